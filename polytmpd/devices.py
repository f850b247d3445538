# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reports block devices that go away, such as a memory stick that is pulled out, from udev's events.

Not here: how polytmpd reacts.

Hard facts
- After an overrun every further read of the monitor fails. So a new monitor replaces it, and since it is
  unknown which events were lost, all devices have to be checked.
- Without udevd, as in most containers, only the kernel sends events, and only to network namespaces that
  belong to the initial user namespace.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyudev

log = logging.getLogger(__name__)

UDEVD: Final = Path("/run/udev/control")
"""udevd's socket."""


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """number: MAJOR:MINOR, as in mountinfo. node: its path below /dev; empty if udev knows none."""

    number: str
    node: str


def exists(number: str) -> bool:
    """Whether the kernel has a block device MAJOR:MINOR. Always true for major 0, which is no device's."""
    return number.startswith("0:") or Path("/sys/dev/block", number).exists()


class Devices:
    """Listens for block devices that go away; owns a netlink socket."""

    def __init__(self, gone: Callable[[BlockDevice], None], missed: Callable[[], None]) -> None:
        """The event loop calls gone(device) for each device that goes away.

        It calls missed() if events were lost: then any device may have gone.
        """
        self._gone = gone
        self._missed = missed
        self._monitor: Any = None

    def start(self) -> None:
        """Start listening. Logs a failure and ignores it: everything else works without udev."""
        try:
            context = pyudev.Context()
            source = "udev" if UDEVD.exists() else "kernel"
            self._monitor = pyudev.Monitor.from_netlink(context, source=source)
            self._monitor.filter_by("block")
            self._monitor.start()
        except (OSError, ImportError) as error:  # ImportError: no libudev
            self._monitor = None
            log.warning(
                "Failed to listen to udev, devices that go away stay mounted in private directories: %s",
                error,
            )
            return
        if source == "kernel":
            log.debug("udevd is not running, listening to the kernel")
        asyncio.get_running_loop().add_reader(self._monitor.fileno(), self._on_readable)

    def close(self) -> None:
        if self._monitor is not None:
            asyncio.get_running_loop().remove_reader(self._monitor.fileno())
            self._monitor = None  # libudev closes the socket with it

    def _on_readable(self) -> None:
        try:
            while (device := self._monitor.poll(timeout=0)) is not None:
                if device.action == "remove":
                    number = device.device_number
                    text = f"{os.major(number)}:{os.minor(number)}"
                    self._gone(BlockDevice(text, device.device_node or ""))
        except OSError as error:
            log.warning("Lost events of udev, checking all devices: %s", error)
            self.close()
            self.start()
            self._missed()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Block devices that go away, a memory stick that is pulled out say, as udev tells it.

Not here: what is done about it.

Hard facts
- An overrun makes each further read of the monitor fail. A new one is made, and as nobody knows what the old
  one missed, everything has to be looked at.
- udevd's events come from udevd: where there is none (most containers) only the kernel's own come, and those
  the kernel sends to network namespaces of the initial user namespace alone.
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
    """number: MAJOR:MINOR, as mountinfo has it. node: its path below /dev; empty where udev has none."""

    number: str
    node: str


def exists(number: str) -> bool:
    """Whether the kernel has a block device MAJOR:MINOR now. Major 0 is no device's, and always there."""
    return number.startswith("0:") or Path("/sys/dev/block", number).exists()


class Devices:
    """Hears of block devices that go away; owns one netlink socket."""

    def __init__(self, gone: Callable[[BlockDevice], None], missed: Callable[[], None]) -> None:
        """gone(device) is called in the event loop for each that goes away.

        missed() where it is not known which did: at an overrun.
        """
        self._gone = gone
        self._missed = missed
        self._monitor: Any = None

    def start(self) -> None:
        """Listen. Where that cannot be, log it and go on: everything else works without."""
        try:
            context = pyudev.Context()
            source = "udev" if UDEVD.exists() else "kernel"
            self._monitor = pyudev.Monitor.from_netlink(context, source=source)
            self._monitor.filter_by("block")
            self._monitor.start()
        except (OSError, ImportError) as error:  # ImportError: no libudev
            self._monitor = None
            log.warning("Devices that go away stay mounted in private directories: udev: %s", error)
            return
        if source == "kernel":
            log.debug("No udevd is running, listening to the kernel")
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
            log.warning("Events of udev were lost, looking at all devices: %s", error)
            self.close()
            self.start()
            self._missed()

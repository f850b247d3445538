# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reports block devices that go away, such as a memory stick that is pulled out, from udev's events.

Not here: how polytmpd reacts.

Hard facts
- After an overrun every further read of the monitor fails. So a new monitor replaces it, and since it is
  unknown which events were lost, all devices have to be checked.
- Without udevd, as in most containers, only the kernel sends events, and only to network namespaces that
  belong to the initial user namespace. They include those of all mounts of the host (kernel/uevents).
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, NamedTuple

from polytmpd.kernel import uevents
from polytmpd.tasks import Tasks

log = logging.getLogger(__name__)

UDEVD: Final = Path("/run/udev/control")
"""udevd's socket."""


class BlockDevice(NamedTuple):
    """number: MAJOR:MINOR, as in mountinfo. node: its path below /dev; empty if udev knows none."""

    number: str
    node: str

    def is_source_of(self, number: str, source: str) -> bool:
        """Whether a mount with this device number and source, as in mountinfo, is from the device.

        Some file systems, such as btrfs, have their own number. The source is what was given to mount(2).
        """
        return self.number == number or (bool(self.node) and self.node == source)


def exists(number: str) -> bool:
    """Whether the kernel has a block device MAJOR:MINOR. Always true for major 0: no device has it."""
    return number.startswith("0:") or Path("/sys/dev/block", number).exists()


def _context() -> Any:
    """libudev, ready for use. Raises ImportError.

    Importing pyudev takes long, and then it runs ldconfig(8) to find the library: not while systemd waits
    for the daemon, nor in the event loop.
    """
    import pyudev

    return pyudev.Context()


class Devices:
    """Listens for block devices that go away; owns a netlink socket."""

    def __init__(
        self,
        gone: Callable[[BlockDevice], Coroutine[Any, Any, None]],
        missed: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """gone(device) is started in the event loop for each device that goes away.

        missed() is started if any may have gone: at start, and if events were lost.
        """
        self._gone = gone
        self._missed = missed
        self._tasks = Tasks()
        self._context: Any = None
        self._monitor: Any = None

    def start(self) -> None:
        """Start listening. Logs a failure and ignores it: everything else works without udev."""
        self._tasks.start(self._start())

    async def _start(self) -> None:
        await self._listen()
        await self._missed()

    async def close(self) -> None:
        """Report nothing more."""
        await self._tasks.close()
        self._stop_listening()

    async def _listen(self) -> None:
        try:
            if self._context is None:
                self._context = await asyncio.to_thread(_context)
            import pyudev

            source = "udev" if UDEVD.exists() else "kernel"
            self._monitor = pyudev.Monitor.from_netlink(self._context, source=source)
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
            with contextlib.suppress(OSError):  # then more events wake us up
                uevents.only_removals(self._monitor.fileno())
        asyncio.get_running_loop().add_reader(self._monitor.fileno(), self._on_readable)

    def _stop_listening(self) -> None:
        if self._monitor is not None:
            asyncio.get_running_loop().remove_reader(self._monitor.fileno())
            self._monitor = None  # libudev closes the socket with it

    def _on_readable(self) -> None:
        try:
            while (device := self._monitor.poll(timeout=0)) is not None:
                if device.action == "remove":
                    number = device.device_number
                    text = f"{os.major(number)}:{os.minor(number)}"
                    self._tasks.start(self._gone(BlockDevice(text, device.device_node or "")))
        except OSError as error:
            log.warning("Lost events from udev, checking all devices: %s", error)
            self._stop_listening()
            self.start()

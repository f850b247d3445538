# SPDX-License-Identifier: LGPL-2.1-or-later
"""inotify(7), as thin as it can be: an owning descriptor, watches, events.

Hard facts
- cgroup.events of cgroup v2 sends IN_MODIFY when `populated` changes (cgroups(7)).
- A watch keeps nothing alive. When the last mount of a file system ends, its watched inodes send IN_UNMOUNT,
  then IN_IGNORED.
- Watch descriptors are not used again within one inotify instance before 2^31 of them were given out.
- When the queue overflows, one event comes with wd -1 and IN_Q_OVERFLOW: events were lost, look at the world
  anew.
"""

import os
import struct
from dataclasses import dataclass
from typing import Final

from polytmpd.kernel.syscalls import inotify_add_watch, inotify_init1, inotify_rm_watch

IN_MODIFY: Final = 0x00000002
IN_MOVED_FROM: Final = 0x00000040
IN_MOVED_TO: Final = 0x00000080
IN_CREATE: Final = 0x00000100
IN_DELETE: Final = 0x00000200
IN_DELETE_SELF: Final = 0x00000400
IN_MOVE_SELF: Final = 0x00000800
IN_UNMOUNT: Final = 0x00002000
IN_Q_OVERFLOW: Final = 0x00004000
IN_IGNORED: Final = 0x00008000
IN_ONLYDIR: Final = 0x01000000

_HEADER: Final = struct.Struct("=iIII")


@dataclass(frozen=True, slots=True)
class Event:
    """One inotify_event. name is empty where the watch is on the object itself."""

    watch: int
    mask: int
    name: str


class Inotify:
    """An inotify instance that owns its descriptor."""

    def __init__(self, fd: int | None = None) -> None:
        """Takes over fd (from the FD store, say), or makes a new instance. Raises OSError (EMFILE)."""
        self.fd = inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK) if fd is None else fd

    def add_watch(self, path: str, mask: int) -> int:
        """Returns the watch descriptor; the same one where the inode is watched already. Raises OSError."""
        return inotify_add_watch(self.fd, path, mask)

    def remove_watch(self, watch: int) -> None:
        """Raises OSError (EINVAL) where the kernel removed it already."""
        inotify_rm_watch(self.fd, watch)

    def read(self) -> list[Event]:
        """The events that wait; empty where there are none."""
        try:
            data = os.read(self.fd, 65536)
        except BlockingIOError:
            return []
        return parse(data)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def parse(data: bytes) -> list[Event]:
    """What one read(2) of an inotify descriptor gave."""
    events = []
    offset = 0
    while offset < len(data):
        watch, mask, _cookie, length = _HEADER.unpack_from(data, offset)
        offset += _HEADER.size
        name = data[offset : offset + length].split(b"\0", 1)[0]
        offset += length
        events.append(Event(watch, mask, os.fsdecode(name)))
    return events


def living_watches(fd: int) -> set[int]:
    """The watch descriptors that an inotify instance still has, from /proc/PID/fdinfo (proc_pid_fdinfo(5)).

    One whose file system was unmounted is not among them, whether its events were read or not.
    """
    found = set()
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        for line in file:
            if line.startswith(b"inotify wd:"):
                found.add(int(line.split()[1].removeprefix(b"wd:"), 16))
    return found


def is_inotify(fd: int) -> bool:
    """Whether a descriptor is an inotify instance."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:inotify"
    except OSError:
        return False

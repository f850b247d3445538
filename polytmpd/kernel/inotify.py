# SPDX-License-Identifier: LGPL-2.1-or-later
"""A thin layer over inotify(7): a descriptor, watches, events.

Not here: what the events mean.

Hard facts
- cgroup.events of cgroup v2 sends IN_MODIFY when `populated` changes (cgroups(7)).
- A watch keeps nothing alive. When the last mount of a file system goes, its watched inodes send IN_UNMOUNT,
  then IN_IGNORED.
- An inotify instance does not reuse watch descriptors until it has given out 2^31 of them.
- When the queue overflows, one event with wd -1 and IN_Q_OVERFLOW arrives: events were lost, so read the
  current state again.
"""

import os
import struct
from typing import Final, NamedTuple

from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.syscalls import inotify_add_watch, inotify_init1, inotify_rm_watch

IN_MODIFY: Final = 0x00000002
IN_ATTRIB: Final = 0x00000004
IN_CLOSE_NOWRITE: Final = 0x00000010
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
IN_ONESHOT: Final = 0x80000000

_HEADER: Final = struct.Struct("=iIII")


class Event(NamedTuple):
    """One inotify_event. name is empty if it is about the watched object itself."""

    watch: int
    mask: int
    name: str


class Inotify:
    """An inotify instance that owns its descriptor."""

    def __init__(self, fd: Descriptor | None = None) -> None:
        """Make a new instance, or take over fd, for example from the FD store. Raises OSError (EMFILE)."""
        self.fd = inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK) if fd is None else fd

    def add_watch(self, path: str, mask: int) -> int:
        """Watch an inode; returns the same watch descriptor if it is watched already. Raises OSError."""
        return inotify_add_watch(self.fd, path, mask)

    def remove_watch(self, watch: int) -> None:
        """End a watch. Raises OSError (EINVAL) if the kernel has removed it already."""
        inotify_rm_watch(self.fd, watch)

    def read(self) -> list[Event]:
        """The pending events, if any. Does not block."""
        try:
            data = os.read(self.fd, 65536)
        except BlockingIOError:
            return []
        return parse(data)

    def close(self) -> None:
        self.fd.close()


def parse(data: bytes) -> list[Event]:
    """The events in the result of one read(2) of an inotify descriptor."""
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

    A watch goes when its file system is unmounted, even if its events have not been read yet.
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

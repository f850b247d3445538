# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counts the blocks and inodes of an instance, a tree that its user may change meanwhile.

Not here: which instance, and for whom (questions).
"""

import errno
import os
import stat
from collections.abc import Callable
from typing import Final, NamedTuple

from polytmpd.blocking import barriers
from polytmpd.kernel import syscalls
from polytmpd.kernel.descriptor import Descriptor

_RESOLVE: Final = barriers.RESOLVE | syscalls.RESOLVE_NO_SYMLINKS
_OPEN_LEVELS: Final = 8
"""How many directories are kept open at a time."""
_HARD_LINKS: Final = 1 << 20
"""How many hard links are remembered, so that each inode counts once."""


class Usage(NamedTuple):
    """What du(1) counts. Not `complete` if cancelled, or if something failed or changed meanwhile."""

    bytes: int
    inodes: int
    complete: bool


def count(inner_fd: int, cancelled: Callable[[], bool] | None = None) -> Usage:
    """Count the blocks and inodes of a tree that changes meanwhile, with few descriptors at any depth.

    Hard links count once, mounts are not entered, symbolic links are not followed. What vanishes or cannot
    be read is left out. Raises OSError only if the root of the tree cannot be read.
    """
    counting = _Count(cancelled or (lambda: False))
    try:
        with barriers.naming(barriers.path_of(inner_fd)):
            counting.enter(Descriptor.open(".", barriers.DIRECTORY, dir_fd=inner_fd))
        counting.run()
    finally:
        counting.close()
    return Usage(counting.bytes, counting.inodes, counting.complete)


class _Level:
    """A directory on the way from the root of the tree to the one being counted."""

    __slots__ = ("fd", "identity", "subdirectories")

    def __init__(self, fd: Descriptor, identity: tuple[int, int], subdirectories: list[str]) -> None:
        self.fd: Descriptor | None = fd
        self.identity = identity
        self.subdirectories = subdirectories


class _Count:
    """Depth first. Each directory is read once and closed; only its subdirectories are remembered.

    Below a certain depth only the current directory stays open. Its parent is found again through "..",
    which is trusted only if its device and inode are those of the directory that we came through. If a
    process has moved us meanwhile, the rest of the parent is left out. Nothing is read before that check,
    and nothing is ever written.
    """

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self.bytes = 0
        self.inodes = 0
        self.complete = True
        self._cancelled = cancelled
        self._levels: list[_Level] = []
        self._linked: set[tuple[int, int]] = set()

    def run(self) -> None:
        while self._levels:
            if self._cancelled():
                self.complete = False
                return
            level = self._levels[-1]
            if level.fd is None or not level.subdirectories:
                self._leave()
                continue
            name = level.subdirectories.pop()
            try:
                fd = syscalls.openat2(level.fd, name, barriers.DIRECTORY, _RESOLVE)
            except OSError as error:
                self._missed(error)
            else:
                self.enter(fd)

    def enter(self, fd: Descriptor) -> None:
        """Count a directory and read it. The descriptor belongs to the count from here on."""
        level = _Level(fd, (0, 0), [])
        self._levels.append(level)
        found = os.fstat(fd)
        level.identity = (found.st_dev, found.st_ino)
        self._add(found)
        if len(self._levels) > _OPEN_LEVELS + 1:
            self._close(self._levels[-2])
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    if self._cancelled():
                        self.complete = False
                        level.subdirectories.clear()
                        return
                    self._look_at(fd, entry.name, level.subdirectories)
        except OSError as error:
            if len(self._levels) == 1:
                raise
            self._missed(error)

    def close(self) -> None:
        for level in self._levels:
            self._close(level)
        self._levels.clear()

    def _look_at(self, dirfd: int, name: str, subdirectories: list[str]) -> None:
        try:
            found = barriers.look(dirfd, name)
        except OSError as error:
            self._missed(error)
            return
        if stat.S_ISDIR(found.st_mode):
            subdirectories.append(name)
            return
        if found.st_nlink > 1:
            key = (found.st_dev, found.st_ino)
            if key in self._linked:
                return
            if len(self._linked) < _HARD_LINKS:
                self._linked.add(key)
            else:
                self.complete = False
        self._add(found)

    def _leave(self) -> None:
        level = self._levels.pop()
        if self._levels and self._levels[-1].fd is None and level.fd is not None:
            self._levels[-1].fd = self._parent(level.fd, self._levels[-1].identity)
        self._close(level)

    def _parent(self, fd: int, identity: tuple[int, int]) -> Descriptor | None:
        try:
            parent = Descriptor.open("..", os.O_PATH | os.O_DIRECTORY, dir_fd=fd)
        except OSError:
            self.complete = False
            return None
        found = os.fstat(parent)
        if (found.st_dev, found.st_ino) == identity:
            return parent
        parent.close()
        self.complete = False
        return None

    def _add(self, found: os.stat_result) -> None:
        self.bytes += found.st_blocks * 512
        self.inodes += 1

    def _missed(self, error: OSError) -> None:
        # What is mounted does not belong to the tree, and what has vanished no longer does.
        if error.errno not in (errno.EXDEV, errno.ENOENT):
            self.complete = False

    @staticmethod
    def _close(level: _Level) -> None:
        if level.fd is not None:
            level.fd.close()
            level.fd = None

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first pass of a deletion: removes what can be removed at once, and leaves the rest to the second.

Nearly always nothing is left. It does less for each directory than the second pass,
which is ready for everything: it takes possession of none but large ones, and looks into no error.
Not here: progress, obstacles and their messages, and processes that change the tree meanwhile (deletion).

Why that is safe
- Nobody but root can enter the barrier. Only a process that already has a descriptor in the tree can change
  it, and hardly ever does one exist. Like the second pass, this one works by descriptor and one name,
  follows no link and enters no mount. So such a process cannot aim it elsewhere. What it moves into the tree
  is deleted; it could have moved that here before. A directory that it moves out while it is open is
  emptied, as it would have been here.
- Nor can it keep this pass busy with one directory. A directory with fewer than _AT_ONCE entries is read
  once. A larger one is given to root first, and then nobody else can add an entry (see deletion).
- An immutable file, a mount point, and a directory that fills again stay, and so do the directories above.
"""

import errno
import os
from collections.abc import Generator, Iterator
from itertools import chain, count, islice
from typing import Final, NamedTuple

from polytmpd.blocking import barriers
from polytmpd.kernel import syscalls

# How many directories below the barrier are open at a time.
_DEPTH: Final = 32
# How many directories that lie deeper are renamed up into the barrier before the first of them is emptied.
_WAITING: Final = 64
# How many entries are read or removed at once.
_AT_ONCE: Final = 32
# How many entries of a large directory are read, and then removed in the order of their inodes. On ext4, it
# saves an eighth of the time that the order of the listing takes. Sorting so many takes 0.9 ms, during which
# no other thread runs.
_SORTED: Final = 8192

_RESOLVE: Final = barriers.RESOLVE | syscalls.RESOLVE_NO_SYMLINKS
_NO_DIRECTORY: Final = (errno.ENOTDIR, errno.ELOOP)


class _Lifted(NamedTuple):
    """A directory that was renamed up into the barrier."""

    name: str


class _Level:
    """An open directory, and what is still to be removed from it."""

    __slots__ = ("entries", "fd", "is_left", "listing", "name")

    def __init__(self, fd: int, name: str, possessed: bool = False) -> None:
        """Owns the descriptor from here on, even if this raises OSError."""
        self.fd = fd
        self.name = name
        self.is_left = False  # something in it is left
        self.listing = None
        try:
            listing = os.scandir(fd)
            some = list(islice(listing, _AT_ONCE))
            self.entries: Iterator[os.DirEntry[str] | _Lifted] = iter(some)
            if len(some) < _AT_ONCE:
                listing.close()
                return
            self.listing = listing
            self.entries = chain(some, listing)
            inodes = [entry.inode() for entry in some]
            if sorted(inodes) not in (inodes, inodes[::-1]):  # a tmpfs lists in that order anyway
                self.entries = chain(some, _by_inode(listing))
            if not possessed:
                os.fchown(fd, 0, 0)
                os.fchmod(fd, 0o700)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        if self.listing is not None:
            self.listing.close()
        os.close(self.fd)


def _by_inode(listing: Iterator[os.DirEntry[str]]) -> Iterator[os.DirEntry[str]]:
    while some := sorted(islice(listing, _SORTED), key=os.DirEntry.inode):
        yield from some


def sweep(barrier: int) -> Generator[int]:
    """Remove what is in the barrier, as far as that is easy. Blocks; a large tree takes long.

    Yields now and then how many entries it has removed since. Close the generator, whether it has ended or
    not. The barrier stays open, at the beginning of its listing. Raises OSError if it cannot be read.

    It is one loop over local names: calls and look-ups would cost as much as what a small directory needs.
    """
    unlink, openat2, flags, resolve = os.unlink, syscalls.openat2, barriers.DIRECTORY, _RESOLVE
    level = _Level(os.dup(barrier), "", possessed=True)
    levels = [level]
    depth = gone = 0
    has_files = [False] * (_DEPTH + 1)  # by depth: whether the last entry was a file, so probably the next
    lifted: list[_Lifted] = []
    try:
        for turn in count(1):
            if gone >= _AT_ONCE or not turn % _AT_ONCE:
                yield gone
                gone = 0
            entry = name = None
            if has_files[depth]:
                fd = level.fd
                for entry in islice(level.entries, _AT_ONCE):
                    try:
                        unlink(entry.name, dir_fd=fd)
                        gone += 1
                    except IsADirectoryError:
                        name = entry.name
                        break
                    except OSError:
                        level.is_left = True
                if name is None and entry is not None and level.listing is not None:
                    continue
            else:
                for entry in level.entries:
                    name = entry.name
                    break
            if name is not None:
                if depth == _DEPTH:
                    _lift(level, name, levels[0].fd, lifted)
                    continue
                try:
                    below = _Level(openat2(level.fd, name, flags, resolve), name)
                except OSError as error:
                    has_files[depth] = error.errno in _NO_DIRECTORY
                    gone += has_files[depth] and _unlink(level, name)
                    continue
                has_files[depth] = False
                level = below
                levels.append(level)
                depth += 1
            elif depth:
                levels.pop()
                depth -= 1
                gone += _leave(level, levels[-1])
                level = levels[-1]
            elif lifted:
                level.entries, lifted = iter(lifted), []
            else:
                break
        yield gone
    finally:
        for level in levels:
            level.close()
        os.lseek(barrier, 0, os.SEEK_SET)


def _unlink(level: _Level, name: str) -> bool:
    try:
        os.unlink(name, dir_fd=level.fd)
    except OSError:
        level.is_left = True
        return False
    return True


def _leave(level: _Level, above: _Level) -> bool:
    """Remove a directory, which should be empty unless something is left in it, and close it."""
    try:
        if not level.is_left:
            try:
                os.rmdir(level.name, dir_fd=above.fd)
            except PermissionError:  # the socket directories of an instance are immutable
                if not barriers.unprotect(level.fd):
                    raise
                os.rmdir(level.name, dir_fd=above.fd)
            return True
    except OSError:
        pass
    finally:
        level.close()
    above.is_left = True
    return False


def _lift(level: _Level, name: str, bottom: int, lifted: list[_Lifted]) -> None:
    """Rename a directory up into the barrier, unless too many are there."""
    new = _Lifted(os.urandom(6).hex())
    try:
        if len(lifted) == _WAITING:
            raise OSError(errno.EMLINK, "too many wait in the barrier")
        syscalls.renameat2(level.fd, name, bottom, new.name, syscalls.RENAME_NOREPLACE)
    except OSError:
        level.is_left = True
    else:
        lifted.append(new)

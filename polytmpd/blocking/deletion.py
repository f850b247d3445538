# SPDX-License-Identifier: LGPL-2.1-or-later
"""Removes a barrier and everything in it: root at work in a tree that a hostile user made.

The user may still hold parts of it open. Not here: when a tree may be removed, and renaming it aside first.

The method
- Sweep first (see there). Nearly always, that leaves nothing.
- Take possession, then empty. A directory is opened, given to root, and closed to everyone else (0700)
  before anything in it is touched. chown(2), create, and rename(2) all hold the directory's inode lock,
  permission check included. So once fchmod has returned, no unprivileged process can add, rename or exchange
  an entry there, whatever descriptor it holds. The barrier is like that from the start, and so is every
  directory on the way down: names stay put while we work.
- Depth first, by descriptor and one name, never by a path and never through "..". The chain of open
  directories has at most _DEPTH links: a directory that lies deeper and is not empty is renamed up into the
  barrier and emptied there. So any depth takes a fixed number of descriptors, and an ordinary tree takes no
  rename at all.
- The type of an entry is not queried but tried: unlinkat(2), on EISDIR unlinkat(2) with AT_REMOVEDIR, on
  ENOTEMPTY open it. None of these follows a link or enters a mount, and exchanging one thing for another
  cannot fool them. Which one is tried first is a guess that only costs time if it is wrong: what was right
  for the last entry at the same depth.

Hard facts
- unlink, rmdir and rename of a mount point fail with EBUSY in the mount namespace that has the mount. In any
  other they succeed, and detach the mount (Linux 3.18). So what users mount in their own namespaces does not
  stop us.
- RESOLVE_NO_XDEV also refuses a bind mount of the same file system; comparing st_dev would not notice it.
- chmod 0700 sets the mask of a POSIX ACL to ---, which disables the entries of named users and groups
  (acl(5)).
- Opening a regular file for reading waits for the holder of a lease, up to 45 s, unless O_NONBLOCK is set
  (fcntl(2)).
- An immutable file cannot get another hard link, so a link count of 1 cannot rise while the flag is set.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Final

from polytmpd.blocking import barriers
from polytmpd.blocking.sweep import sweep
from polytmpd.kernel import syscalls
from polytmpd.kernel.descriptor import Descriptor

# How many directories below the barrier are open at a time (two descriptors each: os.scandir has its own).
_DEPTH: Final = 8
# The same if renaming up fails, for example on a full disk.
_DEPTH_IN_NEED: Final = 64
# How many directories that were renamed up may wait in the barrier. The next one is emptied at once, depth
# first. This keeps the barrier within one block on a full disk, and far below the 65,000 subdirectories of
# ext4 without dir_nlink.
_WAITING: Final = 64
# How often a directory is listed again if it is not empty although all its entries were removed.
_ROUNDS: Final = 64
_ATTEMPTS: Final = 8
_REPORT_EVERY: Final = 1024
# How many entries are removed before asking whether the removal is cancelled.
_CHUNK: Final = 32

_RESOLVE: Final = barriers.RESOLVE | syscalls.RESOLVE_NO_SYMLINKS
_NOT_EMPTY: Final = (errno.ENOTEMPTY, errno.EEXIST)
_NO_DESCRIPTOR: Final = (errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True, slots=True)
class Removed:
    """How many directory entries were removed. If not `complete`, the removal was cancelled."""

    entries: int
    complete: bool


def remove_tree(
    base_fd: int,
    name: str,
    *,
    report: Callable[[int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Removed:
    """Remove the barrier `name` from the base directory. Blocks; a large tree takes long.

    `report` is called now and then with the number of entries removed. What cannot be removed does not stop
    the rest: at the end, OSError names the first such entry and says how many there are. After that, or if
    cancelled, it may be called again. Raises FileNotFoundError if there is no barrier, FileExistsError if
    polytmpd did not make it.
    """
    where = barriers.path_in(base_fd, name)
    with ExitStack() as fds:
        barrier = barriers.open_barrier(base_fd, name, fds)
        barriers.unprotect(barrier)
        work = _Removal(barrier, where, report or (lambda _: None), cancelled or (lambda: False))
        try:
            work.sweep()
            complete = work.run()
            if complete:
                work.remove_barrier(base_fd, name)
        finally:
            work.close()
        if report is not None:
            report(work.entries)
        return Removed(work.entries, complete)


class _Frame:
    """An open directory that is being emptied. The bottom frame is the barrier."""

    __slots__ = ("_listed", "_names", "fd", "name", "rounds", "stuck", "unprotected")

    def __init__(self, fd: Descriptor, name: str) -> None:
        self.fd = fd
        self.name = name
        self.rounds = 0
        self.stuck = False  # something in it, or below, cannot be removed
        self.unprotected = False
        self._listed = False
        self._names: Iterator[os.DirEntry[str]] | None = None

    def names(self) -> Iterator[os.DirEntry[str]]:
        """The rest of this listing. After close_listing(), a new one."""
        if self._names is None:
            if self._listed:
                os.lseek(self.fd, 0, os.SEEK_SET)  # os.scandir shares the position
            self._listed = True
            self._names = os.scandir(self.fd)
        return self._names

    def close_listing(self) -> None:
        if self._names is not None:
            self._names.close()  # type: ignore[attr-defined]  # typeshed has a private class for it
            self._names = None


class _Removal:
    def __init__(
        self, barrier: Descriptor, where: str, report: Callable[[int], None], cancelled: Callable[[], bool]
    ) -> None:
        self.entries = 0
        self._where = where
        self._report = report
        self._cancelled = cancelled
        self._frames = [_Frame(barrier, where)]
        self._guesses: list[Callable[..., None] | None] = [os.unlink] * (_DEPTH_IN_NEED + 2)
        """By depth, what removed the last entry. None: it was a directory that had to be emptied."""
        self._waiting = 0
        self._lifted = 0
        self._in_the_way: OSError | None = None
        self._in_the_way_count = 0

    def sweep(self) -> None:
        """Remove what is easy to remove, until cancelled."""
        with suppress(OSError), closing(sweep(self._frames[0].fd)) as removed:
            for entries in removed:
                self._count(entries)
                if self._cancelled():
                    return

    def run(self) -> bool:
        """Empty the barrier; False if cancelled. Raises OSError if something is in the way."""
        bottom = self._frames[0]
        listed = 0
        progress = (self.entries, self._lifted)
        while not self._cancelled():
            frame = self._frames[-1]
            try:
                seen, name = self._remove_alike(frame)
            except OSError as error:
                if frame is bottom:
                    raise OSError(error.errno, error.strerror, self._where) from None
                self._blocked(self._frames[-2], error, frame.name)
                self._pop()
                continue
            if frame is bottom:
                listed += seen
            if name is not None:
                self._remove(frame, name)
            elif seen == _CHUNK:
                continue
            elif frame is not bottom:
                self._finish(frame)
            elif not listed:
                return True
            else:
                # What was in the way may only have lacked space, so it is tried again while other things go.
                # But things that come back as fast as they go must not keep us here forever.
                entries, lifted = progress
                progress = (self.entries, self._lifted)
                if progress == (entries, lifted) or (
                    self._in_the_way is not None and self._lifted == lifted
                ):
                    bottom.rounds += 1
                    if bottom.rounds >= _ATTEMPTS or (
                        self._in_the_way is not None and progress[0] == entries
                    ):
                        self._give_up()
                listed = 0
                bottom.stuck = False
                self._in_the_way = None
                self._in_the_way_count = 0
        return False

    def remove_barrier(self, base_fd: int, name: str) -> None:
        try:
            os.rmdir(name, dir_fd=base_fd)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._where) from None
        self.entries += 1

    def close(self) -> None:
        """Close everything but the barrier itself."""
        self._abandon()
        self._frames[0].close_listing()

    def _remove_alike(self, frame: _Frame) -> tuple[int, str | None]:
        """Remove entries like the last one at this depth. Nearly all of the time is spent here.

        Returns how many entries it saw, fewer than _CHUNK at the end of the listing, and the name of the
        last one if it is not gone. Raises OSError if the directory cannot be listed.
        """
        remove = self._guesses[len(self._frames) - 1]
        fd = frame.fd
        seen = 0
        name = None
        for entry in islice(frame.names(), _CHUNK):
            seen += 1
            if remove is not None:
                try:
                    remove(entry.name, dir_fd=fd)
                    continue
                except OSError as error:
                    self._learn(error)
            name = entry.name
            break
        if seen:
            self._gone(frame, seen if name is None else seen - 1)
        if name is None and seen < _CHUNK:
            frame.close_listing()
        return seen, name

    def _learn(self, error: OSError) -> None:
        if isinstance(error, IsADirectoryError):
            self._guesses[len(self._frames) - 1] = os.rmdir
        elif isinstance(error, NotADirectoryError):
            self._guesses[len(self._frames) - 1] = os.unlink
        elif error.errno in _NOT_EMPTY:
            self._guesses[len(self._frames) - 1] = None

    def _remove(self, frame: _Frame, name: str) -> None:
        depth = len(self._frames) - 1
        remove = self._guesses[depth]
        if remove is None:
            if depth < _DEPTH and self._enter(frame, name):
                return
            remove = os.rmdir
        unprotected = False
        for _attempt in range(_ATTEMPTS):
            try:
                remove(name, dir_fd=frame.fd)
            except IsADirectoryError:
                remove = os.rmdir
            except NotADirectoryError:
                remove = os.unlink
            except FileNotFoundError:
                return
            except OSError as error:
                if error.errno in _NOT_EMPTY and remove is os.rmdir:
                    self._guesses[depth] = None
                    self._descend(frame, name)
                    return
                if error.errno != errno.EPERM or unprotected or not self._unprotect(frame, name):
                    self._blocked(frame, error, name)
                    return
                unprotected = True
            else:
                self._guesses[depth] = remove
                self._gone(frame)
                return
        # A process exchanges it faster than we try: the next listing will show it again.

    def _finish(self, frame: _Frame) -> None:
        """At the end of a listing: remove the directory, or have it listed again."""
        parent = self._frames[-2]
        unprotected = False
        while True:
            try:
                os.rmdir(frame.name, dir_fd=parent.fd)
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno in _NOT_EMPTY:
                    if frame.stuck:  # what is in the way has been noted where it lies
                        parent.stuck = True
                        break
                    frame.rounds += 1
                    if frame.rounds < _ROUNDS:
                        return
                elif error.errno == errno.EPERM and not unprotected and self._unprotect(parent, frame.name):
                    unprotected = True
                    continue
                self._blocked(parent, error, frame.name)
            else:
                self._gone(parent)
            break
        self._pop()

    # --- down, and up ---

    def _descend(self, frame: _Frame, name: str) -> None:
        """Continue in the directory `name` of the topmost frame, or rename it up."""
        if len(self._frames) > _DEPTH:
            error = self._lift(frame, name)
            if error is None:
                return
            if len(self._frames) > _DEPTH_IN_NEED:
                self._blocked(frame, error, name)
                return
        try:
            child = self._open(frame, name)
        except (FileNotFoundError, NotADirectoryError):
            return  # exchanged meanwhile: the next listing will show it again
        except OSError as error:
            if error.errno == errno.EXDEV:
                self._blocked(frame, OSError(errno.EBUSY, "is a mount point"), name)
            elif error.errno in _NO_DESCRIPTOR and frame is not self._frames[0]:
                lift_error = self._lift(frame, name)
                if lift_error is not None:
                    self._blocked(frame, lift_error, name)
            elif error.errno != errno.ELOOP:  # that, too, is an exchange
                self._blocked(frame, error, name)
            return
        self._frames.append(child)

    def _enter(self, frame: _Frame, name: str) -> bool:
        """Continue in `name` if it is a directory that can be opened. Its being empty only costs time."""
        try:
            child = self._open(frame, name)
        except OSError:
            return False  # the long way finds out why
        self._frames.append(child)
        return True

    def _open(self, frame: _Frame, name: str) -> _Frame:
        child = _Frame(syscalls.openat2(frame.fd, name, barriers.DIRECTORY, _RESOLVE), name)
        try:
            self._possess(child.fd)
            child.names()
        except OSError:
            child.fd.close()
            raise
        return child

    def _possess(self, fd: int) -> None:
        """Once this returns, only root can change the directory, whatever descriptors others hold."""
        try:
            os.fchown(fd, 0, 0)
        except PermissionError:
            if not barriers.unprotect(fd):
                raise
            os.fchown(fd, 0, 0)
        os.fchmod(fd, 0o700)

    def _lift(self, frame: _Frame, name: str) -> OSError | None:
        """Rename a directory up into the barrier. Returns the error if that fails."""
        bottom = self._frames[0]
        unprotected = False
        for _attempt in range(_ATTEMPTS):
            new = os.urandom(6).hex()
            try:
                syscalls.renameat2(frame.fd, name, bottom.fd, new, syscalls.RENAME_NOREPLACE)
            except FileNotFoundError:
                return None
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno != errno.EPERM or unprotected or not self._unprotect(frame, name):
                    return error
                unprotected = True
                continue
            self._lifted += 1
            self._waiting += 1
            if self._waiting > _WAITING:
                # Leave this branch as it is: the next listing of the barrier returns to it. Each directory
                # that is emptied this way lay _DEPTH deeper than the last, so there are few of them.
                self._abandon()
                self._descend(bottom, new)
            return None
        return OSError(errno.EEXIST, "no free name in the barrier", name)

    def _abandon(self) -> None:
        while len(self._frames) > 1:
            self._pop()

    def _pop(self) -> None:
        frame = self._frames.pop()
        frame.close_listing()
        frame.fd.close()

    # --- immutable and append-only ---

    def _unprotect(self, frame: _Frame, name: str) -> bool:
        """Clear the flags of an entry and of its directory; False if there were none."""
        cleared = False
        if not frame.unprotected:
            frame.unprotected = True
            cleared = barriers.unprotect(frame.fd)
        try:
            path_fd = syscalls.openat2(frame.fd, name, os.O_PATH | os.O_NOFOLLOW, _RESOLVE)
        except OSError:
            return cleared
        with path_fd, suppress(OSError):
            found = os.fstat(path_fd)
            # A file that has another name, perhaps outside, is not ours to change: an administrator may have
            # protected it after the user made the link. Only files and directories are ever opened.
            if stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1):
                # Through /proc this is the inode that was examined, whatever the name means by now.
                with Descriptor.open(f"/proc/self/fd/{path_fd}", os.O_RDONLY | os.O_NONBLOCK) as fd:
                    return barriers.unprotect(fd) or cleared
        return cleared

    # --- progress and failures ---

    def _gone(self, frame: _Frame, entries: int = 1) -> None:
        if frame is self._frames[0]:
            self._waiting = max(0, self._waiting - entries)
        self._count(entries)

    def _count(self, entries: int) -> None:
        reported = self.entries // _REPORT_EVERY
        self.entries += entries
        if self.entries // _REPORT_EVERY != reported:
            self._report(self.entries)

    def _blocked(self, frame: _Frame, error: OSError, name: str) -> None:
        frame.stuck = True
        self._in_the_way_count += 1
        if self._in_the_way is None:
            index = self._frames.index(frame)
            path = "/".join([*(above.name for above in self._frames[: index + 1]), name])
            self._in_the_way = OSError(error.errno, error.strerror, path)

    def _give_up(self) -> None:
        error = self._in_the_way
        if error is None:
            raise OSError(errno.ENOTEMPTY, "a process keeps creating entries in it", self._where)
        if self._in_the_way_count > 1:
            more = self._in_the_way_count - 1
            error.strerror = f"{error.strerror} (and {more} more could not be removed)"
        raise error

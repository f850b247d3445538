# SPDX-License-Identifier: LGPL-2.1-or-later
"""Instance directories on disk: make one, adopt a kept one, set one aside, find what was left over, measure
one.

In the base directory (/tmp, say) lies the barrier, root's and 0700, which nobody else passes; in the barrier
lies the inner directory `tmp`, a copy of the base directory's owner, mode, ACL and label, which the user
gets as his /tmp. In one that is kept lies also the name of its user.

Every function blocks, works from the caller's descriptor of the base directory (O_PATH will do), and raises
OSError alone. Not here: emptying a tree (deletion), mounts, and the question which instance should exist.

Hard facts
- In a sticky directory of root's nobody else can rename or remove what belongs to root: so a barrier, once
  it is made or judged, stays what its name says. In a directory without that property nothing here is safe;
  it is refused.
- mkdir(2) applies the umask, or the parent's default ACL, and a set-group-ID parent hands its group down. So
  the owner and the mode are always set afterwards, by descriptor.
- Neither O_PATH nor openat2(2) with RESOLVE_NO_XDEV reaches a FIFO's, a device's or a mounted file system's
  own code: what an unknown name means is always asked that way. stat(2) would enter a mount, and hang with
  it.
"""

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from polytmpd.core import names
from polytmpd.core.names import INNER
from polytmpd.kernel import syscalls

MARK: Final = "user"
"""A symbolic link in a kept barrier: it leads nowhere, and its text is the name of the user it was made for.

Unlike a file it is there whole or not at all, also after a crash; unlike an attribute every file system and
every backup has it.
"""

_BARRIER_MODE: Final = 0o700
_MOUNTPOINT_MODE: Final = 0o1777
_LABEL: Final = "security.selinux"
_ACLS: Final = ("system.posix_acl_access", "system.posix_acl_default")
_NO_XATTR: Final = (errno.ENODATA, errno.EOPNOTSUPP)

# One component below a descriptor: no mount is entered, and a symbolic link is at most looked at
# (O_PATH|O_NOFOLLOW).
_RESOLVE: Final = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_XDEV | syscalls.RESOLVE_NO_MAGICLINKS
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_FOREIGN_NAMED: Final = 16
_ATTEMPTS: Final = 16
# usage(): so many levels of directories are kept open, and so many hard links remembered.
_OPEN_LEVELS: Final = 8
_HARD_LINKS: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What lies in a base directory under names that are ours.

    `foreign` are those that are not barriers (somebody squats there): the first few, each with the reason,
    and in `foreign_count` how many there are in all.
    """

    removable: tuple[str, ...]
    foreign: tuple[tuple[str, str], ...]
    foreign_count: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What du(1) counts. Not `complete`: cancelled, or something failed or changed meanwhile."""

    bytes: int
    inodes: int
    complete: bool


def make(base_fd: int, name: str, mountpoints: Sequence[str], user: str = "") -> int:
    """Makes the barrier `name` and what is in it; returns an O_PATH descriptor of the inner directory, the
    caller's.

    user: whom the barrier is to remember, if anybody. Whatever exists under that name already is never
    adopted: FileExistsError. Where anything fails all that was made is removed again.
    """
    with ExitStack() as fds, ExitStack() as undo:
        base, where = _open_base(base_fd, fds, name, *mountpoints)
        with _naming(where):
            barrier = _make_directory(base, name, fds, undo)
            _set_owner_and_mode(barrier, 0, 0, _BARRIER_MODE)
            for acl in _ACLS:
                _copy_xattr(None, barrier, acl)
            _copy_xattr(base, barrier, _LABEL)
            _require_barrier(os.fstat(barrier), where)
        if user:
            with _naming(f"{where}/{MARK}"):
                os.symlink(user, MARK, dir_fd=barrier)
                undo.callback(_unlink_quietly, barrier, MARK)
        inner_fd = _furnish(base, barrier, where, mountpoints, fds, undo)
        undo.pop_all()
        return inner_fd


def adopt(base_fd: int, name: str, mountpoints: Sequence[str], user: str = "") -> int:
    """Takes a kept barrier into use again; returns an O_PATH descriptor of the inner directory, the
    caller's.

    FileNotFoundError where there is none. Anything that we would not have made is a squatter's:
    FileExistsError with what is wrong with it. Inner directory and mount points that are missing (the age
    cleaner may have had them) are made; what the user has put where a mount point must be is renamed to
    `<mount point>.moved-<hex>`. One that remembers nobody remembers `user` from now on.
    """
    with ExitStack() as fds, ExitStack() as undo:
        base, where = _open_base(base_fd, fds, name, *mountpoints)
        barrier = _open_barrier(base, name, where, fds)
        inner_fd = _furnish(base, barrier, where, mountpoints, fds, undo)
        undo.pop_all()
        if user:
            # EEXIST, mostly. A full disk must keep nobody out who needs nothing new: the next time will do.
            with suppress(OSError):
                os.symlink(user, MARK, dir_fd=barrier)
        return inner_fd


def remembered(base_fd: int, name: str) -> str | None:
    """The user whom a kept barrier remembers; None where nobody, as in those of polytmp 0.1.

    FileNotFoundError where there is no barrier, FileExistsError where it, or the mark, is not ours.
    """
    with ExitStack() as fds:
        base, where = _open_base(base_fd, fds, name)
        barrier = _open_barrier(base, name, where, fds)
        with _naming(f"{where}/{MARK}"):
            try:
                return os.readlink(MARK, dir_fd=barrier)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                raise FileExistsError(
                    errno.EEXIST, "not a symbolic link with a user's name as polytmp makes it", MARK
                ) from None


def set_aside(base_fd: int, name: str, new: str) -> None:
    """Renames the barrier to a new name; the old one is free."""
    with ExitStack() as fds:
        base, where = _open_base(base_fd, fds, name, new)
        _open_barrier(base, name, where, fds)
        with _naming(where):
            syscalls.renameat2(base, name, base, new, syscalls.RENAME_NOREPLACE)


def leftovers(base_fd: int) -> Leftovers:
    """Finds the barriers with names of left-over ones. Nothing is touched."""
    removable: list[str] = []
    foreign: list[tuple[str, str]] = []
    foreign_count = 0
    with ExitStack() as fds:
        base, where = _open_base(base_fd, fds)
        with _naming(where), os.scandir(base) as entries:
            for entry in entries:
                if not names.is_leftover(entry.name):
                    continue
                try:
                    reason = _why_no_barrier(_look(base, entry.name))
                except FileNotFoundError:
                    continue
                except OSError as error:
                    reason = _why(error)
                if reason is None:
                    removable.append(entry.name)
                else:
                    foreign_count += 1
                    # Anybody may fill /tmp with such names: neither the memory nor the journal is theirs to
                    # fill.
                    if len(foreign) < _FOREIGN_NAMED:
                        foreign.append((entry.name, reason))
    return Leftovers(tuple(removable), tuple(foreign), foreign_count)


def usage(inner_fd: int, cancelled: Callable[[], bool] | None = None) -> Usage:
    """Counts the blocks and inodes of a tree that changes meanwhile, with few descriptors at any depth.

    Hard links count once, mounts are not entered, symbolic links not followed. What vanishes or cannot be
    read is left out; only where the tree's own root cannot be read does this raise.
    """
    count = _Count(cancelled or (lambda: False))
    try:
        with _naming(_path_of(inner_fd)):
            count.enter(os.open(".", _DIRECTORY, dir_fd=inner_fd))
        count.run()
    finally:
        count.close()
    return Usage(count.bytes, count.inodes, count.complete)


# --- what make and adopt have in common ---


def _furnish(
    base: int, barrier: int, where: str, mountpoints: Sequence[str], fds: ExitStack, undo: ExitStack
) -> int:
    """Brings the inside of a barrier into the state it should have, whatever of it exists already."""
    path = f"{where}/{INNER}"
    with _naming(path):
        wanted = os.fstat(base)
        inner = _open_or_make(barrier, INNER, fds, undo, uid=wanted.st_uid, gid=wanted.st_gid)
        if inner is None:
            raise FileExistsError(errno.EEXIST, "not a directory that polytmp made", path)
        # The owner first: until the mode is set nobody but root passes the barrier anyway.
        os.fchown(inner, wanted.st_uid, wanted.st_gid)
        for xattr in (*_ACLS, _LABEL):
            _copy_xattr(base, inner, xattr)
        os.fchmod(inner, stat.S_IMODE(wanted.st_mode))
        if os.fstat(inner).st_dev != wanted.st_dev:
            raise FileExistsError(errno.EEXIST, "on another file system than its base directory", path)
    for mountpoint in mountpoints:
        with _naming(f"{path}/{mountpoint}"):
            _place_mountpoint(inner, mountpoint, fds, undo)
    with _naming(path):
        return os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=inner)


def _place_mountpoint(inner: int, name: str, fds: ExitStack, undo: ExitStack) -> None:
    """In a kept directory the user's processes may still be at work, and put something else there."""
    for _attempt in range(_ATTEMPTS):
        with suppress(FileExistsError):
            directory = _open_or_make(inner, name, fds, undo, uid=0, gid=0)
            if directory is not None:
                _set_owner_and_mode(directory, 0, 0, _MOUNTPOINT_MODE)
                for acl in _ACLS:
                    _copy_xattr(None, directory, acl)
                return
        with suppress(FileNotFoundError, FileExistsError):
            moved = f"{name}.moved-{secrets.token_hex(4)}"
            syscalls.renameat2(inner, name, inner, moved, syscalls.RENAME_NOREPLACE)
    raise OSError(errno.EBUSY, "somebody keeps putting something else where a mount point must be", name)


def _open_or_make(
    dirfd: int, name: str, fds: ExitStack, undo: ExitStack, *, uid: int, gid: int
) -> int | None:
    """A descriptor that `fds` closes; None where there is something else than a directory of that owner."""
    try:
        fd = _open_path(dirfd, name)
    except FileNotFoundError:
        return _make_directory(dirfd, name, fds, undo)
    fds.callback(os.close, fd)
    found = os.fstat(fd)
    # Root's own is what a half-made directory is whose owner had not been set yet.
    if not stat.S_ISDIR(found.st_mode) or (found.st_uid, found.st_gid) not in {(uid, gid), (0, 0)}:
        return None
    return _reopen(fd, fds)


def _make_directory(dirfd: int, name: str, fds: ExitStack, undo: ExitStack) -> int:
    os.mkdir(name, _BARRIER_MODE, dir_fd=dirfd)
    undo.callback(_rmdir_quietly, dirfd, name)
    fd = _open_path(dirfd, name)
    fds.callback(os.close, fd)
    made = os.fstat(fd)
    if not stat.S_ISDIR(made.st_mode) or made.st_uid != 0:
        raise FileExistsError(errno.EEXIST, "replaced while it was being made", name)
    return _reopen(fd, fds)


def _rmdir_quietly(dirfd: int, name: str) -> None:
    # The error that made us undo says more than one about the undoing. What stays is root's and 0700.
    with suppress(OSError):
        os.rmdir(name, dir_fd=dirfd)


def _unlink_quietly(dirfd: int, name: str) -> None:
    with suppress(OSError):
        os.unlink(name, dir_fd=dirfd)


def _set_owner_and_mode(fd: int, uid: int, gid: int, mode: int) -> None:
    os.fchown(fd, uid, gid)
    os.fchmod(fd, mode)


def _copy_xattr(source: int | None, target: int, name: str) -> None:
    """Gives the target what the source has; without a source, or where that has none, takes it away."""
    wanted = None if source is None else _xattr(source, name)
    if _xattr(target, name) == wanted:
        return
    if wanted is not None:
        os.setxattr(target, name, wanted)
    elif name != _LABEL:  # an object without a label does not exist under SELinux: the policy's own stays
        os.removexattr(target, name)


def _xattr(fd: int, name: str) -> bytes | None:
    try:
        return os.getxattr(fd, name)
    except OSError as error:
        if error.errno in _NO_XATTR:
            return None
        raise


# --- looking at names ---


def _open_base(base_fd: int, fds: ExitStack, *names: str) -> tuple[int, str]:
    """A readable descriptor of the base directory, which `fds` closes, and the path of the first name."""
    where = _path_of(base_fd)
    for name in names:
        if not name or "/" in name or name in {".", ".."}:
            raise OSError(errno.EINVAL, "not the name of a directory entry", name)
    with _naming(where):
        base = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=base_fd)
        fds.callback(os.close, base)
        found = os.fstat(base)
        if found.st_uid != 0 or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
            raise PermissionError(
                errno.EPERM, "not root's, or writable for others without the sticky bit", where
            )
    return base, f"{where}/{names[0]}" if names else where


def _open_barrier(base: int, name: str, where: str, fds: ExitStack) -> int:
    with _naming(where):
        try:
            fd = _open_path(base, name)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise FileExistsError(errno.EEXIST, f"not ours: {_why(error)}", where) from None
            raise
        fds.callback(os.close, fd)
        found = os.fstat(fd)
        _require_barrier(found, where)
        if found.st_dev != os.fstat(base).st_dev:
            raise FileExistsError(errno.EEXIST, "on another file system than its base directory", where)
        return _reopen(fd, fds)


def _require_barrier(found: os.stat_result, where: str) -> None:
    reason = _why_no_barrier(found)
    if reason is not None:
        raise FileExistsError(errno.EEXIST, f"not ours: {reason}", where)


def _why_no_barrier(found: os.stat_result) -> str | None:
    if stat.S_ISLNK(found.st_mode):
        return "a symbolic link"
    if not stat.S_ISDIR(found.st_mode):
        return "not a directory"
    if (found.st_uid, found.st_gid) != (0, 0):
        return f"owned by {found.st_uid}:{found.st_gid}, not by root"
    if stat.S_IMODE(found.st_mode) != _BARRIER_MODE:
        return f"mode {stat.S_IMODE(found.st_mode):04o} instead of {_BARRIER_MODE:04o}"
    return None


def _why(error: OSError) -> str:
    return "something is mounted on it" if error.errno == errno.EXDEV else str(error.strerror)


def _look(dirfd: int, name: str) -> os.stat_result:
    """lstat(2) that does not enter a mount: OSError EXDEV instead."""
    fd = _open_path(dirfd, name)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _open_path(dirfd: int, name: str) -> int:
    return syscalls.openat2(dirfd, name, os.O_PATH | os.O_NOFOLLOW, _RESOLVE)


def _reopen(fd: int, fds: ExitStack) -> int:
    """The same directory for reading: its owner and mode cannot be set through an O_PATH descriptor."""
    opened = os.open(".", _DIRECTORY, dir_fd=fd)
    fds.callback(os.close, opened)
    return opened


def _path_of(fd: int) -> str:
    """For messages alone."""
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return f"(descriptor {fd})"


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Puts the whole path into an OSError that knows only a name or a descriptor."""
    try:
        yield
    except OSError as error:
        if not (isinstance(error.filename, str) and error.filename.startswith("/")):
            error.filename = path
            error.filename2 = None
        raise


# --- usage ---


class _Level:
    """A directory on the way from the tree's root to where the count stands."""

    __slots__ = ("fd", "identity", "subdirectories")

    def __init__(self, fd: int, identity: tuple[int, int], subdirectories: list[str]) -> None:
        self.fd: int | None = fd
        self.identity = identity
        self.subdirectories = subdirectories


class _Count:
    """Depth first. Each directory is read once and closed; of its entries only the subdirectories are
    remembered.

    Below a certain depth only the current directory stays open. The one above is found again through "..",
    which is believed only if device and inode are those of the directory that we came through: if somebody
    has moved us meanwhile, what remained to be counted in it is given up. Nothing is read before that, and
    nothing is ever written.
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
                fd = syscalls.openat2(level.fd, name, _DIRECTORY, _RESOLVE | syscalls.RESOLVE_NO_SYMLINKS)
            except OSError as error:
                self._missed(error)
            else:
                self.enter(fd)

    def enter(self, fd: int) -> None:
        """Counts a directory and reads it. The descriptor belongs to the count from here on."""
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
            found = _look(dirfd, name)
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

    def _parent(self, fd: int, identity: tuple[int, int]) -> int | None:
        try:
            parent = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
        except OSError:
            self.complete = False
            return None
        found = os.fstat(parent)
        if (found.st_dev, found.st_ino) == identity:
            return parent
        os.close(parent)
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
            os.close(level.fd)
            level.fd = None

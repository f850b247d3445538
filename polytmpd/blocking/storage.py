# SPDX-License-Identifier: LGPL-2.1-or-later
"""Instance directories on disk: makes one, adopts a kept one, sets one aside, finds what is left over.

The base directory, for example /tmp, contains the barrier (barriers), which only root can pass. The barrier
contains the inner directory `tmp`, with the owner, mode, ACL and label of the base directory. The user gets
it as their /tmp. A barrier that is kept also contains the name of its user.

While a barrier is in use, it and the mount points in the inner directory are immutable: a cleaner that root
runs on the host can empty the inner directory, but not remove it from under its user.

Every function takes a descriptor of the base directory, which stays the caller's (O_PATH is enough), and
raises only OSError.
Not here: emptying a tree (deletion), mounts (kernel/mountns), and which instance should exist.

Hard facts
- mkdir(2) applies the umask or the parent's default ACL, and takes the group of a set-group-ID parent. So
  the owner and the mode are always set afterwards, by descriptor.
"""

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Final, NamedTuple

from polytmpd.blocking import barriers
from polytmpd.core import names
from polytmpd.core.names import INNER
from polytmpd.kernel import inotify, syscalls
from polytmpd.kernel.descriptor import Descriptor

MARK: Final = "user"
"""A symbolic link in a kept barrier. It leads nowhere: its text is the name of the user it was made for.

Unlike a file, it is complete or absent, even after a crash. Unlike an extended attribute, every file system
and every backup supports it.
"""

_MOUNTPOINT_MODE: Final = 0o1777
_LABEL: Final = "security.selinux"
_ACLS: Final = ("system.posix_acl_access", "system.posix_acl_default")
_NO_XATTR: Final = (errno.ENODATA, errno.EOPNOTSUPP)
# The inner directory itself would send nothing while it is mounted, and all that its user does.
_LOSS_IN_BARRIER: Final = inotify.IN_DELETE | inotify.IN_DELETE_SELF | inotify.IN_ONLYDIR
_LOSS_OF_MOUNTPOINT: Final = inotify.IN_DELETE_SELF | inotify.IN_ONLYDIR
_FOREIGN_NAMED: Final = 16
_ATTEMPTS: Final = 16


Add = Callable[[str, int], None]
"""add(path, mask) watches for the removal of what is at path, see guard()."""


class Leftovers(NamedTuple):
    """What a base directory contains under the names of leftovers.

    `foreign` are those that polytmpd did not make: the first few, each with the reason. `foreign_count` is
    how many there are in all.
    """

    removable: tuple[str, ...]
    foreign: tuple[tuple[str, str], ...]
    foreign_count: int


def make(
    base_fd: int, name: str, mountpoints: Sequence[str], user: str = "", add: Add | None = None
) -> Descriptor:
    """Make the barrier `name` and what is in it; returns an O_PATH descriptor of the inner directory, which
    the caller closes.

    user: the name that the barrier is to remember, if any. add: as for guard(), but it must not raise.
    Whatever already exists under `name` is never adopted: raises FileExistsError. If anything fails,
    everything that was made is removed again.
    """
    with ExitStack() as fds, ExitStack() as undo:
        where = barriers.path_in(base_fd, name, *mountpoints)
        base = barriers.open_base(base_fd, fds)
        with barriers.naming(where):
            barrier = _make_directory(base, name, fds, undo)
            _set_owner_and_mode(barrier, 0, 0, barriers.MODE)
            for acl in _ACLS:
                _copy_xattr(None, barrier, acl)
            _copy_xattr(base, barrier, _LABEL)
            barriers.require_barrier(os.fstat(barrier), where)
        if user:
            with barriers.naming(f"{where}/{MARK}"):
                os.symlink(user, MARK, dir_fd=barrier)
                undo.callback(_unlink_quietly, barrier, MARK)
        inner_fd, furnished = _furnish(base, barrier, where, mountpoints, fds, undo)
        undo.pop_all()
        _guard(barrier, furnished, add)
        return inner_fd


def adopt(
    base_fd: int, name: str, mountpoints: Sequence[str], user: str = "", add: Add | None = None
) -> Descriptor:
    """Take a kept barrier into use again; returns an O_PATH descriptor of the inner directory, which the
    caller closes.

    Raises FileNotFoundError if there is none, and FileExistsError, which says what is wrong, if polytmpd did
    not make it. A missing inner directory or mount point (the age cleaner may have removed it) is made. What
    the user has put where a mount point must be is renamed to `<mount point>.moved-<hex>`. A barrier that
    remembers no user remembers `user` from now on. add: see make().
    """
    with ExitStack() as fds, ExitStack() as undo:
        where = barriers.path_in(base_fd, name, *mountpoints)
        base = barriers.open_base(base_fd, fds)
        barrier = barriers.open_barrier(base, name, fds)
        barriers.unprotect(barrier)
        inner_fd, furnished = _furnish(base, barrier, where, mountpoints, fds, undo)
        undo.pop_all()
        if user:
            # Usually EEXIST. A full disk must not keep out a user who needs nothing new: next time will do.
            with suppress(OSError):
                os.symlink(user, MARK, dir_fd=barrier)
        _guard(barrier, furnished, add)
        return inner_fd


def remembered(base_fd: int, name: str) -> str | None:
    """The user whom a kept barrier remembers; None if it remembers none, like those of polytmp 0.1.

    Raises FileNotFoundError if there is no barrier, FileExistsError if polytmpd did not make it or the mark.
    """
    with ExitStack() as fds:
        where = barriers.path_in(base_fd, name)
        base = barriers.open_base(base_fd, fds)
        barrier = barriers.open_barrier(base, name, fds)
        with barriers.naming(f"{where}/{MARK}"):
            try:
                return os.readlink(MARK, dir_fd=barrier)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                raise FileExistsError(errno.EEXIST, "not a symbolic link that polytmpd made", MARK) from None


def guard(base_fd: int, name: str, mountpoints: Sequence[str], add: Add) -> bool:
    """Protect a barrier in use, and have it watched.

    add(path, mask) is called for what inotify(7) has to watch to report the removal of the barrier, its
    inner directory or a mount point. Only root can remove them.

    The paths are valid during the call only. False if something is missing already. Raises OSError.
    """
    with ExitStack() as fds:
        where = barriers.path_in(base_fd, name, *mountpoints)
        base = barriers.open_base(base_fd, fds)
        try:
            barrier = barriers.open_barrier(base, name, fds)
            barriers.protect(barrier)  # one that an earlier daemon made is not
            add(f"/proc/self/fd/{barrier}", _LOSS_IN_BARRIER)
            inner = fds.enter_context(barriers.open_path(barrier, INNER))
            with barriers.naming(f"{where}/{INNER}"):
                for mountpoint in mountpoints:
                    with barriers.open_path(inner, mountpoint) as fd:
                        if os.fstat(fd).st_uid != 0:
                            return False
                        with ExitStack() as own:
                            barriers.protect(barriers.reopen(fd, own))
                        add(f"/proc/self/fd/{fd}", _LOSS_OF_MOUNTPOINT)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def release(base_fd: int, name: str, mountpoints: Sequence[str]) -> None:
    """End the protection of a barrier that is kept and no longer in use, so that root can delete it.

    Raises OSError: FileNotFoundError if there is none, FileExistsError if it is not ours.
    """
    with ExitStack() as fds:
        where = barriers.path_in(base_fd, name, *mountpoints)
        base = barriers.open_base(base_fd, fds)
        barrier = barriers.open_barrier(base, name, fds)
        with barriers.naming(where):
            _release(barrier, mountpoints)


def kept(base_fd: int) -> list[str]:
    """The names in a base directory that kept barriers have, whatever they belong to."""
    with ExitStack() as fds:
        base = barriers.open_base(base_fd, fds)
        with barriers.naming(barriers.path_of(base)), os.scandir(base) as entries:
            return [entry.name for entry in entries if names.kept_owner(entry.name) is not None]


def set_aside(base_fd: int, name: str, new: str, mountpoints: Sequence[str] = ()) -> None:
    """Rename the barrier, and end its protection; the old name is then free."""
    with ExitStack() as fds:
        where = barriers.path_in(base_fd, name, new, *mountpoints)
        base = barriers.open_base(base_fd, fds)
        _release(barriers.open_barrier(base, name, fds), mountpoints)
        with barriers.naming(where):
            syscalls.renameat2(base, name, base, new, syscalls.RENAME_NOREPLACE)


def leftovers(base_fd: int) -> Leftovers:
    """Find the barriers with the names of leftovers. Changes nothing."""
    removable: list[str] = []
    foreign: list[tuple[str, str]] = []
    foreign_count = 0
    with ExitStack() as fds:
        base = barriers.open_base(base_fd, fds)
        with barriers.naming(barriers.path_of(base)), os.scandir(base) as entries:
            for entry in entries:
                if not names.is_leftover(entry.name):
                    continue
                try:
                    reason = barriers.objection(barriers.look(base, entry.name))
                except FileNotFoundError:
                    continue
                except OSError as error:
                    reason = barriers.why(error)
                if reason is None:
                    removable.append(entry.name)
                else:
                    foreign_count += 1
                    # Any user can fill /tmp with such names, but must not fill our memory or the journal.
                    if len(foreign) < _FOREIGN_NAMED:
                        foreign.append((entry.name, reason))
    return Leftovers(tuple(removable), tuple(foreign), foreign_count)


# --- common to make and adopt ---


def _guard(barrier: int, mountpoints: Sequence[int], add: Add | None) -> None:
    for directory in (barrier, *mountpoints):
        barriers.protect(directory)
    if add is not None:
        add(f"/proc/self/fd/{barrier}", _LOSS_IN_BARRIER)
        for mountpoint in mountpoints:
            add(f"/proc/self/fd/{mountpoint}", _LOSS_OF_MOUNTPOINT)


def _furnish(
    base: int, barrier: int, where: str, mountpoints: Sequence[str], fds: ExitStack, undo: ExitStack
) -> tuple[Descriptor, list[int]]:
    """Bring the inside of a barrier into the state it should have, however much of it already exists.

    Returns a descriptor of the inner directory, the caller's, and those of the mount points, which `fds`
    closes.
    """
    path = f"{where}/{INNER}"
    with barriers.naming(path):
        wanted = os.fstat(base)
        inner = _open_or_make(barrier, INNER, fds, undo, uid=wanted.st_uid, gid=wanted.st_gid)
        if inner is None:
            raise FileExistsError(errno.EEXIST, "not a directory that polytmpd made", path)
        # The owner first: until the mode is set, only root passes the barrier anyway.
        os.fchown(inner, wanted.st_uid, wanted.st_gid)
        for xattr in (*_ACLS, _LABEL):
            _copy_xattr(base, inner, xattr)
        os.fchmod(inner, stat.S_IMODE(wanted.st_mode))
        if os.fstat(inner).st_dev != wanted.st_dev:
            raise FileExistsError(errno.EEXIST, "not on the file system of its base directory", path)
    furnished: list[int] = []
    for mountpoint in mountpoints:
        with barriers.naming(f"{path}/{mountpoint}"):
            furnished.append(_place_mountpoint(inner, mountpoint, fds, undo))
    with barriers.naming(path):
        return Descriptor.open(".", os.O_PATH | os.O_DIRECTORY, dir_fd=inner), furnished


def _place_mountpoint(inner: int, name: str, fds: ExitStack, undo: ExitStack) -> int:
    """Make a mount point, even if processes of the user keep putting something else in a kept directory."""
    for _attempt in range(_ATTEMPTS):
        with suppress(FileExistsError):
            directory = _open_or_make(inner, name, fds, undo, uid=0, gid=0)
            if directory is not None:
                barriers.unprotect(directory)
                _set_owner_and_mode(directory, 0, 0, _MOUNTPOINT_MODE)
                for acl in _ACLS:
                    _copy_xattr(None, directory, acl)
                return directory
        with suppress(FileNotFoundError, FileExistsError):
            moved = f"{name}.moved-{os.urandom(4).hex()}"
            syscalls.renameat2(inner, name, inner, moved, syscalls.RENAME_NOREPLACE)
    raise OSError(errno.EBUSY, "a process keeps putting something else where a mount point must be", name)


def _release(barrier: int, mountpoints: Sequence[str]) -> None:
    barriers.unprotect(barrier)
    with suppress(OSError), barriers.open_path(barrier, INNER) as inner:
        for mountpoint in mountpoints:
            _release_mountpoint(inner, mountpoint)


def _release_mountpoint(inner: int, name: str) -> None:
    """The user may have put something else there, which is left alone."""
    with suppress(OSError), barriers.open_path(inner, name) as found:
        status = os.fstat(found)
        if stat.S_ISDIR(status.st_mode) and status.st_uid == 0:
            with ExitStack() as fds:
                barriers.unprotect(barriers.reopen(found, fds))


def _open_or_make(
    dirfd: int, name: str, fds: ExitStack, undo: ExitStack, *, uid: int, gid: int
) -> int | None:
    """A descriptor that `fds` closes; None for anything other than a directory of that owner."""
    try:
        fd = fds.enter_context(barriers.open_path(dirfd, name))
    except FileNotFoundError:
        return _make_directory(dirfd, name, fds, undo)
    found = os.fstat(fd)
    # A half-made directory whose owner was not set yet belongs to root.
    if not stat.S_ISDIR(found.st_mode) or (found.st_uid, found.st_gid) not in {(uid, gid), (0, 0)}:
        return None
    return barriers.reopen(fd, fds)


def _make_directory(dirfd: int, name: str, fds: ExitStack, undo: ExitStack) -> int:
    os.mkdir(name, barriers.MODE, dir_fd=dirfd)
    undo.callback(_rmdir_quietly, dirfd, name)
    fd = fds.enter_context(barriers.open_path(dirfd, name))
    made = os.fstat(fd)
    if not stat.S_ISDIR(made.st_mode) or made.st_uid != 0:
        raise FileExistsError(errno.EEXIST, "replaced while it was being made", name)
    return barriers.reopen(fd, fds)


def _rmdir_quietly(dirfd: int, name: str) -> None:
    # The error that made us undo says more than one while undoing. What stays is root's, with mode 0700.
    with suppress(OSError):
        os.rmdir(name, dir_fd=dirfd)


def _unlink_quietly(dirfd: int, name: str) -> None:
    with suppress(OSError):
        os.unlink(name, dir_fd=dirfd)


def _set_owner_and_mode(fd: int, uid: int, gid: int, mode: int) -> None:
    os.fchown(fd, uid, gid)
    os.fchmod(fd, mode)


def _copy_xattr(source: int | None, target: int, name: str) -> None:
    """Give the target what the source has, or nothing if there is no source or it has nothing."""
    wanted = None if source is None else _xattr(source, name)
    if _xattr(target, name) == wanted:
        return
    if wanted is not None:
        os.setxattr(target, name, wanted)
    elif name != _LABEL:  # under SELinux everything has a label: keep the one from the policy
        os.removexattr(target, name)


def _xattr(fd: int, name: str) -> bytes | None:
    try:
        return os.getxattr(fd, name)
    except OSError as error:
        if error.errno in _NO_XATTR:
            return None
        raise

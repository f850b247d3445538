# SPDX-License-Identifier: LGPL-2.1-or-later
"""Instance directories on disk: makes one, adopts a kept one, sets one aside, finds what is left over.

The base directory, for example /tmp, holds the barrier (barriers), which only root passes. The barrier holds
the inner directory `tmp`, a copy of the base directory's owner, mode, ACL and label. The user gets it as
their /tmp. A barrier that is kept also holds the name of its user.

Every function works from the caller's descriptor of the base directory, O_PATH is enough, and raises OSError
alone.
Not here: emptying a tree (deletion), mounts (kernel/mountns), and which instance should exist.

Hard facts
- mkdir(2) applies the umask, or the parent's default ACL, and a set-group-ID parent hands its group down. So
  the owner and the mode are always set afterwards, by descriptor.
"""

import errno
import os
import secrets
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Final

from polytmpd.blocking import barriers
from polytmpd.core import names
from polytmpd.core.names import INNER
from polytmpd.kernel import syscalls
from polytmpd.kernel.descriptor import Descriptor

MARK: Final = "user"
"""A symbolic link in a kept barrier: it leads nowhere, and its text is the name of the user it was made for.

Unlike a file it is there whole or not at all, also after a crash; unlike an attribute every file system and
every backup has it.
"""

_MOUNTPOINT_MODE: Final = 0o1777
_LABEL: Final = "security.selinux"
_ACLS: Final = ("system.posix_acl_access", "system.posix_acl_default")
_NO_XATTR: Final = (errno.ENODATA, errno.EOPNOTSUPP)


_FOREIGN_NAMED: Final = 16
_ATTEMPTS: Final = 16


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What lies in a base directory under names that are ours.

    `foreign` are those that are not barriers (somebody squats there): the first few, each with the reason,
    and in `foreign_count` how many there are in all.
    """

    removable: tuple[str, ...]
    foreign: tuple[tuple[str, str], ...]
    foreign_count: int


def make(base_fd: int, name: str, mountpoints: Sequence[str], user: str = "") -> Descriptor:
    """Makes the barrier `name` and what is in it; returns an O_PATH descriptor of the inner directory, the
    caller's.

    user: whom the barrier is to remember, if anybody. Whatever exists under that name already is never
    adopted: FileExistsError. Where anything fails all that was made is removed again.
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
        inner_fd = _furnish(base, barrier, where, mountpoints, fds, undo)
        undo.pop_all()
        return inner_fd


def adopt(base_fd: int, name: str, mountpoints: Sequence[str], user: str = "") -> Descriptor:
    """Takes a kept barrier into use again; returns an O_PATH descriptor of the inner directory, the
    caller's.

    FileNotFoundError where there is none. Anything that we would not have made is a squatter's:
    FileExistsError with what is wrong with it. Inner directory and mount points that are missing (the age
    cleaner may have had them) are made; what the user has put where a mount point must be is renamed to
    `<mount point>.moved-<hex>`. One that remembers nobody remembers `user` from now on.
    """
    with ExitStack() as fds, ExitStack() as undo:
        where = barriers.path_in(base_fd, name, *mountpoints)
        base = barriers.open_base(base_fd, fds)
        barrier = barriers.open_barrier(base, name, fds)
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
                raise FileExistsError(
                    errno.EEXIST, "not a symbolic link with a user's name as polytmp makes it", MARK
                ) from None


def set_aside(base_fd: int, name: str, new: str) -> None:
    """Renames the barrier to a new name; the old one is free."""
    with ExitStack() as fds:
        where = barriers.path_in(base_fd, name, new)
        base = barriers.open_base(base_fd, fds)
        barriers.open_barrier(base, name, fds)
        with barriers.naming(where):
            syscalls.renameat2(base, name, base, new, syscalls.RENAME_NOREPLACE)


def leftovers(base_fd: int) -> Leftovers:
    """Finds the barriers with names of left-over ones. Nothing is touched."""
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
                    # Anybody may fill /tmp with such names: neither the memory nor the journal is theirs to
                    # fill.
                    if len(foreign) < _FOREIGN_NAMED:
                        foreign.append((entry.name, reason))
    return Leftovers(tuple(removable), tuple(foreign), foreign_count)


# --- what make and adopt have in common ---


def _furnish(
    base: int, barrier: int, where: str, mountpoints: Sequence[str], fds: ExitStack, undo: ExitStack
) -> Descriptor:
    """Brings the inside of a barrier into the state it should have, whatever of it exists already."""
    path = f"{where}/{INNER}"
    with barriers.naming(path):
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
        with barriers.naming(f"{path}/{mountpoint}"):
            _place_mountpoint(inner, mountpoint, fds, undo)
    with barriers.naming(path):
        return Descriptor.open(".", os.O_PATH | os.O_DIRECTORY, dir_fd=inner)


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
        fd = fds.enter_context(barriers.open_path(dirfd, name))
    except FileNotFoundError:
        return _make_directory(dirfd, name, fds, undo)
    found = os.fstat(fd)
    # Root's own is what a half-made directory is whose owner had not been set yet.
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

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a barrier is, and how to open one in a directory where anyone may create names.

A barrier is a directory that belongs to root, with mode 0700, on the file system of its base directory.
Not here: making one and what is in it (storage), and emptying one (deletion).

Hard facts
- In a sticky directory that belongs to root, only root can rename or remove what belongs to root. So once a
  barrier is made or checked, it stays what its name says. A base directory without this property is refused.
- Neither O_PATH nor openat2(2) with RESOLVE_NO_XDEV reaches the code of a FIFO, a device, or a mounted file
  system, so an unknown name is always opened that way first. stat(2) would enter a mount, and could hang.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from polytmpd.kernel import syscalls
from polytmpd.kernel.descriptor import Descriptor

MODE: Final = 0o700
PROTECTED: Final = syscalls.FS_IMMUTABLE_FL | syscalls.FS_APPEND_FL
"""With one of these flags an inode cannot be deleted or renamed; a directory keeps its entries, too."""
DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK
RESOLVE: Final = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_XDEV | syscalls.RESOLVE_NO_MAGICLINKS
"""For one component below a descriptor. No mount is entered. With O_PATH|O_NOFOLLOW, a symbolic link is
opened, not followed.
"""


def open_base(base_fd: int, fds: ExitStack) -> Descriptor:
    """Open the base directory for reading; `fds` closes the descriptor.

    Raises OSError; PermissionError if users other than root could rename what root puts there.
    """
    where = path_of(base_fd)
    with naming(where):
        base = fds.enter_context(Descriptor.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=base_fd))
        found = os.fstat(base)
        if found.st_uid != 0 or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
            raise PermissionError(
                errno.EPERM, "not owned by root, or writable by others without the sticky bit", where
            )
    return base


def require_sticky(base_fd: int) -> None:
    """Raises OSError: PermissionError for a directory that is not one for temporary files."""
    where = path_of(base_fd)
    with naming(where):
        if not os.fstat(base_fd).st_mode & stat.S_ISVTX:
            what = "Not sticky, so not for temporary files; run chmod +t, or add it to UncheckedDirectories="
            raise PermissionError(errno.EPERM, what, where)


def open_barrier(base: int, name: str, fds: ExitStack) -> Descriptor:
    """Open a barrier for reading; `fds` closes the descriptor.

    Raises OSError: FileNotFoundError, or FileExistsError that says why polytmpd did not make it.
    """
    where = path_in(base, name)
    with naming(where):
        try:
            fd = fds.enter_context(open_path(base, name))
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise FileExistsError(errno.EEXIST, f"not made by polytmpd: {why(error)}", where) from None
            raise
        found = os.fstat(fd)
        require_barrier(found, where)
        if found.st_dev != os.fstat(base).st_dev:
            raise FileExistsError(errno.EEXIST, "not on the file system of its base directory", where)
        return reopen(fd, fds)


def require_barrier(found: os.stat_result, where: str) -> None:
    """Raise FileExistsError, which says what is wrong, unless it is a barrier."""
    reason = objection(found)
    if reason is not None:
        raise FileExistsError(errno.EEXIST, f"not made by polytmpd: {reason}", where)


def objection(found: os.stat_result) -> str | None:
    """Why this is not a barrier; None if it is one."""
    if stat.S_ISLNK(found.st_mode):
        return "a symbolic link"
    if not stat.S_ISDIR(found.st_mode):
        return "not a directory"
    if (found.st_uid, found.st_gid) != (0, 0):
        return f"owned by {found.st_uid}:{found.st_gid}, not by root"
    if stat.S_IMODE(found.st_mode) != MODE:
        return f"mode {stat.S_IMODE(found.st_mode):04o} instead of {MODE:04o}"
    return None


def why(error: OSError) -> str:
    """The reason why a name could not be opened, for messages."""
    return "is a mount point" if error.errno == errno.EXDEV else str(error.strerror)


def look(dirfd: int, name: str) -> os.stat_result:
    """lstat(2), but raises OSError EXDEV instead of entering a mount."""
    with open_path(dirfd, name) as fd:
        return os.fstat(fd)


def open_path(dirfd: int, name: str) -> Descriptor:
    """Open a directory entry of any type with O_PATH; the caller closes the descriptor."""
    return syscalls.openat2(dirfd, name, os.O_PATH | os.O_NOFOLLOW, RESOLVE)


def reopen(fd: int, fds: ExitStack) -> Descriptor:
    """Open the same directory for reading: an O_PATH descriptor cannot set its owner and mode."""
    return fds.enter_context(Descriptor.open(".", DIRECTORY, dir_fd=fd))


def protect(fd: int) -> None:
    """Make a directory immutable, if the file system and our capabilities allow it.

    Not even root can then remove or rename it, or what is in it, without chattr -i.
    """
    with suppress(OSError):
        flags = syscalls.get_inode_flags(fd)
        if not flags & syscalls.FS_IMMUTABLE_FL:
            syscalls.set_inode_flags(fd, flags | syscalls.FS_IMMUTABLE_FL)


def unprotect(fd: int) -> bool:
    """Clear the flags that protect a file or directory. False if there were none, or it cannot be done."""
    return syscalls.clear_inode_flags(fd, PROTECTED)


def path_in(base_fd: int, *names: str) -> str:
    """The path of the first name in the base directory, for messages.

    Raises OSError EINVAL if one of the names is not the name of a directory entry.
    """
    for name in names:
        if not name or "/" in name or name in {".", ".."}:
            raise OSError(errno.EINVAL, "not the name of a directory entry", name)
    return f"{path_of(base_fd)}/{names[0]}"


def path_of(fd: int) -> str:
    """The path of an open descriptor, for messages only."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115  (pathlib takes ten times as long)
    except OSError:
        return f"(descriptor {fd})"


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Put the full path into an OSError that has only a name or a descriptor."""
    try:
        yield
    except OSError as error:
        if not (isinstance(error.filename, str) and error.filename.startswith("/")):
            error.filename = path
            error.filename2 = None
        raise

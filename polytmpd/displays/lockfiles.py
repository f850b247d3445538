# SPDX-License-Identifier: LGPL-2.1-or-later
"""X displays' sockets, locks and the copies of locks, in one directory.

Every function works from the caller's descriptor of a directory (O_PATH will do); none follows a link or
blocks. They keep nothing, and any thread may call them.
Not here: which directories, and when.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import Final

from polytmpd.kernel.descriptor import Descriptor

SOCKETS: Final = ".X11-unix"
MARK: Final = "trusted.polytmp.displaylock"
"""The extended attribute by which a copy is known to be one, by any daemon."""

_SOCKET: Final = re.compile(r"X(0|[1-9]\d{0,4})", re.ASCII)
_LOCK: Final = re.compile(r"\.X(0|[1-9]\d{0,4})-lock", re.ASCII)
_DISPLAYS: Final = 65536
_PID: Final = re.compile(rb"[ ]*([0-9]{1,10})\s*")
_SIZE_AT_MOST: Final = 16
_PID_LAST: Final = 2**31 - 1
_SCANNED_AT_MOST: Final = 1_000_000
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
# opening a link, a socket, a file with a lease
_NOT_OURS: Final = (errno.ELOOP, errno.ENXIO, errno.EWOULDBLOCK)


def display_of_socket(name: str) -> int | None:
    """The display that a socket is named for; None if the name is no socket's."""
    return _display_of(_SOCKET.fullmatch(name))


def display_of_lock(name: str) -> int | None:
    """The display that a lock is named for; None if the name is no lock's."""
    return _display_of(_LOCK.fullmatch(name))


def _display_of(match: re.Match[str] | None) -> int | None:
    return int(match[1]) if match and int(match[1]) < _DISPLAYS else None


def lock_name(display: int) -> str:
    return f".X{display}-lock"


def parse_pid(data: bytes) -> int | None:
    """The PID in a lock; None for everything that no X server writes."""
    match = _PID.fullmatch(data) if len(data) <= _SIZE_AT_MOST else None
    pid = int(match[1]) if match else 0
    return pid if 0 < pid <= _PID_LAST else None


def socket_owner(sockets: int, display: int) -> int | None:
    """The UID that a display's socket belongs to; None where there is no socket."""
    try:
        found = os.stat(f"X{display}", dir_fd=sockets, follow_symlinks=False)
    except OSError:
        return None
    return found.st_uid if stat.S_ISSOCK(found.st_mode) else None


def read_lock(directory: int, display: int, owner: int) -> int | None:
    """The PID in a display's own lock: a plain, short file of that owner's, and no copy. None for anything
    else.
    """
    with (
        contextlib.suppress(OSError),
        Descriptor.open(lock_name(display), _READ, dir_fd=directory) as fd,
    ):
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_uid == owner:
            return None if _is_marked(fd) else parse_pid(os.read(fd, _SIZE_AT_MOST + 1))
    return None


def make_copy(directory: int, pid: int) -> Descriptor:
    """A lock of ours that has no name yet, for publish(). The descriptor is the caller's. Raises OSError."""
    fd = Descriptor.open(".", os.O_TMPFILE | os.O_RDWR, dir_fd=directory, mode=0o600)
    try:
        os.write(fd, b"%10d\n" % pid)
        os.fchmod(fd, 0o444)
        os.setxattr(fd, MARK, b"1")
    except BaseException:
        fd.close()
        raise
    return fd


def publish(copy: int, directory: int, display: int) -> bool:
    """Give a copy its name in a directory of the same file system; an older copy is replaced.

    Whether a copy is there now: what belongs to somebody else stays as it is. Raises OSError.
    """
    name = lock_name(display)
    with contextlib.suppress(FileNotFoundError), _opened_copy(name, directory) as old:
        if old is None:
            return False
        if os.pread(old, _SIZE_AT_MOST, 0) == os.pread(copy, _SIZE_AT_MOST, 0):
            return True
        os.unlink(name, dir_fd=directory)
    try:
        os.link(f"/proc/self/fd/{copy}", name, dst_dir_fd=directory, follow_symlinks=True)
    except FileExistsError:
        return False
    return True


def withdraw(directory: int, display: int) -> bool:
    """Remove a display's copy, if it is one; whether it was. Raises OSError."""
    name = lock_name(display)
    with contextlib.suppress(FileNotFoundError), _opened_copy(name, directory) as copy:
        if copy is not None:
            os.unlink(name, dir_fd=directory)
            return True
    return False


def find_copies(directory: int, cancelled: Callable[[], bool] = lambda: False) -> list[int]:
    """The displays of which a directory has copies. As slow as the directory is large. Raises OSError."""
    found = []
    with (
        Descriptor.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory) as fd,
        os.scandir(fd) as entries,
    ):
        for count, entry in enumerate(entries):
            if count >= _SCANNED_AT_MOST or cancelled():
                break
            display = display_of_lock(entry.name)
            if display is None:
                continue
            with contextlib.suppress(FileNotFoundError), _opened_copy(entry.name, directory) as copy:
                if copy is not None:
                    found.append(display)
    return found


@contextlib.contextmanager
def _opened_copy(name: str, directory: int) -> Iterator[Descriptor | None]:
    """A descriptor of our copy, None where something else has the name; FileNotFoundError."""
    try:
        fd = Descriptor.open(name, _READ, dir_fd=directory)
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
        yield None
        return
    with fd:
        found = os.fstat(fd)
        yield fd if found.st_uid == 0 and stat.S_ISREG(found.st_mode) and _is_marked(fd) else None


def _is_marked(fd: int) -> bool:
    try:
        os.getxattr(fd, MARK)
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.EOPNOTSUPP}:
            return False
        raise
    return True

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sockets and locks of X displays, and our copies of locks, in one directory.

Runs in any thread: functions without state. Each works from the caller's descriptor of the directory, for
which O_PATH is enough. None follows a symbolic link or enters a mount, so none blocks.
Not here: in which directories, and when.

Hard facts
- An X server, Xwayland and mutter make the lock first ("%10d\\n", the server's PID, mode 0444), then the
  socket X<n>. They remove both at exit. If they are killed, both stay, and because the directory is sticky
  only the owner can remove them. The same is true of a copy, which is root's.
- With -displayfd and no display number there is no lock at all.
- A program that finds a lock calls kill(PID, 0), and removes the lock on ESRCH. A copy must never contain
  anything but a positive PID: kill(-1) reaches every process.
- A lock in a user's /tmp may be anything: a FIFO, a symbolic link, a file with a lease (fcntl(2)).
- fusermount3 mounts on files, too, and an exempt user writes in the host's /tmp. Even stat(2) of a FUSE may
  never return. So what is mounted on a socket or a lock is neither, and is not touched: RESOLVE_NO_XDEV.
- A copy belongs to root and is in a sticky directory. So once a descriptor has shown that a file is a copy,
  its name still refers to it when it is unlinked. Only root can set or see a trusted.* attribute (xattr(7)).
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import Final

from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.syscalls import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV, openat2

SOCKETS: Final = ".X11-unix"
MARK: Final = "trusted.polytmp.displaylock"
"""The extended attribute that marks a copy as one of ours, for this daemon and its successors."""

_SOCKET: Final = re.compile(r"X(0|[1-9]\d{0,4})", re.ASCII)
_LOCK: Final = re.compile(r"\.X(0|[1-9]\d{0,4})-lock", re.ASCII)
_DISPLAYS: Final = 65536
_PID: Final = re.compile(rb"[ ]*([0-9]{1,10})\s*")
_SIZE_AT_MOST: Final = 16
_PID_LAST: Final = 2**31 - 1
_SCANNED_AT_MOST: Final = 1_000_000
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_HERE: Final = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV
# what openat2(2) returns for a symbolic link, a socket, a file with a lease, a mount
_NOT_OURS: Final = (errno.ELOOP, errno.ENXIO, errno.EWOULDBLOCK, errno.EXDEV)


def display_of_socket(name: str) -> int | None:
    """The display in a socket's name; None for any other name."""
    return _display_of(_SOCKET.fullmatch(name))


def display_of_lock(name: str) -> int | None:
    """The display in a lock's name; None for any other name."""
    return _display_of(_LOCK.fullmatch(name))


def _display_of(match: re.Match[str] | None) -> int | None:
    return int(match[1]) if match and int(match[1]) < _DISPLAYS else None


def lock_name(display: int) -> str:
    return f".X{display}-lock"


def parse_pid(data: bytes) -> int | None:
    """The PID in a lock; None for anything that an X server would not write."""
    match = _PID.fullmatch(data) if len(data) <= _SIZE_AT_MOST else None
    pid = int(match[1]) if match else 0
    return pid if 0 < pid <= _PID_LAST else None


def socket_owner(sockets: int, display: int) -> int | None:
    """The UID that a display's socket belongs to; None if there is no socket."""
    try:
        with openat2(sockets, f"X{display}", os.O_PATH | os.O_NOFOLLOW, _HERE) as fd:
            found = os.fstat(fd)
    except OSError:
        return None
    return found.st_uid if stat.S_ISSOCK(found.st_mode) else None


def read_lock(directory: int, display: int, owner: int) -> int | None:
    """The PID in a display's original lock; None if there is none.

    An original is a short regular file that belongs to owner and is not one of our copies.
    """
    with (
        contextlib.suppress(OSError),
        openat2(directory, lock_name(display), _READ, _HERE) as fd,
    ):
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_uid == owner:
            return None if _is_marked(fd) else parse_pid(os.read(fd, _SIZE_AT_MOST + 1))
    return None


def make_copy(directory: int, pid: int) -> Descriptor:
    """A copy that has no name yet, for publish(). The caller closes the descriptor. Raises OSError."""
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
    """Give a copy its name in a directory of the same file system, in place of an older copy.

    Returns False if the name is taken by something that is not a copy; that stays. Raises OSError.
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
    """Remove a display's copy. Returns False if there is none; anything else stays. Raises OSError."""
    name = lock_name(display)
    with contextlib.suppress(FileNotFoundError), _opened_copy(name, directory) as copy:
        if copy is not None:
            os.unlink(name, dir_fd=directory)
            return True
    return False


def find_copies(directory: int, cancelled: Callable[[], bool] = lambda: False) -> list[int]:
    """The displays of which a directory has copies. Slow if the directory is large. Raises OSError.

    If cancelled() becomes true, the result is what was found so far.
    """
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
    """Yields a descriptor of a copy, and closes it; None if something else has the name.

    Raises OSError: FileNotFoundError if nothing has the name.
    """
    try:
        fd = openat2(directory, name, _READ, _HERE)
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

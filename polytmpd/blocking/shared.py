# SPDX-License-Identifier: LGPL-2.1-or-later
"""The directories in /tmp that stay the host's own in every instance: sockets of X11 and others.

Not here: the bind mounts (kernel/mountns).

Hard facts
- systemd's tmpfiles.d/x11.conf makes them at boot, with mode 1777, and they belong to root. X servers and
  compositors refuse a directory that is not root's, is not sticky, or is a symbolic link. So do we.
- Only root can have put a directory that belongs to root into a sticky directory.
- Root may have mounted something on it, for example in a container. If the name was free, a user may have
  mounted a FUSE, and stat(2) of that may never return. The mount table says what is mounted.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from typing import Final

from polytmpd.core.sharing import LINKS
from polytmpd.kernel import host, mountinfo
from polytmpd.kernel.descriptor import Descriptor

_MODE: Final = 0o1777
_LINKS_MODE: Final = 0o755
_UNFINISHED: Final = 0o700
_REMEDY: Final = "move it away if no service uses it; it is made at the next login"


def ensure(base_fd: int, name: str) -> None:
    """Make the host's directory if it is missing, and finish one that is half-made.

    Raises OSError if what is there must not be shared.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, _UNFINISHED, dir_fd=base_fd)
    with Descriptor.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=base_fd) as fd:
        if _is_fuse(fd, base_fd):
            raise OSError(errno.EPERM, f"a FUSE; unmount it, then {_REMEDY}", name)
        found = os.fstat(fd)
    if _may_be_unfinished(found):
        _finish(base_fd, name)
    elif reason := _objection(found, name):
        raise OSError(errno.EPERM, reason, name)


def watch(path: str, name: str, add: Callable[[str], int]) -> int:
    """Make the host's directory if it is missing, and return add(path) of what is there.

    -1 if it must not be shared: it says so at the next login. Raises OSError if it cannot be watched.
    """
    with host.open_directory(path) as base:
        try:
            ensure(base, name)
            fd = Descriptor.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=base)
        except OSError:
            return -1
        with fd:
            return add(f"/proc/self/fd/{fd}")


def _is_fuse(fd: int, base_fd: int) -> bool:
    """Whether a FUSE is mounted there. True also if it cannot be found out."""
    mount_id = mountinfo.mount_id_of(fd)
    if mount_id == mountinfo.mount_id_of(base_fd):
        return False
    with contextlib.closing(mountinfo.lines("1")) as lines:
        found = mountinfo.with_ids(lines, {mount_id}).get(mount_id)
    return found is None or found.fstype.startswith("fuse")


def _finish(base_fd: int, name: str) -> None:
    with Descriptor.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=base_fd) as fd:
        with os.scandir(fd) as entries:
            is_empty = next(entries, None) is None  # if root put something in it, the mode is on purpose
        if is_empty and _may_be_unfinished(os.fstat(fd)):
            os.fchown(fd, 0, 0)
            os.fchmod(fd, _LINKS_MODE if name == LINKS else _MODE)


def _may_be_unfinished(found: os.stat_result) -> bool:
    """Whether it is as mkdir() leaves it: its maker may have been killed before setting the mode."""
    mode = stat.S_IMODE(found.st_mode) & ~stat.S_ISGID  # which it inherits from its parent directory
    return stat.S_ISDIR(found.st_mode) and found.st_uid == 0 and mode == _UNFINISHED


def _objection(found: os.stat_result, name: str) -> str | None:
    """Why it must not be shared, and the remedy; None if it may be."""
    if stat.S_ISSOCK(found.st_mode) or stat.S_ISREG(found.st_mode):
        # Not to be removed: a server may be listening.
        return f"not a directory; to share a socket or file, name /tmp/{name} in SharedPaths="
    if not stat.S_ISDIR(found.st_mode):
        return f"not a directory; {_REMEDY}"
    if found.st_uid != 0:
        return f"owned by UID {found.st_uid}, not by root; {_REMEDY}"
    if name == LINKS and found.st_mode & 0o022:
        return f"writable by others; run chmod {_LINKS_MODE:04o}"
    if found.st_mode & 0o002 and not found.st_mode & stat.S_ISVTX:
        return "world-writable without the sticky bit; run chmod +t"
    return None

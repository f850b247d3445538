# SPDX-License-Identifier: LGPL-2.1-or-later
"""The directories in /tmp that stay the host's own in every instance: X11's and others' sockets.

Not here: the bind mounts (kernel/mountns).

Hard facts
- systemd's tmpfiles.d/x11.conf makes them at boot, root's and 1777; X servers and compositors refuse a
  directory that is not root's, not sticky, or a symbolic link. We hold them to the same.
"""

import errno
import os
import stat
from typing import Final

_MODE: Final = 0o1777
_OPEN: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def ensure(base_fd: int, name: str) -> None:
    """Make the host's directory where it is missing.

    Raises OSError where what is there must not be shared.
    """
    try:
        os.mkdir(name, 0o700, dir_fd=base_fd)
    except FileExistsError:
        pass
    else:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=base_fd)
        try:
            os.fchown(fd, 0, 0)
            os.fchmod(fd, _MODE)
        finally:
            os.close(fd)
    fd = os.open(name, _OPEN, dir_fd=base_fd)
    try:
        found = os.fstat(fd)
    finally:
        os.close(fd)
    if reason := _objection(found):
        raise OSError(errno.EPERM, f"{reason}; remove it and run systemd-tmpfiles --create", name)


def _objection(found: os.stat_result) -> str | None:
    if not stat.S_ISDIR(found.st_mode):
        return "not a directory"
    if found.st_uid != 0:
        return f"owned by UID {found.st_uid}, not by root"
    if found.st_mode & 0o002 and not found.st_mode & stat.S_ISVTX:
        return "writable for all without the sticky bit"
    return None

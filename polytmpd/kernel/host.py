# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host as PID 1 sees it: its root directory and its mount namespace.

The sandbox of polytmpd.service gives the daemon its own mount namespace, see systemd.exec(5). So the daemon
reaches every path of the host through PID 1's root, /proc/1/root.
Not here: changes to the host.
"""

import errno
import os
from typing import Final

from polytmpd.kernel.descriptor import Descriptor

ROOT: Final = "/proc/1/root"
_NAMESPACE: Final = "/proc/1/ns/mnt"
_REMEDIES: Final = {
    errno.EMFILE: "raise LimitNOFILE= of polytmpd.service",
    errno.ENFILE: "raise fs.file-max, see sysctl(8)",
}
_NO_THREAD: Final = "can't start new thread"
"""The text of Python's RuntimeError."""


def path(absolute: str) -> str:
    """Where this process finds an absolute path of the host."""
    return f"{ROOT}{absolute}"


def open_directory(absolute: str) -> Descriptor:
    """Open a directory of the host with O_PATH; the caller closes it.

    Raises OSError; ENOTDIR if the last component is a symbolic link.
    """
    return Descriptor.open(path(absolute), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)


def open_namespace() -> Descriptor:
    """Open PID 1's mount namespace; the caller closes it. Raises OSError."""
    return Descriptor.open(_NAMESPACE, os.O_RDONLY)


def namespace_inode() -> int:
    """The inode of PID 1's mount namespace. Raises OSError."""
    return os.stat(_NAMESPACE).st_ino


def in_words(error: BaseException) -> str:
    """The text of an error for people: without its number, and with the paths as the host has them.

    If a limit is reached, the text names it.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        names = (error.filename, error.filename2)
        what = error.strerror
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy and what == os.strerror(error.errno or 0):  # or else it names another limit
            what = f"{what} ({remedy})"
        text = ": ".join((what, *(str(name) for name in names if name is not None)))
    elif text == _NO_THREAD:
        text = f"{text} (raise TasksMax= of polytmpd.service)"
    return text.replace(f"{ROOT}/", "/")

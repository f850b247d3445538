# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host as PID 1 sees it: its root directory and its mount namespace.

The sandbox of polytmpd.service gives the daemon its own mount namespace, see systemd.exec(5). So the daemon
reaches every path of the host through PID 1's root, /proc/1/root.
Not here: changes to the host.
"""

import os
from typing import Final

from polytmpd.kernel.descriptor import Descriptor

ROOT: Final = "/proc/1/root"
_NAMESPACE: Final = "/proc/1/ns/mnt"


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
    """The text of an error for people: without its number, and with the paths as the host has them."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        names = (error.filename, error.filename2)
        text = ": ".join((error.strerror, *(str(name) for name in names if name is not None)))
    return text.replace(f"{ROOT}/", "/")

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host as PID 1 sees it: its root directory and its mount namespace.

The sandbox of polytmpd.service gives the daemon a mount namespace of its own, see systemd.exec(5). So the
daemon reaches every path of the host through PID 1's root, /proc/1/root.
Not here: what is done on the host.
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
    """An O_PATH descriptor of a directory of the host, the caller's to close.

    Raises OSError; ENOTDIR if the last component is a symbolic link.
    """
    return Descriptor.open(path(absolute), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)


def open_namespace() -> Descriptor:
    """A descriptor of PID 1's mount namespace, the caller's to close. Raises OSError."""
    return Descriptor.open(_NAMESPACE, os.O_RDONLY)


def namespace_inode() -> int:
    """The inode of PID 1's mount namespace. Raises OSError."""
    return os.stat(_NAMESPACE).st_ino


def in_words(error: BaseException) -> str:
    """An error's text for people: without the number, with paths as they are on the host."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        names = (error.filename, error.filename2)
        text = ": ".join((error.strerror, *(str(name) for name in names if name is not None)))
    return text.replace(f"{ROOT}/", "/")

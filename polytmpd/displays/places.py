# SPDX-License-Identifier: LGPL-2.1-or-later
"""A place: the directory that processes of the host, or of one instance, know as /tmp.

Runs in any thread.
Not here: which locks a place shows (registry).

Hard fact
- The daemon's path to a place leads through the host's /tmp, so it crosses no mount of the user's.
"""

import os
from dataclasses import dataclass, field
from typing import Final

from polytmpd.core.model import Instance, Lifetime
from polytmpd.core.names import INNER
from polytmpd.displays.lockfiles import SOCKETS
from polytmpd.kernel import host, syscalls
from polytmpd.kernel.descriptor import Descriptor

_RESOLVE: Final = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_XDEV


@dataclass(frozen=True, slots=True)
class Place:
    """base: the directory on the host. inner: the path from there to the instance's own directory, empty for
    the host. is_persistent: whether the files outlive the instance.
    """

    base: str
    inner: str = ""
    is_persistent: bool = field(default=False, compare=False)

    @property
    def path(self) -> str:
        """The absolute path on the host."""
        return f"{self.base}/{self.inner}" if self.inner else self.base

    def open(self) -> Descriptor:
        """An O_PATH descriptor, the caller's to close.

        Raises OSError: FileNotFoundError once the instance is being removed.
        """
        base = host.open_directory(self.base)
        if not self.inner:
            return base
        with base:
            return syscalls.openat2(base, self.inner, os.O_PATH | os.O_DIRECTORY, _RESOLVE)


def place_of(instance: Instance) -> Place | None:
    """The place of an instance; None if the host's X11 sockets are not shared with it."""
    for entry in instance.directories:
        if SOCKETS in entry.directory.shared:
            persistent = entry.directory.lifetime is Lifetime.PERSISTENT
            return Place(entry.directory.path, f"{entry.barrier}/{INNER}", persistent)
    return None

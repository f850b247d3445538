# SPDX-License-Identifier: LGPL-2.1-or-later
"""A place: the directory that the host, or the processes of one instance, know as /tmp.

Keeps nothing open; any thread may use it. Not here: what is shown in it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from polytmpd.core.model import Instance, Lifetime
from polytmpd.core.names import INNER
from polytmpd.displays.lockfiles import SOCKETS, find_copies
from polytmpd.kernel import host, syscalls
from polytmpd.kernel.descriptor import Descriptor

_RESOLVE: Final = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_XDEV


@dataclass(frozen=True, slots=True)
class Place:
    """What somebody knows as /tmp: base on the host, and in it the barrier and the inner directory."""

    base: str
    inner: str = ""
    is_persistent: bool = field(default=False, compare=False)

    def open(self) -> Descriptor:
        """Raises OSError: FileNotFoundError once the instance is on its way out."""
        base = host.open_directory(self.base)
        if not self.inner:
            return base
        with base:
            return syscalls.openat2(base, self.inner, os.O_PATH | os.O_DIRECTORY, _RESOLVE)


def place_of(instance: Instance) -> Place | None:
    """Where an instance's /tmp is; None where X11's sockets are not shared with it."""
    for entry in instance.directories:
        if SOCKETS in entry.directory.shared:
            persistent = entry.directory.lifetime is Lifetime.PERSISTENT
            return Place(entry.directory.path, f"{entry.barrier}/{INNER}", persistent)
    return None


def find_copies_in(place: Place, cancelled: Callable[[], bool]) -> list[int]:
    with place.open() as directory:
        return find_copies(directory, cancelled)

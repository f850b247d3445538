# SPDX-License-Identifier: LGPL-2.1-or-later
"""The words of polytmp: directories, instances, and the states of states.py.

Not here: the names of directories (names), and anything that changes (lifecycle).
"""

import functools
from dataclasses import dataclass

from polytmpd.core.names import INNER
from polytmpd.core.states import Lifetime as Lifetime
from polytmpd.core.states import State as State


@dataclass(frozen=True, slots=True)
class Directory:
    """A polyinstantiated directory. shared: names in it that stay the host's own in every instance.

    must_be_sticky: no instance is made in it unless it is sticky, as directories for temporary files are.
    """

    path: str
    lifetime: Lifetime
    shared: tuple[str, ...] = ()
    must_be_sticky: bool = False


@functools.lru_cache(maxsize=256)
def shared_by_all(directory: Directory) -> Directory:
    """The first equal one that was asked for: thousands of instances have the same directories."""
    return directory


@dataclass(frozen=True, slots=True)
class InstanceDirectory:
    """A directory of an instance: the barrier's name in the directory that it replaces."""

    directory: Directory
    barrier: str

    @property
    def host_path(self) -> str:
        """Where root finds the user's files."""
        return f"{self.directory.path}/{self.barrier}/{INNER}"


@dataclass(frozen=True, slots=True)
class Instance:
    """A user's instance as it was made. Times are in microseconds, as in systemd's tools.

    namespace: the inode of the mount namespace. watches: the watch descriptors of its sentinels. While one
    of them is left, the namespace (or an earlier one over the same files) has not ended. namespace_id: what
    the kernel calls this namespace and no other until the next boot; 0 if it does not say.
    """

    uid: int
    user: str
    created_usec: int
    created_monotonic_usec: int
    directories: tuple[InstanceDirectory, ...]
    namespace: int = 0
    watches: frozenset[int] = frozenset()
    namespace_id: int = 0


@dataclass(frozen=True, slots=True)
class View:
    """An instance as it is shown: what exists of it now, in any state. Zero and empty mean not known yet."""

    uid: int
    user: str
    state: State
    created_usec: int = 0
    created_monotonic_usec: int = 0
    control_group: str = ""
    namespace: int = 0
    directories: tuple[InstanceDirectory, ...] = ()

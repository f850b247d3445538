# SPDX-License-Identifier: LGPL-2.1-or-later
"""Knows an instance by what it has mounted: for a daemon that lost its descriptors, its state, or both.

Not here: what is done with what is found (executor).
"""

import contextlib
import itertools
import os
import pwd
import re
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from polytmpd.core.model import INNER, Directory, Instance, InstanceDirectory
from polytmpd.kernel import mountinfo, mountns, processes
from polytmpd.kernel.mountinfo import Mount
from polytmpd.kernel.syscalls import RESOLVE_NO_SYMLINKS, openat2

_BARRIER: Final = re.compile(r"polytmp-(?:[0-9a-f]{32}-(\d{1,10})-[0-9a-f]{16}|(\d{1,10}))", re.ASCII)


@dataclass(frozen=True, slots=True)
class Living:
    """A namespace of ours that a process lives in, whose it is, and its mounts."""

    uid: int
    namespace: int
    mounts: tuple[Mount, ...]


def barrier_of(mount: Mount) -> str | None:
    """The barrier's name where the mount is the inner directory of an instance, or lies in it."""
    parts = mount.root.split("/")
    for name, inner in itertools.pairwise(parts):
        if inner == INNER and _BARRIER.fullmatch(name):
            return name
    return None


def _owner(barrier: str) -> int:
    match = _BARRIER.fullmatch(barrier)
    if match is None:
        raise ValueError(f"{barrier!r} is no barrier's name")
    return int(match[1] or match[2])


def _private(mounts: Sequence[Mount], directories: Sequence[Directory]) -> dict[str, str]:
    """Path → barrier of the directories that are private in a namespace.

    The last mount at a path is the one seen.
    """
    paths = {os.path.realpath(directory.path) for directory in directories}
    found: dict[str, str] = {}
    for mount in mounts:
        barrier = barrier_of(mount)
        if barrier is not None and mount.mount_point in paths and mount.root.endswith(f"/{barrier}/{INNER}"):
            found[mount.mount_point] = barrier
    return found


def living(directories: Sequence[Directory]) -> Iterator[Living]:
    """The namespaces that polytmp made and somebody lives in; not those that users made from them.

    A user's own (unshare, bwrap) has the same directories mounted, but is not in the host's peer group any
    more. Blocking: reads all of /proc.
    """
    peers = {mount.shared for mount in mountinfo.read("1") if mount.mount_point == "/"}
    host = mountns.host_namespace_inode()
    for namespace, _, mounts in processes.mount_tables():
        private = _private(mounts, directories)
        if namespace == host or not private:
            continue
        if {mount.shared for mount in mounts if mount.mount_point == "/"} & peers:
            yield Living(_owner(next(iter(private.values()))), namespace, tuple(mounts))


def reconstruct(
    uid: int, namespace: int, mounts: Sequence[Mount], directories: Sequence[Directory]
) -> Instance | None:
    """The instance that a namespace is, by its mounts. None where it is not that user's."""
    points = {mount.mount_point for mount in mounts}
    entries = []
    for directory in directories:
        path = os.path.realpath(directory.path)
        barrier = _private(mounts, [directory]).get(path)
        if barrier is None or _owner(barrier) != uid:
            continue
        shared = tuple(name for name in directory.shared if f"{path}/{name}" in points)
        entries.append(InstanceDirectory(replace(directory, path=path, shared=shared), barrier))
    if not entries:
        return None
    # When it was made is not known any more: now is when we know of it.
    now, monotonic = time.time_ns() // 1000, time.monotonic_ns() // 1000
    return Instance(uid, _name(uid), now, monotonic, tuple(entries), namespace)


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def mounted_barriers() -> dict[str, int]:
    """Barrier's name → a process that has the instance, or something in it, mounted in whatever namespace.

    A bind mount of his /tmp that a user took along into a namespace of his own, say. Not a file system or a
    directory of his own with somebody else's barrier in its path: that would keep the other's files for
    ever. Blocking: reads all of /proc.
    """
    host = mountinfo.read("1")
    found: dict[str, int] = {}
    for _, pid, mounts in processes.mount_tables():
        for mount in mounts:
            barrier = barrier_of(mount)
            if barrier is not None and barrier not in found and _is_genuine(mount, barrier, host):
                found[barrier] = pid
    return found


def _is_genuine(mount: Mount, barrier: str, host: Sequence[Mount]) -> bool:
    """Whether the host has the barrier where the mount's root says that it lies, and it is root's."""
    path = mount.root[: mount.root.index(f"/{barrier}/")] + f"/{barrier}"
    # The magic link by itself: RESOLVE_NO_SYMLINKS would refuse it.
    root = os.open(f"{mountns.HOST}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for entry in host:
            if entry.device != mount.device or not mountinfo.is_below(path, entry.root):
                continue
            place = f"{entry.mount_point}/{path[len(entry.root) :]}"
            with contextlib.suppress(OSError):
                fd = openat2(root, place.lstrip("/"), os.O_PATH | os.O_DIRECTORY, RESOLVE_NO_SYMLINKS)
                try:
                    status = os.fstat(fd)
                finally:
                    os.close(fd)
                if (status.st_uid, stat.S_IMODE(status.st_mode)) == (0, 0o700):
                    return True
    finally:
        os.close(root)
    return False

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Identifies instances by their mounts, for a daemon that lost its descriptors, its state, or both.

Not here: what follows from what is found (executor).
"""

import contextlib
import errno
import functools
import itertools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from polytmpd.blocking import accounts
from polytmpd.core import names
from polytmpd.core.model import Directory, Instance, InstanceDirectory, shared_by_all
from polytmpd.core.names import INNER
from polytmpd.kernel import host, inside, mounted, mountinfo, mountns, namespaces, patience
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.mountinfo import Mount

log = logging.getLogger(__name__)


class Living(NamedTuple):
    """A namespace that polytmp made and a process lives in: its user, its inode, and its mounts.

    fd: valid until the next one is asked for.
    """

    uid: int
    namespace: int
    mounts: tuple[Mount, ...]
    fd: Descriptor


def barrier_of(mount: Mount) -> str | None:
    """The barrier's name if the mount is the inner directory of an instance or is in it; else None."""
    parts = mount.former_root.split("/")
    for name, inner in itertools.pairwise(parts):
        if inner == INNER and names.owner(name) is not None:
            return name
    return None


def is_inner(mount: Mount, barrier: str) -> bool:
    """Whether the mount is the inner directory of that barrier, even if that has been deleted."""
    return mount.former_root.endswith(f"/{barrier}/{INNER}")


def _private(mounts: Sequence[Mount], directories: Sequence[Directory]) -> dict[str, str]:
    """Path → barrier of the directories that are private in a namespace.

    If a path has several mounts, the last one is visible.
    """
    paths = {os.path.realpath(directory.path) for directory in directories}
    found: dict[str, str] = {}
    for mount in mounts:
        barrier = barrier_of(mount)
        if barrier is not None and mount.mount_point in paths and is_inner(mount, barrier):
            found[mount.mount_point] = barrier
    return found


def host_peers() -> Collection[int | None]:
    """The peer group of the host's root directory, for is_host_peer(). Raises OSError."""
    return _peers(mountinfo.read("1"))


def is_host_peer(mounts: Sequence[Mount], peers: Collection[int | None]) -> bool:
    """Whether the host's mounts propagate to the namespace with this table, and back.

    This holds for namespaces that polytmp makes, not for those made from them (unshare, bwrap, a unit's).
    """
    return not _peers(mounts).isdisjoint(peers)


def _peers(mounts: Sequence[Mount]) -> set[int | None]:
    return {mount.shared for mount in mounts if mount.mount_point == "/"}


def has_mounted(instance: Instance, mounts: Iterable[Mount]) -> bool:
    """Whether all directories of the instance are among the mounts of a namespace."""
    mounted = {barrier_of(mount) for mount in mounts}
    return all(entry.barrier in mounted for entry in instance.directories)


def living(directories: Sequence[Directory], known: Collection[int] = ()) -> Iterator[Living]:
    """The namespaces that polytmp made and a process lives in, without those that users made from them.

    known: inodes of namespaces that are left out: to read one takes a millisecond, and there may be ten
    thousand. A user's own (unshare, bwrap) has the same directories mounted, but is no longer in the host's
    peer group. Blocks: reads all of /proc, but no tables of namespaces that a user can make without
    privilege, because users decide how long those are. Logs which namespaces cannot be read.
    """
    peers = host_peers()
    hosts_own = host.namespace_inode()
    for found in namespaces.inhabited(known=known):
        if found.inode == hosts_own or not mountns.is_privileged(found.fd):
            continue
        try:
            # As a login would see it: a process in it may be in a chroot.
            mounts = inside.mounts_in(found.fd)
        except OSError as error:
            log.error("Failed to read the mounts of the namespace of process %d: %s", found.pid, error)
            continue
        owner = names.owner(next(iter(_private(mounts, directories).values()), ""))
        if owner is not None and is_host_peer(mounts, peers):
            yield Living(owner, found.inode, tuple(mounts), found.fd)


def is_its(living: Living, instance: Instance) -> bool:
    """Whether that is the instance's namespace."""
    return living.namespace == instance.namespace and has_mounted(instance, living.mounts)


def reconstruct(
    uid: int, namespace: int, mounts: Sequence[Mount], directories: Sequence[Directory]
) -> Instance | None:
    """The instance that has these mounts; None if it is not that user's."""
    points = {mount.mount_point for mount in mounts}
    removed = {mount.mount_point for mount in mounts if mount.is_removed}
    entries = []
    for directory in directories:
        path = os.path.realpath(directory.path)
        barrier = _private(mounts, [directory]).get(path)
        if barrier is None or names.owner(barrier) != uid:
            continue
        # If the directory was removed on the host, the mounts in it are gone. They are made again.
        shared = directory.shared
        if path not in removed:
            shared = tuple(name for name in shared if f"{path}/{name}" in points)
        entries.append(
            InstanceDirectory(shared_by_all(replace(directory, path=path, shared=shared)), barrier)
        )
    if not entries:
        return None
    # When it was made is no longer known: this is when it was found.
    now, monotonic = time.time_ns() // 1000, time.monotonic_ns() // 1000
    user = accounts.find_local_name(uid) or accounts.find_name(uid) or str(uid)
    return Instance(uid, user, now, monotonic, tuple(entries), namespace)


class UnreadError(OSError):
    """It is not known whether barriers are mounted.

    unknown: the names of these barriers. found: those that are mounted.
    """

    def __init__(self, unknown: Mapping[str, OSError], found: Mapping[str, int]) -> None:
        first = next(iter(unknown.values()))
        super().__init__(first.errno, first.strerror)
        self.unknown = frozenset(unknown)
        self.found = found


def mounted_barriers(
    places: Iterable[tuple[str, str]],
    cancelled: Callable[[], bool] = lambda: False,
    known: mounted.Known | None = None,
) -> dict[str, int]:
    """Which of the barriers, each (directory, name), are mounted in any namespace: name → a process.

    0 instead of a process if none lives in that namespace, but something keeps it. A mount counts if it is
    of the instance or of something in it, for example a bind mount of the user's /tmp in another namespace.
    A user's own file system with another user's barrier in its path does not count.

    What cannot be read may be in use: raises UnreadError, or OSError if that concerns all barriers;
    ECANCELED if cancelled. What a user makes unreadable in their own user namespace concerns their barriers
    alone, and so does what takes too long there (kernel/patience). Logs what is left out. Blocks for as long
    as users like by what is theirs, so no login may wait for it.

    known: what former searches found, for this one to be faster.
    """
    wanted: dict[tuple[str, str], set[str]] = {}
    for path, name in places:
        wanted.setdefault(_identity(path), set()).add(name)
    if not wanted:
        return {}
    owners = {name: names.owner(name) for _, name in places}
    limits = patience.Patience(cancelled, {owner for owner in owners.values() if owner is not None})
    found = _search(wanted, limits, known or mounted.Known())
    unknown: dict[str, OSError] = {}
    for name in owners.keys() - found.keys():
        owner = owners[name]
        for uid, error in limits.unread.items():
            if owner in {uid, None}:  # without a name in it, it may be anyone's
                unknown[name] = error
    for uid in limits.unread.keys() - owners.values():
        log.info("Failed to read all mounts of UID %d, searching without them: %s", uid, limits.unread[uid])
    if unknown:
        raise UnreadError(unknown, found)
    return found


def _search(
    wanted: Mapping[tuple[str, str], set[str]], limits: patience.Patience, known: mounted.Known
) -> dict[str, int]:
    """Name → a process, of those of the barriers that are mounted. Raises OSError."""
    if mounted.lists_mounts():
        return _search_with(inside.open_table, wanted, limits, known)

    def search() -> dict[str, int]:
        with inside.visiting() as open_table:
            return _search_with(open_table, wanted, limits, known)

    return inside.in_disposable_thread(search)


def _search_with(
    open_table: mounted.OpenTable,
    wanted: Mapping[tuple[str, str], set[str]],
    limits: patience.Patience,
    known: mounted.Known,
) -> dict[str, int]:
    found: dict[str, int] = {}
    devices = {device for device, _ in wanted}
    every_name = set().union(*wanted.values())
    with known.searching(devices):
        for namespace in namespaces.every(limits):
            with limits.on_account_of(
                functools.partial(patience.owner, namespace.fd),
                functools.partial(namespaces.users_of, namespace),
            ) as over:
                for device, root in mounted.roots(namespace, devices, every_name, known, open_table, over):
                    for (its_device, directory), barriers in wanted.items():
                        if its_device == device:
                            for name in _lies_in(root, directory, barriers):
                                if name not in found:
                                    found[name] = namespaces.pid_of(namespace)
    return found


def _identity(path: str) -> tuple[str, str]:
    """Device and root of a directory of the host, as mountinfo shows them for a mount of it."""
    with host.open_directory(path) as fd:
        mount_id = mountinfo.mount_id_of(fd)
    with contextlib.closing(mountinfo.lines("1")) as lines:
        entry = mountinfo.with_ids(lines, {mount_id}).get(mount_id)
    if entry is not None:
        below = os.path.relpath(path, entry.mount_point)
        return entry.device, os.path.normpath(f"{entry.root.rstrip('/')}/{below}")
    raise OSError(errno.EAGAIN, "the mount that contains it is gone", path)


def _lies_in(root: str, directory: str, barriers: Collection[str]) -> Iterator[str]:
    prefix = directory.rstrip("/") + "/"
    name, _, inner = root.removeprefix(prefix).partition("/")
    if root.startswith(prefix) and name in barriers and mountinfo.is_below(inner, INNER):
        yield name

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the instances that a former daemon left: in the FD store, in the state files, and in /proc.

Any of the three may be missing. systemd in Debian 12 drops the FD store when the unit is stopped, and a
state file can be lost. A state file has the ID of the namespace, by which Linux 6.18 opens it. All of /proc
is read only if that does not account for everything: the kernel may not open a namespace by its ID, the disk
has a barrier that no state file names, or there is no state file at all.
Not here: what follows from what is found (executor).
"""

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from polytmpd.blocking import instances, recovery
from polytmpd.blocking.recovery import Living
from polytmpd.core import names
from polytmpd.core.model import Directory, Instance, Lifetime
from polytmpd.kernel import host, inside, nsfs
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.host import in_words

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Left:
    """An instance that a former daemon left.

    stored: the descriptor of its namespace in the FD store, if there is one. namespace: the same, or its
    namespace if that was found elsewhere; then it is valid until the next one is asked for.
    """

    instance: Instance
    stored: Descriptor | None
    namespace: Descriptor | None


def left(
    stored: Mapping[int, Descriptor],
    recorded: Mapping[int, Instance],
    directories: Sequence[Directory],
    discard: Callable[[int, Descriptor], None],
) -> Iterator[Left]:
    """Each instance that a former daemon left.

    discard(uid, descriptor) is called for a stored namespace that polytmp did not make.
    """
    known = dict(recorded)
    held: dict[int, Descriptor] = {}
    for uid, fd in stored.items():
        instance = known.get(uid)
        if instance is None or _inode(fd) != instance.namespace:
            instance = _recognise(uid, fd, directories)
        if instance is not None:
            known[uid], held[uid] = instance, fd
        else:
            log.warning("The namespace of UID %d in the FD store is not polytmpd's, closing it", uid)
            discard(uid, fd)
    with contextlib.ExitStack() as fds:
        found = dict(held)
        peers = recovery.host_peers()
        for uid in known.keys() - held.keys():
            with contextlib.suppress(OSError):  # renew_sentinel() tries again, and raises it
                if (living := instances.open_identified(known[uid], peers)) is not None:
                    found[uid] = fds.enter_context(living)
        for entry in _others(known, found, directories):
            uid = entry.uid
            if uid not in known and (instance := _reconstruct(entry, directories)) is not None:
                known[uid] = instance
            if uid not in found and uid in known and recovery.is_its(entry, known[uid]):
                with contextlib.suppress(OSError):
                    found[uid] = fds.enter_context(entry.fd.dup())
        for uid, instance in sorted(known.items()):
            namespace = found.get(uid)
            if namespace is not None:
                instance = instances.identified(instance, namespace)
            yield Left(instance, held.get(uid), namespace)


def renew_sentinel(
    instance: Instance, namespace: Descriptor | None, watch: Callable[[str], int]
) -> int | None:
    """A watch on a new sentinel in the instance's namespace; None if that has ended. Raises OSError.

    namespace: if it is open already.
    """
    first = instance.directories[0].directory
    with contextlib.ExitStack() as fds:
        if namespace is None and (namespace := instances.open_living(instance)) is not None:
            fds.enter_context(namespace)
        if namespace is None:
            return None
        return inside.renew_sentinel(namespace, first.path, first.shared, watch)


def _others(
    known: Mapping[int, Instance], found: Mapping[int, Descriptor], directories: Sequence[Directory]
) -> Iterator[Living]:
    """What else may live. known: instances by UID. found: their namespaces, as far as they are open.

    With none known, someone may have deleted all state files and what is in /tmp.
    """
    missing = [instance for uid, instance in known.items() if uid not in found]
    have_ended = not missing or (all(one.namespace_id for one in missing) and nsfs.finds_all())
    if not known or not have_ended or not _are_all_known(known.values(), directories):
        yield from recovery.living(directories, {_inode(fd) for fd in found.values()})


def _are_all_known(known: Collection[Instance], directories: Sequence[Directory]) -> bool:
    """Whether every barrier on disk is of a known instance. What persists says nothing: it outlives them."""
    ending = [one for one in instances.effective(directories) if one.lifetime is Lifetime.INSTANCE]
    theirs = {entry.barrier for instance in known for entry in instance.directories}
    for directory in ending:
        try:
            with os.scandir(host.path(directory.path)) as entries:
                if any(
                    names.owner(entry.name) is not None and entry.name not in theirs for entry in entries
                ):
                    return False
        except OSError:
            return False
    return bool(ending)


def _recognise(uid: int, fd: Descriptor, directories: Sequence[Directory]) -> Instance | None:
    """The instance of a stored namespace, identified by its mounts; None if it is none or unreadable."""
    try:
        mounts = inside.mounts_in(fd)
    except OSError as error:
        log.warning(
            "Failed to read the mounts of the namespace of UID %d in the FD store: %s", uid, in_words(error)
        )
        return None
    return recovery.reconstruct(uid, _inode(fd), mounts, directories)


def _reconstruct(entry: Living, directories: Sequence[Directory]) -> Instance | None:
    return recovery.reconstruct(entry.uid, entry.namespace, entry.mounts, directories)


def _inode(fd: Descriptor) -> int:
    return os.fstat(fd).st_ino

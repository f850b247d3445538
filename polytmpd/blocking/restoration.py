# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the instances that a former daemon left: in the FD store, in the state files, and in /proc.

Any of the three may be missing. systemd in Debian 12 drops the FD store when the unit is stopped, and a
state file can be lost.
Not here: what follows from what is found (executor).
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from polytmpd.blocking import instances, recovery
from polytmpd.core.model import Directory, Instance
from polytmpd.kernel import inside
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.host import in_words

log = logging.getLogger(__name__)


def left(
    stored: Mapping[int, Descriptor],
    recorded: Mapping[int, Instance],
    directories: Sequence[Directory],
    discard: Callable[[int, Descriptor], None],
) -> Iterator[tuple[Instance, Descriptor | None]]:
    """Each instance that a former daemon left, with the stored descriptor of its namespace, if there is one.

    discard(uid, descriptor) is called for a stored namespace that polytmp did not make.
    """
    known = {
        instance.namespace
        for uid, instance in recorded.items()
        if uid in stored and _inode(stored[uid]) == instance.namespace
    }
    living = {entry.uid: entry for entry in recovery.living(directories, known)}
    for uid in sorted({*stored, *recorded, *living}):
        fd = stored.get(uid)
        instance = recorded.get(uid)
        if fd is not None and (instance is None or _inode(fd) != instance.namespace):
            recognised = _recognise(uid, fd, directories)
            if recognised is None:
                log.warning("The namespace of UID %d in the FD store is not polytmpd's, closing it", uid)
                discard(uid, fd)
                fd = None
            else:
                instance = recognised
        if instance is None and uid in living:
            entry = living[uid]
            instance = recovery.reconstruct(uid, entry.namespace, entry.mounts, directories)
        if instance is not None:
            yield instance, fd


def renew_sentinel(instance: Instance, stored: Descriptor | None, watch: Callable[[str], int]) -> int | None:
    """A watch on a new sentinel in the instance's namespace; None if no process is in it. Raises OSError."""
    fd = stored if stored is not None else instances.open_living(instance)
    if fd is None:
        return None
    first = instance.directories[0].directory
    try:
        return inside.renew_sentinel(fd, first.path, first.shared, watch)
    finally:
        if stored is None:
            fd.close()


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


def _inode(fd: Descriptor) -> int:
    return os.fstat(fd).st_ino

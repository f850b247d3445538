# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes an instance, its directories and its namespace, and finds or changes a living one.

Nothing is kept here: what is made goes to the caller, or is removed again.
Not here: removing an instance (removal), which operation runs when, and who holds what was made (executor).
"""

import contextlib
import errno
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from polytmpd.blocking import accounts, deletion, recovery, shared, storage
from polytmpd.core import names
from polytmpd.core.model import (
    Directory,
    Instance,
    InstanceDirectory,
    Lifetime,
)
from polytmpd.core.names import INNER
from polytmpd.journal import MessageId, fields
from polytmpd.kernel import host, inside, mountns, processes
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.mountinfo import Mount

log = logging.getLogger(__name__)


def prepare(
    uid: int, user: str, directories: Sequence[Directory], boot_id: str, watch: Callable[[str], int]
) -> tuple[Instance, Descriptor, int]:
    """Make directories and namespace: (instance, descriptor of the namespace, watch on its sentinel).

    watch(path) is called for the sentinel, before any process can enter. The caller closes the descriptor.
    Raises OSError, and then leaves nothing behind.
    """
    made: list[InstanceDirectory] = []
    fresh: list[InstanceDirectory] = []
    places: list[mountns.PrivateDirectory] = []
    user = accounts.name_of(uid, user)  # logind may still have a former name
    try:
        for directory in effective(directories):
            with host.open_directory(directory.path) as base:
                entry = InstanceDirectory(
                    replace(directory, shared=_shareable(base, directory)),
                    _new_barrier(directory.lifetime, boot_id, uid),
                )
                inner, is_new = _make_or_adopt(base, entry, uid, user)
                made.append(entry)
                if is_new:
                    fresh.append(entry)
                places.append(_place(entry, inner))
        namespace = mountns.build(places, watch)
    except BaseException:
        _roll_back(fresh)
        raise
    now, monotonic = time.time_ns() // 1000, time.monotonic_ns() // 1000
    instance = Instance(uid, user, now, monotonic, tuple(made), namespace.inode)
    return instance, namespace.fd, namespace.watch


def rebuild(instance: Instance, watch: Callable[[str], int]) -> tuple[Instance, Descriptor, int]:
    """Like prepare(), but over the directories that the instance has. Raises OSError."""
    places = []
    for entry in instance.directories:
        with host.open_directory(entry.directory.path) as base:
            places.append(_place(entry, storage.adopt(base, entry.barrier, entry.directory.shared)))
    namespace = mountns.build(places, watch)
    return replace(instance, namespace=namespace.inode), namespace.fd, namespace.watch


def require_same_user(instance: Instance) -> None:
    """Raise OSError if the UID belongs to another user now and the former user's instance lives on."""
    present = accounts.name_of(instance.uid, instance.user)
    if accounts.is_former(instance.user, instance.uid, present):
        text = f"the instance of {instance.user}, a former user of UID {instance.uid}, is still in use"
        raise OSError(errno.EBUSY, f"{text}; end its processes, see: polytmpctl ps {instance.uid}")


def open_living(instance: Instance) -> Descriptor | None:
    """Open the instance's namespace; None if no process lives in it or holds it open.

    The kernel reuses inode numbers, the lowest first: the number may belong to another namespace by now,
    even to one that the user made from their own. So the mounts decide. Raises OSError if they cannot be
    read, and TimeoutError as processes.open_namespace() does.
    """
    fd = processes.open_namespace(instance.namespace)
    if fd is None:
        return None
    with fd:
        mounts = inside.mounts_in(fd) if mountns.is_privileged(fd) else []
        mounted = {recovery.barrier_of(mount) for mount in mounts}
        if recovery.is_host_peer(mounts) and all(entry.barrier in mounted for entry in instance.directories):
            return Descriptor(fd.detach())
    return None


@contextlib.contextmanager
def entered(instance: Instance, held: Descriptor | None) -> Iterator[Descriptor | None]:
    """A descriptor of the instance's namespace; None if no process lives in it. Raises OSError.

    held: a descriptor that is already open; closed at the end. Without it, the namespace is found through
    the processes in it.
    """
    fd = held if held is not None else open_living(instance)
    if fd is None:
        yield None
        return
    with fd:
        yield fd


def share_again(namespace: Descriptor, instance: Instance, path: str) -> list[str]:
    """Bind the host's socket directories in path again. Returns those that changed. Raises OSError."""
    changed: list[str] = []
    for entry in instance.directories:
        if entry.directory.path == path:
            with host.open_directory(path) as base:
                names = _shareable(base, entry.directory)
            changed += inside.share_again(namespace, path, names)
    return changed


def detach(namespace: Descriptor, instance: Instance, chosen: Callable[[Mount], bool]) -> list[str]:
    """Detach the chosen mounts in the private directories. Returns their paths. Raises OSError.

    What makes the directories private always stays: without it the user would be in the shared ones.
    """

    def others(mount: Mount) -> bool:
        return chosen(mount) and not _is_ours(instance, mount)

    return inside.detach(namespace, [entry.directory.path for entry in instance.directories], others)


def kept(uid: int, directories: Sequence[Directory]) -> tuple[InstanceDirectory, ...]:
    """What is kept for a user between instances."""
    entries = [
        InstanceDirectory(directory, names.kept_barrier(uid))
        for directory in effective(directories)
        if directory.lifetime is Lifetime.PERSISTENT
    ]
    return tuple(entry for entry in entries if Path(host.path(entry.host_path)).is_dir())


def effective(directories: Sequence[Directory]) -> list[Directory]:
    """The directories by their real paths, each once: on some hosts /var/tmp is a link to /tmp."""
    found: dict[str, Directory] = {}
    for directory in directories:
        real = os.path.realpath(directory.path)
        if not any(real == other or real.startswith(other + "/") for other in found):
            found[real] = replace(directory, path=real)
    return list(found.values())


def _is_ours(instance: Instance, mount: Mount) -> bool:
    """Whether the mount is part of the instance, not one that was made in it later."""
    for entry in instance.directories:
        path = entry.directory.path
        if mount.mount_point == path:
            return mount.root.endswith(f"/{entry.barrier}/{INNER}")
        if mount.mount_point in {f"{path}/{name}" for name in entry.directory.shared}:
            return True
    return False


def _make_or_adopt(base: int, entry: InstanceDirectory, uid: int, user: str) -> tuple[Descriptor, bool]:
    """(descriptor of the inner directory, whether it is new).

    Only what persists is ever found there and adopted.
    """
    if entry.directory.lifetime is not Lifetime.PERSISTENT:
        return storage.make(base, entry.barrier, entry.directory.shared), True
    with contextlib.suppress(FileNotFoundError):
        _keep_for_a_former_user(base, entry, uid, user)
        return storage.adopt(base, entry.barrier, entry.directory.shared, user), False
    return storage.make(base, entry.barrier, entry.directory.shared, user), True


def _keep_for_a_former_user(base: int, entry: InstanceDirectory, uid: int, user: str) -> None:
    """Set aside what a former user of the UID left, for root to find."""
    former = storage.remembered(base, entry.barrier)
    if former is None or not accounts.is_former(former, uid, user):
        return
    aside = names.former(uid, _random())
    storage.set_aside(base, entry.barrier, aside)
    log.warning(
        "UID %d belonged to %s and now belongs to %s: moved the former files in %s to %s/%s",
        uid,
        former,
        user,
        entry.directory.path,
        entry.directory.path,
        aside,
        extra=fields(MessageId.FORMER_USER, uid, user),
    )


def _new_barrier(lifetime: Lifetime, boot_id: str, uid: int) -> str:
    if lifetime is Lifetime.PERSISTENT:
        return names.kept_barrier(uid)
    return names.barrier(boot_id, uid, _random())


def _random() -> str:
    return secrets.token_hex(names.RANDOM_BYTES)


def _shareable(base: int, directory: Directory) -> tuple[str, ...]:
    names = []
    for name in directory.shared:
        try:
            shared.ensure(base, name)
        except OSError as error:
            where = f"{directory.path}/{name}"
            log.warning("Failed to share %s with new instances, ignoring: %s", where, error.strerror)
        else:
            names.append(name)
    return tuple(names)


def _place(entry: InstanceDirectory, inner: Descriptor) -> mountns.PrivateDirectory:
    with inner:
        status = os.fstat(inner)
    directory = entry.directory
    source = f"{entry.barrier}/{INNER}"
    return mountns.PrivateDirectory(directory.path, source, (status.st_dev, status.st_ino), directory.shared)


def _roll_back(entries: Sequence[InstanceDirectory]) -> None:
    for entry in entries:
        try:
            with host.open_directory(entry.directory.path) as base:
                deletion.remove_tree(base, entry.barrier)
        except OSError as error:
            log.error(
                "Failed to delete a half-made instance, retrying at the next start: %s", host.in_words(error)
            )

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes an instance, its directories and its namespace, and finds or changes a living one.

Nothing is kept here: what is made goes to the caller, or is removed again.
Not here: removing an instance (removal), which operation runs when, and who holds what was made (executor).
"""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from polytmpd.blocking import barriers, deletion, recovery, shared, storage
from polytmpd.core import names
from polytmpd.core.model import (
    Directory,
    Instance,
    InstanceDirectory,
    Lifetime,
    shared_by_all,
)
from polytmpd.core.names import INNER
from polytmpd.journal import MessageId, fields
from polytmpd.kernel import host, inside, mountns, nsfs, processes
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.mountinfo import Mount

log = logging.getLogger(__name__)

_ATTEMPTS: Final = 16


def prepare(
    uid: int,
    user: str,
    directories: Sequence[Directory],
    boot_id: str,
    watch: Callable[[str], int],
    is_former: Callable[[str], bool],
    add: storage.Add | None = None,
) -> tuple[Instance, Descriptor, int]:
    """Make directories and namespace: (instance, descriptor of the namespace, watch on its sentinel).

    user: the name that the UID has now. watch(path) is called for the sentinel, before any process can
    enter. is_former(name): whether a name that a kept directory remembers is a former user's. add: see
    storage.make(). The caller closes the descriptor. Raises OSError and what is_former() raises, and then
    leaves nothing behind.
    """
    made: list[InstanceDirectory] = []
    fresh: list[InstanceDirectory] = []
    adopted: list[InstanceDirectory] = []
    places: list[mountns.PrivateDirectory] = []
    try:
        for directory in effective(directories):
            with host.open_directory(directory.path) as base:
                if directory.must_be_sticky:
                    barriers.require_sticky(base)
                entry = InstanceDirectory(
                    shared_by_all(replace(directory, shared=_shareable(base, directory))),
                    _new_barrier(directory.lifetime, boot_id, uid),
                )
                inner, is_new = _make_or_adopt(base, entry, uid, user, is_former, add)
                made.append(entry)
                (fresh if is_new else adopted).append(entry)
                places.append(_place(entry, inner))
        namespace = mountns.build(places, watch)
    except BaseException:
        _roll_back(fresh)
        release(adopted)
        raise
    now, monotonic = time.time_ns() // 1000, time.monotonic_ns() // 1000
    instance = Instance(uid, user, now, monotonic, tuple(made), namespace.inode)
    return instance, namespace.fd, namespace.watch


def rebuild(instance: Instance, watch: Callable[[str], int]) -> tuple[Instance, Descriptor, int]:
    """Like prepare(), but over the directories that the instance has. Raises OSError."""
    entries = []
    places = []
    for known in instance.directories:
        with host.open_directory(known.directory.path) as base:
            entry, inner = _find_or_make_again(base, instance, known)
            entries.append(entry)
            places.append(_place(entry, inner))
    namespace = mountns.build(places, watch)
    instance = replace(instance, directories=tuple(entries), namespace=namespace.inode)
    return instance, namespace.fd, namespace.watch


def guard(instance: Instance, add: Callable[[str, int], None]) -> bool:
    """Guard the instance's directories against removal, see storage.guard().

    False if something is missing already. Raises OSError.
    """
    complete = True
    for entry in instance.directories:
        with host.open_directory(entry.directory.path) as base:
            complete &= storage.guard(base, entry.barrier, entry.directory.shared, add)
    return complete


class Mended(NamedTuple):
    """The directories of an instance as they are now, and the paths of those that had to be mended.

    Not `is_watched`: something was missing again at the end.
    """

    directories: tuple[InstanceDirectory, ...]
    mended: tuple[str, ...] = ()
    is_watched: bool = True


def mend(
    instance: Instance, held: Descriptor | None, add: Callable[[str, int], None], is_lost: bool
) -> Mended:
    """Guard a living instance's directories, and give it again what was removed of them on the host.

    held: its namespace, if we have it; closed at the end. add: see storage.guard(). is_lost: whether
    something may have been removed before. Raises OSError.
    """
    with contextlib.ExitStack() as fds:
        if held is not None:
            fds.enter_context(held)
        if not is_lost and guard(instance, add):
            return Mended(instance.directories)
        namespace = held if held is not None else open_living(instance)
        if namespace is None:
            return Mended(instance.directories)
        with namespace:
            directories, mended = _revive(namespace, instance)
        return Mended(directories, mended, guard(replace(instance, directories=directories), add))


def _revive(
    namespace: Descriptor, instance: Instance
) -> tuple[tuple[InstanceDirectory, ...], tuple[str, ...]]:
    """A directory has another barrier if the name of the former one is taken. It can be called again."""
    mounts = inside.mounts_in(namespace)
    entries: list[InstanceDirectory] = []
    mended: list[str] = []
    for known in instance.directories:
        path, entry = known.directory.path, known
        private = [
            mount
            for mount in mounts
            if mount.mount_point == path and recovery.is_inner(mount, known.barrier)
        ]
        removed = next((mount for mount in private if mount.is_removed), None)
        points = {mount.mount_point for mount in mounts}
        if removed is not None or not all(f"{path}/{name}" in points for name in known.directory.shared):
            with host.open_directory(path) as base:
                if removed is not None:
                    entry, inner = _find_or_make_again(base, instance, known)
                    with inner:
                        inside.replace(namespace, removed, inner)
                else:
                    storage.adopt(base, known.barrier, known.directory.shared).close()
                names = _shareable(base, entry.directory)
            inside.share_again(namespace, path, names)
            mended.append(path)
        entries.append(entry)
    return tuple(entries), tuple(mended)


def release(entries: Sequence[InstanceDirectory]) -> None:
    """End the protection of barriers that are kept, and of no instance now. Logs what fails."""
    for entry in entries:
        try:
            with contextlib.suppress(FileNotFoundError), host.open_directory(entry.directory.path) as base:
                storage.release(base, entry.barrier, entry.directory.shared)
        except OSError as error:
            log.warning("%s may still be immutable, see chattr(1): %s, ignoring", entry.host_path, error)


def open_living(instance: Instance) -> Descriptor | None:
    """Open the instance's namespace; None if it has ended.

    By its ID if the kernel does that. Otherwise a process must live in it or hold it open, and all of /proc
    is read. Raises OSError if the mounts cannot be read, TimeoutError as processes.open_namespace() does.
    """
    if (fd := open_identified(instance)) is not None:
        return fd
    if instance.namespace_id and nsfs.finds_all():
        return None
    return _if_its(instance, processes.open_namespace(instance.namespace))


def open_identified(instance: Instance, peers: Collection[int | None] = ()) -> Descriptor | None:
    """Open the instance's namespace by its ID; None if it has ended, or if the kernel does not do that.

    The caller closes it. peers: what recovery.host_peers() said a moment ago. Raises OSError if the mounts
    cannot be read.
    """
    if not instance.namespace_id:
        return None
    return _if_its(instance, nsfs.open_namespace(instance.namespace_id, instance.namespace), peers)


def identified(instance: Instance, namespace: int) -> Instance:
    """The instance with the ID of its namespace, which is open."""
    return replace(instance, namespace_id=nsfs.identify(namespace))


def _if_its(
    instance: Instance, namespace: Descriptor | None, peers: Collection[int | None] = ()
) -> Descriptor | None:
    """The same namespace if it is the instance's; else it is closed.

    The kernel reuses inode numbers, the lowest first: the number may belong to another namespace by now,
    even to one that the user made from their own. And what a state file says is not proof. So the mounts
    decide. Raises OSError if they cannot be read.
    """
    if namespace is None:
        return None
    with namespace:
        mounts = inside.mounts_in(namespace) if mountns.is_privileged(namespace) else []
        if not recovery.has_mounted(instance, mounts):
            return None
        if recovery.is_host_peer(mounts, peers or recovery.host_peers()):
            return Descriptor(namespace.detach())
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
            return recovery.is_inner(mount, entry.barrier)
        if mount.mount_point in {f"{path}/{name}" for name in entry.directory.shared}:
            return True
    return False


def _make_or_adopt(
    base: int,
    entry: InstanceDirectory,
    uid: int,
    user: str,
    is_former: Callable[[str], bool],
    add: storage.Add | None,
) -> tuple[Descriptor, bool]:
    """(descriptor of the inner directory, whether it is new).

    Only what persists is ever found there and adopted.
    """
    if entry.directory.lifetime is not Lifetime.PERSISTENT:
        return storage.make(base, entry.barrier, entry.directory.shared, add=add), True
    with contextlib.suppress(FileNotFoundError):
        _keep_for_a_former_user(base, entry, uid, user, is_former)
        return storage.adopt(base, entry.barrier, entry.directory.shared, user, add), False
    return storage.make(base, entry.barrier, entry.directory.shared, user, add), True


def _find_or_make_again(
    base: int, instance: Instance, entry: InstanceDirectory
) -> tuple[InstanceDirectory, Descriptor]:
    """The directory of a living instance, with a descriptor of its inner directory, the caller's.

    It is made again if it is gone. Another user may have taken its name meanwhile: then it gets a new one,
    unless it has to be found under that name at the next login. Raises OSError.
    """
    is_kept = entry.directory.lifetime is Lifetime.PERSISTENT
    user = instance.user if is_kept else ""
    for _attempt in range(_ATTEMPTS):
        try:
            return entry, storage.adopt(base, entry.barrier, entry.directory.shared)
        except FileNotFoundError:
            pass
        except FileExistsError:
            if is_kept:
                raise
            entry = replace(entry, barrier=names.with_random(entry.barrier, _random()))
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            return entry, storage.make(base, entry.barrier, entry.directory.shared, user)
    raise OSError(errno.EBUSY, "a process keeps removing it", entry.host_path)


def _keep_for_a_former_user(
    base: int, entry: InstanceDirectory, uid: int, user: str, is_former: Callable[[str], bool]
) -> None:
    """Set aside what a former user of the UID left, for root to find."""
    former = storage.remembered(base, entry.barrier)
    if former is None or not is_former(former):
        return
    aside = names.former(uid, _random())
    storage.set_aside(base, entry.barrier, aside, entry.directory.shared)
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
    return os.urandom(names.RANDOM_BYTES).hex()


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

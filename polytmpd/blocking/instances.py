# SPDX-License-Identifier: LGPL-2.1-or-later
"""The work on one instance, as a thread does it: directories and namespace are made, found again, set aside
and deleted. All of it blocks.

Keeps nothing: what is made goes to the caller, or is gone again.
Not here: whose turn it is, and who holds what was made (executor).
"""

import contextlib
import errno
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

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
from polytmpd.kernel import host, mountns, processes
from polytmpd.kernel.mountinfo import Mount

log = logging.getLogger(__name__)


def prepare(
    uid: int, user: str, directories: Sequence[Directory], boot_id: str, watch: Callable[[str], int]
) -> tuple[Instance, int, int]:
    """Make directories and namespace: (instance, descriptor of the namespace, watch on its sentinel).

    watch(path) is called for the sentinel, before anybody can enter. The descriptor is the caller's. Raises
    OSError; nothing is left behind then.
    """
    made: list[InstanceDirectory] = []
    fresh: list[InstanceDirectory] = []
    places: list[mountns.PrivateDirectory] = []
    user = accounts.name_of(uid, user)  # we may have been told of a former user
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


def rebuild(instance: Instance, watch: Callable[[str], int]) -> tuple[Instance, int, int]:
    """As prepare(), over the directories that the instance has. Raises OSError."""
    places = []
    for entry in instance.directories:
        with host.open_directory(entry.directory.path) as base:
            places.append(_place(entry, storage.adopt(base, entry.barrier, entry.directory.shared)))
    namespace = mountns.build(places, watch)
    return replace(instance, namespace=namespace.inode), namespace.fd, namespace.watch


def require_same_user(instance: Instance) -> None:
    """Raise OSError where the UID went to somebody else while a former user's instance lives on."""
    present = accounts.name_of(instance.uid, instance.user)
    if accounts.is_former(instance.user, instance.uid, present):
        text = f"processes live in the instance of {instance.user}, who had UID {instance.uid} before"
        raise OSError(errno.EBUSY, f"{text}; end them, see polytmpctl ps {instance.uid}")


def open_living(instance: Instance) -> int | None:
    """A descriptor of the instance's namespace where somebody lives in it, or holds it open.

    The kernel gives inode numbers out again, the lowest first: it may be another namespace by now, one that
    the user made from his own even. So its mounts count. TimeoutError where it cannot be told, see
    processes.open_namespace().
    """
    fd = processes.open_namespace(instance.namespace)
    if fd is None:
        return None
    try:
        mounts = mountns.mounts_in(fd) if mountns.is_privileged(fd) else []
    except OSError:  # another one by now, in which no /proc is mounted: a sandbox that is being made
        mounts = []
    mounted = {recovery.barrier_of(mount) for mount in mounts}
    if recovery.is_host_peer(mounts) and all(entry.barrier in mounted for entry in instance.directories):
        return fd
    os.close(fd)
    return None


def share_again(instance: Instance, held: int | None, path: str) -> list[str]:
    """Bind the host's socket directories in path anew; those that were. Raises OSError.

    held: a descriptor of the namespace, closed here; without one its processes are asked.
    """
    fd = held if held is not None else open_living(instance)
    if fd is None:
        return []
    try:
        changed: list[str] = []
        for entry in instance.directories:
            if entry.directory.path == path:
                with host.open_directory(path) as base:
                    names = _shareable(base, entry.directory)
                changed += mountns.share_again(fd, path, names)
        return changed
    finally:
        os.close(fd)


def detach(instance: Instance, held: int | None, chosen: Callable[[Mount], bool]) -> list[str]:
    """Detach the chosen mounts in the private directories; where those were. Raises OSError.

    Never what makes them private: the user would be in the shared ones. held: as for share_again().
    """

    def others(mount: Mount) -> bool:
        return chosen(mount) and not _is_ours(instance, mount)

    fd = held if held is not None else open_living(instance)
    if fd is None:
        return []
    try:
        return mountns.detach(fd, [entry.directory.path for entry in instance.directories], others)
    finally:
        os.close(fd)


def set_aside(instance: Instance) -> list[tuple[str, str]]:
    """Rename what does not persist. Raises OSError where one could not be renamed, after the others were."""
    aside: list[tuple[str, str]] = []
    failure: OSError | None = None
    for entry in instance.directories:
        if entry.directory.lifetime is Lifetime.PERSISTENT:
            continue
        try:
            with host.open_directory(entry.directory.path) as base:
                aside.append((entry.directory.path, _set_aside(base, entry.barrier)))
        except FileNotFoundError:
            log.warning("%s was gone already", entry.host_path)
        except OSError as error:
            failure = error
    if failure is not None and not aside:
        raise failure
    if failure is not None:
        log.error("%s", failure)
    return aside


def is_set_aside(instance: Instance) -> bool:
    """Whether set_aside() has begun: something that does not persist is not in its place any more."""
    return any(
        entry.directory.lifetime is Lifetime.INSTANCE and not os.path.lexists(host.path(entry.host_path))
        for entry in instance.directories
    )


def set_persistent_aside(uid: int, directories: Sequence[Directory]) -> list[tuple[str, str]]:
    """Rename what is kept of a user who has no instance. Raises OSError."""
    aside: list[tuple[str, str]] = []
    for directory in effective(directories):
        if directory.lifetime is Lifetime.PERSISTENT:
            with contextlib.suppress(FileNotFoundError), host.open_directory(directory.path) as base:
                aside.append((directory.path, _set_aside(base, names.kept_barrier(uid))))
    return aside


def delete(
    aside: Sequence[tuple[str, str]], report: Callable[[int], None], cancelled: Callable[[], bool]
) -> None:
    """Delete what set_aside() gave; the first OSError is raised after all were tried.

    report is told how many entries are gone.
    """
    failures: list[OSError] = []
    done = 0

    def reported(entries: int) -> None:
        report(done + entries)

    for path, name in aside:
        try:
            with host.open_directory(path) as base:
                done += deletion.remove_tree(base, name, report=reported, cancelled=cancelled).entries
        except FileNotFoundError:
            continue  # an earlier attempt, or an administrator, deleted it
        except OSError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def find_leftovers(directories: Sequence[Directory], known: set[str]) -> list[tuple[str, str]]:
    """(directory, barrier) of what is on disk and of no instance. Logs what cannot be read.

    known: the barriers of instances.
    """
    leftovers: list[tuple[str, str]] = []
    for directory in effective(directories):
        try:
            with host.open_directory(directory.path) as base:
                found = storage.leftovers(base)
        except OSError as error:  # whoever logs in is refused for it: no reason to end
            log.error("%s cannot be looked into: %s", directory.path, error)
            continue
        leftovers += [(directory.path, name) for name in found.removable if name not in known]
        for name, reason in found.foreign:
            log.warning(
                "%s/%s has a name of polytmp's but is not: %s, ignoring", directory.path, name, reason
            )
    return leftovers


def unused(leftovers: Sequence[tuple[str, str]], cancelled: Callable[[], bool]) -> list[tuple[str, str]]:
    """Those that nobody has mounted. Raises OSError, where it was cancelled too."""
    in_use = recovery.mounted_barriers(leftovers, cancelled)
    return [(path, name) for path, name in leftovers if name not in in_use]


def delete_leftover(path: str, name: str, cancelled: Callable[[], bool]) -> None:
    """Logs what cannot be deleted."""
    try:
        with host.open_directory(path) as base:
            deletion.remove_tree(base, name, cancelled=cancelled)
    except OSError as error:
        log.error(
            "Left-over instance cannot be deleted, the next start tries again: %s",
            error,
            extra=fields(MessageId.REMOVE_FAILED),
        )


def effective(directories: Sequence[Directory]) -> list[Directory]:
    """The directories by their real paths, each once: /var/tmp is a link to /tmp on some hosts."""
    found: dict[str, Directory] = {}
    for directory in directories:
        real = os.path.realpath(directory.path)
        if not any(real == other or real.startswith(other + "/") for other in found):
            found[real] = replace(directory, path=real)
    return list(found.values())


def who_mounts(instance: Instance, cancelled: Callable[[], bool]) -> int | None:
    """A process that has mounted what ends with the instance, in whatever namespace. Raises OSError."""
    places = [
        (entry.directory.path, entry.barrier)
        for entry in instance.directories
        if entry.directory.lifetime is Lifetime.INSTANCE
    ]
    return next(iter(recovery.mounted_barriers(places, cancelled).values()), None)


def _is_ours(instance: Instance, mount: Mount) -> bool:
    """Whether the mount is a part of the instance, and none that was made in it."""
    for entry in instance.directories:
        path = entry.directory.path
        if mount.mount_point == path:
            return mount.root.endswith(f"/{entry.barrier}/{INNER}")
        if mount.mount_point in {f"{path}/{name}" for name in entry.directory.shared}:
            return True
    return False


def _make_or_adopt(base: int, entry: InstanceDirectory, uid: int, user: str) -> tuple[int, bool]:
    """(descriptor of the inner directory, whether it is new).

    Only what persists is ever found there and taken again.
    """
    if entry.directory.lifetime is not Lifetime.PERSISTENT:
        return storage.make(base, entry.barrier, entry.directory.shared), True
    with contextlib.suppress(FileNotFoundError):
        _keep_for_a_former_user(base, entry, uid, user)
        return storage.adopt(base, entry.barrier, entry.directory.shared, user), False
    return storage.make(base, entry.barrier, entry.directory.shared, user), True


def _keep_for_a_former_user(base: int, entry: InstanceDirectory, uid: int, user: str) -> None:
    """Set aside what somebody else left who had the UID before, for root to find."""
    former = storage.remembered(base, entry.barrier)
    if former is None or not accounts.is_former(former, uid, user):
        return
    aside = names.former(uid, _random())
    storage.set_aside(base, entry.barrier, aside)
    log.warning(
        "UID %d was %s's and is %s's now, who gets a new %s; what %s kept there is in %s/%s",
        uid,
        former,
        user,
        entry.directory.path,
        former,
        entry.directory.path,
        aside,
        extra=fields(MessageId.FORMER_USER, uid, user),
    )


def _new_barrier(lifetime: Lifetime, boot_id: str, uid: int) -> str:
    if lifetime is Lifetime.PERSISTENT:
        return names.kept_barrier(uid)
    return names.barrier(boot_id, uid, _random())


def _set_aside(base: int, barrier: str) -> str:
    new = names.removing(_random())
    storage.set_aside(base, barrier, new)
    return new


def _random() -> str:
    return secrets.token_hex(names.RANDOM_BYTES)


def _shareable(base: int, directory: Directory) -> tuple[str, ...]:
    names = []
    for name in directory.shared:
        try:
            shared.ensure(base, name)
        except OSError as error:
            log.warning("%s/%s is not shared with new instances: %s", directory.path, name, error.strerror)
        else:
            names.append(name)
    return tuple(names)


def _place(entry: InstanceDirectory, inner: int) -> mountns.PrivateDirectory:
    try:
        status = os.fstat(inner)
    finally:
        os.close(inner)
    directory = entry.directory
    source = f"{entry.barrier}/{INNER}"
    return mountns.PrivateDirectory(directory.path, source, (status.st_dev, status.st_ino), directory.shared)


def _roll_back(entries: Sequence[InstanceDirectory]) -> None:
    for entry in entries:
        try:
            with host.open_directory(entry.directory.path) as base:
                deletion.remove_tree(base, entry.barrier)
        except OSError as error:
            log.error("Half-made instance directory stays until the next start: %s", error)

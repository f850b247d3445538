# SPDX-License-Identifier: LGPL-2.1-or-later
"""Does what the lifecycle asks for: makes instances, holds and lets go their namespaces, removes them.

Owns the descriptors of the namespaces, the inotify instance on the sentinels, and their copies in the FD
store. For one user one operation runs at a time; what blocks runs in threads.
Not here: when anything is to be done (daemon, core/lifecycle).
"""

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from polytmpd import deletion, sdnotify, shared, storage
from polytmpd.core.model import (
    INNER,
    LEFTOVER,
    Directory,
    Instance,
    InstanceDirectory,
    Lifetime,
    barrier_name,
)
from polytmpd.journal import MessageId, fields
from polytmpd.kernel import mountns, processes
from polytmpd.kernel.inotify import IN_DELETE_SELF, IN_UNMOUNT, Inotify, is_inotify
from polytmpd.state import StateDirectory

log = logging.getLogger(__name__)

SENTINELS: Final = "sentinels"
_DELETIONS_AT_ONCE: Final = 4


@dataclass(frozen=True, slots=True)
class Restored:
    """What was there at start. ended: instances nobody lives in any more, to be removed."""

    held: tuple[Instance, ...]
    draining: tuple[Instance, ...]
    ended: tuple[Instance, ...]


class Executor:
    """One for a daemon; its methods are called in the event loop."""

    def __init__(self, state: StateDirectory, boot_id: str, ended: Callable[[int], None]) -> None:
        """ended(uid) is called when the last sentinel of a user's instance ended. Raises OSError."""
        self._state = state
        self._boot_id = boot_id
        self._ended = ended
        self._held: dict[int, int] = {}
        self._watches: dict[int, int] = {}
        self._locks: dict[int, asyncio.Lock] = {}
        self._deletions = asyncio.Semaphore(_DELETIONS_AT_ONCE)
        self._inotify: Inotify | None = None

    # Start and stop

    def restore(self) -> Restored:
        """Take over what a former process left:

        the FD store, the state files. Blocking; once, before start().
        """
        stored: dict[str, int] = {}
        for name, kept in sdnotify.take_stored():
            if name in stored:
                os.close(kept)
            else:
                stored[name] = kept
        inotify_fd: int | None = stored.pop(SENTINELS, None)
        if inotify_fd is not None and not is_inotify(inotify_fd):
            log.warning("The FD store's %s is no inotify instance, ignoring", SENTINELS)
            os.close(inotify_fd)
            inotify_fd = None
        self._inotify = Inotify(inotify_fd)
        if inotify_fd is None:
            sdnotify.store(SENTINELS, self._inotify.fd)
        recorded, problems = self._state.load()
        for problem in problems:
            log.warning("%s", problem)
        held: list[Instance] = []
        draining: list[Instance] = []
        ended: list[Instance] = []
        for uid, instance in recorded.items():
            fd: int | None = stored.pop(_stored_name(uid), None)
            if fd is not None and _inode_or_none(fd) != instance.namespace:
                log.warning("The FD store's ns-%d is not the namespace of that user, ignoring", uid)
                os.close(fd)
                fd = None
            if fd is not None:
                self._held[uid] = fd
                held.append(instance)
            elif (found := processes.open_namespace(instance.namespace)) is not None:
                os.close(found)
                draining.append(instance)
            else:
                ended.append(instance)
                continue
            self._watches.update(dict.fromkeys(instance.watches, uid))
        for name, kept in stored.items():
            log.warning("The FD store's %s belongs to no instance, letting it go", name)
            sdnotify.remove(name)
            os.close(kept)
        return Restored(tuple(held), tuple(draining), tuple(ended))

    def start(self) -> None:
        """Hear of namespaces that end, also of those that ended before."""
        asyncio.get_running_loop().add_reader(self._sentinels.fd, self._on_sentinel)

    def close(self) -> None:
        """Let go of everything but what the FD store holds."""
        if self._inotify is not None:
            asyncio.get_running_loop().remove_reader(self._inotify.fd)
            self._inotify.close()
        for fd in self._held.values():
            os.close(fd)
        self._held.clear()

    # Actions

    async def prepare(self, uid: int, user: str, directories: Sequence[Directory]) -> Instance:
        """Make directories and namespace, hold the descriptor.

        Raises OSError; nothing is left behind then.
        """
        async with self._lock(uid):
            return self._hold(*await asyncio.to_thread(self._prepare, uid, user, directories))

    async def rejoin(self, instance: Instance) -> Instance:
        """Hold a draining namespace again, found through whoever lives in it; the files are the same in any
        case.

        Where nobody is found it has ended, or is held by what cannot be entered (a descriptor in flight, a
        bind mount of the namespace): then a new namespace is made over the same directories. Raises OSError.
        """
        async with self._lock(instance.uid):
            fd = await asyncio.to_thread(processes.open_namespace, instance.namespace)
            if fd is not None:
                return self._hold(instance, fd)
            return self._hold(*await asyncio.to_thread(self._rebuild, instance))

    def hand_over(self, uid: int) -> int:
        """A copy of the descriptor of a held namespace, the caller's to close. Raises OSError (EMFILE)."""
        return os.dup(self._held[uid])

    def let_go(self, uid: int) -> None:
        """Close the descriptor, and the FD store's."""
        sdnotify.remove(_stored_name(uid))
        os.close(self._held.pop(uid))

    async def remove(self, instance: Instance) -> None:
        """Delete what lives as long as the instance. Renaming aside comes first; a new instance waits for
        that alone.

        Raises OSError naming what is in the way; the next start tries again.
        """
        async with self._lock(instance.uid):
            for watch in self._watches_of(instance.uid):
                del self._watches[watch]
            aside = await asyncio.to_thread(_set_aside, instance)
            self._forget(instance.uid)
        async with self._deletions:
            await asyncio.to_thread(_delete, aside)

    async def clear_leftovers(self, directories: Sequence[Directory], known: set[str]) -> None:
        """Delete what former boots, and a daemon that was killed, left on disk.

        Logs what cannot be deleted.
        """
        async with self._deletions:
            await asyncio.to_thread(_clear_leftovers, directories, known)

    # Within

    @property
    def _sentinels(self) -> Inotify:
        if self._inotify is None:
            raise RuntimeError("restore() comes first")
        return self._inotify

    def _lock(self, uid: int) -> asyncio.Lock:
        return self._locks.setdefault(uid, asyncio.Lock())

    def _watches_of(self, uid: int) -> list[int]:
        return [watch for watch, owner in self._watches.items() if owner == uid]

    def _hold(self, instance: Instance, fd: int, watch: int | None = None) -> Instance:
        """watch: the sentinel's, where the namespace is new."""
        if (old := self._held.pop(instance.uid, None)) is not None:
            os.close(old)
        self._held[instance.uid] = fd
        if watch is not None:
            self._watches[watch] = instance.uid
        # Not the ones that the instance had: a former namespace over the same files may have ended
        # meanwhile.
        instance = replace(instance, watches=frozenset(self._watches_of(instance.uid)))
        sdnotify.store(_stored_name(instance.uid), fd)
        try:
            self._state.save(instance)
        except OSError as error:
            log.warning("State of UID %d cannot be written: %s, ignoring", instance.uid, error)
        return instance

    def _forget(self, uid: int) -> None:
        try:
            self._state.forget(uid)
        except OSError as error:
            log.warning("State of UID %d cannot be removed: %s, ignoring", uid, error)

    def _watch_sentinel(self, path: str) -> int:
        return self._sentinels.add_watch(path, IN_DELETE_SELF)

    def _on_sentinel(self) -> None:
        for event in self._sentinels.read():
            if not event.mask & IN_UNMOUNT or event.watch not in self._watches:
                continue
            uid = self._watches.pop(event.watch)
            if not self._watches_of(uid):
                self._ended(uid)

    def _prepare(self, uid: int, user: str, directories: Sequence[Directory]) -> tuple[Instance, int, int]:
        made: list[InstanceDirectory] = []
        fresh: list[InstanceDirectory] = []
        places: list[mountns.PrivateDirectory] = []
        try:
            for directory in _effective(directories):
                with _base(directory.path) as base:
                    entry = InstanceDirectory(
                        replace(directory, shared=_shareable(base, directory)),
                        barrier_name(directory.lifetime, self._boot_id, uid, secrets.token_hex(8)),
                    )
                    inner, is_new = _make_or_adopt(base, entry)
                    made.append(entry)
                    if is_new:
                        fresh.append(entry)
                    places.append(_place(entry, inner))
            namespace = mountns.build(places, self._watch_sentinel)
        except BaseException:
            _roll_back(fresh)
            raise
        now, monotonic = time.time_ns() // 1000, time.monotonic_ns() // 1000
        instance = Instance(uid, user, now, monotonic, tuple(made), namespace.inode)
        return instance, namespace.fd, namespace.watch

    def _rebuild(self, instance: Instance) -> tuple[Instance, int, int]:
        places = []
        for entry in instance.directories:
            with _base(entry.directory.path) as base:
                places.append(_place(entry, storage.adopt(base, entry.barrier, entry.directory.shared)))
        namespace = mountns.build(places, self._watch_sentinel)
        return replace(instance, namespace=namespace.inode), namespace.fd, namespace.watch


def _stored_name(uid: int) -> str:
    return f"ns-{uid}"


def _inode_or_none(fd: int) -> int | None:
    try:
        return mountns.namespace_inode(fd)
    except OSError:
        return None


@contextlib.contextmanager
def _base(path: str) -> Iterator[int]:
    """A descriptor of the host's own directory, whatever mount namespace the unit's sandbox gave to this
    process.
    """
    fd = os.open(f"{mountns.HOST}/root{path}", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _effective(directories: Sequence[Directory]) -> list[Directory]:
    """The directories by their real paths, each once: /var/tmp is a link to /tmp on some hosts."""
    found: dict[str, Directory] = {}
    for directory in directories:
        real = os.path.realpath(directory.path)
        if not any(real == other or real.startswith(other + "/") for other in found):
            found[real] = replace(directory, path=real)
    return list(found.values())


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


def _make_or_adopt(base: int, entry: InstanceDirectory) -> tuple[int, bool]:
    """(descriptor of the inner directory, whether it is new).

    Only what persists is ever found there and taken again.
    """
    if entry.directory.lifetime is Lifetime.PERSISTENT:
        with contextlib.suppress(FileNotFoundError):
            return storage.adopt(base, entry.barrier, entry.directory.shared), False
    return storage.make(base, entry.barrier, entry.directory.shared), True


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
            with _base(entry.directory.path) as base:
                deletion.remove_tree(base, entry.barrier)
        except OSError as error:
            log.error("Half-made instance directory stays until the next start: %s", error)


def _set_aside(instance: Instance) -> list[tuple[str, str]]:
    aside = []
    for entry in instance.directories:
        if entry.directory.lifetime is Lifetime.PERSISTENT:
            continue
        try:
            with _base(entry.directory.path) as base:
                aside.append((entry.directory.path, storage.set_aside(base, entry.barrier)))
        except FileNotFoundError:
            log.warning("%s was gone already", entry.host_path)
    return aside


def _delete(aside: Sequence[tuple[str, str]]) -> None:
    failures: list[OSError] = []
    for path, name in aside:
        try:
            with _base(path) as base:
                deletion.remove_tree(base, name)
        except OSError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _clear_leftovers(directories: Sequence[Directory], known: set[str]) -> None:
    for directory in _effective(directories):
        with _base(directory.path) as base:
            found = storage.leftovers(base, LEFTOVER)
            for name in found.removable:
                if name in known:
                    continue
                try:
                    deletion.remove_tree(base, name)
                except OSError as error:
                    log.error(
                        "Left-over instance cannot be deleted, the next start tries again: %s",
                        error,
                        extra=fields(MessageId.REMOVE_FAILED),
                    )
            for name, reason in found.foreign:
                log.warning(
                    "%s/%s has a name of polytmp's but is not: %s, ignoring", directory.path, name, reason
                )

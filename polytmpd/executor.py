# SPDX-License-Identifier: LGPL-2.1-or-later
"""Does what the lifecycle asks for: makes instances, holds and lets go their namespaces, removes them.

Owns the descriptors of the namespaces, the inotify instance on the sentinels, and their copies in the FD
store. For one user one operation runs at a time; what blocks runs in threads.
Not here: when anything is to be done (daemon, core/lifecycle).
"""

import asyncio
import contextlib
import errno
import functools
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from polytmpd import accounts, deletion, recovery, sdnotify, shared, storage, tmpfiles
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
from polytmpd.kernel import mountns, pidfd, processes
from polytmpd.kernel.inotify import (
    IN_DELETE_SELF,
    IN_Q_OVERFLOW,
    IN_UNMOUNT,
    Inotify,
    is_inotify,
    living_watches,
)
from polytmpd.kernel.mountinfo import Mount
from polytmpd.state import StateDirectory

log = logging.getLogger(__name__)

SENTINELS: Final = "sentinels"
_STORED: Final = "ns-"
_DELETIONS_AT_ONCE: Final = 4
_LOOK_AGAIN: Final = 30.0
"""Seconds after which it is looked again whether a process still has an instance mounted."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What was there at start. ended: instances nobody lives in any more, to be removed."""

    held: list[Instance]
    draining: list[Instance]
    ended: list[Instance]


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
        # Threads of their own: a user decides how long a deletion takes, and no login may wait for one.
        self._deleters = ThreadPoolExecutor(_DELETIONS_AT_ONCE, "deletion")
        self._inotify: Inotify | None = None
        self._instances: dict[int, Instance] = {}
        self._confirming: dict[int, asyncio.Task[None]] = {}
        self._unconfirmed: list[int] = []
        self._undeleted: dict[int, list[tuple[str, str]]] = {}
        self._progress: dict[int, int] = {}
        self._stopping = threading.Event()

    # Start and stop

    def restore(self, directories: Sequence[Directory]) -> Restored:
        """Take over what a former process left: the FD store, the state files, and whoever lives in a
        namespace.

        Any of the three can be missing: Debian 12's systemd drops the FD store at a stop, and a state file
        can be lost. Blocking; once, before start(). Raises OSError, also where another daemon runs.
        """
        self._state.lock()
        namespaces = self._take_stored()
        watched = living_watches(self._sentinels.fd)
        recorded, problems = self._state.load()
        for problem in problems:
            log.warning("%s", problem)
        living = {entry.uid: entry for entry in recovery.living(directories)}
        restored = Restored([], [], [])
        for uid in sorted({*namespaces, *recorded, *living}):
            fd = namespaces.get(uid)
            instance = recorded.get(uid)
            if fd is not None and (instance is None or _inode(fd) != instance.namespace):
                held = recovery.reconstruct(uid, _inode(fd), mountns.mounts_in(fd), directories)
                if held is not None:
                    instance = held
                else:
                    log.warning("The FD store's namespace of UID %d is none of ours, letting it go", uid)
                    self._drop(uid, fd)
                    fd = None
            if instance is None and uid in living:
                entry = living[uid]
                instance = recovery.reconstruct(uid, entry.namespace, entry.mounts, directories)
            if instance is None:
                continue
            self._restore_one(instance, fd, instance.watches & watched, restored)
        self._restore_unconfirmed(restored)
        return restored

    def _restore_unconfirmed(self, restored: "Restored") -> None:
        """What has ended may be mounted in a namespace that is none of ours, see _confirm_end()."""
        mounted = recovery.mounted_barriers() if restored.ended else {}
        for instance in list(restored.ended):
            if not _own_barriers(instance).isdisjoint(mounted):
                restored.ended.remove(instance)
                restored.draining.append(instance)
                self._unconfirmed.append(instance.uid)

    def _take_stored(self) -> dict[int, int]:
        """UID → namespace descriptor, ours from now on. The inotify instance is taken, or a new one made."""
        namespaces: dict[int, int] = {}
        for name, fd in sdnotify.take_stored():
            uid = name.removeprefix(_STORED)
            if name == SENTINELS and self._inotify is None and is_inotify(fd):
                self._inotify = Inotify(fd)
            elif (
                name.startswith(_STORED) and uid.isdecimal() and _is_namespace(fd, namespaces.get(int(uid)))
            ):
                namespaces[int(uid)] = fd
            else:
                log.warning("The FD store's %s is nothing that we put there, letting it go", name)
                sdnotify.remove(name)
                os.close(fd)
        if self._inotify is None:
            self._inotify = Inotify()
            sdnotify.store(SENTINELS, self._inotify.fd)
        return namespaces

    def _restore_one(
        self, instance: Instance, fd: int | None, watches: frozenset[int], restored: "Restored"
    ) -> None:
        """watches: those of the instance that are still there.

        Their sentinels live, and so does the namespace.
        """
        uid = instance.uid
        if not watches:
            found = fd if fd is not None else _open_living(instance)
            if found is None:
                self._instances[uid] = instance
                restored.ended.append(instance)
                return
            try:
                watches = frozenset({self._renew_sentinel(instance, found)})
            except OSError as error:
                log.error(
                    "The end of %s's instance cannot be noticed any more, it stays until the next boot: %s",
                    instance.user,
                    error,
                )
            if fd is None:
                os.close(found)
        self._watches.update(dict.fromkeys(watches, uid))
        instance = replace(instance, watches=watches)
        self._instances[uid] = instance
        self._save(instance)
        if fd is not None:
            self._held[uid] = fd
            restored.held.append(instance)
        else:
            restored.draining.append(instance)

    def _renew_sentinel(self, instance: Instance, fd: int) -> int:
        first = instance.directories[0].directory
        return mountns.renew_sentinel(fd, first.path, first.shared, self._watch_sentinel)

    def _drop(self, uid: int, fd: int) -> None:
        sdnotify.remove(_stored_name(uid))
        os.close(fd)

    def start(self) -> None:
        """Hear of namespaces that end, also of those that ended before."""
        asyncio.get_running_loop().add_reader(self._sentinels.fd, self._on_sentinel)
        while self._unconfirmed:
            self._confirm(self._unconfirmed.pop())

    async def close(self) -> None:
        """Let go of everything but what the FD store holds.

        Deletions stop where they are; the next start goes on.
        """
        self._stopping.set()
        self._deleters.shutdown(wait=False, cancel_futures=True)
        for task in self._confirming.values():
            task.cancel()
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
            await asyncio.to_thread(_require_same_user, instance)
            fd = await asyncio.to_thread(_open_living, instance)
            if fd is not None:
                return self._hold(instance, fd)
            return self._hold(*await asyncio.to_thread(self._rebuild, instance))

    def has_ended(self, uid: int) -> bool:
        """Whether no sentinel of the user's instance is left, and nobody is being waited for."""
        return not self._watches_of(uid) and uid not in {*self._confirming, *self._unconfirmed}

    async def share_again(self, path: str) -> None:
        """Give the host's socket directories in path, where they were made again, to the living instances.

        Logs what fails.
        """
        for uid, instance in list(self._instances.items()):
            async with self._lock(uid):
                try:
                    held = os.dup(self._held[uid]) if uid in self._held else None
                    changed = await asyncio.to_thread(_share_again, instance, held, path)
                except OSError as error:
                    log.warning(
                        "User %s has the former socket directories of %s, until the instance ends: %s",
                        instance.user,
                        path,
                        error,
                    )
                    continue
            if changed:
                log.info("User %s has the new %s", instance.user, ", ".join(changed))

    async def detach(self, chosen: Callable[[Mount], bool]) -> None:
        """Detach the chosen ones of the mounts that lie in private directories, where nobody else sees them.

        Logs what it did, and what fails.
        """
        for uid, instance in list(self._instances.items()):
            async with self._lock(uid):
                try:
                    held = os.dup(self._held[uid]) if uid in self._held else None
                    gone = await asyncio.to_thread(_detach, instance, held, chosen)
                except OSError as error:
                    log.warning("What user %s has mounted cannot be looked at: %s", instance.user, error)
                    continue
            if gone:
                log.warning(
                    "Unmounted %s in the instance of user %s: the device is gone",
                    ", ".join(gone),
                    instance.user,
                    extra=fields(MessageId.DEVICE_GONE, uid, instance.user),
                )

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

        Raises OSError naming what is in the way; the next removal for the user, and the next start, try
        again.
        """
        async with self._lock(instance.uid):
            for watch in self._watches_of(instance.uid):
                del self._watches[watch]
            known = instance.uid in self._instances  # else it was set aside before, and could not be deleted
            aside = await asyncio.to_thread(_set_aside, instance) if known else []
            self._forget(instance.uid)
            self._instances.pop(instance.uid, None)
        await self._delete(instance.uid, aside)

    async def remove_persistent(self, uid: int, directories: Sequence[Directory]) -> bool:
        """Delete what is kept of a user who has no instance, and what former removals left.

        Returns whether there was anything. Raises OSError.
        """
        async with self._lock(uid):
            if self._watches_of(uid):
                raise OSError(errno.EBUSY, "the user has just logged in")
            aside = await asyncio.to_thread(_set_persistent_aside, uid, directories)
        return await self._delete(uid, aside)

    def removed_entries(self, uid: int) -> int:
        """How many entries the removal that runs for the user has deleted so far."""
        return self._progress.get(uid, 0)

    def persistent(self, uid: int, directories: Sequence[Directory]) -> tuple[InstanceDirectory, ...]:
        """What is kept of a user between instances. Blocking, short."""
        entries = [
            InstanceDirectory(directory, barrier_name(directory.lifetime, self._boot_id, uid, ""))
            for directory in _effective(directories)
            if directory.lifetime is Lifetime.PERSISTENT
        ]
        return tuple(entry for entry in entries if Path(f"{mountns.HOST}/root{entry.host_path}").is_dir())

    async def find_leftovers(
        self, directories: Sequence[Directory], known: set[str]
    ) -> list[tuple[str, str]]:
        """(directory, barrier) of what former boots, and a daemon that was killed, left on disk.

        known: the barriers of instances. No instance may be made meanwhile: it would be taken for one.
        """
        return await asyncio.to_thread(_find_leftovers, directories, known)

    async def tell_age_cleaner(self, directories: Sequence[Directory]) -> None:
        """Have the age cleaner spare these directories' barriers, and the living instances'. Logs what
        fails.
        """
        living = [entry.directory for instance in self._instances.values() for entry in instance.directories]
        try:
            await asyncio.to_thread(tmpfiles.write, (*directories, *living))
        except OSError as error:
            log.warning("systemd-tmpfiles may age the directories of instances: %s, ignoring", error)

    async def delete_leftovers(self, leftovers: Sequence[tuple[str, str]]) -> None:
        """Delete what find_leftovers() found. Logs what cannot be deleted."""
        for path, name in leftovers:
            await self._in_deleter(_delete_leftover, path, name)

    # Within

    async def _delete(self, uid: int, aside: Sequence[tuple[str, str]]) -> bool:
        """Whether there was anything, what former attempts left included. Raises OSError."""
        left = [*self._undeleted.pop(uid, ()), *aside]

        def report(entries: int) -> None:
            self._progress[uid] = entries

        try:
            await self._in_deleter(_delete, left, report)
        except BaseException:
            self._undeleted[uid] = [*left, *self._undeleted.get(uid, ())]
            raise
        finally:
            self._progress.pop(uid, None)
        return bool(left)

    async def _in_deleter(self, work: Callable[..., None], *arguments: object) -> None:
        call = functools.partial(work, *arguments, self._stopping.is_set)
        await asyncio.get_running_loop().run_in_executor(self._deleters, call)

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
        self._instances[instance.uid] = instance
        sdnotify.store(_stored_name(instance.uid), fd)
        self._save(instance)
        return instance

    def _save(self, instance: Instance) -> None:
        try:
            self._state.save(instance)
        except OSError as error:
            log.warning("State of UID %d cannot be written: %s, ignoring", instance.uid, error)

    def _forget(self, uid: int) -> None:
        try:
            self._state.forget(uid)
        except OSError as error:
            log.warning("State of UID %d cannot be removed: %s, ignoring", uid, error)

    def _watch_sentinel(self, path: str) -> int:
        return self._sentinels.add_watch(path, IN_DELETE_SELF)

    def _on_sentinel(self) -> None:
        events = self._sentinels.read()
        ended = {event.watch for event in events if event.mask & IN_UNMOUNT}
        if any(event.mask & IN_Q_OVERFLOW for event in events):  # some were lost: ask which are left
            ended |= set(self._watches) - living_watches(self._sentinels.fd)
        for watch in ended & set(self._watches):
            uid = self._watches.pop(watch)
            if not self._watches_of(uid) and uid not in self._confirming:
                self._confirm(uid)

    def _confirm(self, uid: int) -> None:
        task = asyncio.get_running_loop().create_task(self._confirm_end(uid))
        self._confirming[uid] = task
        task.add_done_callback(functools.partial(self._confirmed, uid))

    def _confirmed(self, uid: int, task: "asyncio.Task[None]") -> None:
        del self._confirming[uid]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("Whether the instance of UID %d ended cannot be told, it stays: %r", uid, error)

    async def _confirm_end(self, uid: int) -> None:
        """Report the end, unless somebody took a bind mount of the instance along into a namespace of his
        own.

        That one has no sentinel: bwrap --bind /tmp /tmp, say, moved to another cgroup so that the slice does
        not know of it.
        """
        barriers = _own_barriers(self._instances[uid])
        while True:
            # Locked: a login that makes a new namespace over the same files has them mounted in a thread of
            # our own process.
            async with self._lock(uid):
                if self._watches_of(uid):
                    return  # such a login came meanwhile
                mounted = await asyncio.to_thread(recovery.mounted_barriers)
            pid = next((mounted[barrier] for barrier in barriers if barrier in mounted), None)
            if pid is None:
                self._ended(uid)
                return
            log.info("Process %d has the instance of UID %d mounted in its own namespace, waiting", pid, uid)
            # It may unmount it and live on, root's shell say: look again every now and then.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(pidfd.wait_for_exit(pid), _LOOK_AGAIN)

    def _prepare(self, uid: int, user: str, directories: Sequence[Directory]) -> tuple[Instance, int, int]:
        made: list[InstanceDirectory] = []
        fresh: list[InstanceDirectory] = []
        places: list[mountns.PrivateDirectory] = []
        user = accounts.name_of(uid, user)  # we may have been told of a former user
        try:
            for directory in _effective(directories):
                with _base(directory.path) as base:
                    entry = InstanceDirectory(
                        replace(directory, shared=_shareable(base, directory)),
                        barrier_name(directory.lifetime, self._boot_id, uid, secrets.token_hex(8)),
                    )
                    inner, is_new = _make_or_adopt(base, entry, uid, user)
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
    return f"{_STORED}{uid}"


def _inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def _own_barriers(instance: Instance) -> set[str]:
    """The barriers that end with the instance."""
    return {entry.barrier for entry in instance.directories if entry.directory.lifetime is Lifetime.INSTANCE}


def _open_living(instance: Instance) -> int | None:
    """A descriptor of the instance's namespace where somebody lives in it.

    Inodes are used again: its mounts count.
    """
    fd = processes.open_namespace(instance.namespace)
    if fd is None:
        return None
    try:
        mounted = {recovery.barrier_of(mount) for mount in mountns.mounts_in(fd)}
    except OSError:  # another one by now, in which no /proc is mounted: a sandbox that is being made
        mounted = set()
    if all(entry.barrier in mounted for entry in instance.directories):
        return fd
    os.close(fd)
    return None


def _is_namespace(fd: int, other: int | None) -> bool:
    """Whether it is a mount namespace, the first of that name."""
    try:
        return mountns.namespace_inode(fd) != 0 and other is None
    except OSError:
        return False


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


def _share_again(instance: Instance, held: int | None, path: str) -> list[str]:
    """held: a descriptor of the namespace, closed here; without one its processes are asked."""
    fd = held if held is not None else processes.open_namespace(instance.namespace)
    if fd is None:
        return []
    try:
        changed: list[str] = []
        for entry in instance.directories:
            if entry.directory.path == path:
                with _base(path) as base:
                    names = _shareable(base, entry.directory)
                changed += mountns.share_again(fd, path, names)
        return changed
    finally:
        os.close(fd)


def _detach(instance: Instance, held: int | None, chosen: Callable[[Mount], bool]) -> list[str]:
    """held: as above."""
    fd = held if held is not None else _open_living(instance)
    if fd is None:
        return []
    try:
        return mountns.detach(fd, [entry.directory.path for entry in instance.directories], chosen)
    finally:
        os.close(fd)


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
    aside = storage.set_aside(base, entry.barrier, f"polytmp-former-{uid}-")
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


def _require_same_user(instance: Instance) -> None:
    """Raise OSError where the UID went to somebody else while a former user's instance lives on."""
    present = accounts.name_of(instance.uid, instance.user)
    if accounts.is_former(instance.user, instance.uid, present):
        text = f"processes live in the instance of {instance.user}, who had UID {instance.uid} before"
        raise OSError(errno.EBUSY, f"{text}; end them, see polytmpctl ps {instance.uid}")


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
    """Rename what does not persist. Raises OSError where one could not be renamed, after the others were."""
    aside: list[tuple[str, str]] = []
    failure: OSError | None = None
    for entry in instance.directories:
        if entry.directory.lifetime is Lifetime.PERSISTENT:
            continue
        try:
            with _base(entry.directory.path) as base:
                aside.append((entry.directory.path, storage.set_aside(base, entry.barrier)))
        except FileNotFoundError:
            log.warning("%s was gone already", entry.host_path)
        except OSError as error:
            failure = error
    if failure is not None and not aside:
        raise failure
    if failure is not None:
        log.error("%s", failure)
    return aside


def _set_persistent_aside(uid: int, directories: Sequence[Directory]) -> list[tuple[str, str]]:
    aside: list[tuple[str, str]] = []
    for directory in _effective(directories):
        if directory.lifetime is Lifetime.PERSISTENT:
            with contextlib.suppress(FileNotFoundError), _base(directory.path) as base:
                aside.append(
                    (directory.path, storage.set_aside(base, barrier_name(directory.lifetime, "", uid, "")))
                )
    return aside


def _delete(
    aside: Sequence[tuple[str, str]], report: Callable[[int], None], cancelled: Callable[[], bool]
) -> None:
    """report is told how many entries are gone."""
    failures: list[OSError] = []
    done = 0

    def reported(entries: int) -> None:
        report(done + entries)

    for path, name in aside:
        try:
            with _base(path) as base:
                done += deletion.remove_tree(base, name, report=reported, cancelled=cancelled).entries
        except FileNotFoundError:
            continue  # an earlier attempt, or an administrator, deleted it
        except OSError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _find_leftovers(directories: Sequence[Directory], known: set[str]) -> list[tuple[str, str]]:
    """(directory, barrier) of what nobody lives in, and nobody has mounted."""
    in_use = known | set(recovery.mounted_barriers())
    leftovers: list[tuple[str, str]] = []
    for directory in _effective(directories):
        try:
            with _base(directory.path) as base:
                found = storage.leftovers(base, LEFTOVER)
        except OSError as error:  # whoever logs in is refused for it: no reason to end
            log.error("%s cannot be looked into: %s", directory.path, error)
            continue
        leftovers += [(directory.path, name) for name in found.removable if name not in in_use]
        for name, reason in found.foreign:
            log.warning(
                "%s/%s has a name of polytmp's but is not: %s, ignoring", directory.path, name, reason
            )
    return leftovers


def _delete_leftover(path: str, name: str, cancelled: Callable[[], bool]) -> None:
    try:
        with _base(path) as base:
            deletion.remove_tree(base, name, cancelled=cancelled)
    except OSError as error:
        log.error(
            "Left-over instance cannot be deleted, the next start tries again: %s",
            error,
            extra=fields(MessageId.REMOVE_FAILED),
        )

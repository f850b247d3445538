# SPDX-License-Identifier: LGPL-2.1-or-later
"""Does what the lifecycle asks for: makes instances, holds and lets go their namespaces, removes them.

Owns the descriptors of the namespaces, the inotify instance on the sentinels, and their copies in the FD
store. For one user one operation runs at a time; what blocks runs in threads.
Not here: when anything is to be done (daemon, core/lifecycle), and the work of those threads (instances).
"""

import asyncio
import contextlib
import errno
import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from polytmpd import sdnotify
from polytmpd.blocking import instances, recovery, tmpfiles
from polytmpd.blocking.state import StateDirectory
from polytmpd.core import names
from polytmpd.core.model import (
    Directory,
    Instance,
    InstanceDirectory,
    Lifetime,
)
from polytmpd.journal import MessageId, fields
from polytmpd.kernel import host, mountns, pidfd
from polytmpd.kernel.inotify import (
    IN_DELETE_SELF,
    IN_Q_OVERFLOW,
    IN_UNMOUNT,
    Inotify,
    is_inotify,
    living_watches,
)
from polytmpd.kernel.mountinfo import Mount

log = logging.getLogger(__name__)

T = TypeVar("T")

SENTINELS: Final = "sentinels"
_STORED: Final = "ns-"
_DELETIONS_AT_ONCE: Final = 4
_LOOK_AGAIN: Final = 30.0
"""Seconds after which it is looked again whether a process still has an instance mounted."""
_REST: Final = 1.0
"""Seconds between two such looks at first, where one such process follows another; then ever more."""
_TELL_AGAIN: Final = 60.0
"""Seconds in which the journal is told of one such process of an instance at most."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What was there at start. draining: also what may have ended, which is confirmed after start()."""

    held: list[Instance]
    draining: list[Instance]


class Executor:
    """One for a daemon; its methods are called in the event loop."""

    def __init__(self, state: StateDirectory, boot_id: str, ended: Callable[[int], None]) -> None:
        """ended(uid) is called when the last sentinel of a user's instance ended. Raises OSError."""
        self._state = state
        self._boot_id = boot_id
        self._ended = ended
        self._held: dict[int, int] = {}
        self._watches: dict[int, int] = {}
        self._unwatched: set[int] = set()
        """Users of whose living namespace no sentinel is watched: that none is left says nothing."""
        self._locks: dict[int, asyncio.Lock] = {}
        # Threads of their own: users decide how long a deletion takes, and how much there is to be read of
        # mounts; no login may wait for one of these.
        self._deleters = ThreadPoolExecutor(_DELETIONS_AT_ONCE, "deletion")
        self._searchers = ThreadPoolExecutor(1, "search")
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
        restored = Restored([], [])
        for uid in sorted({*namespaces, *recorded, *living}):
            fd = namespaces.get(uid)
            instance = recorded.get(uid)
            if fd is not None and (instance is None or _inode(fd) != instance.namespace):
                held = _recognised(uid, fd, directories)
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
        return restored

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
            try:
                watch = self._renew_sentinel(instance, fd)
            except OSError as error:
                log.error(
                    "The end of %s's instance cannot be noticed any more, it stays until the next boot: %s",
                    instance.user,
                    error,
                )
                self._unwatched.add(uid)
            else:
                if watch is None and instances.is_set_aside(instance):
                    # A former process began to remove it: the rest are leftovers. A login would find nothing
                    # to join, and be refused.
                    self._forget(uid)
                    return
                if watch is None:
                    self._instances[uid] = instance
                    self._unconfirmed.append(uid)
                    restored.draining.append(instance)
                    return
                watches = frozenset({watch})
        self._watches.update(dict.fromkeys(watches, uid))
        instance = replace(instance, watches=watches)
        self._instances[uid] = instance
        self._save(instance)
        if fd is not None:
            self._held[uid] = fd
            restored.held.append(instance)
        else:
            restored.draining.append(instance)

    def _renew_sentinel(self, instance: Instance, fd: int | None) -> int | None:
        """A watch on a new sentinel; None where nobody is in the namespace any more. Raises OSError.

        fd: of the namespace, where it is stored.
        """
        found = fd if fd is not None else instances.open_living(instance)
        if found is None:
            return None
        first = instance.directories[0].directory
        try:
            return mountns.renew_sentinel(found, first.path, first.shared, self._watch_sentinel)
        finally:
            if fd is None:
                os.close(found)

    def _drop(self, uid: int, fd: int) -> None:
        sdnotify.remove(_stored_name(uid))
        os.close(fd)

    def start(self) -> None:
        """Hear of namespaces that end, also of those that ended before: the ends are reported later on."""
        asyncio.get_running_loop().add_reader(self._sentinels.fd, self._on_sentinel)
        while self._unconfirmed:
            self._confirm(self._unconfirmed.pop())

    async def close(self) -> None:
        """Let go of everything but what the FD store holds.

        Deletions stop where they are; the next start goes on.
        """
        self._stopping.set()
        self._deleters.shutdown(wait=False, cancel_futures=True)
        self._searchers.shutdown(wait=False, cancel_futures=True)
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
            return self._hold(
                *await asyncio.to_thread(
                    instances.prepare, uid, user, directories, self._boot_id, self._watch_sentinel
                )
            )

    async def rejoin(self, instance: Instance) -> Instance:
        """Hold a draining namespace again, found through whoever lives in it; the files are the same in any
        case.

        Where nobody is found it has ended, or is held by what cannot be entered (a descriptor in flight, a
        bind mount of the namespace): then a new namespace is made over the same directories. Raises OSError.
        """
        async with self._lock(instance.uid):
            await asyncio.to_thread(instances.require_same_user, instance)
            try:
                fd = await asyncio.to_thread(instances.open_living, instance)
            except TimeoutError as error:
                log.warning("Nobody was found in the namespace of user %s: %s", instance.user, error)
                fd = None
            if fd is not None:
                return self._hold(instance, fd)
            return self._hold(*await asyncio.to_thread(instances.rebuild, instance, self._watch_sentinel))

    def has_ended(self, uid: int) -> bool:
        """Whether no sentinel of the user's instance is left, and nobody is being waited for.

        Never where none could be watched: whoever lives there lives on unnoticed.
        """
        waited_for = {*self._confirming, *self._unconfirmed, *self._unwatched}
        return not self._watches_of(uid) and uid not in waited_for

    async def share_again(self, path: str) -> None:
        """Give the host's socket directories in path, where they were made again, to the living instances.

        Logs what fails.
        """
        for uid, instance in list(self._instances.items()):
            async with self._lock(uid):
                try:
                    held = os.dup(self._held[uid]) if uid in self._held else None
                    changed = await asyncio.to_thread(instances.share_again, instance, held, path)
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
                    gone = await asyncio.to_thread(instances.detach, instance, held, chosen)
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
            self._unwatched.discard(instance.uid)
            known = instance.uid in self._instances  # else it was set aside before, and could not be deleted
            aside = await asyncio.to_thread(instances.set_aside, instance) if known else []
            self._forget(instance.uid)
            self._instances.pop(instance.uid, None)
        await self._delete(instance.uid, aside)

    async def remove_persistent(self, uid: int, directories: Sequence[Directory]) -> bool:
        """Delete what is kept of a user who has no instance, and what former removals left.

        Returns whether there was anything. Raises OSError.
        """
        async with self._lock(uid):
            if self._watches_of(uid) or uid in self._unwatched:
                raise OSError(errno.EBUSY, "the user has just logged in")
            aside = await asyncio.to_thread(instances.set_persistent_aside, uid, directories)
        return await self._delete(uid, aside)

    def removed_entries(self, uid: int) -> int:
        """How many entries the removal that runs for the user has deleted so far."""
        return self._progress.get(uid, 0)

    def persistent(self, uid: int, directories: Sequence[Directory]) -> tuple[InstanceDirectory, ...]:
        """What is kept of a user between instances. Blocking, short."""
        entries = [
            InstanceDirectory(directory, names.kept_barrier(uid))
            for directory in instances.effective(directories)
            if directory.lifetime is Lifetime.PERSISTENT
        ]
        return tuple(entry for entry in entries if Path(host.path(entry.host_path)).is_dir())

    async def find_leftovers(
        self, directories: Sequence[Directory], known: set[str]
    ) -> list[tuple[str, str]]:
        """(directory, barrier) of what former boots, and a daemon that was killed, left on disk.

        known: the barriers of instances. No instance may be made meanwhile: it would be taken for one.
        """
        return await asyncio.to_thread(instances.find_leftovers, directories, known)

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
        """Delete what find_leftovers() found, but what is still mounted somewhere. Logs what cannot be
        deleted.
        """
        try:
            leftovers = await self._in(self._searchers, instances.unused, leftovers)
        except OSError as error:
            log.error("What former instances left stays until the next start: %s", error)
            return
        for path, name in leftovers:
            await self._in(self._deleters, instances.delete_leftover, path, name)

    # Within

    async def _delete(self, uid: int, aside: Sequence[tuple[str, str]]) -> bool:
        """Whether there was anything, what former attempts left included. Raises OSError."""
        left = [*self._undeleted.pop(uid, ()), *aside]

        def report(entries: int) -> None:
            self._progress[uid] = entries

        try:
            await self._in(self._deleters, instances.delete, left, report)
        except BaseException:
            self._undeleted[uid] = [*left, *self._undeleted.get(uid, ())]
            raise
        finally:
            self._progress.pop(uid, None)
        return bool(left)

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: object) -> T:
        call = functools.partial(work, *arguments, self._stopping.is_set)
        return await asyncio.get_running_loop().run_in_executor(pool, call)

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
            self._unwatched.discard(instance.uid)  # see _confirm_end() for who lives in a former one
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
        task = asyncio.get_running_loop().create_task(self._confirm_until_told(uid))
        self._confirming[uid] = task
        task.add_done_callback(functools.partial(self._confirmed, uid))

    def _confirmed(self, uid: int, task: "asyncio.Task[None]") -> None:
        del self._confirming[uid]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("Whether the instance of UID %d ended cannot be told, it stays: %r", uid, error)

    async def _confirm_until_told(self, uid: int) -> None:
        """Where it cannot be found out now (no descriptors, no threads), later."""
        told = False
        while True:
            try:
                await self._confirm_end(uid)
            except (OSError, RuntimeError) as error:
                if not told:
                    log.error(
                        "Whether the instance of UID %d ended cannot be told now, trying again: %s",
                        uid,
                        error,
                        extra=fields(uid=uid),
                    )
                told = True
                await asyncio.sleep(_LOOK_AGAIN)
            else:
                return

    async def _confirm_end(self, uid: int) -> None:
        """Report the end, unless somebody took a bind mount of the instance along into a namespace of his
        own.

        That one has no sentinel: bwrap --bind /tmp /tmp, say, moved to another cgroup so that the slice does
        not know of it.
        """
        loop = asyncio.get_running_loop()
        rest, tell_due = _REST, loop.time()
        while True:
            looked = loop.time()
            instance = self._instances[uid]
            # Without the lock, for which a login would wait.
            pid = await self._in(self._searchers, instances.who_mounts, instance)
            async with self._lock(uid):  # for a login that makes a new namespace over the same files
                if self._watches_of(uid):
                    return
                if self._instances[uid] is not instance:
                    continue  # one came and went: it may have left something that was not there to be found
                if pid is None:
                    self._ended(uid)
                    return
            if looked >= tell_due:
                tell_due = looked + _TELL_AGAIN
                log.info(
                    "Process %d has the instance of UID %d mounted in its own namespace, waiting", pid, uid
                )
            # It may unmount it and live on, root's shell say: look again every now and then.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(pidfd.wait_for_exit(pid), _LOOK_AGAIN)
            # A user can have one such process follow another without end, and a look reads all of /proc.
            await asyncio.sleep(looked + rest - loop.time())
            rest = min(rest * 2, _LOOK_AGAIN)


def _stored_name(uid: int) -> str:
    return f"{_STORED}{uid}"


def _recognised(uid: int, fd: int, directories: Sequence[Directory]) -> Instance | None:
    """The instance that a stored namespace is, by its mounts. None where no /proc is there to tell them."""
    try:
        mounts = mountns.mounts_in(fd)
    except OSError as error:
        log.warning("What the FD store's namespace of UID %d has mounted cannot be read: %s", uid, error)
        return None
    return recovery.reconstruct(uid, _inode(fd), mounts, directories)


def _inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def _is_namespace(fd: int, other: int | None) -> bool:
    """Whether it is a mount namespace, the first of that name."""
    try:
        return mountns.namespace_inode(fd) != 0 and other is None
    except OSError:
        return False

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Does what the lifecycle asks for: makes instances, holds and releases their namespaces, removes them.

For each user, one operation runs at a time. What blocks runs in threads.
Not here: when to do anything (daemon, core/lifecycle), the work of those threads (blocking/), and noticing
the end of an instance (sentinels).
"""

import asyncio
import errno
import functools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

from polytmpd import devices
from polytmpd.blocking import instances, removal, restoration, tmpfiles
from polytmpd.blocking.state import StateDirectory
from polytmpd.core.model import Directory, Instance
from polytmpd.core.sharing import Sharing
from polytmpd.devices import BlockDevice
from polytmpd.displays.displaylocks import DisplayLocks
from polytmpd.executor.fdstore import Namespaces, Stored
from polytmpd.executor.losses import IDLE_FACTOR, Losses
from polytmpd.executor.removals import Removals
from polytmpd.executor.sentinels import Sentinels
from polytmpd.executor.sharedfiles import SharedFiles
from polytmpd.executor.shares import Shares
from polytmpd.executor.workers import Workers
from polytmpd.journal import MessageId, fields
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.host import in_words
from polytmpd.kernel.mountinfo import Mount
from polytmpd.tasks import Tasks

log = logging.getLogger(__name__)

Work = Callable[[Descriptor, Instance], list[str]]
"""Work in the namespace of an instance; returns what it changed. Raises OSError."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What existed at start. draining includes instances that may have ended; start() confirms it."""

    held: list[Instance] = field(default_factory=list)
    draining: list[Instance] = field(default_factory=list)


class Executor:
    """One for the daemon. Its methods are called in the event loop."""

    def __init__(self, state: StateDirectory, boot_id: str, stored: Stored, displays: DisplayLocks) -> None:
        """stored and displays belong to this object from now on. Raises OSError."""
        self._state = state
        self._boot_id = boot_id
        self._stored = stored
        self._instances: dict[int, Instance] = {}
        self._locks: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()
        """By UID, while an operation runs or waits."""
        self._searchers = Workers(1, "search")
        self._displays = displays
        self._removals = Removals()
        self._leftovers: list[removal.Place] = []
        self._tasks = Tasks()
        self._namespaces = Namespaces(state)
        self._sentinels = Sentinels(stored.inotify, self._instances, self._lock, self._searchers)
        self._losses = Losses(self._mend)
        self._shares = Shares(self._shares_changed)
        self._files = SharedFiles(self._instances)
        self._changed: list[Callable[[Instance], None]] = []
        displays.follow(self.share_again)

    # Start and stop

    def follow(self, ended: Callable[[int], None], changed: Callable[[Instance], None]) -> None:
        """Call these in the event loop after start(): ended(uid) when a user's instance has ended, and
        changed(instance) when its directories have other names.
        """
        self._sentinels.follow(ended)
        self._changed.append(changed)

    async def restore(self, directories: Sequence[Directory]) -> Restored:
        """Take over what a former daemon left, and find leftovers.

        Call it once, before start() and before any instance is made: a new one would be taken for a
        leftover. Raises OSError.
        """
        restored = await asyncio.to_thread(self._take_over, directories)
        known = {entry.barrier for instance in self._instances.values() for entry in instance.directories}
        self._leftovers = await asyncio.to_thread(removal.find_leftovers, directories, known)
        await asyncio.to_thread(removal.release_kept, directories, known)
        await self.tell_age_cleaner(directories)
        await self._displays.start(directories, (*restored.held, *restored.draining))
        return restored

    def _take_over(self, directories: Sequence[Directory]) -> Restored:
        living = self._sentinels.living()
        recorded, problems = self._state.load()
        for problem in problems:
            log.warning("%s", problem)
        restored = Restored()
        for left in restoration.left(self._stored.namespaces, recorded, directories, self._stored.discard):
            self._restore_one(left, left.instance.watches & living, restored)
            uid = left.instance.uid
            if (now := self._instances.get(uid)) not in {None, recorded.get(uid)}:
                self._namespaces.record(now)
        return restored

    def _restore_one(self, left: restoration.Left, watches: frozenset[int], restored: Restored) -> None:
        """watches: the instance's watches that still exist. While one does, the namespace lives."""
        instance, fd = left.instance, left.stored
        uid = instance.uid
        if not watches:
            try:
                watch = restoration.renew_sentinel(instance, left.namespace, self._sentinels.watch)
            except OSError as error:
                log.error(
                    "Failed to watch for the end of the instance of user %s, keeping it until the next "
                    "boot: %s",
                    instance.user,
                    in_words(error),
                    extra=fields(uid=uid),
                )
                self._sentinels.cannot_watch(uid)
            else:
                if watch is None and removal.is_set_aside(instance):
                    # A former daemon began to remove it, and the rest is leftovers. A login would find
                    # nothing to join, and be refused.
                    self._namespaces.forget(uid)
                    return
                if watch is None:
                    self._instances[uid] = instance
                    self._sentinels.may_have_ended(uid)
                    restored.draining.append(instance)
                    return
                watches = frozenset({watch})
        if watches:
            self._sentinels.add(uid, watches)
        if watches != instance.watches:
            instance = replace(instance, watches=watches)
        self._instances[uid] = instance
        if fd is not None:
            self._namespaces.take_over(uid, fd)
            restored.held.append(instance)
        else:
            restored.draining.append(instance)

    def start(self) -> None:
        """Report the ends of instances, including earlier ones, and delete leftovers."""
        self._sentinels.start()
        self._losses.start()
        self._shares.start()
        self._losses.look_through(self._instances)
        for instance in self._instances.values():
            self._shares.add(instance)
        self._tasks.start(self._removals.delete_leftovers(self._leftovers, self._searchers))

    async def close(self) -> None:
        """Close everything but what the FD store holds.

        Deletions stop where they are; the next start of the daemon continues.
        """
        await self._tasks.close()
        await self._losses.close()
        await self._shares.close()
        await self._files.close()
        await self._displays.close()
        self._removals.close()
        self._searchers.close()
        self._sentinels.close()
        self._namespaces.close()

    # Actions

    async def prepare(
        self,
        uid: int,
        user: str,
        directories: Sequence[Directory],
        is_former: Callable[[str], Coroutine[Any, Any, bool]],
    ) -> Instance:
        """Make directories and namespace, and hold the namespace.

        is_former(name): whether the name belongs to a former user of the UID; it has a bound. Raises OSError
        and what is_former() raises, and then leaves nothing behind.
        """
        loop = asyncio.get_running_loop()
        unwatched: list[OSError] = []

        def ask(name: str) -> bool:  # if the name is another one than user, which is rare
            return asyncio.run_coroutine_threadsafe(is_former(name), loop).result()

        def add(path: str, mask: int) -> None:
            try:
                self._losses.add(uid, path, mask)
            except OSError as error:  # tried again, but not while a login waits
                unwatched.append(error)

        async with self._lock(uid):
            made = await asyncio.to_thread(
                instances.prepare, uid, user, directories, self._boot_id, self._sentinels.watch, ask, add
            )
            instance = self._hold(*made)
            if unwatched:
                self._losses.look(uid)
        await self._displays.instance_came(instance)
        await self._files.instance_came(instance)
        log.info(
            "New instance of user %s: %s",
            user,
            ", ".join(entry.host_path for entry in instance.directories),
            extra=fields(MessageId.INSTANCE_NEW, uid, user),
        )
        return instance

    async def rejoin(self, instance: Instance) -> Instance:
        """Hold a draining namespace again, found through the processes in it. The files stay the same.

        If no process is found, the namespace has ended, or something that cannot be entered holds it: a
        descriptor in flight, or a bind mount of the namespace. Then a new namespace is made over the same
        directories. Raises OSError.
        """
        async with self._lock(instance.uid):
            try:
                fd = await asyncio.to_thread(instances.open_living, instance)
            except TimeoutError as error:
                log.warning(
                    "Failed to find a process in the namespace of user %s, making a new namespace: %s",
                    instance.user,
                    in_words(error),
                )
                fd = None
            if fd is not None:
                held = self._hold(instance, fd)
            else:
                held = self._hold(
                    *await asyncio.to_thread(instances.rebuild, instance, self._sentinels.watch)
                )
            self._losses.look(instance.uid)
        await self._displays.instance_came(held)
        await self._files.instance_came(held)
        return held

    def has_ended(self, uid: int) -> bool:
        """Whether no process is left in the user's instance. Always False if that cannot be noticed."""
        return self._sentinels.has_ended(uid)

    def hand_over(self, uid: int) -> Descriptor:
        """A second descriptor of a namespace that is held; the caller closes it.

        Raises OSError, such as EMFILE.
        """
        return self._namespaces.open(uid)

    def let_go(self, uid: int) -> None:
        """Release the namespace. From now on only the processes in it keep it."""
        self._namespaces.let_go(uid)

    async def remove(self, instance: Instance) -> None:
        """Delete what lives as long as the instance. It is set aside first: a new one only waits for that.

        Raises OSError that names what is in the way. The next removal for the user, and the next start, try
        again.
        """
        uid = instance.uid
        self._displays.instance_gone(uid)
        async with self._lock(uid):
            self._losses.forget(uid)
            self._sentinels.forget(uid)
            known = uid in self._instances  # else it was set aside before, and could not be deleted
            aside = await asyncio.to_thread(removal.set_aside, instance) if known else []
            self._namespaces.forget(uid)
            self._instances.pop(uid, None)
        await self._removals.delete(uid, aside)
        log.info(
            "Removed instance of user %s",
            instance.user,
            extra=fields(MessageId.INSTANCE_REMOVED, uid, instance.user),
        )

    async def remove_persistent(self, uid: int, directories: Sequence[Directory]) -> bool:
        """Delete what is kept for a user who has no instance, and what former removals left.

        Returns whether there was anything. Raises OSError.
        """
        async with self._lock(uid):
            if self._sentinels.is_alive(uid):
                raise OSError(errno.EBUSY, "the user has just logged in")
            aside = await asyncio.to_thread(removal.set_persistent_aside, uid, directories)
        return await self._removals.delete(uid, aside)

    def removed_entries(self, uid: int) -> int:
        """How many entries the removal that runs for the user has deleted so far."""
        return self._removals.entries(uid)

    async def tell_age_cleaner(self, directories: Sequence[Directory]) -> None:
        """Exclude the barriers in these directories, and those of living instances, from aging.

        Logs failures.
        """
        living = [entry.directory for instance in self._instances.values() for entry in instance.directories]
        try:
            await asyncio.to_thread(tmpfiles.write, (*directories, *living))
        except OSError as error:
            log.warning("Failed to exclude instance directories from aging, ignoring: %s", in_words(error))

    # In every instance

    async def share_files(self, sharing: Sharing) -> None:
        """Share these sockets and files of the host with instances from now on. Logs failures."""
        await self._files.share(sharing)

    async def share_again(self, path: str) -> None:
        """Give the living instances the host's socket directories in path, which were made again.

        Logs what it does, and failures.
        """

        def share(namespace: Descriptor, instance: Instance) -> list[str]:
            return instances.share_again(namespace, instance, path)

        async for instance, changed in self._in_each_instance(share, f"share the new directories in {path}"):
            log.info("Shared the new %s with the instance of user %s", ", ".join(changed), instance.user)

    async def _shares_changed(self, path: str) -> None:
        """Share the host's new directories, and have the displays in them found."""
        await self.share_again(path)
        self._files.look_again()
        for instance in list(self._instances.values())[:1]:
            await self._displays.instance_came(instance)

    async def device_gone(self, device: BlockDevice) -> None:
        """Detach what was mounted from it in private directories, where only the user sees it."""
        await self._detach(lambda mount: device.is_source_of(mount.device, mount.source))

    async def devices_missed(self) -> None:
        """Detach what is mounted from devices that do not exist: events were lost or not yet received."""
        await self._detach(lambda mount: not devices.exists(mount.device), at_leisure=True)

    async def _detach(self, chosen: Callable[[Mount], bool], *, at_leisure: bool = False) -> None:
        def detach(namespace: Descriptor, instance: Instance) -> list[str]:
            return instances.detach(namespace, instance, chosen)

        async for instance, gone in self._in_each_instance(detach, "examine mounts", at_leisure):
            log.warning(
                "Unmounted %s in the instance of user %s: the device is gone",
                ", ".join(gone),
                instance.user,
                extra=fields(MessageId.DEVICE_GONE, instance.uid, instance.user),
            )

    async def _in_each_instance(
        self, work: Work, what: str, at_leisure: bool = False
    ) -> AsyncIterator[tuple[Instance, list[str]]]:
        """The instances in which the work changed something, and what. Logs failures.

        at_leisure: rest between them, since there may be ten thousand, and logins come first.
        """

        def enter(instance: Instance, held: Descriptor | None) -> list[str]:
            with instances.entered(instance, held) as namespace:
                return work(namespace, instance) if namespace is not None else []

        loop = asyncio.get_running_loop()
        for uid in list(self._instances):
            begun = loop.time()
            async with self._lock(uid):
                if (instance := self._instances.get(uid)) is None:
                    continue
                try:
                    held = self._namespaces.open_if_held(uid)
                    changed = await asyncio.to_thread(enter, instance, held)
                except OSError as error:
                    log.warning(
                        "Failed to %s in the instance of user %s: %s", what, instance.user, in_words(error)
                    )
                    continue
            if changed:
                yield instance, changed
            if at_leisure:
                await asyncio.sleep((loop.time() - begun) * IDLE_FACTOR)

    async def _mend(self, uid: int, is_lost: bool) -> None:
        """Watch the directories of a user's instance, and make what was removed of them on the host."""
        async with self._lock(uid):
            instance = self._instances.get(uid)
            if instance is None:
                return
            held = self._namespaces.open_if_held(uid)
            add = functools.partial(self._losses.add, uid)
            found = await asyncio.to_thread(instances.mend, instance, held, add, is_lost)
            if found.directories != instance.directories:
                self._instances[uid] = instance = replace(instance, directories=found.directories)
                self._namespaces.record(instance)
                for changed in self._changed:
                    changed(instance)
        if not found.is_watched:
            self._losses.look(uid, is_lost=True)
        if not found.mended:
            return
        await self._displays.instance_came(instance)
        await self._files.instance_came(instance)
        log.warning(
            "%s of user %s was removed on the host, with everything in it; made it again, empty",
            ", ".join(found.mended),
            instance.user,
            extra=fields(MessageId.DIRECTORY_LOST, uid, instance.user),
        )

    # Within

    def _lock(self, uid: int) -> asyncio.Lock:
        """The caller holds it in an `async with` statement, which keeps it."""
        return self._locks.setdefault(uid, asyncio.Lock())

    def _hold(self, instance: Instance, fd: Descriptor, watch: int | None = None) -> Instance:
        """watch: the watch on the sentinel, if the namespace is new."""
        uid = instance.uid
        if watch is not None:
            self._sentinels.add(uid, frozenset({watch}))
        # Not the watches in instance: a former namespace over the same files may have ended meanwhile.
        instance = replace(instances.identified(instance, fd), watches=self._sentinels.watches(uid))
        self._instances[uid] = instance
        self._namespaces.hold(instance, fd)
        self._shares.add(instance)
        return instance

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reports the end of instances: watches the sentinel of each namespace, and confirms that it is unused.

A sentinel is a tmpfs that only one namespace has mounted. The kernel sends IN_UNMOUNT when the last process
or descriptor that holds the namespace is gone.
Not here: setting a sentinel (kernel/mountns), and what follows from an end (daemon).

Hard facts
- A mount namespace made from the instance's (unshare, bwrap) has a copy of the sentinel, which keeps it. A
  bind mount of the instance in any other namespace has none, for example after bwrap --bind /tmp /tmp. If
  such a process is moved to another cgroup, the slice does not show it either. So polytmpd searches all
  namespaces for the instance. What cannot be read may have it mounted: the search is repeated, and the
  instance stays until a search succeeds.
- If no sentinel is watched, silence means nothing. Such an instance never ends by itself.
"""

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Final

from polytmpd.core.model import Instance
from polytmpd.executor import fdstore
from polytmpd.executor.searches import Searches
from polytmpd.executor.workers import Workers
from polytmpd.journal import fields
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.host import in_words
from polytmpd.kernel.inotify import IN_DELETE_SELF, IN_Q_OVERFLOW, IN_UNMOUNT, Inotify, living_watches

log = logging.getLogger(__name__)

_LOOK_AGAIN: Final = 30.0
"""Seconds after which the search for a process that has an instance mounted is repeated."""
_REST: Final = 1.0
"""Seconds between two such searches at first. The pause doubles each time, up to _LOOK_AGAIN."""
_TELL_AGAIN: Final = 60.0
"""Seconds between two journal lines about such a process of one instance."""


class Sentinels:
    """The watches on the sentinels of all living instances. Owns the inotify instance."""

    def __init__(
        self,
        inotify: Descriptor | None,
        instances: Mapping[int, Instance],
        lock: Callable[[int], asyncio.Lock],
        searchers: Workers,
    ) -> None:
        """inotify: what a former process left in the FD store; None makes a new one.

        instances: those that live, by UID; their owner changes the mapping. lock(uid) is held while the
        user's instance is made or removed. Raises OSError.
        """
        self._inotify = Inotify(inotify)
        self._instances = instances
        self._lock = lock
        self._searches = Searches(searchers)
        self._owners: dict[int, int] = {}
        """Watch → UID."""
        self._watches: dict[int, frozenset[int]] = {}
        """UID → watches."""
        self._unwatched: set[int] = set()
        """Users whose living namespace has no watched sentinel."""
        self._unconfirmed: set[int] = set()
        """Users whose instance seems to have ended before start()."""
        self._confirming: dict[int, asyncio.Task[None]] = {}
        self._followers: list[Callable[[int], None]] = []
        if inotify is None:
            fdstore.store_sentinels(self._inotify.fd)

    def follow(self, ended: Callable[[int], None]) -> None:
        """Call ended(uid) in the event loop when a user's instance has ended."""
        self._followers.append(ended)

    def start(self) -> None:
        """Report ends from now on, and earlier ones."""
        asyncio.get_running_loop().add_reader(self._inotify.fd, self._on_readable)
        while self._unconfirmed:
            self._confirm(self._unconfirmed.pop())

    def close(self) -> None:
        """Close the inotify instance. The FD store keeps its copy."""
        for task in self._confirming.values():
            task.cancel()
        self._searches.close()
        asyncio.get_running_loop().remove_reader(self._inotify.fd)
        self._inotify.close()

    def watch(self, path: str) -> int:
        """Watch the sentinel whose root is at path; in any thread. Raises OSError."""
        return self._inotify.add_watch(path, IN_DELETE_SELF)

    def living(self) -> set[int]:
        """The watches whose sentinels still exist."""
        return living_watches(self._inotify.fd)

    def watches(self, uid: int) -> frozenset[int]:
        """The watches on the sentinels of a user's instance."""
        return self._watches.get(uid, frozenset())

    def add(self, uid: int, watches: frozenset[int]) -> None:
        """Add watches on sentinels of the user's instance."""
        self._owners.update(dict.fromkeys(watches, uid))
        self._watches[uid] = self._watches[uid] | watches if uid in self._watches else watches
        self._unwatched.discard(uid)

    def cannot_watch(self, uid: int) -> None:
        """Note that the user's namespace lives, but none of its sentinels can be watched."""
        self._unwatched.add(uid)

    def may_have_ended(self, uid: int) -> None:
        """Note that no process was found in the user's namespace. start() confirms it."""
        self._unconfirmed.add(uid)

    def forget(self, uid: int) -> None:
        """Forget the watches of an instance that is being removed."""
        for watch in self._watches.pop(uid, ()):
            del self._owners[watch]
        self._unwatched.discard(uid)

    def is_alive(self, uid: int) -> bool:
        """Whether a sentinel of the user's instance is left, or could not be watched."""
        return bool(self.watches(uid)) or uid in self._unwatched

    def has_ended(self, uid: int) -> bool:
        """Whether no sentinel of the user's instance is left, and no process is being waited for."""
        return not self.is_alive(uid) and uid not in self._confirming and uid not in self._unconfirmed

    # Within

    def _on_readable(self) -> None:
        events = self._inotify.read()
        ended = {event.watch for event in events if event.mask & IN_UNMOUNT}
        if any(event.mask & IN_Q_OVERFLOW for event in events):  # some were lost: check which are left
            ended |= self._owners.keys() - self.living()
        for watch in ended & self._owners.keys():
            uid = self._owners.pop(watch)
            self._watches[uid] -= {watch}
            if not self._watches[uid]:
                del self._watches[uid]
                if uid not in self._confirming:
                    self._confirm(uid)

    def _confirm(self, uid: int) -> None:
        task = asyncio.get_running_loop().create_task(self._confirm_until_known(uid))
        self._confirming[uid] = task
        task.add_done_callback(functools.partial(self._confirmed, uid))

    def _confirmed(self, uid: int, task: "asyncio.Task[None]") -> None:
        del self._confirming[uid]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error(
                "Cannot determine whether the instance of UID %d has ended, keeping it: %r", uid, error
            )

    async def _confirm_until_known(self, uid: int) -> None:
        """Retry what fails now: there may be no descriptor, or no thread."""
        told = False
        while True:
            try:
                await self._confirm_end(uid)
            except (OSError, RuntimeError) as error:
                if not told:
                    log.error(
                        "Cannot yet determine whether the instance of UID %d has ended, retrying: %s",
                        uid,
                        in_words(error),
                        extra=fields(uid=uid),
                    )
                told = True
                await asyncio.sleep(_LOOK_AGAIN)
            else:
                return

    async def _confirm_end(self, uid: int) -> None:
        """Report the end, unless a process has the instance mounted in another namespace."""
        loop = asyncio.get_running_loop()
        rest, tell_due = _REST, loop.time()
        while True:
            looked = loop.time()
            instance = self._instances[uid]
            # Not under the lock: a login would wait for it.
            pid = await self._searches.who_mounts(instance)
            async with self._lock(uid):  # a login may be making a new namespace over the same files
                if self.watches(uid):
                    return
                if self._instances[uid] is not instance:
                    continue  # a login came and went: the search missed what it left
                if pid is None:
                    for ended in self._followers:
                        ended(uid)
                    return
            if looked >= tell_due:
                tell_due = looked + _TELL_AGAIN
                log.info("%s", _in_words(pid, uid))
            # The process may unmount it and live on, for example root's shell.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_exit_of(pid), _LOOK_AGAIN)
            # A user can start such processes one after the other, and each search reads all of /proc.
            await asyncio.sleep(looked + rest - loop.time())
            rest = min(rest * 2, _LOOK_AGAIN)


def _in_words(pid: int, uid: int) -> str:
    if pid == 0:
        return f"A mount namespace without processes has the instance of UID {uid} mounted, waiting"
    return f"Process {pid} has the instance of UID {uid} mounted in its own namespace, waiting"


async def _exit_of(pid: int) -> None:
    """Return when the process has ended, see pidfd_open(2); never for 0. Raises OSError, such as EMFILE."""
    if pid == 0:
        await asyncio.Event().wait()
    try:
        fd = Descriptor(os.pidfd_open(pid))
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    with fd:
        loop.add_reader(fd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(fd)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Notices that a directory of a living instance was removed on the host, for example by rm -rf /tmp/*.

Only root can do that: the barrier belongs to root and lies in a sticky directory, and so do the mount points
in the inner directory. They are immutable if the file system supports it (blocking/storage). This module is
for file systems that do not, and for an administrator who clears the flag.
Not here: making the directories again (blocking/instances).

Hard facts
- A directory that is removed sends nothing, not even IN_DELETE_SELF, while a bind mount of it exists, as is
  the case for an inner directory. Its parent, the barrier, sends IN_DELETE.
- rmdir(2) of a mount point of another namespace detaches the mount there, and the directory then sends
  IN_DELETE_SELF.
- A cleaner removes the barrier some microseconds after the inner directory. So it may also remove what has
  just been made again. That is one more event.
"""

import asyncio
import contextlib
import logging
import threading
from array import array
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from polytmpd.core.names import INNER
from polytmpd.journal import fields
from polytmpd.kernel.host import in_words
from polytmpd.kernel.inotify import IN_DELETE_SELF, IN_IGNORED, IN_Q_OVERFLOW, Inotify

log = logging.getLogger(__name__)

_SETTLE: Final = 0.05
"""Seconds from the first event to the first attempt: most cleaners are through by then."""
_REST: Final = 0.2
"""Seconds between two attempts for one user. The pause doubles with each failure, up to _RETRY."""
_RETRY: Final = 10.0
_TOLD_AFTER: Final = 3
"""After so many failures in a row, the journal says so."""
_AT_ONCE: Final = 2
"""So many users at a time, since a namespace with a long mount table takes a while."""
IDLE_FACTOR: Final = 2
"""A look at all users rests for so many times as long as it worked, since logins come first."""


class Losses:
    """The watches on the directories of all living instances. Owns an inotify instance."""

    def __init__(self, mend: Callable[[int, bool], Awaitable[None]]) -> None:
        """mend(uid, is_lost) watches the user's directories again, and makes what is missing.

        is_lost: whether something was reported as removed. If it raises, it is called again. Raises OSError.
        """
        self._mend = mend
        self._inotify = Inotify()
        self._owners: dict[int, int] = {}
        """Watch → UID."""
        self._watches: dict[int, array[int]] = {}
        """UID → watches. There are ten thousand users, with eight each: an array is the smallest."""
        self._adding = threading.Lock()
        self._due: dict[int, bool] = {}
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Report what is removed from now on."""
        asyncio.get_running_loop().add_reader(self._inotify.fd, self._on_readable)

    async def close(self) -> None:
        tasks = [*self._tasks.values(), *([self._looking] if self._looking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        asyncio.get_running_loop().remove_reader(self._inotify.fd)
        self._inotify.close()

    def add(self, uid: int, path: str, mask: int) -> None:
        """Watch a directory of the user's instance; in any thread. Raises OSError (ENOSPC)."""
        with self._adding:  # else an event might be read before its watch is known
            watch = self._inotify.add_watch(path, mask)
            if self._owners.get(watch) != uid:
                self._owners[watch] = uid
                self._watches.setdefault(uid, array("i")).append(watch)

    def forget(self, uid: int) -> None:
        """The user's instance is being removed."""
        with self._adding:
            for watch in self._watches.pop(uid, ()):
                if self._owners.get(watch) != uid:
                    continue
                del self._owners[watch]
                with contextlib.suppress(OSError):  # the kernel has removed it already
                    self._inotify.remove_watch(watch)
        self._due.pop(uid, None)

    def look(self, uid: int, *, is_lost: bool = False) -> None:
        """Have mend() called for the user. is_lost: something may have been removed already."""
        self._due[uid] = self._due.get(uid, False) or is_lost
        if uid not in self._tasks:
            task = asyncio.get_running_loop().create_task(self._work(uid))
            self._tasks[uid] = task
            task.add_done_callback(lambda _: self._tasks.pop(uid))

    def look_through(self, uids: Iterable[int]) -> None:
        """Have mend() called for these users, one after the other: something may have been removed."""
        self._looking = asyncio.get_running_loop().create_task(self._look_through(array("I", uids)))

    # Within

    async def _look_through(self, uids: "array[int]") -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(_SETTLE)
        for uid in uids:
            begun = loop.time()
            try:
                async with self._at_once:
                    await self._mend(uid, True)
            except Exception:
                self.look(uid, is_lost=True)  # tries again, and says so if it goes on failing
            await asyncio.sleep((loop.time() - begun) * IDLE_FACTOR)

    def _on_readable(self) -> None:
        with self._adding:
            for event in self._inotify.read():
                if event.mask & IN_Q_OVERFLOW:
                    for uid in set(self._owners.values()):
                        self.look(uid, is_lost=True)
                elif (owner := self._owners.get(event.watch)) is not None:
                    if event.mask & IN_IGNORED:
                        del self._owners[event.watch]
                        self._watches[owner].remove(event.watch)
                    elif event.mask & IN_DELETE_SELF or event.name == INNER:
                        self.look(owner, is_lost=True)

    async def _work(self, uid: int) -> None:
        failures = 0
        await asyncio.sleep(_SETTLE)
        while uid in self._due:
            is_lost = self._due.pop(uid)
            try:
                async with self._at_once:
                    await self._mend(uid, is_lost)
            except Exception as error:  # also "can't start new thread"
                failures += 1
                if failures == _TOLD_AFTER:  # before that, a cleaner may be at work
                    log.error(
                        "Failed to restore what was removed of the directories of UID %d, retrying: %s",
                        uid,
                        in_words(error),
                        extra=fields(uid=uid),
                    )
                self.look(uid, is_lost=is_lost)
                await asyncio.sleep(min(_REST * 2 ** (failures - 1), _RETRY))
            else:
                failures = 0
                await asyncio.sleep(_REST)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Notices when servers make or remove the sockets and files of the host that all instances share.

Not here: making and removing the links (blocking/sharedfiles), and directories (shares).

Hard facts
- A watch on the host's /tmp reports what everyone there does: services, root, exempt users. So after each
  look we rest, for ten times as long as the processor worked for it. The queue holds 16,384 events by
  default; if more is lost, one look at the whole directory makes up for it.
- An inode sends IN_DELETE_SELF when its last name and its last user are gone. A server uses its socket.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final, ParamSpec, TypeVar

from polytmpd.blocking import sharedfiles
from polytmpd.core.model import Instance
from polytmpd.core.sharing import LINKS, Sharing
from polytmpd.journal import fields
from polytmpd.kernel.host import in_words
from polytmpd.kernel.inotify import (
    IN_ATTRIB,
    IN_CREATE,
    IN_DELETE,
    IN_DELETE_SELF,
    IN_IGNORED,
    IN_MOVE_SELF,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    IN_ONESHOT,
    IN_ONLYDIR,
    IN_Q_OVERFLOW,
    Inotify,
)

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_CHANGES: Final = IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_ATTRIB | IN_ONLYDIR
_LOSSES: Final = IN_DELETE | IN_MOVED_FROM | IN_ONLYDIR
_REMOVED: Final = IN_DELETE_SELF | IN_MOVE_SELF | IN_ONESHOT
"""Once: else a user could have us watch any number of files, by moving one away after the other."""
_REST: Final = 0.02
_REST_FACTOR: Final = 10
_REST_AT_MOST: Final = 30.0
_SETTLE: Final = 0.2
"""Seconds from the removal of a link to the attempt to make it again: rm -r would find it in its way."""
_RETRY: Final = 10.0
"""Seconds until it tries again after a failure."""
_READS: Final = 2
_TOLD_AT_MOST: Final = 64
"""So many names at a time: an exempt user can make any number of them that match a pattern."""


class SharedFiles:
    """One for the daemon. Call its methods in the event loop. Owns an inotify instance."""

    def __init__(self, instances: Mapping[int, Instance]) -> None:
        """instances: all, by UID, as they are at any time. Raises OSError."""
        self._instances = instances
        self._inotify = Inotify()
        self._sharing = Sharing()
        self._is_used = False
        self._host = -1
        self._links = -1
        self._owners: dict[int, int] = {}
        """Watch on something in an instance → UID."""
        self._adding = threading.Lock()
        self._names: set[str] | None = None
        """What may have changed; None for everything."""
        self._users: set[int] = set()
        """Those whose instances lack something."""
        self._objections: dict[str, str] = {}
        self._taken: dict[int, set[str]] = {}
        """UID → names of theirs that the journal has."""
        self._failures: dict[int, str] = {}
        """UID → why their instance has not everything."""
        self._failure = ""
        self._retry: asyncio.TimerHandle | None = None
        self._spent = 0.0
        self._shared: set[str] = set()
        """What the instances have."""
        self._due = asyncio.Event()
        self._distributing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def share(self, sharing: Sharing) -> None:
        """Share this from now on, in instances that have LINKS. Returns once it is there. Logs failures."""
        self._sharing = sharing
        self._is_used |= bool(sharing.patterns) or bool(self._with_links())
        if not self._is_used:
            with contextlib.suppress(OSError):  # there is none
                await self._in_thread(sharedfiles.clear, sharing)
            return
        await self._try(None, set())
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work())
            self._listen()

    async def close(self) -> None:
        """Stop. What is shared stays."""
        if self._retry is not None:
            self._retry.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            asyncio.get_running_loop().remove_reader(self._inotify.fd)
        self._inotify.close()

    async def instance_came(self, instance: Instance) -> None:
        """Furnish an instance, before its user enters. It may be called again. Logs failures."""
        if any(LINKS in entry.directory.shared for entry in instance.directories):
            self._taken.pop(instance.uid, None)
            try:
                async with self._distributing:
                    await self._furnish((instance,), ())
            except Exception as error:  # "can't start new thread": no reason to refuse a login
                self._failed(instance, self._sharing.path, in_words(error))
                self._look_later()

    def look_again(self) -> None:
        """LINKS, or something in an instance, may be missing."""
        self._names, self._retry = None, None
        self._due.set()

    # Within

    def _with_links(self) -> list[Instance]:
        return [
            instance
            for instance in self._instances.values()
            if any(LINKS in entry.directory.shared for entry in instance.directories)
        ]

    def _listen(self) -> None:
        asyncio.get_running_loop().add_reader(self._inotify.fd, self._on_readable)

    def _on_readable(self) -> None:
        asyncio.get_running_loop().remove_reader(self._inotify.fd)  # until the look and the rest are over
        self._due.set()

    def _read(self) -> None:
        for _ in range(_READS):
            with self._adding:
                events = self._inotify.read()
            for event in events:
                if event.mask & IN_Q_OVERFLOW:
                    self._names = None
                elif event.watch in {self._host, self._links}:
                    if self._sharing.matches(event.name):
                        self._note(event.name, late=event.watch == self._links)
                elif (uid := self._owners.get(event.watch)) is not None:
                    self._users.add(uid)
                if event.mask & IN_IGNORED:
                    self._owners.pop(event.watch, None)
            if not events:
                return

    def _note(self, name: str, *, late: bool) -> None:
        if late:
            asyncio.get_running_loop().call_later(_SETTLE, partial(self._note, name, late=False))
            return
        if self._names is not None:
            self._names.add(name)
        self._due.set()

    async def _work(self) -> None:
        while True:
            await self._due.wait()
            begun = time.thread_time()
            self._read()
            self._spent = time.thread_time() - begun
            self._due.clear()
            names, self._names = self._names, set()
            users, self._users = self._users, set()
            if names is None or names or users:
                await self._try(names, users)
            await asyncio.sleep(min(max(_REST, self._spent * _REST_FACTOR), _REST_AT_MOST))
            self._listen()

    async def _try(self, names: set[str] | None, users: set[int]) -> None:
        try:
            await self._look(names, users)
        except Exception as error:  # also "can't start new thread"
            self._look_later()
            if self._failure != (text := in_words(error)):
                self._failure = text
                log.warning(
                    "Failed to share sockets and files in %s with sessions, retrying: %s",
                    self._sharing.path,
                    text,
                )
        else:
            self._failure = ""

    def _look_later(self) -> None:
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(_RETRY, self.look_again)

    async def _look(self, names: set[str] | None, users: set[int]) -> None:
        """Raises OSError."""
        sharing = self._sharing
        if names is None or names:
            self._host, self._links = await self._in_thread(
                sharedfiles.watch, sharing, self._watch_host, self._watch_links
            )
            found = await self._in_thread(sharedfiles.update, sharing, names)
            self._complain(found, names)
            if names is None or found.links != self._shared:
                async with self._distributing:
                    await self._furnish(self._with_links(), found.gone)
                    await self._in_thread(sharedfiles.forget, sharing, found.gone)
                self._shared = found.links
                return
        async with self._distributing:
            await self._furnish([one for one in self._with_links() if one.uid in users], ())

    async def _furnish(self, instances: Iterable[Instance], gone: Iterable[str]) -> None:
        chosen = list(instances)
        if chosen:
            await self._in_thread(self._furnish_each, chosen, set(gone))
        for uid in [uid for uid in self._failures if uid not in self._instances]:
            del self._failures[uid]
        if self._failures:
            self._look_later()

    def _furnish_each(self, instances: Iterable[Instance], gone: set[str]) -> None:
        """Runs in a thread."""
        for instance in instances:
            for entry in instance.directories:
                if LINKS not in entry.directory.shared:
                    continue
                path = entry.directory.path
                try:
                    taken = sharedfiles.furnish(entry, gone, self._watcher(instance.uid), self._sharing)
                except FileNotFoundError:  # it is being removed
                    continue
                except OSError as error:
                    self._failed(instance, path, in_words(error))
                    continue
                self._failures.pop(instance.uid, None)
                for name in sorted(taken - self._taken.get(instance.uid, set())):
                    log.warning(
                        "Not sharing %s/%s with user %s, who has one of their own: %s/%s",
                        path,
                        name,
                        instance.user,
                        entry.host_path,
                        name,
                        extra=fields(uid=instance.uid, user=instance.user),
                    )
                if taken:
                    self._taken[instance.uid] = taken
                else:
                    self._taken.pop(instance.uid, None)

    def _failed(self, instance: Instance, path: str, text: str) -> None:
        if self._failures.get(instance.uid) != text:
            log.warning(
                "Failed to share sockets and files in %s with user %s, retrying: %s",
                path,
                instance.user,
                text,
                extra=fields(uid=instance.uid, user=instance.user),
            )
        self._failures[instance.uid] = text

    def _complain(self, found: sharedfiles.Found, names: set[str] | None) -> None:
        """Once for each name, until it is shared or gone."""
        for name in list(self._objections):
            if name not in found.objections and (names is None or name in names):
                del self._objections[name]
        for name, objection in found.objections.items():
            if self._objections.get(name) == objection or len(self._objections) > _TOLD_AT_MOST:
                continue
            self._objections[name] = objection
            if len(self._objections) > _TOLD_AT_MOST:
                text = "Not sharing more than %d names in %s with sessions, naming no more"
                log.warning(text, _TOLD_AT_MOST, self._sharing.path)
            else:
                log.warning("Not sharing %s/%s with sessions: %s", self._sharing.path, name, objection)

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As asyncio.to_thread(). Counts the time that the processor works for it."""

        def timed() -> tuple[T, float]:
            begun = time.thread_time()
            return work(*args, **kwargs), time.thread_time() - begun

        result, spent = await asyncio.to_thread(timed)
        self._spent += spent
        return result

    def _watch_host(self, path: str) -> int:
        return self._inotify.add_watch(path, _CHANGES)

    def _watch_links(self, path: str) -> int:
        return self._inotify.add_watch(path, _LOSSES)

    def _watcher(self, uid: int) -> Callable[[str], None]:
        def add(path: str) -> None:
            with self._adding:  # else an event might be read before its watch is known
                self._owners[self._inotify.add_watch(path, _REMOVED)] = uid

        return add

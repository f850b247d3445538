# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's side of the display locks: decides when the registry is updated.

Runs in the event loop and touches no file; it has the worker's thread do that.
Not here: when instances come and go (daemon), and the bind mounts of the socket directory (kernel/mountns,
executor).
"""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

from polytmpd.core.model import Directory, Instance
from polytmpd.displays import socketdir
from polytmpd.displays.complaints import Complaints
from polytmpd.displays.lockfiles import SOCKETS, find_copies
from polytmpd.displays.places import Place, place_of
from polytmpd.displays.registry import HOST, Registry, Status
from polytmpd.displays.worker import Worker

# In seconds. An update works for at most _UPDATE, then rests for at least _REST, and for ten times as long
# as it worked. So a user who makes and removes sockets in a loop costs a tenth of a processor, and logins
# come in between.
_UPDATE: Final = 0.02
_REST: Final = 0.05
_REST_FACTOR: Final = 10
_SWEEP_FACTOR: Final = 2
"""After each sweep at start, rest for so many times as long as it took."""
_PATIENCE: Final = 2.0
"""Seconds that a login waits at most for the worker."""


class DisplayLocks:
    """The display locks of one daemon. Call its methods in the event loop."""

    def __init__(self) -> None:
        self._followers: list[Callable[[str], Awaitable[None]]] = []
        self._complaints = complaints = Complaints()
        self._stopping = threading.Event()
        stopping = self._stopping.is_set
        self._worker = Worker(lambda: Registry(complaints, stopping), complaints)
        self._changed = asyncio.Event()
        self._status = Status()
        self._shared = 0  # the generation of the socket directory that the instances have
        self._updates: asyncio.Task[None] | None = None
        self._sweeps: set[asyncio.Task[None]] = set()

    def follow(self, share_again: Callable[[str], Awaitable[None]]) -> None:
        """Have share_again(base) give the instances the socket directories that the host has in base now."""
        self._followers.append(share_again)

    async def start(self, directories: Sequence[Directory], instances: Iterable[Instance]) -> None:
        """Show all displays in all instances, and remove the copies that a former daemon left.

        Call it once, before the other methods. instances: every instance, even one that has ended and is
        about to be removed, since its files may persist. Nothing happens until a directory or an instance
        shares SOCKETS.
        """
        places = {instance.uid: place for instance in instances if (place := place_of(instance))}
        bases = [place.base for place in places.values()]
        bases += [entry.path for entry in directories if SOCKETS in entry.shared]
        if not bases:
            return
        await self._have_done(lambda registry: registry.start(bases[0], places))
        self._update_soon()
        self._sweep(HOST, *places)

    async def instance_came(self, instance: Instance) -> None:
        """Show all displays in an instance. Call it before the user enters; it may be called again.

        If the worker does not answer within two seconds, this returns without it: no login waits for a file
        system that hangs. The displays are shown once the worker answers.
        """
        if (place := place_of(instance)) is None:
            return
        await self._have_done(lambda registry: registry.add_place(instance.uid, place))
        self._update_soon()
        if place.is_persistent:
            self._sweep(instance.uid)

    def instance_gone(self, uid: int) -> None:
        """Forget the displays of an instance that has ended, and show no more displays in it."""
        if self._updates is not None:
            self._worker.submit(lambda registry: registry.remove_place(uid))

    async def close(self) -> None:
        """Stop. The copies stay; the next start() removes those that are out of date."""
        self._stopping.set()
        tasks = [task for task in (self._updates, *self._sweeps) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._updates = None
        if self._status.inotify is not None:
            asyncio.get_running_loop().remove_reader(self._status.inotify)
        await self._have_done(lambda registry: registry.close())
        self._worker.shut_down()

    async def _have_done(self, work: Callable[[Registry], None]) -> None:
        """Have the worker do this, and wait for it, but not for long."""
        if await self._worker.call_within(_PATIENCE, work):
            self._complaints.settle("worker")
        else:
            message = "The thread that shows X display locks does not answer, continuing without it"
            self._complaints.warn("worker", message)

    def _update_soon(self) -> None:
        """Update the registry at the next opportunity, and from now on whenever something changes."""
        self._changed.set()
        if self._updates is None and not self._stopping.is_set():
            self._updates = asyncio.get_running_loop().create_task(self._keep_updated())

    async def _keep_updated(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._due()):
                    await self._changed.wait()
            self._changed.clear()
            begun = loop.time()
            status = await self._worker.call(_update)
            if status is None:  # the update failed, but may have more work
                status = await self._worker.call(lambda registry: registry.status())
            self._status = status or self._status
            if self._status.generation != self._shared:
                await self._share(self._status)
            await asyncio.sleep(max(_REST, (loop.time() - begun) * _REST_FACTOR))
            if self._status.has_work:
                self._changed.set()
            if self._status.inotify is not None:
                loop.add_reader(self._status.inotify, self._on_readable, self._status.inotify)

    def _due(self) -> float | None:
        """When to update even if nothing changes; None for never."""
        due = self._status.check_due  # loop.time() is time.monotonic()
        if self._status.generation == self._shared:
            return due
        again = asyncio.get_running_loop().time() + socketdir.CHECK_INTERVAL
        return again if due is None else min(due, again)

    def _on_readable(self, inotify: int) -> None:
        asyncio.get_running_loop().remove_reader(inotify)  # until the next update is over and has rested
        self._changed.set()

    async def _share(self, status: Status) -> None:
        """Give the instances a new socket directory."""
        try:
            for share_again in self._followers:
                await share_again(status.base)
        except Exception as error:  # it must not end the task that keeps the displays updated
            message = "Failed to share %s/%s with all instances, retrying: %r"
            self._complaints.warn("share", message, status.base, SOCKETS, error)
        else:
            self._shared = status.generation
            self._complaints.settle("share")

    def _sweep(self, *uids: int) -> None:
        """Remove the copies that a former daemon left in places, one after the other. Returns at once."""
        task = asyncio.get_running_loop().create_task(self._remove_all_strays(uids))
        self._sweeps.add(task)
        task.add_done_callback(self._sweeps.discard)

    async def _remove_all_strays(self, uids: Sequence[int]) -> None:
        loop = asyncio.get_running_loop()
        for uid in uids:
            begun = loop.time()
            await self._remove_strays(uid)
            if len(uids) > 1:  # there may be ten thousand, and logins come first
                await asyncio.sleep((loop.time() - begun) * _SWEEP_FACTOR)

    async def _remove_strays(self, uid: int) -> None:
        place = await self._worker.call(lambda registry: registry.place(uid))
        if place is None:
            return
        with contextlib.suppress(OSError):
            found = await asyncio.to_thread(_find_copies, place, self._stopping.is_set)
            await self._worker.call(lambda registry: registry.remove_strays(uid, place, found))


def _update(registry: Registry) -> Status:
    """Runs in the worker's thread."""
    registry.update(_UPDATE)
    return registry.status()


def _find_copies(place: Place, cancelled: Callable[[], bool]) -> list[int]:
    """Runs in its own thread, so that the worker need not wait for a large directory."""
    with place.open() as directory:
        return find_copies(directory, cancelled)

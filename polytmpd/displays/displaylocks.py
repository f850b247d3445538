# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's side of the display locks: hears of instances and of changes, and has the registry updated.

Runs in the event loop, and touches no file: all of that is work for the worker's thread. What fails is
logged: a login never fails for a display.
Not here: the socket directory's bind mounts (kernel/mountns, executor), and when instances come and go
(daemon).
"""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

from polytmpd.core.model import Directory, Instance
from polytmpd.displays.complaints import Complaints
from polytmpd.displays.lockfiles import SOCKETS
from polytmpd.displays.places import find_copies_in, place_of
from polytmpd.displays.registry import HOST, Registry, Status
from polytmpd.displays.worker import Worker

# An update works so long at most, and rests at least so long, and ten times as long as it worked: whoever
# makes and removes sockets without end gets a tenth of a processor, and logins come in between.
_UPDATE: Final = 0.02
_REST: Final = 0.05
_REST_FACTOR: Final = 10


class DisplayLocks:
    """One for a daemon; its methods are called in the event loop."""

    def __init__(self, share_again: Callable[[str], Awaitable[None]]) -> None:
        """share_again(base) gives the host's socket directories in base, made again, to the instances."""
        self._share_again = share_again
        self._complaints = complaints = Complaints()
        self._stopping = threading.Event()
        stopping = self._stopping.is_set
        self._worker = Worker(lambda: Registry(complaints, stopping), complaints)
        self._changed = asyncio.Event()
        self._status = Status()
        self._shared = 0  # the generation that the instances were last given
        self._updates: asyncio.Task[None] | None = None
        self._sweeps: set[asyncio.Task[None]] = set()

    async def start(self, directories: Sequence[Directory], instances: Iterable[Instance]) -> None:
        """Look at everything anew.

        instances: all that are there; also those that have ended and are removed next, since files of theirs
        may persist. Without SOCKETS in directories this is idle until an instance comes that shares it.
        """
        places = {instance.uid: place for instance in instances if (place := place_of(instance))}
        bases = [place.base for place in places.values()]
        bases += [entry.path for entry in directories if SOCKETS in entry.shared]
        if not bases:
            return
        await self._worker.call(lambda registry: registry.start(bases[0], places))
        self._update_soon()
        for uid in (HOST, *places):
            self._sweep(uid)

    async def instance_came(self, instance: Instance) -> None:
        """Show the displays that exist to an instance before its user comes in. Instances that have come
        already may come again.
        """
        if (place := place_of(instance)) is None:
            return
        await self._worker.call(lambda registry: registry.add_place(instance.uid, place))
        self._update_soon()
        if place.is_persistent:
            self._sweep(instance.uid)

    def instance_gone(self, uid: int) -> None:
        """An instance ended: its displays are no more, and it is shown no others."""
        if self._updates is not None:
            self._worker.submit(lambda registry: registry.remove_place(uid))

    async def close(self) -> None:
        """Stop; copies stay, the next start judges them."""
        self._stopping.set()
        tasks = [task for task in (self._updates, *self._sweeps) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._updates = None
        if self._status.inotify is not None:
            asyncio.get_running_loop().remove_reader(self._status.inotify)
        await self._worker.call(lambda registry: registry.close())
        self._worker.shut_down()

    def _update_soon(self) -> None:
        """Begin to hear events, at the latest when there is something to hear of."""
        self._changed.set()
        if self._updates is None and not self._stopping.is_set():
            self._updates = asyncio.get_running_loop().create_task(self._keep_updated())

    async def _keep_updated(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._status.check_due):  # loop.time() is time.monotonic()
                    await self._changed.wait()
            self._changed.clear()
            begun = loop.time()
            await self._worker.call(lambda registry: registry.update(_UPDATE))
            self._status = await self._worker.call(lambda registry: registry.status()) or self._status
            if self._status.generation != self._shared:
                await self._share(self._status)
            await asyncio.sleep(max(_REST, (loop.time() - begun) * _REST_FACTOR))
            if self._status.has_work:
                self._changed.set()
            if self._status.inotify is not None:
                loop.add_reader(self._status.inotify, self._on_readable, self._status.inotify)

    def _on_readable(self, inotify: int) -> None:
        asyncio.get_running_loop().remove_reader(inotify)  # until the update that it starts has rested
        self._changed.set()

    async def _share(self, status: Status) -> None:
        """Give a new socket directory to the instances."""
        try:
            await self._share_again(status.base)
        except Exception as error:  # nobody else would go on showing displays
            message = "Instances may have a former %s: %r, trying again"
            self._complaints.warn("share", message, SOCKETS, error)
        else:
            self._shared = status.generation
            self._complaints.settle("share")

    def _sweep(self, uid: int) -> None:
        """Remove copies that a former daemon left in a place, without keeping anybody waiting."""
        task = asyncio.get_running_loop().create_task(self._remove_strays(uid))
        self._sweeps.add(task)
        task.add_done_callback(self._sweeps.discard)

    async def _remove_strays(self, uid: int) -> None:
        place = await self._worker.call(lambda registry: registry.place(uid))
        if place is None:
            return
        with contextlib.suppress(OSError):
            found = await asyncio.to_thread(find_copies_in, place, self._stopping.is_set)
            await self._worker.call(lambda registry: registry.remove_strays(uid, place, found))

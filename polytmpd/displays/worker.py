# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one thread that owns the registry, and the only way to reach it.

The event loop calls submit() and call(). The thread runs the work in the order in which it was submitted. It
also creates the registry and keeps it in thread-local storage, so that no other thread can touch it.
Not here: what the work is.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from polytmpd.displays.complaints import Complaints
from polytmpd.displays.registry import Registry

T = TypeVar("T")


class _Local(threading.local):
    registry: Registry


class Worker:
    """A thread and its registry. Work must return neither the registry nor anything else that can change."""

    def __init__(self, make: Callable[[], Registry], complaints: Complaints) -> None:
        """The thread calls make() once, when it starts."""
        self._complaints = complaints
        local = _Local()

        def own() -> None:
            local.registry = make()

        self._local = local
        self._pool = ThreadPoolExecutor(1, "displaylocks", initializer=own)
        self._awaited: Future[object] | asyncio.Future[object] = Future()
        self._awaited.set_result(None)

    def submit(self, work: Callable[[Registry], T]) -> "Future[T | None]":
        """Queue work for the thread. If the work fails, the error is logged and the result is None."""

        def run() -> T | None:
            try:
                return work(self._local.registry)
            except Exception as error:
                self._complaints.report(error)
                return None

        try:
            return self._pool.submit(run)
        except RuntimeError as error:  # can't start new thread: run() stays queued until one starts
            self._complaints.report(error)
            future: Future[T | None] = Future()
            future.set_result(None)
            return future

    async def call(self, work: Callable[[Registry], T]) -> T | None:
        """Queue work for the thread, and wait for its result; see submit()."""
        return await asyncio.wrap_future(self.submit(work))

    async def call_within(self, seconds: float, work: Callable[[Registry], object]) -> bool:
        """Queue work for the thread, and wait so long for it. Returns whether it is done.

        Otherwise it stays queued: the thread may be stuck in the kernel. Until it goes on, further calls do
        not wait at all.
        """
        future = asyncio.wrap_future(self.submit(work))
        if not self._awaited.done():
            return False
        await asyncio.wait((future,), timeout=seconds)
        self._awaited = future
        return future.done()

    def shut_down(self) -> None:
        """Accept no more work. Does not wait for work that is still queued."""
        self._pool.shutdown(wait=False)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one thread that owns the registry, and the only way to it.

The event loop calls submit() and call(); the work that they are given runs in the thread, in the order in
which it was submitted. The registry is made in the thread and lies in its local storage, so no other thread
can reach it.
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
    """A thread with a registry in it. Work must not return the registry, or anything that can change."""

    def __init__(self, make: Callable[[], Registry], complaints: Complaints) -> None:
        """make() is called in the thread, once."""
        self._complaints = complaints
        local = _Local()

        def own() -> None:
            local.registry = make()

        self._local = local
        self._pool = ThreadPoolExecutor(1, "displaylocks", initializer=own)

    def submit(self, work: Callable[[Registry], T]) -> "Future[T | None]":
        """Have the work done, after all that was submitted before. Its result is None if it fails; an error
        is logged.
        """

        def run() -> T | None:
            try:
                return work(self._local.registry)
            except Exception as error:
                self._complaints.report(error)
                return None

        try:
            return self._pool.submit(run)
        except RuntimeError as error:  # can't start new thread: run() stays queued until one can be started
            self._complaints.report(error)
            future: Future[T | None] = Future()
            future.set_result(None)
            return future

    async def call(self, work: Callable[[Registry], T]) -> T | None:
        """submit(), and wait for the result."""
        return await asyncio.wrap_future(self.submit(work))

    def shut_down(self) -> None:
        """Take no more work, and wait for none."""
        self._pool.shutdown(wait=False)

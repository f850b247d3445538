# SPDX-License-Identifier: LGPL-2.1-or-later
"""Threads for work of which users decide how long it takes, so that no login waits for one of them.

Not here: the work (blocking/).
"""

import asyncio
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Workers:
    """A pool of threads of its own, beside the event loop's."""

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, name)
        self._closed = threading.Event()

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """What work(*arguments, cancelled) returns, or raises.

        cancelled() becomes true with close(). A caller that no longer waits does not end the work.
        """
        call = functools.partial(work, *arguments, self._closed.is_set)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def close(self) -> None:
        """Have the work end where it stands, without waiting for it."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

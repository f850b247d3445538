# SPDX-License-Identifier: LGPL-2.1-or-later
"""Threads for work that takes as long as users like, so that no login waits for it.

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
    """A pool of threads, separate from the event loop's."""

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, name)
        self._closed = threading.Event()

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """What work(*arguments, cancelled) returns or raises.

        cancelled() becomes true with close(). The work goes on even if its caller stops waiting.
        """
        call = functools.partial(work, *arguments, self._closed.is_set)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def close(self) -> None:
        """Tell the work to stop where it is, without waiting for that."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

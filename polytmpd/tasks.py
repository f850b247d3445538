# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tasks that nobody awaits: kept until they end, logged if they fail.

The event loop keeps only weak references to tasks, so a task that nobody holds may vanish (asyncio docs,
create_task).
Not here: what the tasks do.
"""

import asyncio
import logging
import sys
from collections.abc import Coroutine
from typing import Any, Final

log = logging.getLogger(__name__)

_EAGER: Final[dict[str, Any]] = {"eager_start": True} if sys.version_info[:2] >= (3, 12) else {}


class Tasks:
    """The tasks of one owner, which closes them."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()
        self._closed = False

    def __bool__(self) -> bool:
        """Whether a task is running."""
        return bool(self._running)

    def start(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run it beside everything else. After close(), it is cancelled before it begins."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._running.add(task)
        task.add_done_callback(self._ended)
        if self._closed:
            task.cancel()
        return task

    def start_here(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """start(), but run it up to its first pause before this returns (since Python 3.12)."""
        if self._closed or not _EAGER:
            return self.start(coroutine)
        task: asyncio.Task[None] = asyncio.Task(coroutine, loop=asyncio.get_running_loop(), **_EAGER)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Cancel all tasks, wait for their end, and begin no others."""
        self._closed = True
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("Internal error: %r", error, exc_info=error)

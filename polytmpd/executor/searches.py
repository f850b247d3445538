# SPDX-License-Identifier: LGPL-2.1-or-later
"""Searches for processes that have an ended instance mounted: one search for all who wait for one.

A search reads the mounts of every namespace, so it takes longer the more users are logged in. When many of
them leave at once, each would wait for as many searches as there are before it.
Not here: the search (blocking/recovery), and what follows from it (sentinels).
"""

import asyncio
from collections.abc import Mapping

from polytmpd.blocking import removal
from polytmpd.core.model import Instance
from polytmpd.executor.workers import Workers
from polytmpd.kernel.mounted import Known


class Searches:
    """Those that are asked for while one runs are answered by the next: it begins after they were asked."""

    def __init__(self, searchers: Workers) -> None:
        self._searchers = searchers
        self._known = Known()  # of the one thread of the searchers
        self._asked: list[tuple[Instance, asyncio.Future[int | None]]] = []
        self._running: asyncio.Task[None] | None = None

    async def who_mounts(self, instance: Instance) -> int | None:
        """A process that has mounted what ends with the instance, in any namespace; 0 for an unknown one.

        Raises OSError, and RuntimeError if there is no thread for it.
        """
        future: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._asked.append((instance, future))
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._search())
        return await future

    def close(self) -> None:
        """Search no more. Whoever waits is cancelled by their owner."""
        if self._running is not None:
            self._running.cancel()

    async def _search(self) -> None:
        try:
            while self._asked:
                asked, self._asked = self._asked, []
                waiting = [(instance, future) for instance, future in asked if not future.done()]
                try:
                    found = await self._searchers.run(
                        removal.who_mounts, [instance for instance, _ in waiting], self._known
                    )
                except Exception as error:
                    _answer(waiting, dict.fromkeys((instance.uid for instance, _ in waiting), error))
                else:
                    _answer(waiting, found)
        finally:
            self._running = None


def _answer(
    waiting: list[tuple[Instance, "asyncio.Future[int | None]"]],
    found: Mapping[int, int | Exception | None],
) -> None:
    for instance, future in waiting:
        if future.done():
            continue
        answer = found[instance.uid]
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

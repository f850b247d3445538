# SPDX-License-Identifier: LGPL-2.1-or-later
"""The threads for work whose length users decide: how it is passed on, abandoned and ended."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from polytmpd.executor.workers import Workers
from tests.unit.settled import eventually

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]

Cancelled = Callable[[], bool]


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers(2, "test")
    yield made
    made.close()


class Work:
    """Work that runs until the test ends it."""

    def __init__(self) -> None:
        self.begun = 0
        self.done = 0
        self.end = threading.Event()
        self.seen: list[bool] = []

    def __call__(self, cancelled: Cancelled) -> None:
        self.begun += 1
        self.end.wait(30)
        self.seen.append(cancelled())
        self.done += 1


async def test_work_runs_in_a_thread_of_the_pool_and_returns_its_result(workers: Workers) -> None:
    def work(first: int, second: str, cancelled: Cancelled) -> tuple[int, str, bool, str]:
        return first, second, cancelled(), threading.current_thread().name.partition("_")[0]

    assert await workers.run(work, 1, "two") == (1, "two", False, "test")


async def test_the_caller_gets_the_error_of_the_work(workers: Workers) -> None:
    def fail(_: Cancelled) -> None:
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        await workers.run(fail)


async def test_the_number_of_threads_is_limited(workers: Workers) -> None:
    work = Work()
    calls = [asyncio.ensure_future(workers.run(work)) for _ in range(5)]
    await eventually(lambda: work.begun == 2)
    await asyncio.sleep(0.05)  # a third one must not begin
    assert work.begun == 2
    work.end.set()
    await asyncio.gather(*calls)
    assert work.done == 5


async def test_abandoned_work_continues(workers: Workers) -> None:
    work = Work()
    call = asyncio.ensure_future(workers.run(work))
    await eventually(lambda: work.begun)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    work.end.set()
    await eventually(lambda: work.done)
    assert work.seen == [False]


async def test_close_cancels_running_work_without_waiting_and_drops_the_rest(workers: Workers) -> None:
    work = Work()
    running = [asyncio.ensure_future(workers.run(work)) for _ in range(2)]
    await eventually(lambda: work.begun == 2)
    queued = asyncio.ensure_future(workers.run(work))
    await asyncio.sleep(0)  # it enters the queue
    workers.close()
    assert work.done == 0
    with pytest.raises(asyncio.CancelledError):
        await queued
    work.end.set()
    await asyncio.gather(*running)
    assert work.seen == [True, True]
    assert work.begun == 2

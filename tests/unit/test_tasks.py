# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tasks that no code awaits: they are kept, their errors are logged, and their owner ends them."""

import asyncio
import gc
import logging

import pytest

from polytmpd.tasks import Tasks

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def fail() -> None:
    raise ValueError("a defect")


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_task_runs_until_it_ends() -> None:
    tasks = Tasks()
    go = asyncio.Event()
    done = []

    async def work() -> None:
        await go.wait()
        done.append(True)

    assert not tasks
    task = tasks.start(work())
    await settle()
    assert tasks
    assert done == []
    go.set()
    await task
    await settle()
    assert done == [True]
    assert not tasks


async def test_a_task_that_nobody_else_refers_to_is_kept() -> None:
    tasks = Tasks()
    tasks.start(forever())
    await settle()
    gc.collect()
    assert tasks
    await tasks.close()


async def test_an_error_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks()
    tasks.start(fail())
    await settle()
    assert not tasks
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (
        logging.ERROR,
        "Internal error: ValueError('a defect')",
    )
    assert record.exc_info


async def test_a_cancelled_task_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks()
    tasks.start(forever()).cancel()
    await settle()
    assert not tasks
    assert caplog.records == []


async def test_close_cancels_all_tasks_and_waits_for_them(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks()
    ended = []

    async def work(name: str) -> None:
        try:
            await forever()
        finally:
            await settle()
            ended.append(name)

    for name in ("first", "second"):
        tasks.start(work(name))
    await settle()
    await tasks.close()
    assert sorted(ended) == ["first", "second"]
    assert caplog.records == []


async def test_close_survives_a_task_that_fails_on_cancellation(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks()

    async def work() -> None:
        try:
            await forever()
        finally:
            await fail()

    tasks.start(work())
    await settle()
    await tasks.close()
    await settle()
    assert [record.getMessage() for record in caplog.records] == ["Internal error: ValueError('a defect')"]


async def test_after_close_no_task_begins() -> None:
    tasks = Tasks()
    begun = []

    async def work() -> None:
        begun.append(True)

    await tasks.close()
    task = tasks.start(work())
    await settle()
    assert task.cancelled()
    assert begun == []
    assert not tasks

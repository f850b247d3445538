# SPDX-License-Identifier: LGPL-2.1-or-later
"""The worker and its thread, complaints, and which modules know of the event loop."""

import ast
import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import polytmpd.displays
from polytmpd.displays.complaints import Complaints
from polytmpd.displays.registry import Registry, Status
from polytmpd.displays.worker import Worker

pytestmark = pytest.mark.unit


@pytest.fixture
async def worker(no_task_leaks: None) -> AsyncIterator[Worker]:
    complaints = Complaints()
    worker = Worker(lambda: Registry(complaints, lambda: False), complaints)
    yield worker
    worker.shut_down()


def test_only_the_event_loops_part_imports_asyncio() -> None:
    found = set()
    for path in Path(polytmpd.displays.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            if isinstance(node, ast.ImportFrom) and node.module:
                names = {node.module}
            if {name.partition(".")[0] for name in names} & {"asyncio"}:
                found.add(path.stem)
    assert found == {"displaylocks", "worker"}


async def test_one_thread_does_all_work_in_order(worker: Worker) -> None:
    done: list[int] = []
    threads: set[int] = set()

    def work(number: int) -> Callable[[Registry], None]:
        def run(registry: Registry) -> None:
            done.append(number)
            threads.add(threading.get_ident())

        return run

    for number in range(100):
        worker.submit(work(number))
    assert await worker.call(lambda registry: registry.status()) == Status()
    assert done == list(range(100))
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


async def test_no_other_thread_reaches_the_registry(worker: Worker) -> None:
    assert await worker.call(lambda registry: isinstance(registry, Registry))
    with pytest.raises(AttributeError):
        _ = worker._local.registry


async def test_work_that_fails_has_no_result_and_is_reported_once(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        assert await worker.call(lambda _: 1 // 0) is None
    (record,) = caplog.records
    assert record.exc_info
    assert await worker.call(lambda _: 1) == 1


async def test_work_waits_for_a_thread_that_could_not_be_started(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    with monkeypatch.context() as context:

        def fail(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        context.setattr(threading.Thread, "start", fail)
        await worker.call(lambda _: done.append(1))
        assert not done
    await worker.call(lambda _: done.append(2))
    assert done == [1, 2]


def test_a_complaint_is_made_once_until_it_is_settled(caplog: pytest.LogCaptureFixture) -> None:
    complaints = Complaints()
    for _ in range(2):
        complaints.warn("disk", "disk of UID %d", 7, uid=7)
        complaints.warn("watch", "watch")
    complaints.settle("disk")
    complaints.settle("nothing")
    complaints.warn("disk", "disk again")
    assert [record.message for record in caplog.records] == ["disk of UID 7", "watch", "disk again"]
    assert caplog.records[0].__dict__["POLYTMP_UID"] == "7"


async def test_nothing_waits_for_a_thread_that_hangs(worker: Worker) -> None:
    """In the kernel, for example, for a file system that never answers. What was queued is done later."""
    hangs = threading.Event()
    done: list[int] = []

    def note(number: int) -> Callable[[Registry], None]:
        return lambda _: done.append(number)

    try:
        assert not await worker.call_within(0.01, lambda _: hangs.wait())
        async with asyncio.timeout(10):
            for number in range(100):
                assert not await worker.call_within(3600, note(number))
        assert not done
    finally:
        hangs.set()
    await worker.call(lambda _: None)
    assert done == list(range(100))
    assert await worker.call_within(3600, lambda _: done.clear())
    assert not done

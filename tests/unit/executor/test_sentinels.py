# SPDX-License-Identifier: LGPL-2.1-or-later
"""When an instance has ended: which processes still have it mounted, and searches that fail."""

import asyncio
import errno
import os

import pytest

from polytmpd.executor import sentinels
from polytmpd.kernel.host import in_words
from tests.unit.executor.world import BARRIER, UID, World
from tests.unit.settled import eventually

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]


async def test_short_lived_processes_one_after_another(
    ended: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sentinels, "_REST", 0.02)
    monkeypatch.setattr(sentinels, "_LOOK_AGAIN", 0.2)
    caplog.set_level("INFO")
    ended.executor.start()  # each process that is found has already ended
    await asyncio.sleep(0.5)  # the test counts the searches in this time
    assert 3 <= ended.looks <= 6, (
        "searches after 0, 0.02, 0.06, 0.14, 0.3 and 0.5 seconds, not without a pause"
    )
    assert ended.ended == []
    assert len([record for record in caplog.records if "waiting" in record.message]) == 1
    ended.mounted = {}
    await eventually(lambda: ended.ended == [UID])


async def test_a_process_that_stays_is_waited_for(ended: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentinels, "_REST", 0.001)
    process = await asyncio.create_subprocess_exec("sleep", "infinity")
    try:
        ended.mounted = {BARRIER: process.pid}
        ended.executor.start()
        await eventually(lambda: ended.looks)
        await asyncio.sleep(0.1)  # a second search must not follow
        assert ended.looks == 1
        ended.mounted = {}
    finally:
        process.kill()
        await process.wait()
    await eventually(lambda: ended.ended == [UID])


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "none left"), RuntimeError("can't start new thread")]
)
async def test_a_failed_search_is_retried(
    ended: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    monkeypatch.setattr(sentinels, "_REST", 0.01)
    monkeypatch.setattr(sentinels, "_LOOK_AGAIN", 0.01)
    failures: list[Exception] = [error, error]

    def pidfd_open(pid: int) -> int:
        raise failures.pop() if failures else ProcessLookupError

    ended.failures = [error, error]
    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    ended.executor.start()
    await eventually(lambda: not failures)
    assert not ended.executor.has_ended(UID)
    ended.mounted = {}
    await eventually(lambda: ended.ended == [UID])
    assert len([record for record in caplog.records if in_words(error) in record.message]) == 1

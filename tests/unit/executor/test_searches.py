# SPDX-License-Identifier: LGPL-2.1-or-later
"""One search for all who wait."""

import asyncio
import errno
import threading
from collections.abc import Iterator

import pytest

from polytmpd.blocking import recovery
from polytmpd.core.model import Instance, InstanceDirectory
from polytmpd.executor.searches import Searches
from polytmpd.executor.workers import Workers
from tests.unit.executor.world import TMP
from tests.unit.settled import eventually

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]


def barrier(uid: int) -> str:
    return f"polytmp-{'a' * 32}-{uid}-{'b' * 16}"


def instance(uid: int) -> Instance:
    return Instance(uid, f"user{uid}", 0, 0, (InstanceDirectory(TMP, barrier(uid)),), namespace=uid)


class Search:
    """Stands in for recovery.mounted_barriers; waits until the test lets it go on."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.go_on = threading.Event()
        self.found: dict[str, int] = {}
        self.error: Exception | None = None

    def __call__(self, places: list[tuple[str, str]], *_: object) -> dict[str, int]:
        self.asked.append(sorted(name for _, name in places))
        assert self.go_on.wait(10)
        if self.error:
            raise self.error
        return self.found


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Search:
    made = Search()
    monkeypatch.setattr(recovery, "mounted_barriers", made)
    return made


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers(1, "search")
    yield made
    made.close()


async def test_those_who_come_during_a_search_share_the_next(search: Search, workers: Workers) -> None:
    """The running one may have passed what keeps their instances."""
    searches = Searches(workers)
    first = asyncio.create_task(searches.who_mounts(instance(1)))
    await eventually(lambda: search.asked)
    others = [asyncio.create_task(searches.who_mounts(instance(uid))) for uid in (2, 3, 4)]
    await asyncio.sleep(0)
    search.found = {barrier(3): 77}
    search.go_on.set()
    assert await first is None
    assert [await task for task in others] == [None, 77, None]
    assert search.asked == [[barrier(1)], [barrier(2), barrier(3), barrier(4)]]
    assert await searches.who_mounts(instance(5)) is None
    assert len(search.asked) == 3


async def test_what_cannot_be_read_concerns_its_user_alone(search: Search, workers: Workers) -> None:
    search.go_on.set()
    unknown = {barrier(2): OSError(errno.EACCES, "no")}
    search.error = recovery.UnreadError(unknown, {barrier(3): 0})
    searches = Searches(workers)
    answers = await asyncio.gather(
        *(searches.who_mounts(instance(uid)) for uid in (1, 2, 3)), return_exceptions=True
    )
    assert (answers[0], answers[2]) == (None, 0)
    assert isinstance(answers[1], OSError)
    assert answers[1].errno == errno.EACCES


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "none left"), RuntimeError("no thread")])
async def test_a_search_that_fails_fails_for_all(search: Search, workers: Workers, error: Exception) -> None:
    search.go_on.set()
    search.error = error
    searches = Searches(workers)
    tasks = [searches.who_mounts(instance(uid)) for uid in (1, 2)]
    assert await asyncio.gather(*tasks, return_exceptions=True) == [error, error]
    search.error = None
    assert await searches.who_mounts(instance(1)) is None


async def test_whoever_gave_up_is_left_out(search: Search, workers: Workers) -> None:
    searches = Searches(workers)
    first = asyncio.create_task(searches.who_mounts(instance(1)))
    await eventually(lambda: search.asked)
    second = asyncio.create_task(searches.who_mounts(instance(2)))
    third = asyncio.create_task(searches.who_mounts(instance(3)))
    await asyncio.sleep(0)
    second.cancel()
    search.go_on.set()
    assert (await first, await third) == (None, None)
    assert search.asked[1] == [barrier(3)]


async def test_close(search: Search, workers: Workers) -> None:
    searches = Searches(workers)
    waiting = asyncio.create_task(searches.who_mounts(instance(1)))
    await eventually(lambda: search.asked)
    searches.close()
    waiting.cancel()
    search.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.sleep(0.01)  # the cancelled search ends

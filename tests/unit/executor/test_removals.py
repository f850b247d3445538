# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which leftovers of a former daemon are deleted, and what a failed deletion leaves for the next one."""

import asyncio
import contextlib
import errno
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from polytmpd.blocking import removal, storage
from polytmpd.blocking.removal import Place
from polytmpd.executor.removals import Removals
from polytmpd.kernel import host, inside
from tests.unit.executor.world import BARRIER, INSTANCE, NOBODY, TMP, UID, World
from tests.unit.settled import eventually

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]


async def test_directories_of_no_living_instance_are_leftovers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[set[str]] = []
    deleted: list[Place] = []

    def find_leftovers(_: object, barriers: set[str]) -> list[Place]:
        known.append(barriers)
        return [Place("/tmp", "left"), Place("/tmp", "mounted")]

    monkeypatch.setattr(inside, "renew_sentinel", lambda *_: 1)
    monkeypatch.setattr(removal, "find_leftovers", find_leftovers)
    monkeypatch.setattr(removal, "delete_leftover", lambda place, _: deleted.append(place))
    world.mounted = {"mounted": NOBODY}
    world.state.save(INSTANCE)
    restored = await world.executor.restore([TMP])
    assert [entry.uid for entry in restored.draining] == [UID]
    assert known == [{BARRIER}]
    assert world.displays.shown == {UID}
    world.executor.start()
    await eventually(lambda: deleted == [Place("/tmp", "left")])


def test_foreign_leftovers_that_are_not_named_are_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Any user can make thousands."""
    named = tuple((f"polytmp-{number}", "not a directory") for number in range(16))
    monkeypatch.setattr(host, "open_directory", lambda _: contextlib.nullcontext(0))
    monkeypatch.setattr(storage, "leftovers", lambda _: storage.Leftovers((), named, 300))
    assert removal.find_leftovers([TMP], set()) == []
    assert caplog.text.count("/tmp/polytmp-") == 16
    assert "284 more in /tmp whose names begin with polytmp- were not made by polytmpd" in caplog.text
    monkeypatch.setattr(storage, "leftovers", lambda _: storage.Leftovers((), named, 16))
    caplog.clear()
    assert removal.find_leftovers([TMP], set()) == []
    assert "more in" not in caplog.text


@pytest.fixture
def removals() -> Iterator[Removals]:
    made = Removals()
    yield made
    made.close()


async def test_the_next_deletion_tries_again_what_the_last_one_could_not_delete(
    removals: Removals, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[list[Place]] = []
    refuse = True

    def delete(aside: Sequence[Place], _report: object, _cancelled: object) -> None:
        attempts.append(list(aside))
        if refuse:
            raise OSError(errno.EBUSY, "Device or resource busy", "/tmp/first")

    monkeypatch.setattr(removal, "delete", delete)
    first, second, other = (Place("/tmp", name) for name in ("first", "second", "other"))
    with pytest.raises(OSError, match="/tmp/first"):
        await removals.delete(UID, [first])
    with pytest.raises(OSError, match="/tmp/first"):
        await removals.delete(UID, [second])
    refuse = False
    assert await removals.delete(UID + 1, [other])
    assert await removals.delete(UID, [])
    assert attempts == [[first], [first, second], [other], [first, second]]
    assert not await removals.delete(UID, []), "nothing is left to delete"


async def test_progress_is_known_while_a_deletion_runs(
    removals: Removals, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted, end = threading.Event(), threading.Event()

    def delete(_aside: object, report: Callable[[int], None], _cancelled: object) -> None:
        report(1024)
        deleted.set()
        end.wait(30)

    monkeypatch.setattr(removal, "delete", delete)
    running = asyncio.ensure_future(removals.delete(UID, [Place("/tmp", "many")]))
    await eventually(deleted.is_set)
    assert (removals.entries(UID), removals.entries(UID + 1)) == (1024, 0)
    end.set()
    assert await running
    assert removals.entries(UID) == 0

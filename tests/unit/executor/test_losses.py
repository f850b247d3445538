# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is reported when directories of an instance, or those that all share, are removed on the host."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from polytmpd.blocking import shared
from polytmpd.core.model import Directory, Instance, InstanceDirectory, Lifetime
from polytmpd.executor import losses, shares
from polytmpd.executor.losses import Losses
from polytmpd.executor.shares import Shares
from polytmpd.kernel import host
from polytmpd.kernel.inotify import IN_DELETE, IN_DELETE_SELF
from tests.unit.settled import eventually

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]

ALICE, BOB = 1001, 1002


class Mender:
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool]] = []
        self.failures: list[Exception] = []

    async def mend(self, uid: int, is_lost: bool) -> None:
        self.calls.append((uid, is_lost))
        if self.failures:
            raise self.failures.pop()


@pytest.fixture
def mender() -> Mender:
    return Mender()


@pytest.fixture
async def watched(mender: Mender, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[Losses]:
    """The barriers of two users, with an inner directory and a mount point in each."""
    monkeypatch.setattr(losses, "_SETTLE", 0.01)
    monkeypatch.setattr(losses, "_REST", 0.02)
    monkeypatch.setattr(losses, "_RETRY", 0.05)
    made = Losses(mender.mend)
    made.start()
    for uid in (ALICE, BOB):
        barrier = tmp_path / str(uid)
        (barrier / "tmp" / ".X11-unix").mkdir(parents=True)
        made.add(uid, str(barrier), IN_DELETE | IN_DELETE_SELF)
        made.add(uid, str(barrier / "tmp" / ".X11-unix"), IN_DELETE_SELF)
    yield made
    await made.close()


async def test_a_barrier_is_removed(watched: Losses, mender: Mender, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / str(ALICE))
    await eventually(lambda: mender.calls)
    assert set(mender.calls) == {(ALICE, True)}


async def test_a_mount_point_is_removed(watched: Losses, mender: Mender, tmp_path: Path) -> None:
    (tmp_path / str(BOB) / "tmp" / ".X11-unix").rmdir()
    await eventually(lambda: mender.calls == [(BOB, True)])


async def test_something_else_in_a_barrier(watched: Losses, mender: Mender, tmp_path: Path) -> None:
    """The name of the user is there, too."""
    (tmp_path / str(ALICE) / "user").touch()
    (tmp_path / str(ALICE) / "user").unlink()
    (tmp_path / str(BOB) / "tmp" / ".X11-unix").rmdir()
    await eventually(lambda: mender.calls)
    assert mender.calls == [(BOB, True)]


async def test_of_many_events_one_call_is_made(watched: Losses, mender: Mender) -> None:
    for _ in range(100):
        watched.look(ALICE)
        watched.look(ALICE, is_lost=True)
        watched.look(ALICE)
    await eventually(lambda: mender.calls)
    await asyncio.sleep(0.2)  # a second call must not come
    assert mender.calls == [(ALICE, True)]


async def test_what_fails_is_tried_again(
    watched: Losses, mender: Mender, caplog: pytest.LogCaptureFixture
) -> None:
    failure = OSError(28, "No space left on device")
    mender.failures = [failure, failure, RuntimeError("can't start new thread"), failure]
    watched.look(ALICE, is_lost=True)
    await eventually(lambda: len(mender.calls) == 5)
    assert set(mender.calls) == {(ALICE, True)}
    assert len([record for record in caplog.records if "retrying" in record.message]) == 1


async def test_what_is_forgotten_is_not_reported(watched: Losses, mender: Mender, tmp_path: Path) -> None:
    watched.forget(ALICE)
    shutil.rmtree(tmp_path / str(ALICE))
    shutil.rmtree(tmp_path / str(BOB))
    await eventually(lambda: mender.calls)
    assert {uid for uid, _ in mender.calls} == {BOB}


async def test_a_shared_directory_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    changed: list[str] = []

    async def share_again(path: str) -> None:
        changed.append(path)

    monkeypatch.setattr(host, "ROOT", "")
    monkeypatch.setattr(host, "path", lambda path: path)
    monkeypatch.setattr(shares, "_REST", 0.05)
    monkeypatch.setattr(shared, "ensure", lambda *_: None)
    base = str(tmp_path)
    places = [tmp_path / name for name in (".X11-unix", ".ICE-unix")]
    for place in places:
        place.mkdir()
    made = Shares(share_again)
    made.start()
    directory = Directory(base, Lifetime.INSTANCE, (".X11-unix", ".ICE-unix"))
    made.add(Instance(ALICE, "alice", 0, 0, (InstanceDirectory(directory, "polytmp-1001"),)))
    await eventually(lambda: -1 not in made._watches[base].values())
    for place in places:
        assert list(place.iterdir()) == []
    await asyncio.sleep(0.2)  # being listed is no reason to share it again
    assert changed == []
    shutil.rmtree(places[0])
    places[0].mkdir()
    await eventually(lambda: changed == [base])
    shutil.rmtree(places[1])
    places[1].mkdir()
    await eventually(lambda: changed == [base] * 2)
    await made.close()

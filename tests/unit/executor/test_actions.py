# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the executor takes over at start, what it holds, and what it removes.

Not here: making and deleting directories and namespaces (tests/kernel, tests/e2e).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polytmpd.blocking import instances, removal
from polytmpd.blocking.instances import Mended
from polytmpd.core.model import Instance
from polytmpd.executor.actions import Executor
from polytmpd.journal import MessageId
from polytmpd.kernel import inside
from polytmpd.kernel.descriptor import Descriptor
from tests.unit.executor.world import BARRIER, INSTANCE, TMP, UID, World, namespace
from tests.unit.settled import eventually

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]


@pytest.mark.parametrize("lives", [False, True])
async def test_an_instance_that_was_already_set_aside(
    world: World, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    """The former daemon ended before it forgot the instance. A login could not join it and would fail."""
    if not lives:
        monkeypatch.setattr(instances, "open_living", lambda _: None)
    monkeypatch.setattr(inside, "renew_sentinel", lambda *_: 1)
    world.state.save(INSTANCE)
    restored = await world.executor.restore([TMP])
    world.executor.start()
    assert [entry.uid for entry in restored.draining] == ([UID] if lives else [])
    assert set(world.state.load()[0]) == ({UID} if lives else set())


async def test_an_unwatched_instance_has_not_ended(unwatched: Executor) -> None:
    """Otherwise its files would be deleted while processes use them."""
    assert not unwatched.has_ended(UID)
    with pytest.raises(OSError, match="just logged in"):
        await unwatched.remove_persistent(UID, [TMP])


async def test_a_descriptor_does_not_replace_a_watch(unwatched: Executor) -> None:
    await unwatched.rejoin(INSTANCE)
    assert not unwatched.has_ended(UID)
    unwatched.let_go(UID)
    assert not unwatched.has_ended(UID)


async def test_a_new_namespace_is_watched(
    world: World, unwatched: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rebuild(instance: Instance, watch: Any) -> tuple[Instance, Descriptor, int]:
        return instance, namespace(), watch(str(tmp_path))

    monkeypatch.setattr(instances, "open_living", lambda _: None)
    monkeypatch.setattr(instances, "rebuild", rebuild)
    held = await unwatched.rejoin(INSTANCE)
    unwatched.let_go(UID)
    assert not unwatched.has_ended(UID)
    assert held.watches == unwatched._sentinels.watches(UID)
    unwatched._sentinels.forget(UID)  # as its end does
    assert unwatched.has_ended(UID)


async def test_an_unwatched_instance_ends_when_root_removes_it(
    unwatched: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "set_aside", lambda _: [])
    await unwatched.remove(INSTANCE)
    assert unwatched.has_ended(UID)


async def test_what_was_removed_is_made_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Under another name, as another user took the former one. The bus and the next start know it."""
    asked: list[bool] = []
    other = replace(INSTANCE.directories[0], barrier=BARRIER.replace("b", "c"))

    def mend(instance: Instance, held: Descriptor | None, _: object, is_lost: bool) -> Mended:
        asked.append(is_lost)
        if held is not None:
            held.close()
        if instance.directories == (other,):
            return Mended((other,))
        return Mended((other,), ("/tmp",), is_watched=False)

    monkeypatch.setattr(inside, "renew_sentinel", lambda *_: 1)
    monkeypatch.setattr(instances, "mend", mend)
    world.state.save(INSTANCE)
    await world.executor.restore([TMP])
    world.displays.shown.clear()
    world.executor.start()
    await eventually(lambda: len(asked) == 2)
    assert asked == [True, True], "at start something may have been removed; then it was not watched"
    assert [instance.directories for instance in world.changed] == [(other,)]
    assert world.state.load()[0][UID].directories == (other,)
    assert world.displays.shown == {UID}
    [record] = [record for record in caplog.records if "was removed on the host" in record.message]
    assert vars(record)["MESSAGE_ID"] == MessageId.DIRECTORY_LOST

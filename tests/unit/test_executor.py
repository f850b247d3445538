# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the executor concludes from what the kernel tells it, and from what it cannot tell.

Not here: what it makes and removes (tests/kernel, tests/e2e).
"""

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from polytmpd import instances, recovery
from polytmpd.core.model import Directory, Instance, InstanceDirectory, Lifetime
from polytmpd.executor import Executor
from polytmpd.kernel import mountns
from polytmpd.state import StateDirectory

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]

UID = 1000
BARRIER = f"polytmp-{'a' * 32}-{UID}-{'b' * 16}"
TMP = Directory("/tmp", Lifetime.INSTANCE)
INSTANCE = Instance(UID, "alice", 0, 0, (InstanceDirectory(TMP, BARRIER),), namespace=42)


def namespace(*_: object) -> int:
    """What stands for a descriptor of the instance's namespace."""
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


class World:
    """An executor whose kernel is what the test says."""

    def __init__(self, state: Path) -> None:
        self.state = StateDirectory(state)
        self.ended: list[int] = []
        self.mounted: dict[str, int] = {}
        self.executor = Executor(self.state, "a" * 32, self.ended.append)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    made = World(tmp_path / "instances")
    monkeypatch.setattr(StateDirectory, "lock", lambda _: None)  # which is for the life of the process
    monkeypatch.setattr(recovery, "living", lambda _: [])
    monkeypatch.setattr(recovery, "mounted_barriers", lambda *_: made.mounted)
    monkeypatch.setattr(instances, "open_living", namespace)
    monkeypatch.setattr(instances, "require_same_user", lambda _: None)
    yield made
    await made.executor.close()


# No watch


@pytest.fixture
async def unwatched(world: World, monkeypatch: pytest.MonkeyPatch) -> Executor:
    """A daemon that found a living instance, whose sentinel it cannot set anew (before Linux 6.5)."""

    def fail(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mountns, "renew_sentinel", fail)
    world.state.save(INSTANCE)
    restored = world.executor.restore([TMP])
    assert [entry.uid for entry in restored.draining] == [UID]
    world.executor.start()
    return world.executor


def former_user(_: Instance) -> None:
    raise OSError(errno.EBUSY, "processes live in the instance of alice")


async def test_what_is_not_watched_has_not_ended(
    unwatched: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files would be deleted under whoever lives in it."""
    monkeypatch.setattr(instances, "require_same_user", former_user)
    with pytest.raises(OSError, match="processes live"):
        await unwatched.rejoin(INSTANCE)
    assert not unwatched.has_ended(UID)
    with pytest.raises(OSError, match="just logged in"):
        await unwatched.remove_persistent(UID, [TMP])


async def test_a_descriptor_is_no_watch(unwatched: Executor) -> None:
    await unwatched.rejoin(INSTANCE)
    assert not unwatched.has_ended(UID)
    unwatched.let_go(UID)
    assert not unwatched.has_ended(UID)


async def test_a_new_namespace_is_watched(
    world: World, unwatched: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rebuild(instance: Instance, watch: Any) -> tuple[Instance, int, int]:
        return instance, namespace(), watch(str(tmp_path))

    monkeypatch.setattr(instances, "open_living", lambda _: None)
    monkeypatch.setattr(instances, "rebuild", rebuild)
    held = await unwatched.rejoin(INSTANCE)
    unwatched.let_go(UID)
    assert not unwatched.has_ended(UID)
    (watch,) = held.watches
    del unwatched._watches[watch]  # as its end does
    assert unwatched.has_ended(UID)


async def test_what_root_removed_is_not_there_any_more(
    unwatched: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instances, "set_aside", lambda _: [])
    await unwatched.remove(INSTANCE)
    assert unwatched.has_ended(UID)

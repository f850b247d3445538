# SPDX-License-Identifier: LGPL-2.1-or-later
"""The executor of each test, and the states in which a daemon can find an instance at start."""

import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from polytmpd.blocking import instances, recovery, removal, restoration, tmpfiles
from polytmpd.executor.actions import Executor
from polytmpd.kernel import inside
from tests.unit.executor.world import BARRIER, INSTANCE, NOBODY, TMP, UID, World, mend, namespace


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    made = World(tmp_path / "instances")
    monkeypatch.setattr(recovery, "living", lambda *_: [])
    monkeypatch.setattr(recovery, "host_peers", set)
    monkeypatch.setattr(restoration, "_are_all_known", lambda *_: False)
    monkeypatch.setattr(removal, "find_leftovers", lambda *_: [])
    monkeypatch.setattr(tmpfiles, "write", lambda _: None)
    monkeypatch.setattr(recovery, "mounted_barriers", made.mounted_barriers)
    monkeypatch.setattr(instances, "open_living", namespace)
    monkeypatch.setattr(instances, "mend", mend)
    yield made
    await made.executor.close()


@pytest.fixture
async def unwatched(world: World, monkeypatch: pytest.MonkeyPatch) -> Executor:
    """A daemon that found a living instance but cannot renew its sentinel (before Linux 6.5)."""

    def fail(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(inside, "renew_sentinel", fail)
    world.state.save(INSTANCE)
    restored = await world.executor.restore([TMP])
    assert [entry.uid for entry in restored.draining] == [UID]
    world.executor.start()
    return world.executor


@pytest.fixture
async def ended(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A daemon that found no process in the namespace at start."""
    monkeypatch.setattr(instances, "open_living", lambda _: None)
    monkeypatch.setattr(removal, "is_set_aside", lambda _: False)
    world.state.save(INSTANCE)
    world.mounted = {BARRIER: NOBODY}
    assert (await world.executor.restore([TMP])).draining
    world.looks = 0
    return world

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the executor concludes from what the kernel tells it, and from what it cannot tell.

Not here: what it makes and removes (tests/kernel, tests/e2e).
"""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from polytmpd.blocking import instances, recovery, removal, tmpfiles
from polytmpd.blocking.recovery import Living
from polytmpd.blocking.removal import Place
from polytmpd.blocking.state import StateDirectory
from polytmpd.core.model import Directory, Instance, InstanceDirectory, Lifetime
from polytmpd.executor import sentinels
from polytmpd.executor.actions import Executor
from polytmpd.executor.fdstore import Stored
from polytmpd.kernel import inside
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.host import in_words
from polytmpd.kernel.mountinfo import Mount, parse_line
from tests.unit.settled import eventually

if TYPE_CHECKING:
    from polytmpd.displays.displaylocks import DisplayLocks

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]

UID = 1000
NOBODY = 2**22  # above the largest PID
BARRIER = f"polytmp-{'a' * 32}-{UID}-{'b' * 16}"
TMP = Directory("/tmp", Lifetime.INSTANCE)
INSTANCE = Instance(UID, "alice", 0, 0, (InstanceDirectory(TMP, BARRIER),), namespace=42)


def namespace(*_: object) -> Descriptor:
    """What stands for a descriptor of the instance's namespace."""
    return Descriptor.open("/dev/null", os.O_RDONLY)


class FakeDisplays:
    """Remembers to whose instances displays are shown."""

    def __init__(self) -> None:
        self.shown: set[int] = set()

    def follow(self, share_again: object) -> None:
        pass

    async def start(self, directories: Sequence[Directory], instances: Sequence[Instance]) -> None:
        self.shown = {instance.uid for instance in instances}

    async def instance_came(self, instance: Instance) -> None:
        self.shown.add(instance.uid)

    def instance_gone(self, uid: int) -> None:
        self.shown.discard(uid)

    async def close(self) -> None:
        pass


class World:
    """An executor whose kernel is what the test says."""

    def __init__(self, state: Path) -> None:
        self.state = StateDirectory(state)
        self.ended: list[int] = []
        self.mounted: dict[str, int] = {}
        self.looks = 0
        self.failures: list[Exception] = []
        self.displays = FakeDisplays()
        self.executor = self.start()

    def start(self, stored: Stored = Stored()) -> Executor:  # noqa: B008  # it is frozen
        """Another daemon, with what the FD store has for it."""
        self.executor = Executor(self.state, "a" * 32, stored, cast("DisplayLocks", self.displays))
        self.executor.follow(self.ended.append)
        return self.executor

    def mounted_barriers(self, *_: object) -> dict[str, int]:
        self.looks += 1
        if self.failures:
            raise self.failures.pop()
        return dict(self.mounted)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    made = World(tmp_path / "instances")
    monkeypatch.setattr(recovery, "living", lambda _: [])
    monkeypatch.setattr(removal, "find_leftovers", lambda *_: [])
    monkeypatch.setattr(tmpfiles, "write", lambda _: None)
    monkeypatch.setattr(recovery, "mounted_barriers", made.mounted_barriers)
    monkeypatch.setattr(instances, "open_living", namespace)
    monkeypatch.setattr(instances, "require_same_user", lambda _: None)
    yield made
    await made.executor.close()


# The FD store


@pytest.mark.parametrize("lives", [False, True])
async def test_a_stored_namespace_that_cannot_be_looked_into(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lives: bool
) -> None:
    """No /proc is mounted there, and the state file is lost: none of ours, and no reason not to start."""

    def mounts_in(_: int) -> list[Mount]:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/thread-self/mountinfo")

    table = (parse_line(f"36 35 0:30 /{BARRIER}/tmp /tmp rw - tmpfs tmpfs rw".encode()),)
    stored = namespace()
    await world.executor.close()
    world.start(Stored({UID: stored}))
    monkeypatch.setattr(inside, "mounts_in", mounts_in)
    monkeypatch.setattr(inside, "renew_sentinel", lambda *_: 1)
    if lives:
        monkeypatch.setattr(recovery, "living", lambda _: [Living(UID, 42, table)])
    restored = await world.executor.restore([TMP])
    world.executor.start()
    assert [entry.namespace for entry in restored.draining] == ([42] if lives else [])
    assert restored.held == []
    assert "is not polytmpd's" in caplog.text
    assert stored.closed


# What is left over


async def test_what_no_living_instance_has_is_left_over(
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


# A removal that was interrupted


@pytest.mark.parametrize("lives", [False, True])
async def test_an_instance_that_is_set_aside_already(
    world: World, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    """The daemon ended before it forgot it. A login would be refused: nothing is there to be joined."""
    if not lives:
        monkeypatch.setattr(instances, "open_living", lambda _: None)
    monkeypatch.setattr(inside, "renew_sentinel", lambda *_: 1)
    world.state.save(INSTANCE)
    restored = await world.executor.restore([TMP])
    world.executor.start()
    assert [entry.uid for entry in restored.draining] == ([UID] if lives else [])
    assert set(world.state.load()[0]) == ({UID} if lives else set())


# No watch


@pytest.fixture
async def unwatched(world: World, monkeypatch: pytest.MonkeyPatch) -> Executor:
    """A daemon that found a living instance, whose sentinel it cannot set anew (before Linux 6.5)."""

    def fail(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(inside, "renew_sentinel", fail)
    world.state.save(INSTANCE)
    restored = await world.executor.restore([TMP])
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
    def rebuild(instance: Instance, watch: Any) -> tuple[Instance, Descriptor, int]:
        return instance, namespace(), watch(str(tmp_path))

    monkeypatch.setattr(instances, "open_living", lambda _: None)
    monkeypatch.setattr(instances, "rebuild", rebuild)
    held = await unwatched.rejoin(INSTANCE)
    unwatched.let_go(UID)
    assert not unwatched.has_ended(UID)
    (watch,) = held.watches
    del unwatched._sentinels._owners[watch]  # as its end does
    assert unwatched.has_ended(UID)


async def test_what_root_removed_is_not_there_any_more(
    unwatched: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "set_aside", lambda _: [])
    await unwatched.remove(INSTANCE)
    assert unwatched.has_ended(UID)


# Who has it mounted


@pytest.fixture
async def ended(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """At start, nobody is found in the namespace."""
    monkeypatch.setattr(instances, "open_living", lambda _: None)
    monkeypatch.setattr(removal, "is_set_aside", lambda _: False)
    world.state.save(INSTANCE)
    world.mounted = {BARRIER: NOBODY}
    assert (await world.executor.restore([TMP])).draining
    world.looks = 0
    return world


async def test_processes_that_follow_one_another(
    ended: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sentinels, "_REST", 0.02)
    monkeypatch.setattr(sentinels, "_LOOK_AGAIN", 0.2)
    caplog.set_level("INFO")
    ended.executor.start()  # the process is gone whenever it is looked for
    await asyncio.sleep(0.5)  # the test counts the looks in this time
    assert 3 <= ended.looks <= 6, "after 0, 0.02, 0.06, 0.14, 0.3, 0.5 seconds, and not without a pause"
    assert ended.ended == []
    assert len([record for record in caplog.records if "waiting" in record.message]) == 1
    ended.mounted = {}
    await eventually(lambda: ended.ended == [UID])


async def test_one_that_stays_is_waited_for(ended: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentinels, "_REST", 0.001)
    process = await asyncio.create_subprocess_exec("sleep", "infinity")
    try:
        ended.mounted = {BARRIER: process.pid}
        ended.executor.start()
        await eventually(lambda: ended.looks)
        await asyncio.sleep(0.1)  # a second look must not come
        assert ended.looks == 1
        ended.mounted = {}
    finally:
        process.kill()
        await process.wait()
    await eventually(lambda: ended.ended == [UID])


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "none left"), RuntimeError("can't start new thread")]
)
async def test_what_cannot_be_found_out_now_is_later(
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

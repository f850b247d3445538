# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a daemon takes from the FD store, and what it closes because it did not put it there."""

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from polytmpd import sdnotify
from polytmpd.blocking import recovery
from polytmpd.blocking.recovery import Living
from polytmpd.blocking.state import StateDirectory
from polytmpd.executor import fdstore
from polytmpd.executor.fdstore import SENTINELS, Namespaces, Stored, take
from polytmpd.kernel import inside
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.inotify import Inotify
from polytmpd.kernel.mountinfo import Mount, parse_line
from tests.unit.executor.world import BARRIER, INSTANCE, TMP, UID, World, namespace

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]


@pytest.mark.parametrize("lives", [False, True])
async def test_a_stored_namespace_that_cannot_be_examined(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lives: bool
) -> None:
    """It has no /proc, and the state file is lost: not polytmp's. The daemon must start all the same."""

    def mounts_in(_: int) -> list[Mount]:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/thread-self/mountinfo")

    table = (parse_line(f"36 35 0:30 /{BARRIER}/tmp /tmp rw - tmpfs tmpfs rw".encode()),)
    stored = namespace()
    await world.executor.close()
    world.start(Stored({UID: stored}))
    monkeypatch.setattr(inside, "mounts_in", mounts_in)
    monkeypatch.setattr(inside, "renew_sentinel", lambda *_: 1)
    if lives:
        monkeypatch.setattr(recovery, "living", lambda *_: [Living(UID, 42, table, stored)])
    restored = await world.executor.restore([TMP])
    world.executor.start()
    assert [entry.namespace for entry in restored.draining] == ([42] if lives else [])
    assert restored.held == []
    assert "is not polytmpd's" in caplog.text
    assert stored.closed


# What the daemon takes from the FD store


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were removed from the FD store."""
    names: list[str] = []
    monkeypatch.setattr(sdnotify, "remove", names.append)
    return names


def opened(path: str) -> Descriptor:
    return Inotify().fd if path == "inotify" else Descriptor.open(path, os.O_RDONLY)


MOUNT_NAMESPACE = "/proc/self/ns/mnt"


def test_take(removed: list[str]) -> None:
    alice, bob = opened(MOUNT_NAMESPACE), opened(MOUNT_NAMESPACE)
    inotify = opened("inotify")
    passed = [("ns-1000", alice), (SENTINELS, inotify), ("ns-1001", bob)]
    with alice, bob, inotify:
        assert take(passed) == Stored({1000: alice, 1001: bob}, inotify)
        assert [fd.closed for fd in (alice, bob, inotify)] == [False] * 3
    assert removed == []


def test_take_nothing(removed: list[str]) -> None:
    assert take([]) == Stored({}, None)
    assert removed == []


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("ns-1000", "/dev/null"),
        ("ns-1000", "/proc/self/ns/net"),
        ("ns-1000", "inotify"),
        ("ns-", MOUNT_NAMESPACE),
        ("ns-alice", MOUNT_NAMESPACE),
        ("ns--1", MOUNT_NAMESPACE),
        ("1000", MOUNT_NAMESPACE),
        ("stored", MOUNT_NAMESPACE),
        (SENTINELS, "/dev/null"),
        (SENTINELS, MOUNT_NAMESPACE),
        ("stored", "inotify"),
    ],
)
def test_take_closes_what_polytmpd_did_not_store(
    caplog: pytest.LogCaptureFixture, removed: list[str], name: str, path: str
) -> None:
    foreign, ours = opened(path), opened(MOUNT_NAMESPACE)
    passed = [(name, foreign), ("ns-1001", ours)]
    with ours:
        assert take(passed) == Stored({1001: ours}, None)
    assert foreign.closed
    assert removed == [name]
    assert f"Found {name} in the FD store" in caplog.text


@pytest.mark.parametrize(("name", "path"), [("ns-1000", MOUNT_NAMESPACE), (SENTINELS, "inotify")])
def test_take_keeps_the_first_descriptor_of_a_name(
    monkeypatch: pytest.MonkeyPatch, removed: list[str], name: str, path: str
) -> None:
    first, second = opened(path), opened(path)
    kept: list[tuple[str, int]] = []
    monkeypatch.setattr(sdnotify, "store", lambda name, fd: kept.append((name, fd)))
    passed = [(name, first), (name, second)]
    with first:
        stored = take(passed)
        assert first in (stored.inotify, *stored.namespaces.values())
        assert len(stored.namespaces) <= 1
        assert not first.closed
    assert second.closed
    assert removed == [name]
    assert kept == [(name, first)], "removing a name removed the first one, too"


# Namespaces that are held


@pytest.fixture
def namespaces(tmp_path: Path) -> Iterator[Namespaces]:
    made = Namespaces(StateDirectory(tmp_path / "instances"))
    yield made
    made.close()


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What was put into the FD store."""
    entries: list[tuple[str, int]] = []
    monkeypatch.setattr(sdnotify, "store", lambda name, fd: entries.append((name, fd)))
    return entries


def test_a_namespace_that_is_held_is_stored_until_it_is_released(
    namespaces: Namespaces, stored: list[tuple[str, int]], removed: list[str]
) -> None:
    former, current = namespace(), namespace()
    namespaces.hold(INSTANCE, former)
    namespaces.hold(INSTANCE, current)
    assert stored == [(f"ns-{UID}", former), (f"ns-{UID}", current)]
    assert (former.closed, current.closed) == (True, False)
    with namespaces.open(UID) as copy:
        assert copy != current
    assert removed == []
    namespaces.let_go(UID)
    assert removed == [f"ns-{UID}"]
    assert current.closed
    assert UID not in namespaces
    assert namespaces.open_if_held(UID) is None


def test_stopping_leaves_the_fd_store_alone(
    namespaces: Namespaces, stored: list[tuple[str, int]], removed: list[str]
) -> None:
    taken_over = namespace()
    namespaces.take_over(UID, taken_over)
    namespaces.close()
    assert taken_over.closed
    assert (stored, removed) == ([], [])


def test_a_namespace_is_held_even_if_its_state_cannot_be_written(
    namespaces: Namespaces,
    stored: list[tuple[str, int]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StateDirectory, "save", fail)
    monkeypatch.setattr(StateDirectory, "forget", fail)
    namespaces.hold(INSTANCE, namespace())
    namespaces.forget(UID)
    assert UID in namespaces
    assert [record.message.count(", ignoring: No space left on device") for record in caplog.records] == [
        1,
        1,
    ]


@pytest.mark.parametrize("limit", ["FDSTORE", "names"])
def test_the_fd_store_is_full(
    tmp_path: Path,
    stored: list[tuple[str, int]],
    removed: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
) -> None:
    """The names that systemd passes must fit into one variable, or the daemon could not start again."""
    if limit == "FDSTORE":
        monkeypatch.setenv("FDSTORE", "3")
    else:
        monkeypatch.setattr(fdstore, "NAMES_AT_MOST", 2 * len("ns-1000:"))
    namespaces = Namespaces(StateDirectory(tmp_path / "instances"))
    namespaces.take_over(UID, namespace())
    for uid in (UID + 1, UID + 2, UID + 3, UID + 1):
        namespaces.hold(replace(INSTANCE, uid=uid), namespace())
        assert uid in namespaces
    assert [name for name, _ in stored] == [f"ns-{UID + 1}"] * 2
    (line,) = [record.message for record in caplog.records]
    assert "or if a process is in it" in line
    assert f"UID {UID + 2}" in line
    namespaces.let_go(UID + 2)
    namespaces.let_go(UID)
    namespaces.hold(replace(INSTANCE, uid=UID + 4), namespace())
    assert removed == [f"ns-{UID}"]
    assert stored[-1][0] == f"ns-{UID + 4}"
    namespaces.close()


def test_what_is_stored_of_a_former_namespace_is_removed(
    tmp_path: Path, stored: list[tuple[str, int]], removed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The FD store is smaller than what a former daemon left in it: there is no room for the new one."""
    monkeypatch.setenv("FDSTORE", "1")
    namespaces = Namespaces(StateDirectory(tmp_path / "instances"))
    for uid in (UID, UID + 1, UID + 2):
        namespaces.take_over(uid, namespace())
    namespaces.hold(INSTANCE, namespace())
    assert (stored, removed) == ([], [f"ns-{UID}"])
    namespaces.close()

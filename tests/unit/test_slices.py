# SPDX-License-Identifier: LGPL-2.1-or-later
"""Slices: inotify on cgroup.events, with plain files instead of a cgroup file system."""

import errno
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from polytmpd import slices
from polytmpd.kernel.inotify import IN_Q_OVERFLOW, Event
from polytmpd.slices import Slices, parse_populated
from tests.unit.settled import eventually

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]


class Heard(list[tuple[int, bool]]):
    def __call__(self, uid: int, populated: bool) -> None:
        self.append((uid, populated))


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(slices, "CGROUP_ROOTS", (str(tmp_path / "v2"), str(tmp_path / "unified")))
    return tmp_path / "v2"


@pytest.fixture
async def heard() -> Heard:
    return Heard()


@pytest.fixture
async def watched() -> AsyncIterator[Slices]:
    made = Slices()
    yield made
    made.close()


def cgroup(root: Path, name: str, populated: int) -> Path:
    file = root / name.lstrip("/") / "cgroup.events"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"populated {populated}\nfrozen 0\n")
    return file


@pytest.mark.parametrize(
    ("text", "populated"),
    [
        ("populated 1\nfrozen 0\n", True),
        ("frozen 1\npopulated 1", True),
        ("populated 0\nfrozen 1\n", False),
        ("populated 10\n", False),
        ("", False),
        ("frozen 1\n", False),
        ("unpopulated 1\n", False),
    ],
)
async def test_parse_populated(text: str, populated: bool) -> None:
    assert parse_populated(text) is populated


async def test_reports_at_once_and_at_each_change(cgroups: Path, watched: Slices, heard: Heard) -> None:
    first, second = cgroup(cgroups, "user-1000.slice", 1), cgroup(cgroups, "user-1001.slice", 0)
    watched.watch(1000, "/user-1000.slice", heard)
    watched.watch(1001, "/user-1001.slice", heard)
    assert heard == [(1000, True), (1001, False)]
    second.write_text("populated 1\n")
    await eventually(lambda: heard[-1] == (1001, True))
    first.write_text("populated 0\n")
    await eventually(lambda: heard[-1] == (1000, False))


async def test_the_hybrid_hierarchy(cgroups: Path, watched: Slices, heard: Heard) -> None:
    cgroup(cgroups.parent / "unified", "user-1000.slice", 1)
    watched.watch(1000, "/user-1000.slice", heard)
    assert heard == [(1000, True)]


@pytest.mark.parametrize("group", ["", "/user-1000.slice"])
async def test_without_a_cgroup_there_are_no_processes(
    cgroups: Path, watched: Slices, heard: Heard, group: str
) -> None:
    watched.watch(1000, group, heard)
    assert heard == [(1000, False)]


async def test_a_cgroup_that_goes_away(cgroups: Path, watched: Slices, heard: Heard) -> None:
    file = cgroup(cgroups, "user-1000.slice", 1)
    watched.watch(1000, "/user-1000.slice", heard)
    with file.open("a") as open_file:  # a change; the file is gone when it is read
        open_file.write("frozen 0\n")
        open_file.flush()
        shutil.rmtree(file.parent)
    await eventually(lambda: heard[-1] == (1000, False))
    cgroup(cgroups, "user-1000.slice", 1)
    watched.watch(1000, "/user-1000.slice", heard)
    assert heard[-1] == (1000, True)
    file.write_text("populated 0\n")
    await eventually(lambda: heard[-1] == (1000, False))


async def test_a_slice_that_moved_is_no_longer_watched_at_its_old_place(
    cgroups: Path, watched: Slices, heard: Heard
) -> None:
    old, new = cgroup(cgroups, "old.slice", 1), cgroup(cgroups, "new.slice", 1)
    watched.watch(1000, "/old.slice", heard)
    watched.watch(1000, "/new.slice", heard)
    heard.clear()
    old.write_text("populated 0\n")
    new.write_text("populated 0\n")
    await eventually(lambda: heard)
    new.write_text("populated 1\n")
    await eventually(lambda: heard[-1] == (1000, True))
    assert (1000, True) not in heard[:1], "the old one, still there, would have said so"


async def test_after_lost_events_every_slice_is_read(
    cgroups: Path, watched: Slices, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    for uid in (1000, 1001):
        cgroup(cgroups, f"user-{uid}.slice", 1)
        watched.watch(uid, f"/user-{uid}.slice", heard)
    heard.clear()
    monkeypatch.setattr(watched._inotify, "read", lambda: [Event(-1, IN_Q_OVERFLOW, "")])
    watched._on_readable()
    assert heard == [(1000, True), (1001, True)]


async def test_a_slice_that_is_watched_is_only_read(
    cgroups: Path, watched: Slices, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each login asks for it."""
    file = cgroup(cgroups, "user-1000.slice", 1)
    watched.watch(1000, "/user-1000.slice", heard)
    added: list[str] = []
    monkeypatch.setattr(watched._inotify, "add_watch", lambda path, _: added.append(path))
    file.write_text("populated 0\n")
    watched.watch(1000, "/user-1000.slice", heard)
    assert heard == [(1000, True), (1000, False)]
    assert not added


async def test_a_slice_made_again_before_its_end_is_noticed(
    cgroups: Path, watched: Slices, heard: Heard
) -> None:
    """Reading the new file must not pass for watching it."""
    file = cgroup(cgroups, "user-1000.slice", 1)
    watched.watch(1000, "/user-1000.slice", heard)
    shutil.rmtree(file.parent)
    cgroup(cgroups, "user-1000.slice", 1)
    watched.watch(1000, "/user-1000.slice", heard)
    assert heard[-1] == (1000, True)
    watched._on_readable()
    file.write_text("populated 0\n")
    await eventually(lambda: heard[-1] == (1000, False))


# Slices that come


async def test_slices_that_are_made_are_reported(cgroups: Path, watched: Slices) -> None:
    (cgroups / "user.slice").mkdir(parents=True)
    made: list[int] = []
    watched.follow("/user.slice", made.append)
    for name in ("user-1000.slice", "user-1-x.slice", "user-.slice", "x-user-1001.slice", "user-1002.slice"):
        (cgroups / "user.slice" / name).mkdir()
    await eventually(lambda: 1002 in made)
    assert made == [1000, 1002]


async def test_a_slice_that_is_made_again_is_watched(cgroups: Path, watched: Slices, heard: Heard) -> None:
    group = "/user.slice/user-1000.slice"
    file = cgroup(cgroups, group, 1)
    watched.follow("/user.slice", lambda uid: watched.watch(uid, group, heard))
    watched.watch(1000, group, heard)
    heard.clear()
    shutil.rmtree(file.parent)
    prepared = cgroup(cgroups, "prepared", 1).parent
    file.parent.mkdir()
    (prepared / "cgroup.events").rename(file)  # a cgroup has it from the beginning
    await eventually(lambda: heard and heard[-1] == (1000, True))
    file.write_text("populated 0\n")
    await eventually(lambda: heard[-1] == (1000, False))


async def test_user_slice_may_be_made_later_and_again(cgroups: Path, watched: Slices) -> None:
    (cgroups / "system.slice").mkdir(parents=True)
    made: list[int] = []
    watched.follow("/user.slice", made.append)
    (cgroups / "user.slice/user-1000.slice").mkdir(parents=True)
    await eventually(lambda: 1000 in made)
    shutil.rmtree(cgroups / "user.slice")
    (cgroups / "user.slice/user-1001.slice").mkdir(parents=True)
    await eventually(lambda: 1001 in made)


async def test_slices_are_found_in_the_hybrid_hierarchy(cgroups: Path, watched: Slices) -> None:
    unified = cgroups.parent / "unified"
    unified.mkdir()
    (unified / "cgroup.controllers").touch()
    made: list[int] = []
    watched.follow("/user.slice", made.append)
    (unified / "user.slice/user-1000.slice").mkdir(parents=True)
    await eventually(lambda: made and set(made) == {1000})


async def test_without_watches_following_is_tried_again(
    cgroups: Path, watched: Slices, heard: Heard, no_watches: list[str]
) -> None:
    cgroup(cgroups, "user.slice/user-1000.slice", 1)
    made: list[int] = []
    watched.follow("/user.slice", made.append)
    no_watches.append("one")
    watched.watch(1000, "/user.slice/user-1000.slice", heard)
    (cgroups / "user.slice/user-1001.slice").mkdir()
    await eventually(lambda: made == [1001])


# What the kernel refuses


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_LOOK_AGAIN", 0.01)


@pytest.fixture
def no_watches(watched: Slices, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """fs.inotify.max_user_watches is reached until the test appends to the list."""
    free: list[str] = []
    add_watch = watched._inotify.add_watch

    def limited(path: str, mask: int) -> int:
        if not free:
            raise OSError(errno.ENOSPC, "the kernel's limit fs.inotify.max_user_watches is reached")
        return add_watch(path, mask)

    monkeypatch.setattr(watched._inotify, "add_watch", limited)
    return free


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("populated", [0, 1])
async def test_a_slice_that_cannot_be_watched_is_retried(
    cgroups: Path,
    watched: Slices,
    heard: Heard,
    no_watches: list[str],
    caplog: pytest.LogCaptureFixture,
    populated: int,
) -> None:
    file = cgroup(cgroups, "user-1000.slice", populated)
    watched.watch(1000, "/user-1000.slice", heard)
    await eventually(lambda: len(heard) > 3)
    assert set(heard) == {(1000, True)}, "processes that may be there must not lose their files"
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "fs.inotify.max_user_watches" in record.getMessage()
    no_watches.append("one")
    heard.clear()
    await eventually(lambda: heard)
    assert heard == [(1000, bool(populated))]
    file.write_text("populated 1\n")
    await eventually(lambda: heard[-1] == (1000, True))
    file.write_text("populated 0\n")
    await eventually(lambda: heard[-1] == (1000, False))


@pytest.mark.usefixtures("soon", "no_watches")
async def test_a_slice_that_cannot_be_watched_goes_away(
    cgroups: Path, watched: Slices, heard: Heard
) -> None:
    file = cgroup(cgroups, "user-1000.slice", 1)
    watched.watch(1000, "/user-1000.slice", heard)
    assert heard == [(1000, True)]
    shutil.rmtree(file.parent)
    await eventually(lambda: heard[-1] == (1000, False))
    assert not watched._guessed, "nothing is left to poll"


async def test_a_slice_that_moved_to_a_cgroup_that_cannot_be_watched(
    cgroups: Path, watched: Slices, heard: Heard, no_watches: list[str]
) -> None:
    """What happens to the former cgroup no longer matters."""
    no_watches.append("one")
    old = cgroup(cgroups, "old.slice", 1)
    cgroup(cgroups, "new.slice", 1)
    watched.watch(1000, "/old.slice", heard)
    no_watches.clear()
    watched.watch(1000, "/new.slice", heard)
    old.write_text("populated 0\n")
    watched._on_readable()
    assert heard[-1] == (1000, True)


@pytest.mark.usefixtures("soon")
async def test_a_slice_that_cannot_be_read(
    cgroups: Path, watched: Slices, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = cgroup(cgroups, "user-1000.slice", 1)
    watched.watch(1000, "/user-1000.slice", heard)
    with monkeypatch.context() as context:

        def fail(path: str) -> str:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

        context.setattr(slices, "_text", fail)
        file.open("a").close()
        file.write_text("populated 0\n")
        watched._on_readable()
        assert set(heard) == {(1000, True)}
    await eventually(lambda: heard[-1] == (1000, False))

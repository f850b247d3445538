# SPDX-License-Identifier: LGPL-2.1-or-later
"""SharedFiles at work: servers come and go, users take names, the host's directory is flooded."""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from polytmpd.blocking import sharedfiles, storage
from polytmpd.core.model import Directory, Instance, InstanceDirectory, Lifetime
from polytmpd.core.sharing import LINKS, Sharing
from polytmpd.executor.sharedfiles import SharedFiles
from polytmpd.kernel import host, inotify
from tests.kernel import places
from tests.unit.settled import eventually

pytestmark = pytest.mark.kernel

ALICE, BOB, SERVER = 1001, 1002, 115
NAME = ".s.DB.1"


class World:
    def __init__(self, base: Path) -> None:
        self.base = base
        self.instances: dict[int, Instance] = {}
        self.files = SharedFiles(self.instances)
        self.sharing = Sharing(str(base), (".s.DB.*",))

    async def login(self, uid: int) -> None:
        with places.opened(self.base) as fd:
            os.close(storage.make(fd, f"polytmp-{uid}", [LINKS]))
        entry = InstanceDirectory(Directory(str(self.base), Lifetime.INSTANCE, (LINKS,)), f"polytmp-{uid}")
        self.instances[uid] = Instance(uid, f"user{uid}", 0, 0, (entry,))
        await self.files.instance_came(self.instances[uid])

    def path(self, uid: int, name: str = NAME) -> Path:
        return self.base / f"polytmp-{uid}" / "tmp" / name

    @contextmanager
    def server(self, name: str = NAME) -> Iterator[None]:
        with closing(socket.socket(socket.AF_UNIX)) as listening:
            listening.bind(str(self.base / name))
            os.chown(self.base / name, SERVER, SERVER)
            yield
            (self.base / name).unlink()

    def has(self, uid: int) -> bool:
        """Whether the user reaches the server's socket, the one that the host has."""
        try:
            return os.path.samestat(self.path(uid).stat(), (self.base / NAME).stat())
        except OSError:
            return False


@pytest.fixture
async def world(base: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(host, "ROOT", "")
    made = World(base)
    await made.files.share(made.sharing)
    await made.login(ALICE)
    await made.login(BOB)
    yield made
    await made.files.close()


async def test_servers_come_and_go(world: World) -> None:
    for _ in range(3):
        with world.server():
            await eventually(lambda: world.has(ALICE) and world.has(BOB))
        await eventually(lambda: not world.path(ALICE).is_symlink() and not world.path(BOB).is_symlink())
    await eventually(lambda: os.listdir(world.base / LINKS) == [])


async def test_what_is_there_before_the_login(world: World) -> None:
    with world.server():
        await eventually(lambda: world.has(ALICE))
        await world.login(1003)
        assert world.has(1003), "at once"


async def test_a_new_socket_needs_nothing_of_the_instances(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with world.server():
        await eventually(lambda: world.has(ALICE))
        furnished: list[InstanceDirectory] = []
        monkeypatch.setattr(sharedfiles, "furnish", lambda entry, *_: furnished.append(entry))
        with closing(socket.socket(socket.AF_UNIX)) as second:
            second.bind(f"{world.base}/new")
            os.chown(world.base / "new", SERVER, SERVER)
            (world.base / "new").rename(world.base / NAME)
            await eventually(lambda: world.has(ALICE) and world.has(BOB))
        assert furnished == []


async def test_a_name_that_the_user_has(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.path(ALICE).write_text("hers")
    with world.server():
        await eventually(lambda: world.has(BOB))
        assert world.path(ALICE).read_text() == "hers"
        (world.base / ".s.DB.2").touch()
        await eventually(lambda: world.path(ALICE, ".s.DB.2").is_symlink())
        said = [record for record in caplog.records if "one of their own" in record.getMessage()]
        assert [vars(record)["POLYTMP_USER"] for record in said] == ["user1001"], "once"
        world.path(ALICE).unlink()
        await eventually(lambda: world.has(ALICE))


async def test_a_user_who_moves_files_away_is_watched_once_for_each(world: World) -> None:
    def watches() -> int:
        return len(inotify.living_watches(world.files._inotify.fd))

    with world.server():
        await eventually(lambda: world.has(ALICE) and world.has(BOB))
        # The host's directory, LINKS, and a symbolic link in each instance.
        await eventually(lambda: watches() == 4)
        for number in range(3):
            world.path(ALICE, "hers").touch()
            inode = world.path(ALICE, "hers").stat().st_ino
            world.path(ALICE, "hers").rename(world.path(ALICE))  # as root: she could not
            await eventually(lambda inode=inode: is_watched(world, inode))  # type: ignore[misc]
            world.path(ALICE).rename(world.path(ALICE, f"away{number}"))
            await eventually(lambda: world.has(ALICE))
            await eventually(lambda: watches() == 4)


def is_watched(world: World, inode: int) -> bool:
    info = Path(f"/proc/self/fdinfo/{int(world.files._inotify.fd)}").read_text()
    return f" ino:{inode:x} " in info


async def test_links_that_root_removes(world: World) -> None:
    with world.server():
        await eventually(lambda: world.has(ALICE))
        world.path(ALICE).unlink()
        await eventually(lambda: world.has(ALICE))
        (world.base / LINKS / NAME).unlink()
        await eventually(lambda: world.has(ALICE))


async def test_a_squatter_is_named_once_and_again_after_the_server(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def said() -> int:
        return sum("owned by UID 1003" in record.getMessage() for record in caplog.records)

    def squat() -> None:
        (world.base / NAME).touch()
        os.chown(world.base / NAME, 1003, 1003)

    async def is_named(times: int) -> None:
        squat()
        await eventually(lambda: said() == times)
        (world.base / NAME).chmod(0o600)
        other = f".s.DB.{times}0"
        (world.base / other).touch()
        await eventually(lambda: world.path(ALICE, other).is_symlink())
        assert said() == times

    for times in (1, 2):
        await is_named(times)
        assert not world.path(ALICE).is_symlink()
        (world.base / NAME).unlink()
        with world.server():
            await eventually(lambda: world.has(ALICE))
        await eventually(lambda: not world.path(ALICE).is_symlink())


async def test_any_number_of_squatters(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def said() -> int:
        return sum("Not sharing" in record.getMessage() for record in caplog.records)

    for number in range(70):
        (world.base / f".s.DB.x{number}").symlink_to("/etc/passwd")
    await eventually(lambda: said() == 65)
    assert "Not sharing more than 64 names" in caplog.records[-1].getMessage()
    (world.base / ".s.DB.x70").symlink_to("/etc/passwd")
    with world.server():
        await eventually(lambda: world.has(ALICE))
    assert said() == 65


def overflow(base: Path) -> None:
    """More events than the queue holds, before the event loop gets to read them."""
    for _ in range(int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())):
        (base / "x").touch()
        (base / "x").unlink()


async def test_more_events_than_the_queue_holds(world: World) -> None:
    overflow(world.base)
    with world.server():
        await eventually(lambda: world.has(ALICE))


async def test_a_flood_of_names_that_nobody_asked_for(world: World) -> None:
    stop = asyncio.Event()

    def flood() -> None:
        while not stop.is_set():
            (world.base / "x").touch()
            (world.base / "x").unlink()

    flooding = asyncio.create_task(asyncio.to_thread(flood))
    try:
        for _ in range(3):
            with world.server():
                await eventually(lambda: world.has(ALICE), 20)
            await eventually(lambda: not world.path(ALICE).is_symlink(), 20)
    finally:
        stop.set()
        await flooding


async def test_a_failure_is_said_once_and_it_tries_again(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polytmpd.executor.sharedfiles._RETRY", 0.05)
    with world.server():
        await eventually(lambda: world.has(ALICE))
    await eventually(lambda: os.listdir(world.base / LINKS) == [])
    (world.base / LINKS).chmod(0o777)
    with world.server():
        await eventually(lambda: "writable by others; run chmod 0755" in caplog.text)
        assert not world.path(ALICE).is_symlink()
        (world.base / LINKS).chmod(0o755)
        await eventually(lambda: world.has(ALICE))
    assert caplog.text.count("with sessions, retrying") == 1


async def test_a_user_whose_directory_is_full(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polytmpd.executor.sharedfiles._RETRY", 0.05)
    is_full, tries, symlink = True, 0, os.symlink

    def symlink_in_a_full_directory(target: str, name: str, *, dir_fd: int) -> None:
        nonlocal tries
        if is_full and os.path.samestat(os.fstat(dir_fd), world.path(ALICE).parent.stat()):
            tries += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        symlink(target, name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "symlink", symlink_in_a_full_directory)
    with world.server():
        await eventually(lambda: world.has(BOB) and tries > 2)
        assert caplog.text.count("with user user1001, retrying: No space left") == 1
        is_full = False
        await eventually(lambda: world.has(ALICE))


async def test_a_login_goes_on_without_a_thread(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("polytmpd.executor.sharedfiles._RETRY", 0.05)
    with world.server():
        await eventually(lambda: world.has(ALICE))
        with monkeypatch.context() as patch:
            patch.setattr(world.files, "_in_thread", no_thread)
            await world.login(1003)
        assert "with user user1003, retrying: can't start new thread" in caplog.text
        await eventually(lambda: world.has(1003))


async def test_nothing_shared_any_more(world: World) -> None:
    with world.server():
        await eventually(lambda: world.has(ALICE))
        await world.files.share(world.sharing._replace(patterns=()))
        assert not world.path(ALICE).is_symlink()
        assert list((world.base / LINKS).iterdir()) == []


async def test_without_the_setting_there_is_no_watch(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "ROOT", "")
    files = SharedFiles({})
    await files.share(Sharing(str(base)))
    assert inotify.living_watches(files._inotify.fd) == set()
    assert os.listdir(base) == []
    await files.close()


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "polytmpd")

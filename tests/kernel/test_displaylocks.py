# SPDX-License-Identifier: LGPL-2.1-or-later
"""Display locks on real files: what is read, what is written over; the room with sockets and instances."""

import asyncio
import errno
import fcntl
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from polytmpd import displaylocks
from polytmpd.core.model import Directory, Instance, InstanceDirectory, Lifetime
from polytmpd.displaylocks import (
    MARK,
    PER_OWNER,
    SOCKETS,
    DisplayLocks,
    find_copies,
    make_copy,
    publish,
    read_lock,
    withdraw,
)
from polytmpd.kernel.inotify import IN_Q_OVERFLOW, Event, Inotify
from tests.unit.settled import eventually

pytestmark = pytest.mark.kernel

ALICE, BOB, CAROL = 1001, 1002, 1003
MAX_QUEUED_EVENTS = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


@pytest.fixture(params=["/var/tmp", "/dev/shm"])
def base(request: pytest.FixtureRequest) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.fail("these tests need root")
    path = Path(tempfile.mkdtemp(prefix="polytmp-test-", dir=request.param))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def make_lock(directory: Path, display: int, owner: int, content: str = f"{4711:10}\n") -> Path:
    path = directory / f".X{display}-lock"
    path.write_text(content)
    os.chown(path, owner, owner)
    return path


def make_socket(directory: Path, display: int, owner: int) -> Path:
    path = directory / SOCKETS / f"X{display}"
    bound = directory / "bound"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(bound))
    os.chown(bound, owner, owner)
    return bound.rename(path)  # it is its owner's from the first moment on


def put_copy(directory: Path, display: int, pid: int = 4711) -> bool:
    with opened(directory) as fd:
        copy = make_copy(fd, pid)
        try:
            return publish(copy, fd, display)
        finally:
            os.close(copy)


def read(directory: Path, display: int, owner: int) -> int | None:
    with opened(directory) as fd:
        return read_lock(fd, display, owner)


def take_away(directory: Path, display: int) -> bool:
    with opened(directory) as fd:
        return withdraw(fd, display)


# Reading


def test_a_lock_is_read(base: Path) -> None:
    make_lock(base, 7, ALICE)
    assert read(base, 7, ALICE) == 4711


def test_a_lock_of_another_owner_is_not(base: Path) -> None:
    make_lock(base, 7, BOB)
    assert read(base, 7, ALICE) is None
    assert read(base, 8, ALICE) is None


@pytest.mark.parametrize(
    "kind", ["link", "broken link", "fifo", "directory", "socket", "huge", "long", "text"]
)
def test_what_is_no_lock_is_not_read_and_nothing_blocks(base: Path, kind: str) -> None:
    path = base / ".X7-lock"
    match kind:
        case "link":
            path.symlink_to(make_lock(base, 8, ALICE))
        case "broken link":
            path.symlink_to("nowhere")
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        case "huge":
            path.touch()
            os.truncate(path, 1 << 40)
        case "long":
            path.write_text(f"{1:16}\n")
        case _:
            path.write_text("first\n")
    os.chown(path, ALICE, ALICE, follow_symlinks=False)
    assert read(base, 7, ALICE) is None
    assert not put_copy(base, 7)
    assert not take_away(base, 7)
    assert os.path.lexists(path)


def test_a_file_with_a_lease_does_not_block(base: Path) -> None:
    former = signal.signal(signal.SIGIO, signal.SIG_IGN)  # which tells the holder
    path = make_lock(base, 7, 0)
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        assert read(base, 7, 0) is None
        assert not put_copy(base, 7)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, former)


def test_a_copy_is_nobodys_lock(base: Path) -> None:
    assert put_copy(base, 7)
    assert read(base, 7, 0) is None


# Writing


def test_a_copy_is_roots_readable_for_all_and_marked(base: Path) -> None:
    os.umask(os.umask(0o077))
    assert put_copy(base, 7)
    path = base / ".X7-lock"
    found = path.stat()
    assert (found.st_uid, found.st_mode, path.read_text()) == (0, 0o100444, "      4711\n")
    assert MARK in os.listxattr(path)
    assert [entry.name for entry in base.iterdir()] == [".X7-lock"], "nothing else is left"
    assert take_away(base, 7)
    assert not take_away(base, 7)
    assert list(base.iterdir()) == []


def test_an_older_copy_is_replaced_the_same_one_stays(base: Path) -> None:
    put_copy(base, 7)
    first = (base / ".X7-lock").stat().st_ino
    assert put_copy(base, 7)
    assert (base / ".X7-lock").stat().st_ino == first
    assert put_copy(base, 7, 4712)
    assert (base / ".X7-lock").read_text() == "      4712\n"


@pytest.mark.parametrize("owner", [0, BOB])
def test_a_lock_that_is_not_ours_stays(base: Path, owner: int) -> None:
    path = make_lock(base, 7, owner, "theirs")
    before = path.stat()
    assert not put_copy(base, 7)
    assert not take_away(base, 7)
    assert (path.stat().st_ino, path.read_text()) == (before.st_ino, "theirs")


def test_a_user_cannot_forge_the_mark(base: Path) -> None:
    path = make_lock(base, 7, BOB)
    os.setxattr(path, MARK, b"1")  # root did; it is a user's file all the same
    assert not take_away(base, 7)
    with opened(base) as fd:
        assert find_copies(fd) == []


def test_copies_are_found_among_other_files(base: Path) -> None:
    for display in (0, 7, 65535):
        put_copy(base, display)
    make_lock(base, 8, 0)
    os.mkfifo(base / ".X9-lock")
    (base / ".X10-lock").symlink_to(".X7-lock")
    (base / ".X007-lock").hardlink_to(base / ".X7-lock")
    with opened(base) as fd:
        assert sorted(find_copies(fd)) == [0, 7, 65535]
        assert find_copies(fd, lambda: True) == []


def test_one_file_serves_all_directories(base: Path) -> None:
    (base / "a").mkdir()
    with opened(base) as fd, opened(base / "a") as other:
        copy = make_copy(fd, 1)
        try:
            assert publish(copy, fd, 7)
            assert publish(copy, other, 7)
        finally:
            os.close(copy)
    assert (base / ".X7-lock").stat().st_ino == (base / "a/.X7-lock").stat().st_ino


# The room


class Room:
    """A host of its own: a base directory, instances in it, and the room."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.shared_again = 0
        self.failures: list[Exception] = []
        self.room = DisplayLocks(self._share_again)
        self.directory = Directory(str(base), Lifetime.INSTANCE, (SOCKETS,))

    async def _share_again(self, base: str) -> None:
        assert base == str(self.base)
        if self.failures:
            raise self.failures.pop()
        self.shared_again += 1

    def instance(self, uid: int, name: str = "") -> Instance:
        entry = InstanceDirectory(self.directory, f"polytmp-{uid}{name}")
        Path(entry.host_path).mkdir(parents=True, exist_ok=True)
        Path(entry.host_path).chmod(0o1777)
        return Instance(uid, str(uid), 0, 0, (entry,))

    def tmp(self, uid: int, name: str = "") -> Path:
        return self.base / f"polytmp-{uid}{name}/tmp"

    async def start(self, *uids: int) -> None:
        await self.room.start([self.directory], [self.instance(uid) for uid in uids])

    async def again(self, *uids: int) -> None:
        """Another daemon; the former one is closed."""
        self.room = DisplayLocks(self._share_again)
        await self.start(*uids)

    def shown(self, display: int = 7) -> list[str]:
        """Where the lock is to be seen, whoever's it is."""
        places = {"host": self.base, **{path.parent.name[8:]: path for path in self.base.glob("*/tmp")}}
        return sorted(name for name, path in places.items() if (path / f".X{display}-lock").is_file())

    async def shows(self, places: Sequence[str | int], display: int = 7) -> None:
        wanted = sorted(map(str, places))
        await eventually(lambda: self.shown(display) == wanted)


@pytest.fixture
async def host(base: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Room]:
    monkeypatch.setattr(
        "polytmpd.kernel.host.ROOT", "/proc/self/root"
    )  # in a container PID 1 may be another's
    (base / SOCKETS).mkdir()
    (base / SOCKETS).chmod(0o1777)
    room = Room(base)
    yield room
    await room.room.close()
    assert len(asyncio.all_tasks()) == 1


def serve(host: Room, uid: int, display: int = 7, where: Path | None = None) -> Path:
    make_lock(where or host.tmp(uid), display, uid)
    return make_socket(host.base, display, uid)


async def test_a_lock_is_shown_and_goes_with_its_socket(host: Room) -> None:
    await host.start(ALICE, BOB)
    path = serve(host, ALICE)
    await host.shows(["host", ALICE, BOB])
    assert (host.tmp(ALICE) / ".X7-lock").stat().st_uid == ALICE
    path.unlink()
    await host.shows([ALICE])
    assert read(host.tmp(ALICE), 7, ALICE) == 4711, "her own is not touched"


async def test_a_new_server_of_the_same_display(host: Room) -> None:
    await host.start(ALICE, BOB)
    path = serve(host, ALICE)
    await host.shows(["host", ALICE, BOB])
    path.unlink()
    (host.tmp(ALICE) / ".X7-lock").unlink()
    await host.shows([])
    make_lock(host.tmp(BOB), 7, BOB, f"{4712:10}\n")
    path = make_socket(host.base, 7, BOB)
    await host.shows(["host", ALICE, BOB])
    (host.tmp(BOB) / ".X7-lock").write_text(f"{4713:10}\n")
    path.unlink()
    make_socket(host.base, 7, BOB)
    await eventually(lambda: (host.tmp(ALICE) / ".X7-lock").read_text() == f"{4713:10}\n")


async def test_locks_of_the_host_and_in_a_foreign_place(host: Room) -> None:
    await host.start(ALICE, BOB)
    serve(host, CAROL, 3, host.base)  # an exempt user
    await host.shows(["host", ALICE, BOB], 3)
    assert (host.base / ".X3-lock").stat().st_uid == CAROL
    serve(host, 0, 4, host.tmp(ALICE))  # root's, in alice's session
    await host.shows(["host", ALICE, BOB], 4)


async def test_instances_come_and_go(host: Room) -> None:
    await host.start(ALICE)
    serve(host, ALICE)
    await host.shows(["host", ALICE])
    await host.room.instance_came(host.instance(BOB))
    assert str(BOB) in host.shown(), "before it is used"
    host.room.instance_gone(ALICE)
    await host.shows([ALICE])
    assert (host.base / SOCKETS / "X7").exists(), "the socket is not ours"
    await host.room.instance_came(host.instance(ALICE, "-again"))
    assert host.shown() == [str(ALICE)]


async def test_without_instances_and_without_sharing_the_room_is_idle(host: Room) -> None:
    host.directory = Directory(str(host.base), Lifetime.INSTANCE, (".ICE-unix",))
    await host.start(ALICE, BOB)
    serve(host, ALICE)
    host.room.instance_gone(BOB)
    await host.room.instance_came(host.instance(BOB))
    await asyncio.sleep(0.2)
    assert host.shown() == [str(ALICE)]
    assert len(asyncio.all_tasks()) == 1
    host.directory = Directory(str(host.base), Lifetime.INSTANCE, (SOCKETS,))
    await host.room.instance_came(host.instance(BOB))  # after a reload
    await host.room.instance_came(host.instance(ALICE))
    await host.shows(["host", ALICE, BOB])


async def test_a_new_daemon_judges_what_it_finds(host: Room) -> None:
    await host.start(ALICE, BOB)
    path = serve(host, ALICE)
    serve(host, ALICE, 8)
    await host.shows(["host", ALICE, BOB])
    await host.shows(["host", ALICE, BOB], 8)
    inode = (host.tmp(BOB) / ".X7-lock").stat().st_ino
    await host.room.close()
    (host.base / SOCKETS / "X8").unlink()
    (host.tmp(ALICE) / ".X8-lock").unlink()
    serve(host, BOB, 9)
    await host.again(ALICE, BOB)
    await host.shows([], 8)
    await host.shows(["host", ALICE, BOB], 9)
    assert (host.tmp(BOB) / ".X7-lock").stat().st_ino == inode
    path.unlink()
    await host.shows([ALICE])


async def test_a_copy_is_not_taken_for_the_hosts_own_lock(host: Room) -> None:
    """Root's socket, and in the host's directory the copy of a user's lock."""
    put_copy(host.base, 7)
    make_socket(host.base, 7, 0)
    await host.start(ALICE)
    await host.shows([])


async def test_a_persistent_directory_is_cleared_of_a_former_boots_copies(host: Room) -> None:
    host.directory = Directory(str(host.base), Lifetime.PERSISTENT, (SOCKETS,))
    await host.start(ALICE)
    instance = host.instance(BOB)
    put_copy(host.tmp(BOB), 7)
    await host.room.instance_came(instance)
    await host.shows([])


async def test_no_user_is_shown_more_than_his_share(
    host: Room, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host.start(ALICE, BOB)
    for display in range(100, 100 + PER_OWNER + 200):
        serve(host, ALICE, display)
    serve(host, BOB)
    await host.shows(["host", ALICE, BOB])
    await eventually(lambda: len(list(host.tmp(BOB).glob(".X???-lock"))) == PER_OWNER)

    def complaints() -> list[object]:
        return [record.args for record in caplog.records if "more than" in record.message]

    await eventually(complaints)  # perhaps the last of them is not seen yet
    assert complaints() == [(ALICE, PER_OWNER)]
    for path in (host.base / SOCKETS).glob("X???"):
        path.unlink()
    await eventually(lambda: not list(host.tmp(BOB).glob(".X???-lock")))


async def test_events_that_were_lost_are_made_up_for(host: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    await host.start(ALICE, BOB)
    await host.shows([])
    await eventually(lambda: host.shared_again == 1)
    with monkeypatch.context() as context:
        context.setattr(displaylocks, "display_of", lambda name, pattern=None: None)
        serve(host, ALICE)
        await asyncio.sleep(0.2)
    assert host.shown() == [str(ALICE)], "not heard"
    first, second = host.base / SOCKETS / "a", host.base / SOCKETS / "b"
    for _ in range(MAX_QUEUED_EVENTS // 4 + 10):  # without a moment for the room: four different events each
        first.touch()
        second.touch()
        first.unlink()
        second.unlink()
    await host.shows(["host", ALICE, BOB])
    assert host.shared_again == 1, "it is the same directory as before"


async def test_a_large_directory_is_listed_little_by_little(
    host: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logins come in between; and whoever has events lost meanwhile does not have it begin anew."""
    monkeypatch.setattr(displaylocks, "_PASS", 0.0005)
    monkeypatch.setattr(displaylocks, "_REST", 0.001)
    for number in range(20000):
        (host.base / SOCKETS / f"junk{number}").touch()
    tmp = host.tmp(ALICE)
    tmp.mkdir(parents=True)
    serve(host, ALICE)
    passes = 0
    real = host.room._pass

    def counted() -> None:
        nonlocal passes
        passes += 1
        real()

    monkeypatch.setattr(host.room, "_pass", counted)
    monkeypatch.setattr(Inotify, "read", lambda _: [Event(-1, IN_Q_OVERFLOW, "")])
    await host.start(ALICE, BOB)
    await host.shows(["host", ALICE, BOB])
    serve(host, ALICE, 8)  # of which nothing is heard
    await host.shows(["host", ALICE, BOB], 8)
    assert passes > 10
    assert host.shared_again == 1


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
async def test_a_socket_directory_that_is_made_again(
    host: Room, monkeypatch: pytest.MonkeyPatch, bound: bool
) -> None:
    monkeypatch.setattr(displaylocks, "CHECK_INTERVAL", 0.1)
    monkeypatch.setattr(displaylocks, "_MOVED_DELAY", 0.1)
    await host.start(ALICE, BOB)
    serve(host, ALICE)
    await host.shows(["host", ALICE, BOB])
    holder = os.open(host.base / SOCKETS, os.O_PATH) if bound else -1  # as a bind mount does
    shutil.rmtree(host.base / SOCKETS)
    await host.shows([ALICE])
    await eventually((host.base / SOCKETS).exists)
    assert (host.base / SOCKETS).stat().st_mode == 0o41777
    await eventually(lambda: host.shared_again == 2)
    serve(host, BOB, 8)
    await host.shows(["host", ALICE, BOB], 8)
    if bound:
        os.close(holder)


async def test_an_empty_one_goes_without_an_event(host: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(displaylocks, "CHECK_INTERVAL", 0.1)
    await host.start(ALICE, BOB)
    await eventually(lambda: host.shared_again == 1)
    with opened(host.base / SOCKETS):
        (host.base / SOCKETS).rmdir()
        (host.base / SOCKETS).mkdir()
        serve(host, ALICE)
        await host.shows(["host", ALICE, BOB])


async def test_a_socket_directory_that_must_not_be_shared(
    host: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(displaylocks, "CHECK_INTERVAL", 0.05)
    (host.base / SOCKETS).rename(host.base / "real")
    (host.base / SOCKETS).symlink_to("real")
    await host.start(ALICE, BOB)
    make_lock(host.tmp(ALICE), 7, ALICE)
    await eventually(lambda: "not shown across users" in caplog.text)
    await asyncio.sleep(0.5)  # ten looks more
    assert len([record for record in caplog.records if "not shown across users" in record.message]) == 1
    (host.base / SOCKETS).unlink()
    (host.base / "real").rename(host.base / SOCKETS)
    make_socket(host.base, 7, ALICE)
    await host.shows(["host", ALICE, BOB])


async def test_a_place_that_cannot_be_written_does_not_keep_others_from_it(
    host: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await host.start(ALICE, BOB, CAROL)
    shutil.rmtree(host.tmp(CAROL))  # on its way out
    real = displaylocks.publish

    def fail(copy: int, directory: int, display: int) -> bool:
        if os.path.samestat(os.fstat(directory), host.tmp(BOB).stat()):
            raise OSError(errno.ENOSPC, "full")
        return real(copy, directory, display)

    monkeypatch.setattr(displaylocks, "publish", fail)
    serve(host, ALICE)
    serve(host, ALICE, 8)
    await host.shows(["host", ALICE])
    await host.shows(["host", ALICE], 8)
    assert len([record for record in caplog.records if "full" in record.message]) == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), OSError(errno.EMFILE, "none left")]
)
async def test_what_cannot_be_shared_again_is_tried_again(
    host: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    monkeypatch.setattr(displaylocks, "CHECK_INTERVAL", 0.05)
    host.failures = [error, error]
    await host.start(ALICE, BOB)
    serve(host, ALICE)
    await host.shows(["host", ALICE, BOB])
    await eventually(lambda: host.shared_again)
    assert [record.args for record in caplog.records] == [(SOCKETS, error)], "said once"
    await asyncio.sleep(0.3)
    assert host.shared_again == 1


async def test_a_mistake_of_ours_is_told_once_and_stops_nothing(
    host: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = displaylocks.socket_owner

    def fail(sockets: int, display: int) -> int | None:
        if display == 8:
            raise ValueError("8")
        return real(sockets, display)

    monkeypatch.setattr(displaylocks, "socket_owner", fail)
    await host.start(ALICE, BOB)
    for display in (8, 7):
        path = serve(host, ALICE, display)
    await host.shows(["host", ALICE, BOB])
    path.unlink()
    (host.base / SOCKETS / "X8").unlink()
    await host.shows([ALICE])
    await eventually(lambda: not host.room._dirty)
    (record,) = [record for record in caplog.records if "not shown everywhere" in record.message]
    assert record.exc_info


async def test_a_login_does_not_fail_where_no_thread_can_be_started(
    host: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:

        def fail(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        context.setattr(threading.Thread, "start", fail)
        await host.room.instance_came(host.instance(ALICE))
    await host.room.instance_came(host.instance(BOB))
    serve(host, ALICE)
    await host.shows(["host", ALICE, BOB])


async def test_it_ends_in_the_middle_of_work(host: Room) -> None:
    await host.start(ALICE, BOB)
    for display in range(100, 400):
        serve(host, ALICE, display)
    await host.room.instance_came(host.instance(CAROL))
    former = host.room
    await former.close()
    await host.again(ALICE, BOB)
    former.instance_gone(ALICE)  # nobody listens

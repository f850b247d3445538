# SPDX-License-Identifier: LGPL-2.1-or-later
"""The socket that pam_polytmp asks, over a real one."""

import asyncio
import contextlib
import os
import select
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from polytmpd import login
from polytmpd.errors import ExemptError, NotPolyinstantiatedError
from polytmpd.kernel import peers
from polytmpd.kernel.descriptor import Descriptor
from tests.unit.settled import eventually

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]

UID = 1001


class World:
    """A daemon that answers as the test says, and processes that log in."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.peer_uid = 0  # the tests may run as any user
        self.peer_pid: int | None = None
        self.asked: list[tuple[int, int]] = []
        self.cancelled = 0
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.logins: login.Logins | None = None
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listening.bind(self.path)
        self.listening.listen(64)

    async def namespace(self, uid: int, pid: int) -> Descriptor:
        self.asked.append((uid, pid))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # cleaning up may take a while; a second cancellation would end it
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return Descriptor.open("/dev/null", os.O_PATH)

    def serve(self, **limits: int) -> None:
        self.logins = login.Logins(self.listening, self.namespace, **limits)
        self.logins.start()

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.connect(self.path)
        client.setblocking(False)
        return client

    def ask(self, uid: int = UID) -> socket.socket:
        client = self.connect()
        client.send(f"acquire {uid}".encode())
        return client


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    made = World(tmp_path / "login")
    real = peers.peer

    @contextlib.contextmanager
    def peer(connection: socket.socket) -> Iterator[peers.Peer]:
        with real(connection) as found:
            yield replace(
                found, uid=made.peer_uid, pid=found.pid if made.peer_pid is None else made.peer_pid
            )

    monkeypatch.setattr(peers, "peer", peer)
    yield made
    if made.logins:
        await made.logins.close()
    made.listening.close()


async def reply(client: socket.socket) -> tuple[str, int]:
    """The text, and the number of descriptors, which are closed. ("", 0) if the daemon hung up."""

    def has_come() -> bool:
        return bool(select.select([client], [], [], 0)[0])

    await eventually(has_come)
    with client:
        data, fds, _, _ = socket.recv_fds(client, 4096, 8)
        for fd in fds:
            os.close(fd)
    return data.decode(), len(fds)


async def test_a_namespace(world: World) -> None:
    world.serve()
    assert await reply(world.ask()) == ("namespace", 1)
    assert world.asked == [(UID, os.getpid())]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ExemptError("user svc is exempt"), "exempt user svc is exempt"),
        (
            NotPolyinstantiatedError("process 7 has its own mount namespace"),
            "refused org.polytmp1.Error.NotPolyinstantiated process 7 has its own mount namespace",
        ),
        (NotPolyinstantiatedError("ä\udcff"), "refused org.polytmp1.Error.NotPolyinstantiated ä?"),
        (
            RuntimeError("secret"),
            "refused org.polytmp1.Error.Failed internal error, see the journal of polytmpd",
        ),
    ],
)
async def test_no_namespace(world: World, error: Exception, text: str) -> None:
    world.serve()
    world.error = error
    assert await reply(world.ask()) == (text, 0)


async def test_a_reply_has_a_limit(world: World) -> None:
    world.serve()
    world.error = NotPolyinstantiatedError("x" * 100_000)
    text, _ = await reply(world.ask())
    assert len(text) == 2048


@pytest.mark.parametrize(
    "request_",
    [
        b"acquire",
        b"acquire ",
        b"acquire -1",
        b"acquire 01",
        b"acquire 1001\n",
        b"acquire 4294967295",
        b"acquire 99999999999",
        b"acquire \xd9\xa1",
        b"ACQUIRE 1001",
        b"acquire 1001" + b" " * 1000,
        b"x" * 60_000,
    ],
    ids=lambda value: str(value[:24]),
)
async def test_a_request_that_is_none(world: World, request_: bytes) -> None:
    world.serve()
    client = world.connect()
    client.send(request_)
    text, fds = await reply(client)
    assert text.startswith("refused org.freedesktop.DBus.Error.InvalidArgs ")
    assert (fds, world.asked) == (0, [])


@pytest.mark.parametrize(("uid", "pid"), [(1001, None), (0, 0)])
async def test_only_root_may_ask(world: World, uid: int, pid: int | None) -> None:
    world.serve()
    world.peer_uid, world.peer_pid = uid, pid
    text, fds = await reply(world.ask())
    assert text.startswith("refused org.freedesktop.DBus.Error.AccessDenied ")
    assert (fds, world.asked) == (0, [])


async def test_logins_wait_for_a_daemon(world: World) -> None:
    clients = [world.ask(uid) for uid in range(1000, 1020)]
    world.serve()
    assert [await reply(client) for client in clients] == [("namespace", 1)] * 20
    assert [uid for uid, _ in world.asked] == list(range(1000, 1020))


async def test_a_daemon_that_ends_hangs_up_and_the_next_one_answers(world: World) -> None:
    kept = world.listening.dup()  # PID 1's
    world.serve()
    world.gate.clear()
    first = world.ask()
    await eventually(lambda: world.asked)
    assert world.logins
    await world.logins.close()
    assert await reply(first) == ("", 0)
    second = world.ask()
    world.listening = kept
    world.gate.set()
    world.serve()
    assert await reply(second) == ("namespace", 1)


async def test_a_caller_that_hangs_up_is_forgotten(world: World) -> None:
    world.serve()
    world.gate.clear()
    with world.ask():
        await eventually(lambda: world.asked)
    await eventually(lambda: world.cancelled)
    world.gate.set()
    assert await reply(world.ask()) == ("namespace", 1)


async def test_a_caller_that_no_longer_waits_in_the_queue_asks_for_nothing(world: World) -> None:
    world.ask(1).close()
    kept = world.ask(2)
    world.serve()
    assert await reply(kept) == ("namespace", 1)
    assert [uid for uid, _ in world.asked] == [2]


async def test_a_caller_that_goes_on_sending_is_forgotten(world: World) -> None:
    world.serve()
    world.gate.clear()
    with world.ask() as client:
        await eventually(lambda: world.asked)
        client.send(b"acquire 1002")
        await eventually(lambda: world.cancelled)
    assert [uid for uid, _ in world.asked] == [UID]


async def test_a_caller_that_asks_nothing_loses_its_place(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(login, "REQUEST_TIMEOUT", 0.2)
    world.serve(at_once=1)
    silent = world.connect()
    assert await reply(world.ask()) == ("namespace", 1)
    assert await reply(silent) == ("", 0)
    assert "sent nothing" in caplog.text


async def test_further_logins_wait_in_the_queue(world: World) -> None:
    world.serve(at_once=2)
    world.gate.clear()
    clients = [world.ask(uid) for uid in (1, 2, 3)]
    await eventually(lambda: len(world.asked) == 2)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(world.asked) == 2
    world.gate.set()
    assert [await reply(client) for client in clients] == [("namespace", 1)] * 3


async def test_one_user_leaves_room_for_others(world: World) -> None:
    world.serve(at_once=4, of_one_user=2)
    world.gate.clear()
    clients = [world.ask(), world.ask()]
    await eventually(lambda: len(world.asked) == 2)
    text, _ = await reply(world.ask())
    assert text.startswith("refused org.polytmp1.Error.Failed too many logins of this user")
    clients.append(world.ask(1002))
    await eventually(lambda: len(world.asked) == 3)
    world.gate.set()
    assert [await reply(client) for client in clients] == [("namespace", 1)] * 3
    assert await reply(world.ask()) == ("namespace", 1)


async def test_a_process_that_has_ended_gets_no_namespace(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pid may be another's by now, which placement has examined instead."""
    monkeypatch.setattr(peers.Peer, "has_ended", lambda _: True)
    world.serve()
    assert await reply(world.ask()) == ("", 0)


async def test_without_descriptors_logins_wait(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(login, "_PAUSE", 0.05)
    failures = [OSError(24, "Too many open files")] * 2

    class Listening(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            if failures:
                raise failures.pop()
            return super().accept()

    world.listening = Listening(fileno=world.listening.detach())
    world.serve()
    assert await reply(world.ask()) == ("namespace", 1)
    assert caplog.text.count("Failed to accept a login, retrying: Too many open files") == 2


async def test_a_login_that_cannot_be_examined_is_reported(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(peers, "_pidfd", fail)
    world.serve()
    client = world.ask()
    await eventually(lambda: "Failed to answer a login" in caplog.text)
    with client, contextlib.suppress(ConnectionResetError):
        assert client.recv(64) == b""
    assert "closing the connection: Too many open files" in caplog.text


def test_the_peer_is_the_process_that_connected(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(tmp_path / "login"))
        listening.listen()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                client.connect(str(tmp_path / "login"))
                os.read(reader, 1)  # until the test has seen enough
            os._exit(0)
        os.close(reader)
        connection, _ = listening.accept()
        with connection, peers.peer(connection) as peer:
            assert (peer.uid, peer.pid) == (os.geteuid(), child)
            assert not peer.has_ended()
            os.close(writer)
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            assert peer.has_ended() == (peer.pidfd is not None)
        os.waitpid(child, 0)


def test_no_option_in_an_older_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SO_PEERPIDFD", 0x7FFF)
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other, peers.peer(one) as peer:
        assert (peer.pid, peer.pidfd) == (os.getpid(), None)
        assert not peer.has_ended()


def test_take_socket() -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as ours,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as deaf,
        Descriptor.open("/dev/null", os.O_RDONLY) as null,
    ):
        for listening in (ours, stream):
            listening.bind(f"\0{os.urandom(8).hex()}")
            listening.listen()
        first, second, third, fourth = (Descriptor(os.dup(fd.fileno())) for fd in (ours, stream, deaf, ours))
        passed = [
            ("ns-1000", null),
            ("login", second),
            ("login", third),
            ("login", null),
            ("other", fourth),
        ]
        assert login.take_socket(passed) is None
        passed.insert(0, ("login", first))
        taken = login.take_socket(passed)
        assert taken is not None
        assert taken.fileno() == first
        taken.close()
        for fd in (second, third, fourth):
            fd.close()
        assert len(passed) == 5

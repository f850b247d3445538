# SPDX-License-Identifier: LGPL-2.1-or-later
"""What callers may send at any time: descriptors, novel signatures, floods; and descriptors in replies."""

import asyncio
import contextlib
import fcntl
import os
import socket
from collections.abc import Callable
from itertools import product
from typing import Any
from unittest.mock import MagicMock

import pytest

from polytmpd.bus import library
from polytmpd.bus.connection import Connection
from polytmpd.bus.contract import MANAGER, PATH, SERVICE
from polytmpd.bus.library import (
    BODY_AT_MOST,
    LIBRARY,
    SIGNATURES_AT_MOST,
    UNREAD,
    Message,
    MessageFlag,
    Variant,
    signatures,
)
from polytmpd.bus.server import CALLS_AT_MOST
from polytmpd.bus.service import Service
from polytmpd.kernel.descriptor import Descriptor
from tests.bus.world import Backend, Client
from tests.unit.settled import descriptors, eventually

pytestmark = [pytest.mark.bus, pytest.mark.usefixtures("root")]

PEER = "org.freedesktop.DBus.Peer"


def close_all(replies: list[Message]) -> int:
    """Close the descriptors of the replies. dbus-fast also shows one in replies that had none."""
    fds = {fd for reply in replies for fd in reply.unix_fds}
    for fd in fds:
        os.close(fd)
    return len(fds)


async def ping(client: Client) -> None:
    assert await client.result("Ping", interface=PEER) is None


# Descriptors in replies


async def test_acquire_returns_a_working_descriptor(
    service: Service, backend: Backend, client: Client
) -> None:
    reply = await client.call("AcquireNamespace", "u", [1000])
    assert (reply.signature, reply.body) == ("h", [0])
    (fd,) = reply.unix_fds
    try:
        assert os.fstat(fd) == os.fstat(backend.fd)
    finally:
        os.close(fd)
    assert (backend.acquired, backend.callers) == ([1000], [os.getpid()]), (
        "the backend learns which process calls"
    )


async def test_replies_leave_no_descriptor_open(service: Service, client: Client) -> None:
    await ping(client)
    before = len(descriptors())
    for _ in range(20):
        replies = await asyncio.gather(*(client.call("AcquireNamespace", "u", [1000]) for _ in range(10)))
        assert close_all(replies) == 10
    await eventually(lambda: len(descriptors()) == before)


async def test_a_closed_descriptor_ends_a_call_and_not_the_connection(
    service: Service, backend: Backend, client: Client
) -> None:
    def closed() -> Descriptor:
        fd = backend.fd.dup()
        fd.close()
        return fd

    backend.acquire_with = closed
    name, text = await client.error("AcquireNamespace", "u", [1000])
    assert name == "org.polytmp1.Error.Failed"
    assert "journal" in text
    backend.acquire_with = None
    os.close((await client.call("AcquireNamespace", "u", [1000])).unix_fds[0])


async def test_a_caller_that_went_away_leaves_no_descriptor(
    service: Service, backend: Backend, new_client: Callable[[], Any], client: Client
) -> None:
    before = len(descriptors())
    backend.gate = asyncio.Event()
    gone = await new_client()
    gone.bus.send(message("AcquireNamespace", "u", [1000]))
    await eventually(lambda: backend.acquired)
    await gone.close()
    backend.gate.set()
    await ping(client)
    await eventually(lambda: len(descriptors()) == before)


async def test_a_caller_that_wants_no_reply_gets_none(
    service: Service,
    backend: Backend,
    client: Client,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checked at the sender: the bus would drop such a reply and log it."""
    answers: list[str] = []
    send = connection.send

    def note(sent: Message, on_sent: Callable[[], None] | None = None) -> None:
        answers.append(sent.error_name or sent.signature)
        send(sent, on_sent)

    monkeypatch.setattr(connection, "send", note)
    before = len(descriptors())
    for sent in (message("AcquireNamespace", "u", [1000]), message("NoSuch"), message("Reload")):
        sent.flags = MessageFlag.NO_REPLY_EXPECTED
        client.bus.send(sent)
    await eventually(lambda: backend.reloads)
    await ping(client)
    assert backend.acquired
    assert answers == [""], "only the reply to Ping"
    await eventually(lambda: len(descriptors()) == before)


def message(member: str, signature: str = "", body: list[Any] | None = None, **more: Any) -> Message:
    return Message(
        destination=SERVICE,
        path=PATH,
        interface=MANAGER,
        member=member,
        signature=signature,
        body=body or [],
        **more,
    )


# Unexpected descriptors


async def test_descriptors_in_any_message_are_closed(
    service: Service, client: Client, connection: Any
) -> None:
    fds = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(16)]
    try:
        await ping(client)
        before = len(descriptors())
        handles = ["h" * 16, list(range(16))]
        for _ in range(5):
            client.send_signal("UserNew", handles[0], handles[1], to=connection.unique_name, fds=fds)  # type: ignore[arg-type]
            name, _ = await client.error("Reload", handles[0], handles[1], fds=fds)  # type: ignore[arg-type]
            assert name == "org.freedesktop.DBus.Error.InvalidArgs"
            name, _ = await client.error("NoSuch", handles[0], handles[1], fds=fds)  # type: ignore[arg-type]
            assert name == "org.freedesktop.DBus.Error.UnknownMethod"
        await ping(client)
        await eventually(lambda: len(descriptors()) == before)
    finally:
        for fd in fds:
            os.close(fd)


async def test_descriptors_in_a_requested_reply_are_closed(connection: Any, client: Client) -> None:
    """The bus itself sends a pidfd with credentials, and any service may add descriptors to its reply."""

    def answer(received: Message) -> bool:
        if received.member != "Take":
            return False
        client.bus.send(Message.new_method_return(received, "hh", [0, 1], [0, 1]))
        return True

    client.bus.add_message_handler(answer)
    before = len(descriptors())
    for _ in range(20):
        assert await connection.ask(client.name, "/x", "org.example.X", "Take") == [0, 1]
        await connection.ask_bus("GetConnectionCredentials", "s", client.name)
    await eventually(lambda: len(descriptors()) == before)


# Novel signatures


def novel(count: int) -> list[str]:
    found = ["".join(letters) for letters in product("ybnqiuxtds", repeat=4)]
    return [f"({letters})" for letters in found[:count]]


async def test_novel_signatures_are_forgotten_again(service: Service, client: Client) -> None:
    bound = max(SIGNATURES_AT_MOST, 4096)
    for signature in novel(40):
        await client.error("Reload", f"a{signature}", [[]])
    await ping(client)
    assert signatures() <= bound


async def test_novel_signatures_in_one_message_are_bounded(service: Service, client: Client) -> None:
    """Each variant has its own signature, so one message can contain thousands."""
    variants = [Variant(f"a{signature}", []) for signature in novel(6000)]
    name, _ = await client.error("Reload", "av", [variants])
    assert name == "org.freedesktop.DBus.Error.InvalidArgs"
    assert signatures() <= max(SIGNATURES_AT_MOST, 4096)


@pytest.mark.parametrize("member", ["Reload", "GetInstance"])
async def test_no_method_accepts_a_large_body(service: Service, client: Client, member: str) -> None:
    name, text = await client.error(member, "s", ["x" * BODY_AT_MOST])
    assert name == "org.freedesktop.DBus.Error.InvalidArgs"
    assert (UNREAD in text) == (LIBRARY == "dbus_next")  # dbus-fast, which is compiled, reads everything
    await ping(client)


async def test_the_service_survives_a_deeply_nested_message(service: Service, client: Client) -> None:
    deep: Any = Variant("s", "x")
    for _ in range(60):
        deep = Variant("v", deep)
    await client.call("Reload", "v", [deep])
    await ping(client)


# Floods


@pytest.mark.skipif(LIBRARY != "dbus_next", reason="dbus-fast, which is compiled, has its own reader")
def test_a_flood_leaves_time_for_everything_else() -> None:
    """However many messages wait in the socket, the event loop has its turn after a few."""
    bus = MagicMock()
    bus._unmarshaller.unmarshall.return_value = True
    bus._create_unmarshaller.return_value = bus._unmarshaller
    vars(library)["_read_some"](bus)
    assert bus._on_message.call_count == library.MESSAGES_AT_ONCE
    bus._finalize.assert_not_called()


async def test_a_full_socket_with_a_high_descriptor_number() -> None:
    """A daemon that gets a thousand namespaces back from the FD store opens its connection after them."""
    here, there = socket.socketpair()
    with here, there, socket.socket(fileno=fcntl.fcntl(here, fcntl.F_DUPFD_CLOEXEC, 1500)) as high:
        high.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while high.send(b"x" * 4096):
                pass
        reader = asyncio.create_task(asyncio.to_thread(there.recv, 1 << 20))
        patient = library._PatientSocket(high)
        assert await asyncio.to_thread(patient.sendmsg, [b"y"], []) == 1
        await reader


async def test_a_flood_from_one_caller_does_not_stop_others(
    service: Service, backend: Backend, client: Client, new_client: Callable[[], Any]
) -> None:
    backend.gate = asyncio.Event()
    flood = [
        asyncio.ensure_future(client.call("AcquireNamespace", "u", [1000]))
        for _ in range(CALLS_AT_MOST + 20)
    ]
    await eventually(lambda: sum(task.done() for task in flood) == 20)
    refused = [task.result() for task in flood if task.done()]
    assert {reply.error_name for reply in refused} == {"org.freedesktop.DBus.Error.LimitsExceeded"}

    other = await new_client()
    await ping(other)
    waiting = asyncio.ensure_future(other.call("AcquireNamespace", "u", [1001]))
    await eventually(lambda: backend.acquired[-1] == 1001)

    backend.gate.set()
    replies = await asyncio.gather(*flood, waiting)
    assert [reply.signature for reply in replies].count("h") == CALLS_AT_MOST + 1
    assert close_all(replies) == CALLS_AT_MOST + 1
    await ping(client)


async def test_concurrent_callers_are_told_apart(
    service: Service, backend: Backend, new_client: Callable[[], Any]
) -> None:
    clients = [await new_client() for _ in range(20)]
    replies = await asyncio.gather(
        *(client.call("ResolvePath", "us", [1000 + i, f"/tmp/{i}"]) for i, client in enumerate(clients))
    )
    assert [reply.body for reply in replies] == [[f"/host/tmp/{i}"] for i in range(20)]

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection: replies, timeouts, its end, and whose signals it believes."""

import asyncio
import gc
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polytmpd.bus.connection import BusError, Connection
from polytmpd.bus.library import Message
from tests.bus.world import LOGIN1, LOGIN1_MANAGER, Client
from tests.unit.settled import eventually

pytestmark = pytest.mark.bus

Heard = list[tuple[str, list[Any]]]


class Deaf:
    """A service that accepts calls and never replies."""

    def __init__(self, client: Client) -> None:
        self.taken: list[Message] = []
        self.name = client.name
        self.bus = client.bus
        client.bus.add_message_handler(self._take)

    def _take(self, message: Message) -> bool:
        if message.interface != "org.example.Deaf":
            return False
        self.taken.append(message)
        return True


async def departed(connection: Connection, name: str) -> None:
    """Wait until the bus has noticed that the owner is gone."""
    for _ in range(1000):
        if await connection.ask_bus("NameHasOwner", "s", name) == [False]:
            return
    pytest.fail(f"{name} does not leave")


# ask()


async def test_sequential_calls(connection: Connection) -> None:
    for _ in range(10):
        (names,) = await connection.ask_bus("ListNames")
        assert connection.unique_name in names
    assert connection.connected


async def test_an_error_reply_has_a_name_and_a_text(connection: Connection) -> None:
    with pytest.raises(BusError, match=r"no\.such\.name") as caught:
        await connection.ask("no.such.name", "/", "org.example.X", "Do")
    assert caught.value.name == "org.freedesktop.DBus.Error.ServiceUnknown"


async def test_a_call_times_out(connection: Connection, client: Client) -> None:
    deaf = Deaf(client)
    with pytest.raises(BusError, match="no answer from") as caught:
        await connection.ask(deaf.name, "/", "org.example.Deaf", "Do", timeout=0.05)
    assert caught.value.name == "org.freedesktop.DBus.Error.Timeout"
    # late, with descriptors: not taken for another reply, and closed
    deaf.bus.send(Message.new_method_return(deaf.taken[0], "h", [0], [0]))
    for _ in range(3):
        assert await connection.ask_bus("GetId")


async def test_a_service_that_goes_away_during_the_call(connection: Connection, client: Client) -> None:
    deaf = Deaf(client)
    asked = asyncio.ensure_future(connection.ask(deaf.name, "/", "org.example.Deaf", "Do"))
    await eventually(lambda: deaf.taken)
    await client.close()
    with pytest.raises(BusError) as caught:
        await asyncio.wait_for(asked, 20)
    assert caught.value.name == "org.freedesktop.DBus.Error.NoReply"


@pytest.mark.parametrize("whose", ["ours", "the bus's"])
async def test_the_end_of_the_connection_ends_every_call(
    connection: Connection, client: Client, whose: str
) -> None:
    deaf = Deaf(client)
    asked = [
        asyncio.ensure_future(connection.ask(deaf.name, "/", "org.example.Deaf", "Do")) for _ in range(3)
    ]
    closed = asyncio.ensure_future(connection.wait_closed())
    await eventually(lambda: len(deaf.taken) == 3)
    if whose == "ours":
        connection.close()
    else:  # as if the bus had closed it
        library: Any = connection._bus
        library._sock.shutdown(socket.SHUT_RD)
    for task in asked:
        with pytest.raises(BusError):
            await asyncio.wait_for(task, 20)
    await asyncio.wait_for(closed, 20)
    assert not connection.connected
    with pytest.raises(BusError, match="not connected") as caught:
        await connection.ask_bus("GetId")
    assert caught.value.name == "org.freedesktop.DBus.Error.Disconnected"
    sent: list[bool] = []
    connection.send(Message.new_signal("/x", "org.example.X", "X", "", []), lambda: sent.append(True))
    assert sent == [True], "the code that waits to close the descriptor is notified"


async def test_calls_do_not_disturb_waiting_for_the_end(connection: Connection) -> None:
    closed = asyncio.ensure_future(connection.wait_closed())
    impatient = asyncio.ensure_future(connection.wait_closed())
    for _ in range(3):
        await connection.ask_bus("GetId")
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    await connection.ask_bus("GetId")
    assert not closed.done()
    connection.close()
    await asyncio.wait_for(closed, 20)


async def test_a_body_that_does_not_match_its_signature(connection: Connection) -> None:
    with pytest.raises(BusError):
        await connection.ask_bus("GetNameOwner", "s", 5)
    assert await connection.ask_bus("GetId")


async def test_no_bus_at_the_address(tmp_path: Path) -> None:
    await refused(f"unix:path={tmp_path}/none", OSError)


async def refused(address: str, kind: type[Exception]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ResourceWarning
        )  # the library forgets its socket; so does the program
        with pytest.raises(kind):
            await Connection.open(address)
        gc.collect()


async def test_an_invalid_address() -> None:
    await refused("nonsense", BusError)


async def test_credentials(connection: Connection, client: Client) -> None:
    assert await connection.uid_of(client.name) == os.getuid()
    assert await connection.pid_of(client.name) == os.getpid()
    await client.close()
    await departed(connection, client.name)
    with pytest.raises(BusError):
        await connection.uid_of(client.name)
    with pytest.raises(BusError):
        await connection.pid_of(client.name)


async def test_a_name_has_one_owner(connection: Connection, connect: Callable[[], Any]) -> None:
    await connection.own_name("org.example.Mine")
    other = await connect()
    with pytest.raises(BusError, match=r"another process owns org\.example\.Mine"):
        await other.own_name("org.example.Mine")
    connection.close()
    await departed(other, "org.example.Mine")
    await other.own_name("org.example.Mine")


async def test_descriptors_that_came_with_another_message_are_closed_once(
    connection: Connection, client: Client
) -> None:
    """dbus-fast also lists them with the previous message. Descriptors opened in between stay open."""

    def answer(received: Message) -> bool:
        if received.member != "Take":
            return False
        client.bus.send(Message.new_method_return(received))
        client.send_signal("UserNew", "h", [0], to=connection.unique_name, fds=[0])
        return True

    client.bus.add_message_handler(answer)
    ours: list[int] = []
    open_one = connection._on_signal

    def on_signal(message: Message) -> None:
        ours.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        open_one(message)

    connection._on_signal = on_signal  # type: ignore[method-assign]
    for _ in range(20):
        await connection.ask(client.name, "/x", "org.example.X", "Take")
    await eventually(lambda: len(ours) == 20)
    for fd in ours:
        os.close(fd)  # EBADF if it was already closed


async def test_descriptors_that_were_asked_for(connection: Connection, client: Client) -> None:
    def answer(received: Message) -> bool:
        if received.member != "Take":
            return False
        client.bus.send(Message.new_method_return(received, "h", [0], [0]))
        return True

    client.bus.add_message_handler(answer)
    for _ in range(5):
        (fd,) = await connection.ask(client.name, "/x", "org.example.X", "Take", keep_fds=True)
        assert os.fstat(fd) == os.fstat(0)
        os.close(fd)


# Signals


@pytest.fixture
async def heard(connection: Connection) -> Heard:
    found: Heard = []
    await connection.subscribe(
        LOGIN1, LOGIN1_MANAGER, "UserRemoved", lambda path, body: found.append((path, body))
    )
    return found


async def test_only_signals_of_the_owner_are_believed(
    connection: Connection, heard: Heard, new_client: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    forger, logind = await new_client(), await new_client()
    forger.send_signal("UserRemoved", "uo", [1000, "/"], to=connection.unique_name)
    await eventually(lambda: "ignoring" in caplog.text)
    assert heard == [], "the name has no owner yet"
    await logind.own(LOGIN1)
    forger.send_signal("UserRemoved", "uo", [1001, "/"], to=connection.unique_name)
    forger.send_signal("UserRemoved", "uo", [1002, "/"])
    await forger.result("GetId", to="org.freedesktop.DBus", path="/", interface="org.freedesktop.DBus")
    logind.send_signal("UserRemoved", "uo", [1003, "/"])
    await eventually(lambda: heard)
    assert [body[0] for _, body in heard] == [1003]
    assert forger.name in caplog.text


async def test_a_forged_change_of_owner_is_not_believed(
    connection: Connection, heard: Heard, new_client: Callable[[], Any]
) -> None:
    forger, logind = await new_client(), await new_client()
    await logind.own(LOGIN1)
    await eventually(lambda: connection.owner(LOGIN1) == logind.name)
    forger.send_signal(
        "NameOwnerChanged",
        "sss",
        [LOGIN1, logind.name, forger.name],
        to=connection.unique_name,
        path="/org/freedesktop/DBus",
        interface="org.freedesktop.DBus",
    )
    forger.send_signal("UserRemoved", "uo", [1, "/"], to=connection.unique_name)
    await forger.result("GetId", to="org.freedesktop.DBus", path="/", interface="org.freedesktop.DBus")
    logind.send_signal("UserRemoved", "uo", [2, "/"])
    await eventually(lambda: heard)
    assert [body[0] for _, body in heard] == [2]
    assert connection.owner(LOGIN1) == logind.name


async def test_the_owner_is_known_from_the_start(connection: Connection, client: Client) -> None:
    await client.own(LOGIN1)
    told: list[str | None] = []
    await connection.follow_owner(LOGIN1, told.append)
    assert connection.owner(LOGIN1) == client.name
    await client.disown(LOGIN1)
    await client.own(LOGIN1)
    await eventually(lambda: told == [None, client.name])


async def test_a_change_of_owner_overrides_an_older_reply(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read may return the reply to GetNameOwner together with the signal that follows it."""

    async def ask_bus(member: str, signature: str = "", *body: Any) -> list[Any]:
        if member == "GetNameOwner":
            changed = Message.new_signal(
                "/org/freedesktop/DBus",
                "org.freedesktop.DBus",
                "NameOwnerChanged",
                "sss",
                [LOGIN1, ":1.old", ":1.new"],
            )
            changed.unix_fds = []
            changed.sender = "org.freedesktop.DBus"
            connection._on_message(changed)
            return [":1.old"]
        return []

    monkeypatch.setattr(connection, "ask_bus", ask_bus)
    await connection.follow_owner(LOGIN1, None)
    assert connection.owner(LOGIN1) == ":1.new"

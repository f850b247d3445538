# SPDX-License-Identifier: LGPL-2.1-or-later
"""polytmpctl's connection for one call after the other, on a bus; its wire format, next to the library's."""

import asyncio
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polytmpd.bus import synchronous, wire
from polytmpd.bus.client import Holder, Polytmp, Shown
from polytmpd.bus.contract import MANAGER, PATH, SERVICE
from polytmpd.bus.library import Message, MessageType, Variant
from polytmpd.bus.protocol import DBUS, BusError
from polytmpd.bus.service import Service
from polytmpd.bus.synchronous import SynchronousConnection
from polytmpd.core.model import State
from polytmpd.core.names import object_path
from tests.bus.world import Backend, Client, lists, view

pytestmark = pytest.mark.bus

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plain(bus: str) -> Iterator[SynchronousConnection]:
    name = synchronous.socket_name(bus)
    assert name is not None
    opened = SynchronousConnection.open(name)
    yield opened
    opened.close()


async def asked(work: Any) -> Any:
    """The result of a coroutine that only waits for a synchronous connection, in a thread."""
    return await asyncio.to_thread(synchronous.run, work)


# Calls


async def test_what_polytmpctl_asks(
    service: Service, backend: Backend, plain: SynchronousConnection
) -> None:
    path = object_path(1000)
    backend.views.show(view(1000))
    polytmp = Polytmp(plain)
    assert await asked(polytmp.instances_in_full()) == [Shown(1000, "alice", path, State.ACTIVE, 11)]
    assert await asked(polytmp.holders(1000)) == [Holder(17, "sleep 1", "/user.slice", "mount namespace")]
    assert await asked(polytmp.usage(1000, timeout=10)) == [("/tmp", 1 << 40, 3)]
    assert await asked(polytmp.resolve(1000, "/tmp/é")) == "/host/tmp/é"
    assert await asked(polytmp.directories()) == ["/tmp", "/var/tmp"]
    properties = await asked(polytmp.properties(1000))
    assert properties["NamespaceID"] == 4026532000
    assert properties["Directories"][1] == ["/var/tmp", "/var/tmp/polytmp-1000/tmp", "persistent"]
    assert (await asked(polytmp.all_properties()))[1000] == properties


async def test_a_thousand_instances(
    service: Service, backend: Backend, plain: SynchronousConnection
) -> None:
    for uid in range(2000, 3000):
        backend.views.show(view(uid, f"user{uid}"))
    found = await asked(Polytmp(plain).instances_in_full())
    assert [entry.uid for entry in found] == list(range(2000, 3000))
    assert len(await asked(Polytmp(plain).all_properties())) == 1000


async def test_an_error_has_its_name(service: Service, plain: SynchronousConnection) -> None:
    with pytest.raises(BusError, match="no object at") as failure:
        await asked(Polytmp(plain).properties(4711))
    assert failure.value.name == "org.freedesktop.DBus.Error.UnknownObject"
    with pytest.raises(BusError) as failure:
        await asked(plain.ask("org.example.None", "/", "org.example", "Nothing"))
    assert failure.value.name == "org.freedesktop.DBus.Error.ServiceUnknown"


async def test_a_late_answer_is_dropped(
    service: Service, backend: Backend, plain: SynchronousConnection
) -> None:
    backend.views.show(view(1000))
    backend.gate = asyncio.Event()
    polytmp = Polytmp(plain)
    with pytest.raises(BusError) as failure:
        await asked(polytmp.usage(1000, timeout=0.1))
    assert failure.value.name == f"{DBUS}.Error.Timeout"
    backend.gate.set()
    assert [entry.uid for entry in await asked(polytmp.instances())] == [1000]
    with pytest.raises(BusError) as failure:
        await asked(plain.ask(SERVICE, PATH, MANAGER, "ListInstances", timeout=-1))
    assert failure.value.name == f"{DBUS}.Error.Timeout"


async def test_signals_are_ignored(service: Service, client: Client, plain: SynchronousConnection) -> None:
    name = (await asked(plain.ask_bus("GetConnectionUnixUser", "s", client.name)))[0]
    assert name == os.geteuid()
    await asked(plain.ask_bus("AddMatch", "s", "type='signal'"))
    client.send_signal("Anything", "as", [["x"] * 1000])
    assert await asked(Polytmp(plain).instances()) == []


@pytest.mark.parametrize("word", ["\0", "\udcff"])
async def test_what_the_bus_cannot_carry_is_refused_here(
    word: str, service: Service, plain: SynchronousConnection
) -> None:
    with pytest.raises(BusError):
        await asked(Polytmp(plain).resolve(1000, word))
    assert await asked(Polytmp(plain).instances()) == [], "the connection still works"


class Peer:
    """A bus that sends what a test tells it to, and then hangs up."""

    def __init__(self, path: Path, *parts: bytes) -> None:
        self.name = str(path / "peer")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.name)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, args=(parts,))
        self._thread.start()

    def _serve(self, parts: tuple[bytes, ...]) -> None:
        stream, _ = self._listener.accept()
        with stream:
            for part in parts:
                stream.recv(4096)
                stream.sendall(part)

    def close(self) -> None:
        self._thread.join(10)
        self._listener.close()


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ([b"REJECTED EXTERNAL\r\n"], "Failed"),
        ([b"OK"], "Failed"),
        ([b"x" * 20_000], "Failed"),
        ([b"OK 1234\r\n"], "Disconnected"),
        ([b"OK 1234\r\n", b"HTTP/1.1 400 Bad Request"], "Failed"),
        ([b"OK 1234\r\n", b"l\2\1\1" + b"\xff" * 12], "Failed"),
    ],
)
def test_a_broken_bus(parts: list[bytes], name: str, tmp_path: Path) -> None:
    peer = Peer(tmp_path, *parts)
    try:
        with pytest.raises(BusError) as failure:
            SynchronousConnection.open(peer.name)
        assert failure.value.name == f"{DBUS}.Error.{name}"
    finally:
        peer.close()


def test_no_bus(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        SynchronousConnection.open(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("unix:path=/run/bus", "/run/bus"),
        ("unix:guid=12,path=/run/bus", "/run/bus"),
        ("unix:abstract=/a", "\0/a"),
        ("unix:path=/run/a%20b", None),
        ("unix:path=/a;unix:path=/b", None),
        ("tcp:host=localhost,port=1", None),
        ("unixexec:path=/bin/sh", None),
        ("nonsense", None),
    ],
)
def test_addresses(address: str, name: str | None) -> None:
    assert synchronous.socket_name(address) == name


async def test_a_coroutine_that_needs_a_loop() -> None:
    with pytest.raises(RuntimeError, match="needs an event loop"):
        synchronous.run(asyncio.sleep(0))


# The wire format

BODIES: list[tuple[str, list[Any]]] = [
    ("", []),
    ("ybnqiuxtd", [1, True, -2, 3, -4, 5, -6, 1 << 63, 0.5]),
    ("sog", ["é", "/a", "a{sv}"]),
    ("a(uso)", [[[1, "alice", "/x"], [2, "bob", "/y"]]]),
    ("a(usost)", [[]]),
    ("ya(y)at", [1, [], [2, 3]]),
    ("a{sv}", [{"A": Variant("s", "x"), "B": Variant("a(sss)", [["1", "2", "3"]]), "C": Variant("t", 1)}]),
    ("a{oa{sa{sv}}}", [{"/a": {"i": {"P": Variant("v", Variant("as", ["x"]))}}}]),
    ("ay", [b"bytes"]),
    ("(bas)", [[True, ["x", ""]]]),
]


def message(signature: str, body: list[Any]) -> bytes:
    call = Message(destination="a.b", path="/", member="M", interface="a.b", serial=7, sender=":1.7")
    made = Message.new_method_return(call, signature, body)
    made.serial = 8
    return bytes(made._marshall(False))


def unwrapped(value: Any) -> Any:
    """Variants of either kind, as their values."""
    if isinstance(value, (Variant, wire.Variant)):
        return unwrapped(value.value)
    if isinstance(value, dict):
        return {key: unwrapped(entry) for key, entry in value.items()}
    return [unwrapped(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("signature", "body"), BODIES)
def test_answers_as_the_library_writes_them(signature: str, body: list[Any]) -> None:
    whole = message(signature, body)
    assert wire.length(whole[: wire.PREFIX]) == len(whole) - wire.PREFIX
    found = wire.reply(whole)
    assert (found.kind, found.serial, found.error_name) == (wire.METHOD_RETURN, 7, "")
    assert unwrapped(found.body) == unwrapped(lists(body))


@pytest.mark.parametrize(("signature", "body"), BODIES)
def test_a_damaged_answer_raises_one_error(signature: str, body: list[Any]) -> None:
    whole = message(signature, body)
    for end in range(wire.PREFIX, len(whole)):
        try:
            wire.reply(whole[:end])
        except wire.WireError:
            continue
    for place in range(wire.PREFIX, len(whole)):
        for value in (0, 0x61, 0x76, 0xFF):
            try:
                wire.reply(whole[:place] + bytes((value,)) + whole[place + 1 :])
            except wire.WireError:
                continue


def test_nesting_is_bounded() -> None:
    deep = b"\1v\0" * 10_000
    fields = b"\5\1u\0\7\0\0\0" + b"\x08\1g\0\1v\0\0"
    head = struct.pack("<cBBBIII", b"l", 2, 0, 1, len(deep), 8, len(fields) - 1)
    with pytest.raises(wire.WireError):
        wire.reply(head + fields + deep)


@pytest.mark.parametrize("fields", [b"\x08\1u\0\5\0\0\0", b"\x08\1g\0\3a()\0\0\0"])
def test_types_that_no_bus_lets_through(fields: bytes) -> None:
    body = b"\x08" + bytes(15)
    head = struct.pack("<cBBBIII", b"l", 2, 0, 1, len(body), 8, len(fields))
    with pytest.raises(wire.WireError):
        wire.reply(head + fields + bytes(-len(fields) % 8) + body)


def test_big_endian() -> None:
    fields = b"\5\1u\0\0\0\0\7" + b"\x08\1g\0\2su\0"
    fields += bytes(-len(fields) % 8)
    body = b"\0\0\0\2hi\0\0\0\0\1\0"
    head = struct.pack(">cBBBIII", b"B", 2, 0, 1, len(body), 8, 16)
    assert wire.length(head) == len(fields + body)
    assert wire.reply(head + fields + body) == wire.Reply(wire.METHOD_RETURN, 7, "", ["hi", 256])


@pytest.mark.parametrize("prefix", [b"x" * 16, b"l\2\1\2" + bytes(12), b"l\2\1\1" + b"\xff" * 12])
def test_what_is_no_message(prefix: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.length(prefix)


async def test_a_call_arrives_as_it_was_sent(client: Client, plain: SynchronousConnection) -> None:
    got: list[Message] = []

    def on_message(call: Message) -> bool:
        if call.message_type is not MessageType.METHOD_CALL:
            return False
        got.append(call)
        client.bus.send(Message.new_method_return(call, "u", [5]))
        return True

    client.bus.add_message_handler(on_message)
    body = ["é", "/a", 7, 1 << 40]
    answer = await asked(plain.ask(client.name, "/p", "a.b", "M", "sout", body, interactive=True))
    assert answer == [5]
    (call,) = got
    assert (call.path, call.interface, call.member, call.signature) == ("/p", "a.b", "M", "sout")
    assert call.body == body
    assert int(call.flags.value) == 4


# What is imported


SLOW = ("asyncio", "dbus_next", "dbus_fast", "dataclasses", "inspect", "subprocess", "json", "logging")


@pytest.mark.parametrize("words", [["list"], ["status"], ["path", "/etc/passwd"], ["--help"]])
async def test_a_short_command_imports_little(words: list[str], service: Service, bus: str) -> None:
    program = (
        "import sys\n"
        "from polytmpd.ctl.__main__ import main\n"
        f"status = main({words!r})\n"
        f"sys.exit(str(sorted(set(sys.modules) & set({SLOW!r}))) if not status else 'failed')"
    )
    # -S: the site module of a virtual environment imports a lot by itself.
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-S", "-c", program],
        cwd=ROOT,
        env={"DBUS_SYSTEM_BUS_ADDRESS": bus},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.stderr.strip() == "[]", done.stdout

# SPDX-License-Identifier: LGPL-2.1-or-later
"""polytmpctl's connection for one call after the other, on a bus."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from ctypes import c_void_p
from pathlib import Path
from typing import Any

import pytest

from polytmpd.bus import sdbus
from polytmpd.bus.client import Holder, Polytmp, Shown
from polytmpd.bus.library import Message, MessageType, Variant
from polytmpd.bus.protocol import DBUS, BusError
from polytmpd.bus.sdbus import SdBus
from polytmpd.bus.service import Service
from polytmpd.core.model import State
from polytmpd.core.names import object_path
from polytmpd.ctl.__main__ import main
from tests.bus.world import Backend, Client, lists, view

pytestmark = pytest.mark.bus

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "DBUS_SYSTEM_BUS_ADDRESS"


@pytest.fixture
def plain(bus: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SdBus]:
    monkeypatch.setenv(ADDRESS, bus)
    made = SdBus()
    made.open()
    yield made
    made.close()


async def asked(work: Any) -> Any:
    """The result of a coroutine that only waits for sd-bus, in a thread."""
    return await asyncio.to_thread(sdbus.run, work)


# Calls


async def test_what_polytmpctl_asks(service: Service, backend: Backend, plain: SdBus) -> None:
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


async def test_a_thousand_instances(service: Service, backend: Backend, plain: SdBus) -> None:
    for uid in range(2000, 3000):
        backend.views.show(view(uid, f"user{uid}"))
    found = await asked(Polytmp(plain).instances_in_full())
    assert [entry.uid for entry in found] == list(range(2000, 3000))
    assert len(await asked(Polytmp(plain).all_properties())) == 1000


async def test_an_error_has_its_name(service: Service, plain: SdBus) -> None:
    with pytest.raises(BusError, match="no object at") as failure:
        await asked(Polytmp(plain).properties(4711))
    assert failure.value.name == "org.freedesktop.DBus.Error.UnknownObject"
    with pytest.raises(BusError) as failure:
        await asked(plain.ask("org.example.None", "/", "org.example", "Nothing"))
    assert failure.value.name == "org.freedesktop.DBus.Error.ServiceUnknown"


@pytest.mark.parametrize("seconds", [0.1, -1])
async def test_a_late_answer_is_dropped(seconds: float, client: Client, plain: SdBus) -> None:
    got: list[Message] = []

    def on_message(call: Message) -> bool:
        if call.message_type is not MessageType.METHOD_CALL:
            return False
        got.append(call)
        for late in got if len(got) == 2 else []:
            client.bus.send(Message.new_method_return(late, "s", [late.member]))
        return True

    client.bus.add_message_handler(on_message)
    with pytest.raises(BusError, match=f"^no answer from {client.name} to a.b.First$") as failure:
        await asked(plain.ask(client.name, "/p", "a.b", "First", timeout=seconds))
    assert failure.value.name == f"{DBUS}.Error.Timeout"
    assert await asked(plain.ask(client.name, "/p", "a.b", "Second")) == ["Second"]


async def test_signals_are_ignored(service: Service, client: Client, plain: SdBus) -> None:
    name = (await asked(plain.ask_bus("GetConnectionUnixUser", "s", client.name)))[0]
    assert name == os.geteuid()
    await asked(plain.ask_bus("AddMatch", "s", "type='signal'"))
    client.send_signal("Anything", "as", [["x"] * 1000])
    assert await asked(Polytmp(plain).instances()) == []


@pytest.mark.parametrize("word", ["\0", "\udcff"])
async def test_what_the_bus_cannot_carry_is_refused_here(word: str, service: Service, plain: SdBus) -> None:
    with pytest.raises(BusError):
        await asked(Polytmp(plain).resolve(1000, word))
    assert await asked(Polytmp(plain).instances()) == [], "the connection still works"


def answers(client: Client, signature: str, body: list[Any]) -> list[Message]:
    """From now on, the client answers each call like that. Returns the calls."""
    got: list[Message] = []

    def on_message(call: Message) -> bool:
        if call.message_type is not MessageType.METHOD_CALL:
            return False
        got.append(call)
        client.bus.send(Message.new_method_return(call, signature, body))
        return True

    client.bus.add_message_handler(on_message)
    return got


async def test_a_call_arrives_as_it_was_sent(client: Client, plain: SdBus) -> None:
    got = answers(client, "u", [5])
    body = ["é", "/a", 7, 1 << 40]
    answer = await asked(plain.ask(client.name, "/p", "a.b", "M", "sout", body, interactive=True))
    assert answer == [5]
    (call,) = got
    assert (call.path, call.interface, call.member, call.signature) == ("/p", "a.b", "M", "sout")
    assert call.body == body
    assert int(call.flags.value) == 4
    await asked(plain.ask(client.name, "/p", "a.b", "M"))
    assert int(got[1].flags.value) == 0


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        ("", []),
        ("ybnqiuxtd", [1, True, -2, 3, -4, 5, -6, 1 << 63, 0.5]),
        ("sog", ["é", "/a", "a{sv}"]),
        ("a(uso)", [[[1, "alice", "/x"], [2, "bob", "/y"]]]),
        ("a(usost)", [[]]),
        ("a(sb)", [[["x", True], ["y", False]]]),
        ("yaaya(y)at", [1, [], [], [2, 3]]),
        ("a{us}", [{1: "a", 2: "b"}]),
        (
            "a{sv}",
            [{"A": Variant("s", "x"), "B": Variant("a(sss)", [["1", "2", "3"]]), "C": Variant("t", 1)}],
        ),
        ("a{oa{sa{sv}}}", [{"/a": {"i": {"P": Variant("v", Variant("as", ["x"]))}}}]),
        ("(bas)", [[True, ["x", ""]]]),
    ],
)
async def test_answers_are_read_as_they_were_sent(
    signature: str, body: list[Any], client: Client, plain: SdBus
) -> None:
    answers(client, signature, body)
    found = await asked(plain.ask(client.name, "/p", "a.b", "M"))
    assert repr(unwrapped(found)) == repr(unwrapped(lists(body)))  # 1 is not True


def unwrapped(value: Any) -> Any:
    """Variants of either kind, as their values."""
    if isinstance(value, (Variant, sdbus.Variant)):
        return unwrapped(value.value)
    if isinstance(value, dict):
        return {key: unwrapped(entry) for key, entry in value.items()}
    return [unwrapped(entry) for entry in value] if isinstance(value, list) else value


async def test_a_large_answer(client: Client, plain: SdBus) -> None:
    text = "é" * (8 * 1024 * 1024)
    answers(client, "s", [text])
    assert await asked(plain.ask(client.name, "/p", "a.b", "M")) == [text]


class Counted:
    """libsystemd, and how often each message was taken more often than released."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.held: Counter[int] = Counter()
        self.taken = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def sd_bus_process(self, bus: c_void_p, place: Any) -> int:
        return self._take(self._library.sd_bus_process(bus, place), place)

    def sd_bus_message_new_method_call(self, bus: c_void_p, place: Any, *names: bytes) -> int:
        return self._take(self._library.sd_bus_message_new_method_call(bus, place, *names), place)

    def _take(self, result: int, place: Any) -> int:
        if found := place._obj.value:
            self.held[found] += 1
            self.taken += 1
        return result

    def sd_bus_message_unref(self, message: c_void_p) -> None:
        if message.value:
            self.held[message.value] -= 1
        self._library.sd_bus_message_unref(message)


async def test_each_message_is_released_once(
    client: Client, bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESS, bus)
    connection = SdBus()
    counted = Counted(connection._library)
    monkeypatch.setattr(connection, "_library", counted)
    got = answers(client, "v", [Variant("s", "x")])
    try:
        await asyncio.to_thread(connection.open)
        await asked(connection.ask(client.name, "/p", "a.b", "M", "s", ["x"]))
        client.send_signal("Anything", "s", ["x"], to=got[0].sender)
        await asked(connection.ask(client.name, "/p", "a.b", "M"))
        for name, value in (("a.none", 1), (client.name, -1), (client.name, 1 << 32)):
            with pytest.raises(BusError):
                await asked(connection.ask(name, "/p", "a.b", "M", "u", [value]))
        assert counted.taken == 10  # five calls, NameAcquired, a signal, two answers, an error
        assert set(counted.held.values()) == {0}
    finally:
        connection.close()


# A bus that does not work


class Peer:
    """A bus that sends what a test tells it to, and then hangs up or says nothing more."""

    def __init__(self, path: Path, *parts: bytes, hangs_up: bool = True) -> None:
        self.address = f"unix:path={path}/peer"
        self.called = threading.Event()
        self._hangs_up = hangs_up
        self._end = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path / "peer"))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, args=(parts,))
        self._thread.start()

    def _serve(self, parts: tuple[bytes, ...]) -> None:
        stream, _ = self._listener.accept()
        with stream, contextlib.suppress(BrokenPipeError):
            for part in parts:
                stream.recv(4096)
                stream.sendall(part)
            self.called.set()
            if not self._hangs_up:
                self._end.wait(30)

    def close(self) -> None:
        self._end.set()
        self._thread.join(10)
        self._listener.close()


OK = b"DATA\r\nOK 0123456789abcdef0123456789abcdef\r\nAGREE_UNIX_FD\r\n"
"""What sd-bus wants to hear before it listens to messages."""


@pytest.mark.parametrize(
    "parts",
    [
        [b"REJECTED EXTERNAL\r\n"],
        [b"OK"],
        [b"x" * 20_000],
        [b"x" * 200_000],
        [b"OK 1234\r\n"],
        [OK],
        [OK + b"HTTP/1.1 400 Bad Request"],
        [OK + b"l\2\1\1" + b"\xff" * 12],
    ],
)
def test_a_broken_bus(
    parts: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = Peer(tmp_path, *parts)
    monkeypatch.setenv(ADDRESS, peer.address)
    try:
        assert main(["list"]) == 1
    finally:
        peer.close()
    text = capsys.readouterr().err
    assert text.startswith("polytmpctl: Failed to connect to bus: ")
    assert text.endswith("\nIs D-Bus running? See: systemctl status dbus.service\n")


def test_a_silent_bus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = Peer(tmp_path, hangs_up=False)
    monkeypatch.setenv(ADDRESS, peer.address)
    monkeypatch.setattr(sdbus, "TIMEOUT", 0.1)
    try:
        assert main(["list"]) == 1
    finally:
        peer.close()
    assert "polytmpctl: Failed to connect to bus: the bus does not answer\n" in capsys.readouterr().err


def test_ctrl_c_ends_a_wait(tmp_path: Path) -> None:
    peer = Peer(tmp_path, hangs_up=False)
    process = subprocess.Popen(
        [sys.executable, "-m", "polytmpd.ctl", "list"],
        cwd=ROOT,
        env={ADDRESS: peer.address},
        stderr=subprocess.PIPE,
    )
    try:
        assert peer.called.wait(20)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10)[1] == b""
        assert process.returncode == 130
    finally:
        process.kill()
        process.communicate()
        peer.close()


async def test_a_bus_that_ends(
    short_bus: tuple[str, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, end = short_bus
    monkeypatch.setenv(ADDRESS, address)
    connection = SdBus()
    client = await Client.open(address)
    called = asyncio.Event()

    def on_message(message: Message) -> bool:
        if message.member == "M":
            called.set()
        return message.member == "M"

    client.bus.add_message_handler(on_message)
    try:
        await asyncio.to_thread(connection.open)
        waiting = asyncio.create_task(asked(connection.ask(client.name, "/p", "a.b", "M", timeout=None)))
        await asyncio.wait_for(called.wait(), 10)
        end()
        with pytest.raises(BusError, match=r"^no answer from \S+ to a.b.M$") as failure:
            await asyncio.wait_for(waiting, 10)
        assert failure.value.name == f"{DBUS}.Error.Disconnected"
        with pytest.raises(BusError, match=r"^no answer from a.b to a.b.M$") as failure:
            await asked(connection.ask("a.b", "/p", "a.b", "M"))
        assert failure.value.name == f"{DBUS}.Error.Disconnected"
    finally:
        connection.close()
        await client.close()


@pytest.mark.parametrize("address", ["nonsense", "unix:path=/nonexistent/bus", "unix:path=/a%2"])
def test_no_bus(address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(ADDRESS, address)
    assert main(["list"]) == 1
    assert capsys.readouterr().err.startswith("polytmpctl: Failed to connect to bus: ")


async def test_addresses_as_other_programs_read_them(
    service: Service, bus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in (bus.replace("-", "%2d"), f"unix:path=/nonexistent;{bus}"):
        monkeypatch.setenv(ADDRESS, address)
        connection = SdBus()
        try:
            await asyncio.to_thread(connection.open)
            assert await asked(Polytmp(connection).instances()) == []
        finally:
            connection.close()


async def test_a_coroutine_that_needs_a_loop() -> None:
    with pytest.raises(RuntimeError, match="needs an event loop"):
        sdbus.run(asyncio.sleep(0))


# What is imported


SLOW = ("asyncio", "dbus_next", "dbus_fast", "dataclasses", "inspect", "subprocess", "json", "logging")


async def imported(words: list[str], bus: str, *before: str) -> set[str]:
    """Which of SLOW a command imports, after these lines of Python."""
    program = (
        "import sys",
        *before,
        "from polytmpd.ctl.__main__ import main",
        f"status = main({words!r})",
        f"sys.exit(' '.join(set(sys.modules) & set({SLOW!r})) if not status else 'failed')",
    )
    # -S: the site module of a virtual environment imports a lot by itself.
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-S", "-c", "\n".join(program)],
        cwd=ROOT,
        env={ADDRESS: bus, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    found = done.stderr.strip()
    assert found != "failed", done.stdout
    return set(found.split())


@pytest.mark.parametrize("words", [["list"], ["status"], ["path", "/etc/passwd"], ["--help"]])
async def test_a_short_command_imports_little(words: list[str], service: Service, bus: str) -> None:
    assert await imported(words, bus) == set()


async def test_without_libsystemd_the_library_is_used(service: Service, bus: str) -> None:
    missing = (
        "def load(): raise OSError('no such file')",
        "from polytmpd import libsystemd",
        "libsystemd.load = load",
    )
    assert {"asyncio"} <= await imported(["list"], bus, *missing)

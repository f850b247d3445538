# SPDX-License-Identifier: LGPL-2.1-or-later
"""No reply: no bus, no daemon, or one that dies, hangs or speaks nonsense."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.pam.outcomes import CALL, DBUS, MakeDaemon, assert_joined, assert_unreachable_for
from tests.pam.pam_world import (
    Bus,
    Namespace,
    World,
)

pytestmark = [pytest.mark.pam, pytest.mark.timeout(120)]

both_kinds = pytest.mark.parametrize("user", ["alice", "cronuser"])


@both_kinds
def test_no_bus(world: World, user: str) -> None:
    assert assert_unreachable_for(world, user).seconds < 8


@both_kinds
def test_a_bus_socket_without_a_bus(world: World, user: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{world.base}/dead")
    assert_unreachable_for(world, user, f"unix:path={world.base}/dead")


@both_kinds
def test_a_bus_without_the_daemon(world: World, bus: Bus, user: str) -> None:
    session = assert_unreachable_for(world, user, bus.address)
    assert f"{DBUS}ServiceUnknown" in session.log[0][1]


@both_kinds
def test_a_daemon_that_cannot_be_started(world: World, bus: Bus, user: str) -> None:
    bus.activatable(["/bin/false"])
    stdin = os.open(world.base / "activated-stdin", os.O_RDWR)
    try:
        session = assert_unreachable_for(world, user, bus.address)
    finally:
        os.close(stdin)
    assert f"{DBUS}Spawn." in session.log[0][1]


@both_kinds
def test_a_daemon_that_never_replies(world: World, bus: Bus, daemon: MakeDaemon, user: str) -> None:
    world.module("timeout=1")
    daemon(silent=True)
    session = assert_unreachable_for(world, user, bus.address)
    assert 0.9 < session.seconds < 8


@both_kinds
def test_a_daemon_that_dies_during_the_call(world: World, bus: Bus, daemon: MakeDaemon, user: str) -> None:
    daemon(die=True)
    session = assert_unreachable_for(world, user, bus.address)
    assert session.seconds < 8


def test_a_daemon_that_dies_during_the_call_and_is_restarted(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    first = daemon(die=True)
    bus.activatable(bus.command(open=[private.path]))
    stdin = os.open(world.base / "activated-stdin", os.O_RDWR)
    try:
        session = world.open_session(bus=bus.address)
    finally:
        os.close(stdin)
    assert_joined(session, private)
    assert session.log == []
    assert first.stop() == [CALL + "1500"]


@both_kinds
def test_a_daemon_that_dies_during_every_call(world: World, bus: Bus, user: str) -> None:
    """After a few attempts, the module gives up."""
    bus.activatable(bus.command(die=True))
    stdin = os.open(world.base / "activated-stdin", os.O_RDWR)
    try:
        session = assert_unreachable_for(world, user, bus.address)
    finally:
        os.close(stdin)
    assert f"{DBUS}NoReply" in session.log[0][1]
    assert session.seconds < 15


def test_a_daemon_with_a_full_queue_is_asked_again(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    """The bus replies that the daemon's queue is full; others may have filled it."""
    busy = daemon(error=f"{DBUS}LimitsExceeded", text="full", errors=3, open=[private.path])
    session = world.open_session(bus=bus.address)
    assert_joined(session, private)
    assert session.log == []
    assert busy.stop() == [CALL + "1500"] * 4


@both_kinds
def test_a_daemon_whose_queue_stays_full(world: World, bus: Bus, daemon: MakeDaemon, user: str) -> None:
    world.module("timeout=1")
    daemon(error=f"{DBUS}LimitsExceeded", text="full")
    session = assert_unreachable_for(world, user, bus.address)
    assert f"{DBUS}LimitsExceeded" in session.log[0][1]
    assert 0.8 < session.seconds < 8


@both_kinds
def test_a_bus_that_dies_during_the_call(world: World, bus: Bus, daemon: MakeDaemon, user: str) -> None:
    daemon(silent=True, kill=[bus.process.pid])
    session = assert_unreachable_for(world, user, bus.address)
    assert session.seconds < 8


@contextmanager
def server(world: World, serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a socket that serve() handles instead of a bus."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{world.base}/odd")
        listening.listen()
        listening.settimeout(10)
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        yield f"unix:path={world.base}/odd"
        thread.join(20)
        assert not thread.is_alive()


def never_speak(listening: socket.socket) -> None:
    client, _ = listening.accept()
    with client:
        while client.recv(4096):
            pass


def hang_up(listening: socket.socket) -> None:
    listening.accept()[0].close()


def talk_nonsense(listening: socket.socket) -> None:
    client, _ = listening.accept()
    with client:
        client.settimeout(10)
        try:
            client.sendall(b"\0 220 polytmp.example.org ESMTP\r\n" * 100)
            while client.recv(4096):
                pass
        except ConnectionError:
            pass


def trickle(listening: socket.socket) -> None:
    """Keep sending, but never a whole line."""
    client, _ = listening.accept()
    with client:
        try:
            for _ in range(200):
                client.sendall(b"R")
                time.sleep(0.05)  # the pace of the attack: slow, but never silent
        except ConnectionError:
            pass


@both_kinds
@pytest.mark.parametrize("serve", [never_speak, hang_up, talk_nonsense, trickle])
def test_a_bus_that_does_not_speak_dbus(
    world: World, user: str, serve: Callable[[socket.socket], None]
) -> None:
    """The deadline includes setting up the connection."""
    world.module("timeout=1")
    with server(world, serve) as address:
        session = assert_unreachable_for(world, user, address)
    assert session.seconds < 8

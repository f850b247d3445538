# SPDX-License-Identifier: LGPL-2.1-or-later
"""No reply: no socket, nothing behind it, or a daemon that ends, hangs or is somebody else's."""

import os
import socket
from pathlib import Path

import pytest

from tests.bed import eventually
from tests.pam.outcomes import (
    CALL,
    MakeDaemon,
    assert_joined,
    assert_refused,
    assert_unreachable_for,
)
from tests.pam.pam_world import (
    PAM_IGNORE,
    Daemon,
    Namespace,
    Session,
    World,
)

pytestmark = [pytest.mark.pam, pytest.mark.timeout(120)]

both_kinds = pytest.mark.parametrize("user", ["alice", "cronuser"])

FOREVER = "timeout=600"
"""Longer than the test's bound for a session: a session that ends has not waited for it."""


def assert_waited_a_second(session: Session) -> None:
    """timeout=1 was respected, not the default of 20 s. The bound is no figure: machines may be slow."""
    assert 0.9 < session.seconds < 20


@both_kinds
def test_no_socket(world: World, user: str) -> None:
    world.module(FOREVER)
    session = assert_unreachable_for(world, user)
    assert "No such file or directory" in session.log[0][1]


@both_kinds
def test_a_socket_that_nobody_listens_on(world: World, user: str) -> None:
    world.module(FOREVER)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(world.socket_path)
    session = assert_unreachable_for(world, user)
    assert "Connection refused" in session.log[0][1]


@both_kinds
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_socket_of_another_type(world: World, user: str, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(world.socket_path)
        assert_unreachable_for(world, user)


@both_kinds
def test_a_file_in_place_of_the_socket(world: World, user: str) -> None:
    Path(world.socket_path).touch()
    assert_unreachable_for(world, user)


@both_kinds
def test_a_socket_without_a_daemon(world: World, user: str) -> None:
    world.module("timeout=1")
    world.listen()
    session = assert_unreachable_for(world, user)
    assert "Connection timed out" in session.log[0][1]
    assert_waited_a_second(session)


@both_kinds
def test_a_queue_that_is_full(world: World, user: str) -> None:
    """The kernel has no room for one more: connect(2) itself waits."""
    world.module("timeout=1")
    world.listen(backlog=0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first:
        first.connect(world.socket_path)
        session = assert_unreachable_for(world, user)
    assert "Connection timed out" in session.log[0][1]
    assert_waited_a_second(session)


@both_kinds
def test_a_daemon_that_never_replies(world: World, daemon: MakeDaemon, user: str) -> None:
    world.module("timeout=1")
    daemon(silent=True)
    session = assert_unreachable_for(world, user)
    assert_waited_a_second(session)


@both_kinds
def test_a_daemon_that_dies_during_the_call(world: World, daemon: MakeDaemon, user: str) -> None:
    """The module asks once more, and waits for the next daemon."""
    world.module("timeout=1")
    daemon(die=True)
    session = assert_unreachable_for(world, user)
    assert "Connection timed out" in session.log[0][1]
    assert_waited_a_second(session)


@pytest.mark.parametrize("backlog", [64, 0], ids=["queued", "queue-full"])
def test_a_system_user_does_not_wait_for_long(
    world: World, daemon: MakeDaemon, private: Namespace, backlog: int
) -> None:
    """polytmpd does not start. Jobs of system users run all the same; who needs a namespace waits on."""
    world.module(FOREVER, "debug")
    world.listen(backlog)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first, world.opening() as opening:
        first.connect(world.socket_path)
        eventually(lambda: "requesting the namespace of user alice" in str(world.log.take()))
        waited = world.open_session("-u", "cronuser")
        assert waited.result == PAM_IGNORE
        assert "polytmpd cannot be reached: Connection timed out" in waited.log[-1][1]
        first.close()
        daemon(open=[private.path])
        assert_joined(opening(), private)


def test_a_login_waits_for_the_next_daemon(world: World, daemon: MakeDaemon, private: Namespace) -> None:
    """The first one dies while it has the request; the second one finds it in the queue."""
    first = daemon(die=True)
    with world.opening() as opening:
        assert first.ended() == [CALL + "1500"]
        second = daemon(open=[private.path])
        session = opening()
    assert_joined(session, private)
    assert session.log == []
    assert second.stop() == [CALL + "1500"]


@both_kinds
def test_a_daemon_that_hangs_up_every_time(world: World, daemon: MakeDaemon, user: str) -> None:
    """After two attempts, the module gives up."""
    world.module(FOREVER)
    fake = daemon(hang_up=True)
    session = assert_unreachable_for(world, user)
    assert "Connection reset by peer" in session.log[0][1]
    assert len(fake.stop()) == 2


def test_a_socket_of_a_user(world: World) -> None:
    """Whoever listens on it, the module takes nothing from a process that is not root's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as theirs:
        theirs.bind(world.socket_path)
        os.seteuid(1501)
        try:
            theirs.listen()  # SO_PEERCRED has the credentials of this moment
        finally:
            os.seteuid(0)
        for user in ("alice", "cronuser"):
            session = world.open_session("-u", user)
            assert_refused(session, "/run/polytmpd/login does not belong to root", user=user)


def test_the_environment_does_not_lead_elsewhere(
    world: World, daemon: MakeDaemon, private: Namespace
) -> None:
    world.environment["DBUS_SYSTEM_BUS_ADDRESS"] = "unix:path=/nowhere"
    made: Daemon = daemon(open=[private.path])
    assert_joined(world.open_session(), private)
    assert made.stop() == [CALL + "1500"]

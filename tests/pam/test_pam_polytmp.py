# SPDX-License-Identifier: LGPL-2.1-or-later
"""pam_polytmp.so in a real libpam: every return value, and what happens to the process.

Every test runs against the module as installed, and built with ASan and UBSan (leaks are errors).
"""

import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.pam.pam_world import (
    PAM_BUF_ERR,
    PAM_ERROR_MSG,
    PAM_IGNORE,
    PAM_PERM_DENIED,
    PAM_SUCCESS,
    PAM_SYSTEM_ERR,
    PAM_USER_UNKNOWN,
    Bus,
    Daemon,
    Namespace,
    Session,
    World,
)

pytestmark = [pytest.mark.pam, pytest.mark.timeout(120)]

MakeDaemon = Callable[..., Daemon]

# if the sanitizers need what the test takes away: /proc, malloc()
plain_build = pytest.mark.parametrize("build", ["plain"], indirect=True)

CALL = "call org.polytmp1.Manager /org/polytmp1 u "

DBUS = "org.freedesktop.DBus.Error."
UNREACHABLE = [
    f"{DBUS}ServiceUnknown",
    f"{DBUS}NameHasNoOwner",
    f"{DBUS}NoReply",
    f"{DBUS}Timeout",
    f"{DBUS}TimedOut",
    f"{DBUS}Disconnected",
    f"{DBUS}NoServer",
    f"{DBUS}Spawn.ExecFailed",
    f"{DBUS}Spawn.ChildExited",
    "org.freedesktop.systemd1.UnitMasked",
    "org.freedesktop.systemd1.NoSuchUnit",
]
ANSWERED = [
    "org.polytmp1.Error.Failed",
    "org.polytmp1.Error.Exempted",  # is not Exempt
    "org.polytmp1.Error.NotPolyinstantiated",
    f"{DBUS}AccessDenied",
    f"{DBUS}InvalidArgs",
    f"{DBUS}UnknownMethod",
    f"{DBUS}TimeoutError",  # a longer name than Timeout
]


def assert_untouched(session: Session, cwd: str = "/") -> None:
    assert not session.moved
    assert session.cwd == cwd
    assert session.same_directory
    assert_clean(session)


def assert_clean(session: Session) -> None:
    assert session.fds == session.fds_before
    assert session.environment == 0
    assert session.closed == PAM_SUCCESS


def assert_refused(
    session: Session, reason: str, name: str = "", user: str = "alice", cwd: str = "/"
) -> None:
    """PAM_PERM_DENIED, one line in the log, one for the user; the process has not moved."""
    assert session.result == PAM_PERM_DENIED
    assert_untouched(session, cwd)
    detail = f"{name}: {reason}" if name else reason
    assert session.log == [("ERR", f"no private /tmp for user {user}, refusing the session: {detail}")]
    told = f"polytmp: cannot give you a private /tmp: {reason}; ask your administrator"
    assert session.messages == [(PAM_ERROR_MSG, told)]


def assert_skipped(session: Session, level: str, line: str) -> None:
    assert session.result == PAM_IGNORE
    assert_untouched(session)
    assert session.log == [(level, line)]
    assert session.messages == []


def assert_joined(session: Session, namespace: Namespace) -> None:
    assert session.result == PAM_SUCCESS
    assert session.namespace == namespace.inode
    assert_clean(session)


# -- joining ---------------------------------------------------------------------------------------


def test_joins_the_namespace_of_its_user(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    fake = daemon(open=[private.path])
    session = world.open_session("-l", "/tmp/marker", bus=bus.address)
    assert_joined(session, private)
    assert session.moved
    assert session.seen
    assert session.cwd == "/"
    assert (session.log, session.messages) == ([], [])
    assert fake.stop() == [CALL + "1500"]


def test_asks_for_the_uid_of_the_pam_user(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    fake = daemon(open=[private.path])
    assert_joined(world.open_session("-u", "bob", bus=bus.address), private)
    assert_joined(world.open_session("-u", "cronuser", bus=bus.address), private)
    assert fake.stop() == [CALL + "1501", CALL + "500"]


def test_in_the_namespace_already_nothing_is_done(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    fake = daemon(open=[private.path])
    session = world.open_session("-o", "2", "-w", "/tmp", bus=bus.address)
    assert_joined(session, private)
    assert session.cwd == "/tmp"
    assert len(fake.stop()) == 2


def test_in_the_namespace_already_even_a_deleted_working_directory_is_kept(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    daemon(open=[private.path])
    session = world.open_session("-n", private.inner_path, "-w", "/tmp/work", "-d", bus=bus.address)
    assert_joined(session, private)
    assert not session.moved
    assert session.same_directory
    assert session.log == []


def test_fifty_sessions_leave_no_descriptor(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    daemon(open=[private.path])
    assert_joined(world.open_session("-o", "50", bus=bus.address), private)


def test_fifty_refused_sessions_leave_no_descriptor(world: World, bus: Bus, daemon: MakeDaemon) -> None:
    daemon(open=["/etc/hostname"] * 4, signature="hhhh", body=[0, 1, 2, 3])
    session = world.open_session("-o", "50", "-q", bus=bus.address)
    assert session.result == PAM_PERM_DENIED
    assert_untouched(session)


def test_fifty_sessions_without_a_bus_leave_no_descriptor(world: World) -> None:
    session = world.open_session("-o", "50", "-q")
    assert session.result == PAM_PERM_DENIED
    assert_untouched(session)


def test_a_process_with_threads(world: World, bus: Bus, daemon: MakeDaemon, private: Namespace) -> None:
    """gdm-session-worker; setns() alone gives EINVAL."""
    daemon(open=[private.path])
    assert_joined(world.open_session("-t", "4", bus=bus.address), private)


def test_a_process_that_shares_its_working_directory(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    """As after vfork(); setns() alone gives EINVAL."""
    daemon(open=[private.path])
    assert_joined(world.open_session("-F", bus=bus.address), private)


def test_only_the_calling_thread_moves(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    daemon(open=[private.path])
    session = world.open_session("-T", bus=bus.address)
    assert_joined(session, private)
    assert session.leader == session.namespace_before


def test_an_activatable_daemon_is_started(world: World, bus: Bus, private: Namespace) -> None:
    bus.activatable(bus.command(open=[private.path]))
    stdin = os.open(world.base / "activated-stdin", os.O_RDWR)  # closing it ends the fake
    try:
        assert_joined(world.open_session(bus=bus.address), private)
    finally:
        os.close(stdin)


def test_with_pamtester(world: World, bus: Bus, daemon: MakeDaemon, private: Namespace) -> None:
    """An independent program, with the control flag of the profile."""
    daemon(open=[private.path])
    (world.base / "pam.d/polytmp-test").write_text(
        f"session required pam_permit.so\nsession required {world.build}/pam_polytmp.so\n"
    )
    environment = world.environment | {"DBUS_SYSTEM_BUS_ADDRESS": bus.address}
    if world.build.name == "sanitize":
        library = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True)
        environment["LD_PRELOAD"] = library.strip()
        environment["ASAN_OPTIONS"] = "detect_leaks=0"  # pamtester leaks

    def pamtester(user: str, address: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*world.inside, "pamtester", "polytmp-test", user, "open_session", "close_session"],
            env=environment | {"DBUS_SYSTEM_BUS_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    assert pamtester("alice", bus.address).returncode == 0
    assert pamtester("root", "unix:path=/nowhere").returncode == 0
    assert pamtester("cronuser", "unix:path=/nowhere").returncode == 0
    refused = pamtester("alice", "unix:path=/nowhere")
    assert refused.returncode != 0
    assert "ask your administrator" in refused.stdout + refused.stderr


# -- the working directory -------------------------------------------------------------------------


def test_a_working_directory_in_tmp_is_the_private_one(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    world.shell("mkdir /tmp/work")
    daemon(open=[private.path])
    session = world.open_session("-w", "/tmp/work", "-l", "/tmp/marker", bus=bus.address)
    assert_joined(session, private)
    assert session.cwd == "/tmp/work"
    assert not session.same_directory  # not the host's /tmp/work
    assert session.log == []


def test_a_working_directory_elsewhere_is_kept(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    daemon(open=[private.path])
    session = world.open_session("-w", "/usr/lib", bus=bus.address)
    assert_joined(session, private)
    assert session.cwd == "/usr/lib"
    assert session.same_directory


def assert_at_the_root(session: Session, namespace: Namespace, directory: str) -> None:
    assert_joined(session, namespace)
    assert session.cwd == "/"
    line = f"working directory {directory} is not available in the namespace of user alice, using /"
    assert session.log == [("NOTICE", line)]
    assert session.messages == []


def test_a_working_directory_that_is_missing_in_the_namespace(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    world.shell("mkdir /tmp/missing")
    daemon(open=[private.path])
    assert_at_the_root(world.open_session("-w", "/tmp/missing", bus=bus.address), private, "/tmp/missing")


def test_a_deleted_working_directory(world: World, bus: Bus, daemon: MakeDaemon, private: Namespace) -> None:
    world.shell("mkdir /tmp/gone")
    daemon(open=[private.path])
    assert_at_the_root(world.open_session("-w", "/tmp/gone", "-d", bus=bus.address), private, "(unknown)")


def test_an_unreachable_working_directory(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    """It is in another mount namespace: the kernel's getcwd() gives "(unreachable)/..."."""
    other = world.make_namespace("mkdir /tmp/elsewhere")
    pid = other.inner_path.split("/")[2]
    daemon(open=[private.path])
    session = world.open_session("-w", f"/proc/{pid}/root/tmp/elsewhere", bus=bus.address)
    assert_at_the_root(session, private, "(unknown)")


@pytest.mark.parametrize("path", ["/tmp/link", "/tmp/link/deeper"])
def test_the_working_directory_is_not_taken_through_a_symlink(
    world: World, bus: Bus, daemon: MakeDaemon, path: str
) -> None:
    """Root could pass through a directory that the user may not enter."""
    world.shell(f"mkdir -p {path}; mkdir -p -m 700 /tmp/secret; mkdir -p /tmp/secret/deeper")
    private = world.make_namespace("mkdir -p -m 700 /tmp/secret/deeper; ln -s secret /tmp/link")
    daemon(open=[private.path])
    assert_at_the_root(world.open_session("-w", path, bus=bus.address), private, path)


# -- polytmpd is not asked -------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["root", "toor"])
def test_root_is_never_moved_and_polytmpd_is_not_asked(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace, user: str
) -> None:
    fake = daemon(open=[private.path])
    session = world.open_session("-u", user, bus=bus.address)
    assert session.result == PAM_IGNORE
    assert_untouched(session)
    assert (session.log, session.messages) == ([], [])
    assert fake.stop() == []


@pytest.mark.parametrize("arguments", [[], ["-T"], ["-e", "1500"], ["-w", "/tmp"]], ids=str)
def test_root_without_a_bus(world: World, arguments: list[str]) -> None:
    session = world.open_session("-u", "root", *arguments)
    assert session.result == PAM_IGNORE
    assert (session.log, session.messages) == ([], [])


def test_an_unknown_user(world: World, bus: Bus, daemon: MakeDaemon, private: Namespace) -> None:
    fake = daemon(open=[private.path])
    session = world.open_session("-u", "nobody-knows", bus=bus.address)
    assert session.result == PAM_USER_UNKNOWN
    assert_untouched(session)
    assert session.log == [("ERR", "user unknown: nobody-knows")]
    assert fake.stop() == []


def test_no_user_name(world: World) -> None:
    session = world.open_session("-u", "")
    assert session.result == PAM_USER_UNKNOWN
    assert session.log == [("ERR", "the session has no user name")]


def test_a_caller_that_is_not_root(world: World) -> None:
    assert_refused(world.open_session("-e", "1500"), "the calling process is not root")


CHROOT = """
mkdir -p /tmp/chroot; cd /tmp/chroot
mkdir usr etc run dev proc
for d in usr etc run dev; do mount --rbind /$d $d; done
ln -s usr/lib usr/lib64 usr/bin usr/sbin .
"""


def test_in_a_chroot_nothing_is_done(world: World, bus: Bus, daemon: MakeDaemon, private: Namespace) -> None:
    """As in an image build: it must work, and the chroot has its own /tmp."""
    fake = daemon(open=[private.path])
    world.shell(f"{CHROOT}\nmount --rbind /proc proc")
    session = world.open_session("-r", "/tmp/chroot", bus=bus.address)
    assert_skipped(session, "NOTICE", "user alice is in a chroot, keeping the chroot's /tmp")
    assert fake.stop() == []


@plain_build
def test_in_a_chroot_without_proc_nothing_is_done(world: World) -> None:
    world.shell(f"{CHROOT}\nmkdir -p proc/thread-self/fd")  # the harness counts descriptors in it
    session = world.open_session("-r", "/tmp/chroot")
    assert_skipped(session, "NOTICE", "user alice is in a chroot, keeping the chroot's /tmp")


def test_a_thread_in_another_namespace_than_its_process(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    fake = daemon(open=[private.path])
    other = world.make_namespace()
    session = world.open_session("-T", "-n", other.inner_path, bus=bus.address)
    assert_refused(session, "the calling thread is not in its process's mount namespace")
    assert session.namespace == other.inode
    assert fake.stop() == []


# -- error replies -----------------------------------------------------------------------------


def test_an_exempt_user_is_left_alone_silently(world: World, bus: Bus, daemon: MakeDaemon) -> None:
    daemon(error="org.polytmp1.Error.Exempt", text="alice is exempt")
    session = world.open_session(bus=bus.address)
    assert session.result == PAM_IGNORE
    assert_untouched(session)
    assert (session.log, session.messages) == ([], [])


@pytest.mark.parametrize("user", ["alice", "cronuser"])
@pytest.mark.parametrize("name", ANSWERED)
def test_an_error_of_the_daemon_refuses_every_user(
    world: World, bus: Bus, daemon: MakeDaemon, name: str, user: str
) -> None:
    daemon(error=name, text="no space left")
    session = world.open_session("-u", user, bus=bus.address)
    assert_refused(session, "no space left", name, user)


@pytest.mark.parametrize("name", UNREACHABLE)
def test_no_daemon_refuses_users_only(world: World, bus: Bus, daemon: MakeDaemon, name: str) -> None:
    daemon(error=name, text="not today")
    session = world.open_session(bus=bus.address)
    assert_refused(session, "polytmpd cannot be reached: not today", name)
    assert_skipped(
        world.open_session("-u", "cronuser", bus=bus.address),
        "WARNING",
        f"system user cronuser keeps the shared /tmp, polytmpd cannot be reached: {name}: not today",
    )


def test_an_error_without_a_text(world: World, bus: Bus, daemon: MakeDaemon) -> None:
    daemon(error="org.polytmp1.Error.Failed", text="")
    session = world.open_session(bus=bus.address)
    assert_refused(session, "org.polytmp1.Error.Failed", "org.polytmp1.Error.Failed")


def test_a_text_with_control_characters_stays_one_line(world: World, bus: Bus, daemon: MakeDaemon) -> None:
    daemon(error="org.polytmp1.Error.Failed", text="a\nb\x1b[2Jc")
    session = world.open_session(bus=bus.address)
    assert_refused(session, "a b [2Jc", "org.polytmp1.Error.Failed")


@pytest.mark.parametrize(("text", "told"), [("is masked.", "is masked"), (".", ""), ("wait...", "wait..")])
def test_the_users_line_continues_after_a_sentence(
    world: World, bus: Bus, daemon: MakeDaemon, text: str, told: str
) -> None:
    daemon(error="org.polytmp1.Error.Failed", text=text)
    assert_refused(world.open_session(bus=bus.address), told, "org.polytmp1.Error.Failed")


def test_a_silent_session_reports_to_the_log_only(world: World, bus: Bus, daemon: MakeDaemon) -> None:
    daemon(error="org.polytmp1.Error.Failed", text="no")
    session = world.open_session("-q", bus=bus.address)
    assert session.result == PAM_PERM_DENIED
    assert session.messages == []
    assert len(session.log) == 1


def test_after_a_refusal_the_working_directory_is_as_it_was(
    world: World, bus: Bus, daemon: MakeDaemon
) -> None:
    world.shell("mkdir /tmp/work")
    daemon(error="org.polytmp1.Error.Failed", text="no")
    session = world.open_session("-w", "/tmp/work", bus=bus.address)
    assert_refused(session, "no", "org.polytmp1.Error.Failed", cwd="/tmp/work")


# -- hostile replies -------------------------------------------------------------------------------

NO_NAMESPACE = "polytmpd's reply contains no namespace: Protocol error"
NOT_OURS = "polytmpd's reply is not a mount namespace of this host"


@pytest.mark.parametrize(
    "answer",
    [
        {"signature": "", "body": []},
        {"signature": "s", "body": ["/proc/1/ns/mnt"]},
        {"signature": "u", "body": [0]},
        {"signature": "hh", "body": [0, 1], "open": ["/etc/hostname", "/etc/hostname"]},
        {"signature": "hs", "body": [0, "x"], "open": ["/etc/hostname"]},
        {"signature": "ah", "body": [[0]], "open": ["/etc/hostname"]},
    ],
    ids=lambda answer: answer["signature"] or "nothing",
)
def test_an_answer_of_the_wrong_type(
    world: World, bus: Bus, daemon: MakeDaemon, answer: dict[str, object]
) -> None:
    daemon(**answer)
    assert_refused(world.open_session(bus=bus.address), NO_NAMESPACE)


def test_a_descriptor_that_was_not_sent(world: World, bus: Bus, daemon: MakeDaemon) -> None:
    daemon(body=[0])
    session = world.open_session(bus=bus.address)
    assert session.result == PAM_PERM_DENIED
    assert_untouched(session)
    assert len(session.log) == len(session.messages) == 1


def test_an_index_past_the_descriptors(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    daemon(body=[7], open=[private.path])
    session = world.open_session(bus=bus.address)
    assert session.result == PAM_PERM_DENIED
    assert_untouched(session)


def test_many_descriptors_with_one_namespace(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    daemon(body=[9], open=["/etc/hostname"] * 9 + [private.path] + ["/dev/null"] * 6)
    assert_joined(world.open_session("-o", "3", bus=bus.address), private)


@pytest.mark.parametrize(
    "answer",
    [
        {"open": ["/etc/hostname"]},
        {"open": ["/tmp"]},
        {"open": ["/proc/self/ns/net"]},
        {"open": ["/proc/self/ns/pid"]},
        {"open": ["/proc/self/ns/user"]},
        {"open": ["/proc/self/mountinfo"]},
        {"open": ["/dev/null"]},
        {"pipe": True},
    ],
    ids=str,
)
def test_a_descriptor_that_is_no_mount_namespace(
    world: World, bus: Bus, daemon: MakeDaemon, answer: dict[str, object]
) -> None:
    daemon(**answer)
    assert_refused(world.open_session(bus=bus.address), NOT_OURS)


def test_a_mount_namespace_that_a_user_made(world: World, bus: Bus, daemon: MakeDaemon) -> None:
    """CVE-2022-31214 in firejail --join: the user controls all that is in it, setuid programs included."""
    theirs = world.make_namespace(":", "--user", "--map-root-user")
    daemon(open=[theirs.path])
    assert_refused(world.open_session(bus=bus.address), NOT_OURS)


# -- no reply --------------------------------------------------------------------------------


def assert_unreachable_for(world: World, user: str, bus: str | None = None) -> Session:
    """A user is refused, a system user is let through; returns the session."""
    session = world.open_session("-u", user, bus=bus)
    assert_untouched(session)
    assert len(session.log) == 1
    level, line = session.log[0]
    assert "polytmpd cannot be reached: " in line
    assert user in line
    if user == "cronuser":
        assert (session.result, level, session.messages) == (PAM_IGNORE, "WARNING", [])
    else:
        assert (session.result, level, len(session.messages)) == (PAM_PERM_DENIED, "ERR", 1)
    return session


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
def test_a_daemon_that_does_not_answer(world: World, bus: Bus, daemon: MakeDaemon, user: str) -> None:
    world.module("timeout=1")
    daemon(silent=True)
    session = assert_unreachable_for(world, user, bus.address)
    assert 0.9 < session.seconds < 8


@both_kinds
def test_a_daemon_that_dies_over_the_call(world: World, bus: Bus, daemon: MakeDaemon, user: str) -> None:
    daemon(die=True)
    session = assert_unreachable_for(world, user, bus.address)
    assert session.seconds < 8


def test_a_daemon_that_dies_over_the_call_and_is_started_again(
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
def test_a_daemon_that_dies_over_every_call(world: World, bus: Bus, user: str) -> None:
    """The module gives up."""
    bus.activatable(bus.command(die=True))
    stdin = os.open(world.base / "activated-stdin", os.O_RDWR)
    try:
        session = assert_unreachable_for(world, user, bus.address)
    finally:
        os.close(stdin)
    assert f"{DBUS}NoReply" in session.log[0][1]
    assert session.seconds < 15


def test_a_daemon_with_much_to_read_is_asked_again(
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
def test_a_bus_that_dies_over_the_call(world: World, bus: Bus, daemon: MakeDaemon, user: str) -> None:
    daemon(silent=True, kill=[bus.process.pid])
    session = assert_unreachable_for(world, user, bus.address)
    assert session.seconds < 8


@contextmanager
def server(world: World, serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """A socket that this function serves, and not a bus."""
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
    """Keeps sending, but never a whole line."""
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


# -- who is a system user --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("login_defs", "user", "system"),
    [
        ("UID_MIN 1000\nUID_MAX 60000\n", "cronuser", True),
        ("UID_MIN 1000\nUID_MAX 60000\n", "alice", False),
        ("UID_MIN 1000\nUID_MAX 60000\n", "high", True),
        ("UID_MIN 1501\n", "alice", True),
        ("UID_MIN 1501\n", "bob", False),
        ("UID_MIN 1500\nUID_MAX 1500\n", "alice", False),
        ("UID_MIN 1500\nUID_MAX 1500\n", "bob", True),
        ("UID_MAX 70000\n", "high", False),
        ("UID_MIN 500\n", "cronuser", False),
        ("", "alice", False),
        ("", "cronuser", True),
        ("#UID_MIN 2000\n", "alice", False),
        ("UID_MIN many\nUID_MAX -1\n", "alice", False),
        ("UID_MIN 2000x\n", "alice", False),
        ("UID_MIN 99999999999999999999999\n", "alice", False),
        ("UID_MIN 4294967295\n", "alice", False),
        ("UID_MAX 0x10\n", "alice", False),
        ("UID_MIN 3000\nUID_MAX 2000\n", "alice", False),  # or all users would be system users
    ],
)
def test_who_is_a_system_user(world: World, login_defs: str, user: str, system: bool) -> None:
    world.login_defs(login_defs)
    session = world.open_session("-u", user)
    assert session.result == (PAM_IGNORE if system else PAM_PERM_DENIED)


# -- arguments -------------------------------------------------------------------------------------


def test_unknown_arguments_are_reported_and_ignored(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    world.module("timout=1", "nonsense", "debugging")
    daemon(open=[private.path])
    session = world.open_session(bus=bus.address)
    assert_joined(session, private)
    words = ("timout=1", "nonsense", "debugging")
    assert session.log == [("ERR", f"unknown module argument '{word}', ignoring") for word in words]


@pytest.mark.parametrize("value", ["0", "601", "-1", "+1", "1s", "", "x", "0x10", "99999999999999999999"])
def test_a_bad_timeout_is_reported_and_the_default_used(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace, value: str
) -> None:
    world.module(f"timeout={value}", "debug")
    daemon(open=[private.path])
    session = world.open_session(bus=bus.address)
    assert_joined(session, private)
    assert session.log[:2] == [
        ("ERR", f"'timeout={value}' is not a number of seconds from 1 to 600, using 20"),
        ("DEBUG", "requesting the namespace of user alice (20 s)"),
    ]


@pytest.mark.parametrize("value", ["1", "600", "020"])
def test_a_good_timeout(world: World, bus: Bus, daemon: MakeDaemon, private: Namespace, value: str) -> None:
    world.module(f"timeout={value}", "debug")
    daemon(open=[private.path])
    session = world.open_session(bus=bus.address)
    assert_joined(session, private)
    assert session.log == [
        ("DEBUG", f"requesting the namespace of user alice ({int(value)} s)"),
        ("DEBUG", f"user alice is in mnt:[{private.inode}]"),
    ]


def test_debug_reports_that_a_user_is_exempt(world: World, bus: Bus, daemon: MakeDaemon) -> None:
    world.module("debug")
    daemon(error="org.polytmp1.Error.Exempt", text="")
    session = world.open_session(bus=bus.address)
    assert session.log[1:] == [("DEBUG", "user alice is exempt")]


# -- the library -----------------------------------------------------------------------------------


def test_only_the_session_functions_are_exported(build: Path) -> None:
    symbols = subprocess.check_output(["nm", "-D", "--defined-only", build / "pam_polytmp.so"], text=True)
    names = {line.split()[-1] for line in symbols.splitlines()}
    assert {name for name in names if not name.startswith("__odr_asan")} == {
        "pam_sm_open_session",
        "pam_sm_close_session",
    }


@plain_build
def test_hardening(build: Path) -> None:
    read = subprocess.check_output(["readelf", "-lWd", build / "pam_polytmp.so"], text=True)
    assert "GNU_RELRO" in read
    assert "BIND_NOW" in read
    assert re.search(r"GNU_STACK .* RW ", read)
    imported = subprocess.check_output(["nm", "-D", "--undefined-only", build / "pam_polytmp.so"], text=True)
    assert "__stack_chk_fail" in imported
    assert not re.search(r"\b(fork|vfork|system|popen|exec\w*|setenv|putenv|unsetenv|getenv)\b", imported)


def test_the_source_stays_small(build: Path) -> None:
    source = build.parent if build.name == "sanitize" else build
    assert len(Path(source / "pam_polytmp.c").read_text().splitlines()) < 400


@plain_build
@pytest.mark.parametrize("reachable", [True, False], ids=["bus", "no-bus"])
def test_every_failing_allocation(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace, reachable: bool
) -> None:
    """Each allocation of a session fails once: no crash, no open descriptor, and no half move."""
    daemon(open=[private.path])
    address = bus.address if reachable else None
    expected = PAM_SUCCESS if reachable else PAM_PERM_DENIED
    total = world.open_session(bus=address).allocations
    assert total > 10
    seen = set()
    for n in range(total):
        session = world.open_session("-a", str(n), bus=address)
        seen.add(session.result)
        if (
            session.result == PAM_SYSTEM_ERR
        ):  # libpam itself, after the module: no memory for its audit message
            continue
        assert session.moved == (session.result == PAM_SUCCESS), n
        assert session.fds == session.fds_before, n
        assert session.result != PAM_IGNORE, n
    # if libc has no memory to read /etc/passwd, it knows no user
    assert seen - {PAM_USER_UNKNOWN, PAM_SYSTEM_ERR} == {expected, PAM_BUF_ERR}


# -- the profile of pam-auth-update ----------------------------------------------------------------

PAM_AUTH_UPDATE = """
cp -a /var/cache/debconf /tmp/debconf
mount --bind /tmp/debconf /var/cache/debconf
mkdir -p /tmp/root/etc/pam.d /tmp/root/var/lib/pam /tmp/root/usr/share
cp -a /usr/share/pam-configs /tmp/root/usr/share/
cd /tmp/root/usr/share/pam-configs
cp "$PROFILE" polytmp
[ -e systemd ] || printf '%s\n' > systemd 'Name: systemd' 'Default: yes' 'Priority: 0' \
    'Session-Interactive-Only: yes' 'Session-Type: Additional' 'Session:' '	optional	pam_systemd.so'
printf '%s\n' > tmpdir 'Name: tmpdir' 'Default: yes' 'Priority: 0' 'Session-Type: Additional' \
    'Session:' '	optional pam_tmpdir.so'
export DEBIAN_FRONTEND=noninteractive
pam-auth-update --root /tmp/root --package --force --enable mkhomedir polytmp systemd tmpdir unix >&2
mkdir "$OUT"
cp /tmp/root/etc/pam.d/common-session* "$OUT"
"""


@plain_build
def test_the_profile_is_right_after_pam_systemd(world: World) -> None:
    """And before modules that start programs, in the stacks of cron and sudo, too; without pam_tmpdir."""
    out = world.base / "stacks"
    world.shell(f"PROFILE={world.build}/polytmp.pam-config\nOUT={out}\n{PAM_AUTH_UPDATE}")

    def modules(stack: str) -> list[str]:
        lines = (out / stack).read_text().splitlines()
        return [line.split("\t")[-1].split()[-1] for line in lines if line.startswith("session")]

    interactive = modules("common-session")
    assert "required\tpam_polytmp.so" in (out / "common-session").read_text()
    after = interactive[interactive.index("pam_systemd.so") :]
    assert after[:3] == ["pam_systemd.so", "pam_polytmp.so", "pam_mkhomedir.so"]
    assert modules("common-session-noninteractive")[-1] == "pam_polytmp.so"
    assert "pam_tmpdir.so" not in interactive

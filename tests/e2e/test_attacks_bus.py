# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attacks on the daemon over D-Bus and with users' names, and what the unit is still allowed to do.

Not here: attacks on files and mounts (test_attacks), the bus by itself (tests/bus).
"""

import logging
import re
import time
from collections.abc import Callable

import pytest

from tests import observe
from tests.attacks import attack, prepare, program
from tests.bed import Machine, Session, eventually

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.prepared(by=prepare),
    pytest.mark.usefixtures("unharmed"),
]

log = logging.getLogger(__name__)

PROPERTY = "org.freedesktop.DBus.Properties Get ss org.freedesktop.login1.Manager IdleHint"
CALL = "busctl call org.polytmp1 /org/polytmp1 org.polytmp1.Manager"


def seconds(work: Callable[[], object]) -> float:
    """Return how long the work takes."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def as_user(machine: Machine, user: str, command: str, timeout: float = 60) -> None:
    """Run a command on the host as a user, without a login."""
    argv = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "sh", "-c", command]
    machine.run(*argv, timeout=timeout)


def ask(alice: Session, connections: int, member: str) -> None:
    """Let alice send questions about her instance, and return when all are sent."""
    question = program("rawbus.py", "ask", str(connections), "1001", member)
    alice.run(f"setsid {question} >/tmp/ask 2>&1 &")
    eventually(lambda: "sent" in alice.run("cat /tmp/ask"), what="the questions are sent")


# Unprivileged callers


@pytest.mark.parametrize("user", ["svc", "alice"])
def test_forged_signals_of_logind(machine: Machine, user: str) -> None:
    """UserRemoved, SessionRemoved and NameOwnerChanged, broadcast and to the daemon alone."""
    with machine.session("alice") as alice:
        alice.run("echo kept >/tmp/kept")
        for _ in range(20):
            as_user(machine, user, program("rawbus.py", "forge", "1001"))
        assert observe.state(machine, "alice") == "active"
        assert set(observe.instances(machine)) == {"alice"}
        assert machine.ssh("alice", "cat /tmp/kept").stdout == "kept\n"
    eventually(lambda: observe.state(machine, "alice") is None, 30, "polytmpd still hears the real ones")


def test_descriptors_and_signatures_leave_nothing(machine: Machine) -> None:
    """16 descriptors in each message; variants with thousands of signatures."""
    as_user(machine, "svc", program("rawbus.py", "fds", "20"))
    as_user(machine, "svc", program("rawbus.py", "signatures", "200"))
    before = (observe.daemon_fds(machine), observe.daemon_memory(machine), observe.restarts(machine))
    as_user(machine, "svc", program("rawbus.py", "fds", "200"))
    as_user(machine, "svc", program("rawbus.py", "signatures", "5000"))
    after = (observe.daemon_fds(machine), observe.daemon_memory(machine), observe.restarts(machine))
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] < before[1] + 64 * 1024, "it caches 1000 signatures, 45 KiB each"
    assert machine.run("su", "-", "alice", "-c", "echo in").stdout == "in\n"


@pytest.mark.parametrize("command", ["pile 8", "pids 16 1"], ids=["messages", "answers-about-callers"])
def test_descriptors_that_wait_to_be_read(machine: Machine, command: str) -> None:
    """While 64 of them wait, the bus refuses all messages to the daemon, which is stopped here."""
    began = machine.now()
    pid = machine.run("systemctl", "show", "-P", "MainPID", "polytmpd").stdout.strip()
    machine.run("kill", "-STOP", pid)
    try:
        with (
            attack(machine, "svc", program("rawbus.py", *command.split()), "sent"),
            attack(machine, "root", "su - alice -c 'echo in'") as login,
        ):
            machine.run("kill", "-CONT", pid)
            for _ in range(5):
                machine.run(*CALL.split(), "ListInstances", timeout=30)
            eventually(lambda: login.output == "in\n", 30, "alice is in")
    finally:
        machine.run("kill", "-CONT", pid)
    assert "full message queue" not in machine.journal("-u", "dbus", "--since", began)


def test_a_flood_while_a_user_logs_in(machine: Machine) -> None:
    """Two seconds of calls from four connections, as fast as the bus accepts them: late, but not refused.

    A longer flood holds up everything that needs the bus, above all logind: see docs/SECURITY.md.
    """
    machine.run("su", "-", "alice", "-c", "true")  # the first login leaves descriptors open
    observe.log_everybody_out(machine)
    before = (observe.daemon_fds(machine), observe.restarts(machine))
    with attack(machine, "svc", program("rawbus.py", "flood", "2", "4")) as flood:
        assert machine.run("su", "-", "alice", "-c", "echo in", timeout=30).stdout == "in\n"
        eventually(lambda: int(flood.output or 0) > 2000, 30, "there was a flood")
    assert machine.run("su", "-", "alice", "-c", "echo in").stdout == "in\n"
    observe.log_everybody_out(machine)
    assert (observe.daemon_fds(machine), observe.restarts(machine)) == before


@pytest.fixture
def door(machine: Machine) -> Callable[..., list[float]]:
    """door(user, count) opens sessions of a service that asks polytmpd alone; milliseconds, sorted."""
    machine.write("/etc/pam.d/only-polytmp", "session required pam_polytmp.so\n")

    def sessions(user: str, count: int) -> list[float]:
        out = machine.sh(program("sessions.py", "only-polytmp", user, str(count)), timeout=120).stdout
        *each, last = out.split()
        assert last == "done"
        return sorted(float(word) for word in each)

    return sessions


def first_logins(machine: Machine, door: Callable[..., list[float]], count: int) -> list[float]:
    """Each of bob's sessions finds no instance, and makes one."""

    def is_gone() -> bool:  # does not ask over the bus
        return not [path for path in observe.on_disk(machine) if "-1002-" in path or "removing" in path]

    found = []
    for _ in range(count):
        eventually(is_gone, 30, "bob's instance is gone")
        found += door("bob", 1)
    return sorted(found)


def test_a_login_does_not_need_the_bus(machine: Machine, door: Callable[..., list[float]]) -> None:
    """Not even the first one. The bus is stopped: whatever waits for it waits for a second at least."""
    machine.run("su", "-", "alice", "-c", "true")
    observe.log_everybody_out(machine)
    pid = machine.run("systemctl", "show", "-P", "MainPID", "dbus").stdout.strip()
    machine.run("kill", "-STOP", pid)
    try:
        assert machine.sh(f"timeout 2 {CALL} ListInstances", check=False).returncode == 124
        found = first_logins(machine, door, 5)
        assert found[0] < 900, found
        assert len(door("alice", 20)) == 20
    finally:
        machine.run("kill", "-CONT", pid)
    assert machine.run("su", "-", "alice", "-c", "echo in").stdout == "in\n"


def test_a_flood_does_not_reach_our_part_of_a_login(
    machine: Machine, door: Callable[..., list[float]]
) -> None:
    """What the bus lets through reaches the daemon, which has less time for logins: late, not refused.

    All of them end while the flood lasts.
    """
    with machine.session("alice"):
        quiet, quiet_first = door("alice", 100), first_logins(machine, door, 15)
        with attack(machine, "svc", program("rawbus.py", "flood", "120", "4")) as flood:
            call = "busctl --timeout=60 call org.freedesktop.login1 /org/freedesktop/login1 "
            asked = [
                seconds(lambda: machine.run(*f"{call} {PROPERTY}".split(), timeout=90)) for _ in range(3)
            ]
            flooded, flooded_first = door("alice", 100), first_logins(machine, door, 15)
            assert machine.run("systemctl", "is-active", flood.unit).stdout == "active\n"
        machine.run("systemctl", "restart", "polytmpd")  # the bus has queued minutes of work for it
        assert machine.run("polytmpctl", "list", "--no-legend", timeout=20).stdout.startswith("1001 alice")
    figures = (
        f"median {quiet[50]:.2f} and {flooded[50]:.2f} ms, worst {quiet[-1]:.2f} and {flooded[-1]:.2f} ms, "
        f"first login {quiet_first[7]:.2f} and {flooded_first[7]:.2f} ms, "
        f"worst {quiet_first[-1]:.2f} and {flooded_first[-1]:.2f} ms"
    )
    log.info("Without and with the flood: %s; a call of logind: %.2f s", figures, min(asked))


def test_huge_messages(machine: Machine) -> None:
    """30 MB of empty arrays: parsing them would take hundreds of MB and hold up the daemon for seconds."""
    before = (observe.daemon_memory(machine), observe.restarts(machine))
    as_user(machine, "svc", program("rawbus.py", "big", "3", "30000000"))
    assert observe.restarts(machine) == before[1]
    assert observe.daemon_memory(machine) < before[0] + 150 * 1024
    assert machine.run("su", "-", "alice", "-c", "echo in", timeout=20).stdout == "in\n"


def test_many_questions_about_an_instance_with_many_mounts(machine: Machine) -> None:
    """Each answer reads all mount tables; alice has three with 16,000 mounts. bob can still log in."""
    with machine.session("alice") as alice:
        alice.run(f"for i in 1 2 3; do setsid {program('mounts.sh')} >/tmp/$i.out 2>&1 & done")
        eventually(
            lambda: [int(count) > 16_000 for count in alice.run("cat /tmp/*.out").split()] == [True] * 3,
            120,
            "the mounts are made",
        )
        ask(alice, 2, "ListHolders")
        assert machine.run("su", "-", "bob", "-c", "echo in", timeout=20).stdout == "in\n"
        machine.run("loginctl", "terminate-user", "alice")
        alice.kill()


def test_questions_about_a_process_that_cannot_be_read(machine: Machine) -> None:
    """Its memory map, and so /proc/PID/cmdline, is locked forever: only the process that asks waits."""
    with machine.session("alice") as alice:
        alice.run("mkdir /tmp/f")
        alice.run(f"setsid {program('fuse.py', 'stuck', '/tmp/f')} >/tmp/out 2>&1 &")
        pid = eventually(lambda: alice.run("cat /tmp/out").strip(), what="it is mounted")
        read = f"timeout -s KILL 0.3 cat /proc/{pid}/cmdline >/dev/null"
        eventually(lambda: alice.result(read, check=False).returncode == 137, what="reading it hangs")
        shown = machine.run("polytmpctl", "ps", "alice", timeout=20).stdout
        assert pid in shown
        ask(alice, 1, "ListProcesses")
        assert machine.run("su", "-", "bob", "-c", "echo in", timeout=20).stdout == "in\n"
        machine.run("loginctl", "terminate-user", "alice")
        alice.kill()


def test_many_questions_whose_a_process_of_many_threads_is(machine: Machine) -> None:
    """Users without any access ask about a process with 8000 threads. All others still get answers."""
    before = observe.restarts(machine)
    with (
        machine.session("alice") as alice,
        machine.session("bob") as bob,
        attack(machine, "svc", program("threads.py", "8000"), "pid ") as threads,
    ):
        pid = threads.output.split()[1]
        for user in (alice, bob):
            user.run(f"setsid {program('rawbus.py', 'pids', '4', pid)} >/tmp/ask 2>&1 &")
        with attack(machine, "svc", program("rawbus.py", "pids", "4", pid)):
            sent = lambda: all("sent" in user.run("cat /tmp/ask") for user in (alice, bob))  # noqa: E731
            eventually(sent, what="the questions are sent")
            for _ in range(10):
                assert seconds(lambda: machine.run(*CALL.split(), "ListInstances", timeout=30)) < 3
            shown = machine.run(*CALL.split(), "GetInstanceByPID", "u", str(bob.pid), timeout=30).stdout
            assert shown == 'o "/org/polytmp1/instance/_1002"\n'
            assert machine.run("su", "-", "alice", "-c", "echo in", timeout=20).stdout == "in\n"
        machine.run("loginctl", "terminate-user", "alice", "bob")
        alice.kill()
        bob.kill()
    assert observe.restarts(machine) == before


def test_questions_about_many_descriptors_whose_caller_leaves(machine: Machine) -> None:
    """Another user has 1.2 million, and each answer reads all of them: root still gets an answer."""
    with (
        machine.session("alice") as alice,
        attack(machine, "svc", program("descriptors.py", "1200000"), "there"),
    ):
        alice.run("setsid sleep infinity >/dev/null 2>&1 &")
        for _ in range(5):
            alice.run(program("rawbus.py", "leave", "2", "1001", "ListHolders"))
        assert "sleep" in machine.run("polytmpctl", "ps", "alice", timeout=20).stdout
        ask(alice, 4, "ListHolders")
        assert "sleep" in machine.run("polytmpctl", "ps", "alice", timeout=20).stdout
        assert seconds(lambda: machine.run("systemctl", "restart", "polytmpd", timeout=40)) < 5
        machine.run("loginctl", "terminate-user", "alice")
        alice.kill()


def test_a_client_without_pam(machine: Machine) -> None:
    """Only root gets a namespace, whatever user the caller names; others may ask little."""
    with machine.session("alice") as alice, machine.session("bob") as bob:
        bob.run("touch /tmp/x")
        place = observe.directories(machine, "bob")["/tmp"]
        for line in (
            f"{CALL} AcquireNamespace u 1001",
            f"{CALL} AcquireNamespace u 1002",
            f"{CALL} ResolvePath us 1002 /tmp/x",
            f"{CALL} RemoveInstance u 1002",
            f"{CALL} RemoveInstanceWithFlags ut 1002 1",
            f"{CALL} GetUserUsage u 1002",
            f"{CALL} GetInstanceByPID u {bob.pid}",
            "busctl call org.polytmp1 /org/polytmp1/instance/_1002 org.polytmp1.Instance ListProcesses",
            "busctl call org.polytmp1 /org/polytmp1/instance/_1002 org.polytmp1.Instance ListHolders",
            "busctl call org.polytmp1 /org/polytmp1/instance/_1002 org.polytmp1.Instance GetUsage",
            "busctl introspect org.polytmp1 /org/polytmp1/instance/_1002 org.polytmp1.Instance",
            "busctl call org.freedesktop.DBus / org.freedesktop.DBus RequestName su org.polytmp1 7",
        ):
            result = alice.result(line, check=False)
            assert result.returncode != 0, line
            assert place not in result.stdout + result.stderr
        managed = alice.run(
            "busctl call org.polytmp1 /org/polytmp1 org.freedesktop.DBus.ObjectManager GetManagedObjects"
        )
        assert place not in managed
        assert bob.run("ls /tmp").split() == ["x"]


# Names of users


def test_two_names_for_one_uid_share_the_instance(machine: Machine) -> None:
    machine.run(
        "useradd", "--non-unique", "--uid", "1001", "--no-create-home", "--home-dir", "/home/alice", "alicia"
    )
    try:
        with machine.session("alice") as alice:
            alice.run("echo mine >/tmp/mine")
            assert machine.run("su", "-", "alicia", "-c", f"cat /tmp/mine; {observe.NAMESPACE}").stdout == (
                "mine\n" + alice.run(observe.NAMESPACE)
            )
            assert len(observe.instances(machine)) == 1
    finally:
        machine.run("sed", "-i", "/^alicia:/d", "/etc/passwd", "/etc/shadow", "/etc/group", "/etc/gshadow")


@pytest.mark.parametrize("name", ["a.b", r"DOM\user", "machine$", "0day", "x" * 32, "Ümlaut", "a@b.c"])
def test_a_name_with_odd_characters(machine: Machine, name: str) -> None:
    passwd = f"{name}:x:1200:1200::/tmp:/bin/sh\n"
    machine.run("tee", "-a", "/etc/passwd", input=passwd)
    machine.run("tee", "-a", "/etc/group", input=f"{name}:x:1200:\n")
    machine.run("tee", "-a", "/etc/shadow", input=f"{name}:*:19000:0:99999:7:::\n")
    try:
        process = machine.popen("su", "-", name, "-c", f"touch /tmp/x; ls /tmp; {observe.NAMESPACE}; cat")
        assert process.stdout is not None
        assert process.stdout.readline() == b"x\n"
        assert process.stdout.readline().startswith(b"mnt:[")
        assert observe.state(machine, name) == "draining"  # su without a terminal is no login
        assert machine.run("polytmpctl", "path", "-u", name, "/tmp/x").stdout.startswith("/tmp/polytmp-")
        machine.run("systemctl", "restart", "polytmpd")
        assert observe.state(machine, name) == "draining", "the daemon has read the state file"
        process.communicate()
        eventually(lambda: observe.instances(machine) == {}, 30, "it ends")
    finally:
        machine.sh(
            "sed -i /:1200:/d /etc/passwd /etc/group; sed -i /:19000:0:99999:7:::/d /etc/shadow; "
            "rm -rf /var/tmp/polytmp-1200"
        )


# The unit


def test_the_unit_is_little_exposed(machine: Machine) -> None:
    """Without the settings that take a mount namespace, see the next test; with them it would be 2.8."""
    last = machine.run("systemd-analyze", "security", "--no-pager", "polytmpd.service").stdout.splitlines()[
        -1
    ]
    assert float(re.search(r": ([0-9.]+) ", last)[1]) <= 4.4  # type: ignore[index]  # or the test fails


def test_the_daemon_sees_a_file_system_that_it_cannot_write(machine: Machine) -> None:
    inside = "nsenter -t $(systemctl show -P MainPID polytmpd) -m --"
    for path in ("/etc/x", "/usr/x", "/tmp/x", "/var/x", "/dev/x", "/run/x", "/proc/sys/kernel/hostname"):
        done = machine.sh(f"{inside} sh -c 'echo x > {path}'", check=False)
        assert "Read-only file system" in done.stderr, path
    assert machine.sh("ls -A /home").stdout
    for path in ("/home", "/root", "/run/user"):
        assert machine.sh(f"{inside} ls -A {path}").stdout == "", path


def test_the_daemon_has_the_capabilities_of_its_unit_and_no_more(machine: Machine) -> None:
    status = machine.sh("cat /proc/$(systemctl show -P MainPID polytmpd)/status").stdout
    sets = {name: int(value, 16) for name, value in re.findall(r"Cap(\w+):\s*(\w+)", status)}
    # CHOWN, DAC_OVERRIDE, FOWNER, FSETID, LINUX_IMMUTABLE, SYS_CHROOT, SYS_PTRACE, SYS_ADMIN
    wanted = sum(1 << bit for bit in (0, 1, 3, 4, 9, 18, 19, 21))
    assert sets["Bnd"] == sets["Prm"] == sets["Eff"] == wanted
    assert sets["Amb"] == 0
    assert re.search(r"NoNewPrivs:\s*1", status)
    assert re.search(r"Seccomp:\s*2", status)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may do what, with the real bus, the real polkitd and a person at a terminal.

Not here: the decisions by themselves (tests/bus/test_polkit).
"""

import os
import select
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.bed import Machine, eventually, nspawn

pytestmark = pytest.mark.e2e

BUSCTL = "busctl --allow-interactive-authorization=no call org.polytmp1"
MANAGER = f"{BUSCTL} /org/polytmp1 org.polytmp1.Manager"
BOB = "/org/polytmp1/instance/_1002"
SECRET = "correct horse"


@pytest.fixture(scope="module", autouse=True)
def users(machine: Machine) -> Iterator[None]:
    """alice may act as an administrator with her password; bob, who is logged in, may not."""
    machine.sh(f"echo 'alice:{SECRET}' | chpasswd; usermod -aG sudo alice")
    with machine.session("bob"):
        yield


def test_the_bus_lets_nobody_take_a_namespace(machine: Machine) -> None:
    done = machine.ssh("alice", f"{MANAGER} AcquireNamespace u 1001", check=False)
    assert done.returncode != 0
    assert "denied" in done.stderr.lower()


@pytest.mark.parametrize(
    "call",
    [
        f"{MANAGER} ResolvePath us 1002 /tmp/x",
        f"{MANAGER} GetUserUsage u 1002",
        f"{MANAGER} GetRemovalProgress u 1002",
        f"{MANAGER} RemoveInstance u 1002",
        f"{MANAGER} RemoveInstanceWithFlags ut 1002 1",
        f"{MANAGER} Reload",
        f"{BUSCTL} {BOB} org.polytmp1.Instance ListProcesses",
        f"{BUSCTL} {BOB} org.polytmp1.Instance ListHolders",
        f"{BUSCTL} {BOB} org.polytmp1.Instance GetUsage",
        f"{BUSCTL} {BOB} org.freedesktop.DBus.Properties GetAll s org.polytmp1.Instance",
    ],
    ids=lambda call: call.split("1.")[-1],
)
def test_others_are_asked_for_a_password(machine: Machine, call: str) -> None:
    done = machine.ssh("alice", call, check=False)
    assert done.returncode != 0
    assert "needs authentication" in done.stderr, done


def test_ones_own_needs_no_password(machine: Machine) -> None:
    own = BOB.replace("1002", "1001")
    for call in (
        f"{MANAGER} ResolvePath us 1001 /tmp/x",
        f"{MANAGER} GetUserUsage u 1001",
        f"{BUSCTL} {own} org.polytmp1.Instance ListHolders",
    ):
        assert machine.ssh("alice", call).stdout
    refused = machine.ssh("alice", f"{MANAGER} RemoveInstance u 1001", check=False)
    assert "processes live in it" in refused.stderr, "allowed, but impossible: her own session is in it"


def test_a_rule_of_the_administrator_decides(machine: Machine) -> None:
    """Rules (polkit(8)) see whose instance it is."""
    machine.write(
        "/etc/polkit-1/rules.d/10-bed.rules",
        """polkit.addRule(function(action, subject) {
            var asked = action.id == "org.polytmp1.inspect" && action.lookup("user") == "bob";
            if (asked && subject.user == "alice") return polkit.Result.YES;
        });""",
    )
    try:
        machine.run("systemctl", "restart", "polkit")
        assert machine.ssh("alice", "polytmpctl path -u bob /tmp/x").stdout.startswith("/tmp/polytmp-")
        assert "bash" in machine.ssh("alice", "polytmpctl ps bob").stdout
    finally:
        machine.run("rm", "/etc/polkit-1/rules.d/10-bed.rules")
        machine.run("systemctl", "restart", "polkit")


def typed(machine: Machine, user: str, command: str, prompt: str, answer: str, seconds: float = 90) -> str:
    """Return what the terminal shows if a person answers the prompt."""
    process = subprocess.Popen(
        [*machine.ssh_command(user, "-tt"), f"tty; {command}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=nspawn.ENVIRONMENT,
        cwd="/",
    )
    assert process.stdin
    assert process.stdout
    seen, end, answered = b"", time.monotonic() + seconds, False
    try:
        while time.monotonic() < end and select.select([process.stdout], [], [], end - time.monotonic())[0]:
            data = os.read(process.stdout.fileno(), 4096)
            if not data:
                break
            seen += data
            if not answered and prompt.encode() in seen:
                terminal = seen.split()[0].decode()
                echo = ("stty", "--all", "--file", terminal)
                # turning the echo off throws away what was typed before
                eventually(lambda: " -echo " in machine.run(*echo).stdout, 20, "the echo is off")  # noqa: B023
                process.stdin.write(answer.encode() + b"\n")
                process.stdin.flush()
                answered = True
    finally:
        process.kill()
        process.communicate()
    return seen.decode(errors="replace")


def test_a_person_types_a_password(machine: Machine) -> None:
    shown = typed(machine, "alice", "polytmpctl path -u bob /tmp/x; echo status $?", "Password:", SECRET)
    assert "temporary directories of bob" in shown, shown
    assert "/tmp/polytmp-" in shown, shown
    assert "status 0" in shown
    assert SECRET not in shown


def test_one_password_for_one_command(machine: Machine) -> None:
    """Each command makes several calls and prompts once; status does not wait long for its sizes."""
    shown = typed(machine, "alice", "polytmpctl status bob; echo status $?", "Password:", SECRET)
    assert (shown.count("Password:"), "status 0" in shown) == (1, True), shown
    assert "; removed with the instance" in shown, "it has sizes"
    shown = typed(machine, "alice", "polytmpctl remove bob; echo status $?", "Password:", SECRET)
    assert (shown.count("Password:"), "status 1" in shown, "in use by" in shown) == (1, True, True), shown


def test_a_wrong_password(machine: Machine) -> None:
    shown = typed(machine, "alice", "polytmpctl path -u bob /tmp/x; echo status $?", "Password:", "wrong")
    assert "status 1" in shown, shown
    assert "/tmp/polytmp-" not in shown


def test_no_ask_password(machine: Machine) -> None:
    done = machine.ssh("alice", "polytmpctl --no-ask-password path -u bob /tmp/x", tty=True, check=False)
    assert done.returncode == 1
    assert "Password" not in done.stdout
    assert "needs authentication" in done.stdout


def test_nobody_waits_for_a_person(machine: Machine) -> None:
    """A dialogue is open: others are served, and it ends when the caller disconnects."""
    asker = subprocess.Popen(
        [*machine.ssh_command("alice", "-tt"), "polytmpctl path -u bob /tmp/x"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=nspawn.ENVIRONMENT,
        cwd="/",
    )
    assert asker.stdout
    seen = b""
    while b"Password:" not in seen:
        assert select.select([asker.stdout], [], [], 20)[0], seen
        seen += os.read(asker.stdout.fileno(), 4096)
    machine.run("polytmpctl", "status", "bob")
    machine.ssh("bob", "true")
    asking = ("pgrep", "-f", "^/usr/bin/python3.*polytmpctl path")
    assert machine.run(*asking).stdout
    asker.kill()
    asker.communicate()
    eventually(lambda: not machine.run(*asking, check=False).stdout, what="the caller has ended")


def test_without_polkit_root_decides_alone(machine: Machine) -> None:
    machine.run("systemctl", "mask", "--now", "--runtime", "polkit.service")
    try:
        done = machine.ssh("alice", f"{MANAGER} Reload", check=False)
        assert "denied" in done.stderr.lower(), done
        done = machine.ssh("alice", "polytmpctl path -u bob /tmp/x", check=False)
        assert done.returncode == 1
        assert "polkit is not available" in done.stderr, done
        machine.sh(f"{MANAGER} Reload")
        machine.run("polytmpctl", "path", "-u", "bob", "/tmp/x")
    finally:
        machine.run("systemctl", "unmask", "--runtime", "polkit.service")

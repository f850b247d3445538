# SPDX-License-Identifier: LGPL-2.1-or-later
"""PAM modules that start a program before the session is private: Cockpit's pam_ssh_add, in Cockpit's stack
and in the common one; and what polytmpctl check finds before and after its remedy.

Not here: how pam-auth-update orders the profiles (tests/pam/test_module.py).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests import cockpit, observe
from tests.bed import Machine

COMMON: Final = "/etc/pam.d/common-session"
KEY: Final = "/home/alice/.ssh/id_ed25519"
SEEN: Final = "ssh-add -l; sudo readlink /proc/self/ns/mnt /proc/$SSH_AGENT_PID/ns/mnt"
AGENTS: Final = "pgrep -x -u alice ssh-agent | xargs -I{} readlink /proc/{}/ns/mnt"

PROFILE: Final = """Name: Start ssh-agent
Default: no
Priority: 64
Session-Type: Additional
Session-Interactive-Only: yes
Session:
	optional	pam_ssh_add.so
"""
"""As libpam-ssh has it for pam_ssh, which does the same."""


def prepare(root: Path) -> None:
    cockpit.install(root)
    observe.quick_logouts(root)


pytestmark = [pytest.mark.e2e, pytest.mark.prepared(by=prepare)]


@pytest.fixture(scope="module", autouse=True)
def key(machine: Machine) -> None:
    """alice has a key, which their password unlocks, and Cockpit listens."""
    cockpit.start(machine, "alice")
    machine.run("runuser", "-u", "alice", "--", "ssh-keygen", "-qt", "ed25519", "-N", "secret", "-f", KEY)
    machine.write("/usr/share/pam-configs/agent", PROFILE)


@pytest.fixture(autouse=True)
def restored(machine: Machine, quiet: None) -> Iterator[None]:
    machine.run("cp", "--archive", "/etc/pam.d", "/root/pam.d")
    yield
    observe.log_everybody_out(machine)
    machine.run("pam-auth-update", "--disable", "agent", "polytmp-early")
    machine.sh("rm -r /etc/pam.d && mv /root/pam.d /etc/pam.d; pkill -x -u alice ssh-agent; true")


def host(machine: Machine) -> str:
    return machine.sh(observe.NAMESPACE).stdout.strip()


def found(machine: Machine, name: str) -> tuple[str, str]:
    """Verdict and remedy of check for a service or file of PAM; empty if it names none."""
    results = json.loads(machine.run("polytmpctl", "--json=short", "check", check=False).stdout)["results"]
    there = [each for each in results if (each["topic"], each["name"]) == ("PAM", name)]
    return (there[0]["verdict"], there[0]["remedy"]) if there else ("", "")


def move_the_line(machine: Machine) -> None:
    """What check and docs/install.md advise."""
    stack = machine.read(cockpit.STACK).decode()
    [line] = [line for line in stack.splitlines() if line.split()[::2] == ["session", "pam_ssh_add.so"]]
    machine.write(cockpit.STACK, stack.replace(f"{line}\n", "") + f"{line}\n")


def test_cockpit_as_delivered_starts_its_agent_on_the_host(machine: Machine) -> None:
    """The session is private. Its SSH_AUTH_SOCK is a name in the host's /tmp."""
    assert found(machine, "cockpit") == ("warn", f"move that line to the end of {cockpit.STACK}")
    mine, agent = cockpit.run(machine, "alice", SEEN).splitlines()
    assert agent == host(machine)
    assert mine == f"mnt:[{observe.status(machine, 'alice')['namespace']}]" != agent


def test_cockpit_with_the_line_moved(machine: Machine) -> None:
    move_the_line(machine)
    assert found(machine, "cockpit") == ("pass", "")
    identity, mine, agent = cockpit.run(machine, "alice", SEEN).splitlines()
    assert "ED25519" in identity
    assert mine == agent == f"mnt:[{observe.status(machine, 'alice')['namespace']}]"
    assert host(machine) not in machine.sh(AGENTS).stdout.split()


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_an_agent_of_the_common_stack(machine: Machine, early: bool) -> None:
    """With the early profile, the second call of the module finds the session where it belongs."""
    machine.sh(f"rm {KEY}.pub; ssh-keygen -qpP secret -N '' -f {KEY}; chown alice: {KEY}", check=False)
    machine.run("pam-auth-update", "--enable", "agent")
    verdict, remedy = found(machine, COMMON)
    assert (verdict, remedy) == ("warn", "pam-auth-update --enable polytmp-early")
    if early:
        machine.sh(remedy)
        assert found(machine, COMMON) == ("", "")
    begin = machine.now()
    for _ in range(10 if early else 1):
        *identity, mine, agent = machine.ssh("alice", SEEN).stdout.splitlines()
        assert mine != host(machine)
        assert agent == (mine if early else host(machine))
        assert bool(identity) is early
        if early:
            observe.log_everybody_out(machine)
            assert observe.held(machine) == []
    assert "pam_polytmp" not in machine.journal("-u", "ssh", "--since", begin)

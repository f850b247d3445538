# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ansible, which becomes other users, and Samba, which serves several users in one process.

Not here: single programs (test_handover).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests import handover, observe
from tests.bed import Machine, Session
from tests.handover import WITNESS

USERS: Final = {"alice": 1001, "bob": 1002}

SMB: Final = """
[global]
    server role = standalone server
    obey pam restrictions = yes
    load printers = no
    disable spoolss = yes
    interfaces = lo
    bind interfaces only = yes
[tmp]
    path = /tmp
    writable = yes
"""


def prepare(root: Path) -> None:
    handover.install(root)
    observe.write(root, "etc/samba/smb.conf", SMB)


pytestmark = [pytest.mark.e2e, pytest.mark.prepared(by=prepare)]


@pytest.fixture(scope="module")
def sessions(machine: Machine) -> Iterator[dict[str, Session]]:
    handover.start(machine)
    with machine.session("alice") as alice, machine.session("root") as root, machine.session("bob") as bob:
        alice.run("echo hers >/tmp/hers")
        bob.run("echo his >/tmp/his")
        machine.sh("echo hosts >/tmp/hosts")
        yield {"alice": alice, "root": root, "bob": bob}


# Ansible


@pytest.mark.parametrize("pipelining", [0, 1], ids=["files", "pipelining"])
@pytest.mark.parametrize("target", ["root", "bob"])
@pytest.mark.parametrize("origin", ["alice", "root"])
def test_ansible_becomes_another_user(
    machine: Machine, sessions: dict[str, Session], origin: str, target: str, pipelining: int
) -> None:
    """Without pipelining, the origin writes a program below /var/tmp or its home, and the target runs it."""
    ansible = (
        f"ANSIBLE_PIPELINING={pipelining} ANSIBLE_LOCALHOST_WARNING=0 "
        f"ansible localhost -i localhost, -c local --become --become-user {target} -m"
    )
    label = f"ansible-{origin}-{target}-{pipelining}"
    sessions[origin].run(f"{ansible} command -a '{WITNESS} {label}'", timeout=60)
    seen = handover.record(machine, label)
    places = handover.places(machine, USERS)
    assert seen.witness.uid == ({"root": 0} | USERS)[target]
    assert seen.witness.namespace == places["host" if origin == "root" else "alice"]
    assert handover.strangers(seen, places, USERS) == []
    sessions[origin].run(f"{ansible} copy -a 'content=text dest=/tmp/{label}'", timeout=60)
    assert sessions[origin].run(f"cat /tmp/{label}; stat -c %U /tmp/{label}") == f"text{target}\n"


# Samba


@pytest.fixture(scope="module")
def samba(machine: Machine, sessions: dict[str, Session]) -> str:
    """Returns when smbd serves."""
    machine.sh(
        "for user in alice bob; do printf 'secret\\nsecret\\n' | smbpasswd -a -s $user; done; "
        "systemctl start smbd"
    )
    return "smbclient //127.0.0.1/tmp -U alice%secret -c '{}' 2>&1 | awk '{{print $1}}'"


def test_samba_shows_each_user_their_own(machine: Machine, samba: str, sessions: dict[str, Session]) -> None:
    seen = machine.sh(samba.format("ls; put /etc/hostname put-by-alice")).stdout.split()
    assert "hers" in seen
    assert not {"his", "hosts"} & set(seen)
    assert sessions["alice"].run("ls /tmp/put-by-alice")


def test_samba_with_users_one_after_the_other(
    machine: Machine, samba: str, sessions: dict[str, Session]
) -> None:
    """One connection, one process: alice logs off, then bob logs on."""
    begin = machine.now()
    steps = "ls; logoff; logon bob secret; tcon tmp; ls; put /etc/hostname put-by-bob"
    seen = machine.sh(samba.format(steps)).stdout.split()
    assert "hers" in seen
    assert "his" in seen[seen.index("tcon") :]
    assert "hers" not in seen[seen.index("tcon") :]
    assert sessions["bob"].run("ls /tmp/put-by-bob")
    assert "several users" not in machine.journal("-u", "smbd", "--since", begin)


def test_samba_with_two_users_at_once(machine: Machine, samba: str, sessions: dict[str, Session]) -> None:
    """alice's session and bob's on one connection: neither sees the other's files."""
    begin = machine.now()
    steps = "ls; logon bob secret; tcon tmp; ls; put /etc/hostname put-on-the-host; get his -; get hers -"
    seen = machine.sh(samba.format(steps)).stdout.split()
    before, after = seen[: seen.index("tcon")], seen[seen.index("tcon") :]
    assert "hers" in before
    assert not {"his", "hosts"} & set(before)
    assert "hosts" in after
    assert not {"his", "hers"} & set(after)
    assert machine.run("stat", "-c", "%U", "/tmp/put-on-the-host").stdout.strip() == "bob"
    for user in ("alice", "bob"):
        assert "put-on-the-host" not in sessions[user].run("ls /tmp")
    line = "this process opens sessions for several users (UID 1001, now user bob)"
    assert line in machine.journal("-u", "smbd", "--since", begin)

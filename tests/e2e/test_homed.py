# SPDX-License-Identifier: LGPL-2.1-or-later
"""A user of a real systemd-homed, whose home directory is mounted at login and unmounted after logout.

Not here: UIDs of its range, and user records in files (test_users).
"""

import json
from pathlib import Path
from typing import Final

import pytest

from tests import observe
from tests.bed import Machine, eventually

UID: Final = 60200
PASSWORD: Final = "a-long-pass-phrase"
pytestmark = [pytest.mark.e2e, pytest.mark.prepared(by=observe.quick_logouts)]


@pytest.fixture(scope="module", autouse=True)
def homed(machine: Machine) -> None:
    if machine.release == "bookworm":
        pytest.skip("expected: systemd-homed 252 often loses the home directory, also without polytmp")
    machine.install_kept("homed")
    machine.run("systemctl", "start", "systemd-homed")
    create = f"homectl create hana --uid={UID} --storage=directory --shell=/bin/bash --rate-limit-burst=1000"
    machine.sh(f"NEWPASSWORD={PASSWORD} {create} --enforce-password-policy=no </dev/null", timeout=120)
    assert home_state(machine) == "inactive"


@pytest.fixture(autouse=True)
def passwords(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """hana logs in with her password, as her home directory with its keys is not there before."""
    answer = tmp_path / "askpass"
    answer.write_text(f"#!/bin/sh\necho {PASSWORD}\n")
    answer.chmod(0o755)
    with_key = machine.ssh_command
    settings = ("env", f"SSH_ASKPASS={answer}", "SSH_ASKPASS_REQUIRE=force")

    def command(user: str, *options: str) -> list[str]:
        if user != "hana":
            return with_key(user, *options)
        words = with_key(user, "-oPreferredAuthentications=password", *options)
        return [*settings, *(word for word in words if word != "-oBatchMode=yes")]

    monkeypatch.setattr(machine, "ssh_command", command)


def home_state(machine: Machine) -> str:
    done = machine.run("homectl", "list", "--json=short")
    (state,) = [row["state"] for row in json.loads(done.stdout) if row["name"] == "hana"]
    return str(state)


def who_sees_her_home(machine: Machine) -> list[str]:
    """The processes in whose namespace it is mounted."""
    return machine.sh("grep -ls ' /home/hana ' /proc/[0-9]*/mountinfo || true").stdout.split()


def test_a_login(machine: Machine) -> None:
    """Her home directory is mounted before her namespace is made, and a second login finds it there."""
    host = machine.run("readlink", "/proc/1/ns/mnt").stdout
    machine.run("touch", "/tmp/of-the-host")
    with machine.session("hana") as hana:
        assert hana.run("id -u").split() == [str(UID)]
        namespace = hana.run(observe.NAMESPACE)
        assert namespace != host
        assert hana.run("touch /tmp/x /var/tmp/x; ls /tmp").split() == ["x"]
        assert hana.run("echo mine >~/file; findmnt -n -o TARGET ~").split() == ["/home/hana"]
        assert observe.state(machine, "hana") == "active"
        assert home_state(machine) == "active"
        assert machine.ssh("hana", f"{observe.NAMESPACE}; cat ~/file").stdout == f"{namespace}mine\n"
        assert observe.directories(machine, "hana")["/var/tmp"] == f"/var/tmp/polytmp-{UID}/tmp"
    eventually(lambda: observe.gone(machine, "hana"), 30, "her instance is gone")
    eventually(lambda: home_state(machine) == "inactive", 30, "her home directory is unmounted")
    assert machine.ssh("hana", "cat ~/file; ls /var/tmp /tmp").stdout.split() == [
        *("mine", "/tmp:", "/var/tmp:", "x")
    ]


def test_nobody_keeps_her_home_mounted(machine: Machine) -> None:
    """Not another user's instance, made before her login or during it: her logout unmounts it."""
    with machine.session("alice"):
        with machine.session("hana") as hana, machine.session("bob"):
            hana.run("echo mark >/tmp/mark")
            assert len(who_sees_her_home(machine)) > 3
            hana.close()
            eventually(lambda: observe.state(machine, "hana") is None, 30, "her instance is gone")
            eventually(lambda: home_state(machine) == "inactive", 30, "her home directory is unmounted")
            assert who_sees_her_home(machine) == []
            assert observe.state(machine, "bob") == "active"
        assert observe.state(machine, "alice") == "active"
    observe.log_everybody_out(machine)


def test_check_has_nothing_to_say(machine: Machine) -> None:
    done = machine.run("polytmpctl", "check", "--json=short", check=False)
    found = json.loads(done.stdout)["results"]
    assert [entry for entry in found if entry["verdict"] == "fail"] == []
    assert "hana" not in next(entry["text"] for entry in found if entry["name"] == "exempt users")

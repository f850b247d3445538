# SPDX-License-Identifier: LGPL-2.1-or-later
"""System units with User= and PAMName=, and servers that open sessions in a sandbox: all of them work, and
none shares a /tmp without a line in the journal.

Not here: units without PAM (test_handover), dovecot (test_dovecot).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests import observe
from tests.bed import Machine, eventually

USERS: Final = {"alice": 1001, "bob": 1002}
Seen = dict[str, Any]
LOOK: Final = """#!/usr/bin/python3 -IS
import json, os
seen = {"uid": os.getuid(), "cwd": os.getcwd(), "tmp": os.stat("/tmp").st_ino}
print(json.dumps(seen))
"""


def prepare(root: Path) -> None:
    observe.write(root, "usr/local/bin/look", LOOK)
    (root / "usr/local/bin/look").chmod(0o755)


pytestmark = [pytest.mark.e2e, pytest.mark.prepared(by=prepare)]


@pytest.fixture(scope="module", autouse=True)
def of_the_host(machine: Machine) -> None:
    machine.sh(
        "mkdir /tmp/of-the-host /var/tmp/of-the-host; cp /usr/local/bin/look /tmp/of-the-host; "
        "chown -R alice: /tmp/of-the-host"
    )


@pytest.fixture
def places(machine: Machine) -> Iterator[dict[str, int]]:
    """The inode of /tmp, by whose it is. alice is logged in, so that she has one to be missed."""
    with machine.session("alice") as alice:
        inode = "stat -c %i /tmp"
        yield {"host": int(machine.sh(inode).stdout), "alice": int(alice.run(inode))}


@pytest.fixture
def begin(machine: Machine) -> str:
    return machine.now()


def unit(
    machine: Machine, *settings: str, user: str = "alice", stack: str = "login", run: str = "look"
) -> Seen:
    """What the command of a unit with these settings sees."""
    options = [f"--property={setting}" for setting in (f"User={user}", f"PAMName={stack}", *settings)]
    result = machine.run("systemd-run", "--quiet", "--wait", "--pipe", "--collect", *options, *run.split())
    seen: Seen = json.loads(result.stdout)
    return seen


def stays(machine: Machine, begin: str) -> list[str]:
    lines = machine.journal("-u", "polytmpd", "--since", begin).splitlines()
    return [line for line in lines if "stays in the host's mount namespace, because of" in line]


STACKS: Final = ["login", "cron"]  # with pam_systemd, which moves the process to a session, and without


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(
    "setting",
    [
        "ReadWritePaths=/tmp/of-the-host",
        "ReadOnlyPaths=/var/tmp/of-the-host",
        "InaccessiblePaths=/var/tmp/of-the-host",
        "BindPaths=/tmp/of-the-host:/mnt",
        "BindReadOnlyPaths=/tmp/of-the-host:/mnt",
        "TemporaryFileSystem=/var/tmp/of-the-host",
        "WorkingDirectory=/tmp/of-the-host",
    ],
)
def test_a_unit_that_needs_the_hosts_directories_starts_in_them(
    machine: Machine, places: dict[str, int], begin: str, setting: str, stack: str
) -> None:
    seen = unit(machine, setting, stack=stack)
    assert (seen["uid"], seen["tmp"]) == (USERS["alice"], places["host"])
    if "Working" in setting:
        assert seen["cwd"] == "/tmp/of-the-host"
    (line,) = stays(machine, begin)
    assert (
        f"of user alice stays in the host's mount namespace, because of {setting.removesuffix(':/mnt')}. "
        in line
    )


@pytest.mark.parametrize("stack", STACKS)
def test_a_unit_with_a_private_tmp_has_that(
    machine: Machine, places: dict[str, int], begin: str, stack: str
) -> None:
    seen = unit(machine, "PrivateTmp=yes", stack=stack)
    assert seen["uid"] == USERS["alice"]
    assert seen["tmp"] not in places.values()
    assert "because of PrivateTmp=yes. To give it" in stays(machine, begin)[0]


@pytest.mark.parametrize("stack", STACKS)
def test_a_unit_whose_program_is_in_the_hosts_tmp(
    machine: Machine, places: dict[str, int], begin: str, stack: str
) -> None:
    assert unit(machine, stack=stack, run="/tmp/of-the-host/look")["tmp"] == places["host"]
    assert "because of ExecStart=/tmp/of-the-host/look. " in stays(machine, begin)[0]


def test_each_command_of_a_unit(machine: Machine, places: dict[str, int]) -> None:
    """And check lists the unit."""
    machine.write(
        "/etc/systemd/system/commands.service",
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nUser=alice\nPAMName=login\nWorkingDirectory=/tmp/of-the-host\n"
        "ExecStartPre=sh -c 'stat -c %%i /tmp >/tmp/of-the-host/pre'\n"
        "ExecStart=sh -c 'stat -c %%i /tmp >/tmp/of-the-host/start'\n"
        "ExecStartPost=sh -c 'stat -c %%i /tmp >/tmp/of-the-host/post'\n",
    )
    machine.run("systemctl", "start", "commands.service")
    seen = machine.sh("cat /tmp/of-the-host/{pre,start,post}").stdout.split()
    assert seen == [str(places["host"])] * 3
    report = json.loads(machine.run("polytmpctl", "--json=short", "check", check=False).stdout)
    found = [entry for entry in report["results"] if entry["name"] == "commands.service"]
    assert [(entry["verdict"], entry["text"]) for entry in found] == [
        ("warn", "runs as alice in the shared /tmp, because of WorkingDirectory=/tmp/of-the-host")
    ]


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["ProtectSystem=strict", "ReadWritePaths=/tmp", "ProtectHome=yes", "PrivateDevices=yes"],
        ["WorkingDirectory=/tmp"],
        ["BindPaths=/srv:/mnt", "TemporaryFileSystem=/opt"],
        ["WorkingDirectory=/srv", "ReadOnlyPaths=-/tmpx -/tmp.d"],
    ],
    ids=lambda settings: " ".join(settings) or "none",
)
def test_every_other_unit_gets_its_users_directories(
    machine: Machine, places: dict[str, int], begin: str, settings: list[str], stack: str
) -> None:
    """Also in a sandbox, which systemd then makes from the user's namespace."""
    seen = unit(machine, *settings, stack=stack)
    assert (seen["uid"], seen["tmp"]) == (USERS["alice"], places["alice"])
    assert stays(machine, begin) == []


@pytest.mark.parametrize("command", ["sudo -iu bob look", "runuser -u alice -- sudo -iu bob look"])
def test_the_session_that_a_units_command_opens_is_a_login_like_any_other(
    machine: Machine, places: dict[str, int], begin: str, command: str
) -> None:
    """Although sudo is the main process of a unit that stays on the host."""
    user = "alice" if command.startswith("sudo") else "root"
    with machine.session("bob") as bob:
        seen = unit(machine, "WorkingDirectory=/tmp/of-the-host", user=user, run=command)
        assert (seen["uid"], seen["tmp"]) == (USERS["bob"], int(bob.run("stat -c %i /tmp")))
    assert len(stays(machine, begin)) == (user == "alice")


def test_a_users_manager_moves_whatever_its_unit_says(machine: Machine) -> None:
    """Otherwise a drop-in for user@.service would leave what every user starts on the host."""
    observe.log_everybody_out(machine)
    machine.write(
        "/etc/systemd/system/user@.service.d/x.conf", "[Service]\nReadOnlyPaths=-/tmp/of-the-host\n"
    )
    machine.run("systemctl", "daemon-reload")
    try:
        with machine.session("alice") as alice:
            seen = json.loads(alice.run("systemd-run --user --quiet --wait --pipe look"))
            assert seen["tmp"] == int(alice.run("stat -c %i /tmp"))
    finally:
        machine.sh("rm -r /etc/systemd/system/user@.service.d/x.conf; systemctl daemon-reload")
        observe.log_everybody_out(machine)


# Login services


def refused(machine: Machine, begin: str) -> bool:
    return "has its own mount namespace" in machine.journal(
        "--since", begin, "-g", "no private /tmp for user"
    )


@pytest.fixture
def cron_in_a_sandbox(machine: Machine) -> Iterator[None]:
    machine.write("/etc/systemd/system/cron.service.d/x.conf", "[Service]\nPrivateTmp=yes\n")
    machine.sh("systemctl daemon-reload; systemctl restart cron")
    yield
    machine.sh("rm -r /etc/systemd/system/cron.service.d; systemctl daemon-reload; systemctl restart cron")


def test_login_services_in_a_sandbox(machine: Machine, begin: str, cron_in_a_sandbox: None) -> None:
    """alice's and bob's jobs would share the /tmp of cron."""
    machine.write("/etc/cron.d/job", "* * * * * bob touch /var/lib/jobs/ran\n")
    machine.sh("install -d -m 1777 /var/lib/jobs")
    eventually(lambda: refused(machine, begin), 75, "cron refuses the job")
    assert machine.run("ls", "/var/lib/jobs").stdout == ""
    machine.run("rm", "/etc/cron.d/job")


@pytest.mark.parametrize(
    "command", ["su - bob -c look", "sudo -iu bob look", "runuser -u bob -- sudo -iu bob look"]
)
def test_a_login_program_in_the_sandbox_of_any_service(machine: Machine, begin: str, command: str) -> None:
    """Its users would share the service's /tmp. A service of alice's would be hers."""
    run = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", "--property=PrivateTmp=yes"]
    assert machine.run(*run, "sh", "-c", f"{command}; echo $?").stdout.strip() == "1"
    assert refused(machine, begin)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A UID that is reused, and a user who is renamed: the files that were kept, and processes that still run.

Not here: the name in the directory (tests/kernel/test_storage).
"""

from collections.abc import Iterator

import pytest

from tests import observe
from tests.bed import Machine, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.prepared(by=observe.quick_logouts)]

UID = 1300
KEPT = f"/var/tmp/polytmp-{UID}"
MESSAGE_ID = "5f3b8c1d6c0a4f0db58c2e6a9d7b1e06"


def add(machine: Machine, user: str) -> None:
    machine.run("useradd", "--uid", str(UID), "--create-home", "--shell", "/bin/bash", user)


def run(machine: Machine, user: str, script: str) -> str:
    """Log in once, run a script, and wait until everything of the login has gone."""
    output = machine.run("su", "-", user, "-c", script).stdout
    eventually(lambda: user not in observe.instances(machine), 30, f"{user}'s instance is gone")
    machine.sh(f"loginctl terminate-user {user}; pkill -KILL -U {UID}; true", check=False)
    eventually(
        lambda: machine.run("pgrep", "-U", str(UID), check=False).returncode == 1,
        30,
        "all processes have ended",
    )
    return output


@pytest.fixture(autouse=True)
def former_users_gone(machine: Machine) -> Iterator[None]:
    yield
    machine.sh(
        f"pkill -x sleep; pkill -KILL -U {UID}; for user in carol dave; do userdel -fr $user; done; "
        f"rm -rf {KEPT} /var/tmp/polytmp-former-*; true",
        check=False,
    )
    eventually(lambda: not observe.instances(machine), 30, "all instances are gone")


def aside(machine: Machine) -> list[str]:
    """Return what root finds of former users."""
    return machine.sh("find /var/tmp -maxdepth 1 -name 'polytmp-former-*'").stdout.split()


def test_a_uid_that_is_used_again(machine: Machine) -> None:
    add(machine, "carol")
    run(machine, "carol", "echo mine >/var/tmp/secret")
    assert run(machine, "carol", "cat /var/tmp/secret") == "mine\n", "it is kept for carol"
    machine.run("userdel", "--remove", "carol")
    add(machine, "dave")
    assert run(machine, "dave", "ls -A /var/tmp; touch /var/tmp/of-dave") == ""
    (place,) = aside(machine)
    assert machine.run("cat", f"{place}/tmp/secret").stdout == "mine\n", "nothing is lost"
    assert machine.run("stat", "-c", "%u %g %a", place).stdout == "0 0 700\n"
    message = machine.run("journalctl", "--no-pager", "-o", "cat", f"MESSAGE_ID={MESSAGE_ID}").stdout
    assert f"UID {UID} belonged to carol and now belongs to dave" in message
    assert place in message
    machine.run("systemctl", "restart", "polytmpd")
    assert run(machine, "dave", "ls -A /var/tmp") == "of-dave\n"
    assert aside(machine) == [place]


def test_a_directory_of_a_former_version_is_its_users_from_now_on(machine: Machine) -> None:
    add(machine, "carol")
    run(machine, "carol", "echo mine >/var/tmp/secret")
    machine.run("rm", f"{KEPT}/user")
    assert run(machine, "carol", "cat /var/tmp/secret") == "mine\n"
    machine.run("userdel", "--remove", "carol")
    add(machine, "dave")
    assert run(machine, "dave", "ls -A /var/tmp") == ""


def test_a_user_who_was_renamed(machine: Machine) -> None:
    """It looks like another user: the files wait for root, who gives them back as the manual says."""
    add(machine, "carol")
    run(machine, "carol", "echo mine >/var/tmp/secret")
    machine.run("usermod", "--login", "dave", "carol")
    assert run(machine, "dave", "ls -A /var/tmp") == ""
    (place,) = aside(machine)
    machine.sh(f"mv {place}/tmp/* {KEPT}/tmp/")
    assert run(machine, "dave", "cat /var/tmp/secret; stat -c %U /var/tmp/secret") == "mine\ndave\n"
    # and the other way: before the next login
    machine.run("usermod", "--login", "carol", "dave")
    machine.run("ln", "-sfn", "carol", f"{KEPT}/user")
    assert run(machine, "carol", "cat /var/tmp/secret") == "mine\n"


def test_a_former_users_processes(machine: Machine) -> None:
    """Another user's process lives on in carol's instance: dave does not get carol's /tmp."""
    add(machine, "carol")
    machine.sh("cp -r /home/alice/.ssh /home/carol && chown -R carol: /home/carol")
    with machine.session("carol") as carol:
        carol.run("echo mine >/tmp/secret")
        pid = carol.pid
        machine.sh(f"nsenter --target {pid} --mount setsid -f sleep infinity >/dev/null 2>&1")
    machine.sh("loginctl terminate-user carol; true", check=False)
    eventually(lambda: observe.state(machine, "carol") == "draining", 30, "only root's process is left")
    eventually(
        lambda: machine.run("pgrep", "-U", str(UID), check=False).returncode == 1,
        30,
        "carol's processes have ended",
    )
    machine.run("userdel", "--remove", "carol")
    add(machine, "dave")
    refused = machine.run("su", "-", "dave", "-c", "cat /tmp/secret", check=False)
    assert refused.returncode != 0
    assert "mine" not in refused.stdout
    assert "the instance of carol, a former user of UID" in machine.journal("-u", "polytmpd", "-n", "30")
    machine.sh("pkill -x sleep")
    eventually(lambda: not observe.instances(machine), 30, "carol's instance is gone")
    assert run(machine, "dave", "ls -A /tmp | grep -v '^[.]'; true") == ""

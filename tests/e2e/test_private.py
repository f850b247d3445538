# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objection 3 and the purpose itself: who sees what, where it is stored, who shares it.

Not here: attacks on it (test_attacks*).
"""

import pytest

from tests import observe
from tests.bed import Machine, eventually

pytestmark = pytest.mark.e2e

LIST = "find /tmp /var/tmp -type f ! -path '*/systemd-private-*' 2>/dev/null | sort"


def test_two_users_see_only_their_own_files(machine: Machine) -> None:
    with machine.session("alice") as alice, machine.session("bob") as bob:
        for session in (alice, bob):
            session.run(f"touch /tmp/of-{session.user} /var/tmp/of-{session.user}")
        assert alice.run(LIST).split() == ["/tmp/of-alice", "/var/tmp/of-alice"]
        assert bob.run(LIST).split() == ["/tmp/of-bob", "/var/tmp/of-bob"]


def test_root_sees_the_hosts_own(machine: Machine) -> None:
    machine.sh("touch /tmp/of-host /var/tmp/of-host")
    with machine.session("alice") as alice, machine.session("root") as root:
        assert root.run("ls /tmp/of-host /var/tmp/of-host").split() == ["/tmp/of-host", "/var/tmp/of-host"]
        assert (
            root.run(observe.NAMESPACE).strip() == machine.run("readlink", "/proc/1/ns/mnt").stdout.strip()
        )
        assert "of-host" not in alice.run("ls -A /tmp /var/tmp")


def test_system_users_stay_on_the_host(machine: Machine) -> None:
    with machine.session("svc") as svc:
        assert svc.run(observe.NAMESPACE).strip() == machine.run("readlink", "/proc/1/ns/mnt").stdout.strip()
    assert "svc" not in observe.instances(machine)


def test_all_of_one_user_share_one_namespace(machine: Machine) -> None:
    with machine.session("alice") as first, machine.session("alice") as second:
        manager = eventually(
            lambda: machine.sh("pgrep -u alice -x systemd").stdout.split(), what="systemd --user of alice"
        )
        seen = {
            first.run(observe.NAMESPACE).strip(),
            second.run(observe.NAMESPACE).strip(),
            machine.run("readlink", f"/proc/{manager[0]}/ns/mnt").stdout.strip(),
            first.run(f"systemd-run --user --quiet --wait --pipe {observe.NAMESPACE}").strip(),
            first.run(f"sudo -u bob sudo -u alice {observe.NAMESPACE}").strip(),
        }
        assert len(seen) == 1
        assert seen == {f"mnt:[{observe.status(machine, 'alice')['namespace']}]"}
        assert seen != {machine.run("readlink", "/proc/1/ns/mnt").stdout.strip()}


def test_sudo_to_root_keeps_the_view(machine: Machine) -> None:
    """`sudo cat /tmp/mine` finds the file that the user means; root's own logins stay on the host."""
    with machine.session("alice") as alice:
        alice.run("echo mine > /tmp/mine")
        assert alice.run("sudo cat /tmp/mine").strip() == "mine"
        assert "mine" not in machine.run("ls", "/tmp").stdout.split()


def test_a_login_by_sudo_joins_the_user_and_a_command_stays(machine: Machine) -> None:
    with machine.session("alice") as alice, machine.session("bob") as bob:
        bob.run("echo bobs > /tmp/where")
        alice.run("echo hers > /tmp/where")
        assert alice.run("sudo -iu bob cat /tmp/where").strip() == "bobs"
        assert alice.run("sudo -u bob cat /tmp/where").strip() == "hers"


@pytest.mark.parametrize("directory", ["/tmp", "/var/tmp"])
def test_an_instance_lies_in_the_directory_that_it_replaces(machine: Machine, directory: str) -> None:
    with machine.session("alice") as alice:
        found = observe.directories(machine, "alice")
        assert found[directory].startswith(f"{directory}/polytmp-")
        assert found[directory].endswith("/tmp")
        alice.run(f"echo here > {directory}/probe")
        assert machine.run("cat", f"{found[directory]}/probe").stdout == "here\n"
        same = "stat -fc '%i %T %b' {0}; stat -c '%d %a %u %g' {0}"
        assert alice.run(same.format(directory)) == machine.sh(same.format(directory)).stdout
        barrier = found[directory].removesuffix("/tmp")
        assert machine.run("stat", "-c", "%a %u %g", barrier).stdout.split() == ["700", "0", "0"]
        assert alice.result(f"ls {barrier}", check=False).returncode != 0


def test_tmp_is_the_case_that_the_release_stands_for(machine: Machine, release: str) -> None:
    """Debian 13: a mount point. Debian 12: a directory of the root file system. The tests need both."""
    is_mount = machine.run("mountpoint", "-q", "/tmp", check=False).returncode == 0
    assert is_mount == (release == "trixie")


def test_what_is_kept_in_var_tmp_is_there_at_the_next_login(machine: Machine) -> None:
    with machine.session("alice") as alice:
        alice.run("echo kept > /var/tmp/kept; echo gone > /tmp/not-kept")
    observe.log_everybody_out(machine)
    with machine.session("alice") as alice:
        assert alice.run("cat /var/tmp/kept; rm /var/tmp/kept").strip() == "kept"
        assert alice.result("cat /tmp/not-kept", check=False).returncode != 0


def test_two_first_logins_at_once_share_one_namespace(machine: Machine) -> None:
    observe.log_everybody_out(machine)
    processes = [machine.popen("su", "-", "alice", "-c", f"{observe.NAMESPACE}; cat") for _ in range(6)]
    try:
        seen = set()
        for process in processes:
            assert process.stdout is not None
            seen.add(process.stdout.readline())
        assert len(seen) == 1
        assert len([path for path in observe.on_disk(machine) if "-1001-" in path]) == 1
    finally:
        for process in processes:
            process.communicate(timeout=30)


def test_the_working_directory_is_kept(machine: Machine) -> None:
    """As by programs that do not go to the home directory. The argument makes su one (docs/install.md)."""
    stack = "/etc/pam.d/su"
    machine.sh(f"cp -a {stack} /root/stack; echo 'session required pam_polytmp.so user' >>{stack}")
    try:
        assert machine.sh("cd /usr/share && su alice -c pwd").stdout.strip() == "/usr/share"
        assert (
            machine.run("su", "alice", "-c", observe.NAMESPACE).stdout
            != machine.sh(observe.NAMESPACE).stdout
        )
    finally:
        machine.run("mv", "/root/stack", stack)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attacks on what the daemon reads to find out who still uses an instance: mount tables and descriptors. A
user controls their length and their content.

Not here: attacks on files (test_attacks), on the bus (test_attacks_bus).
"""

import pytest

from tests import observe
from tests.attacks import attack, prepare, program, wait_until_gone
from tests.bed import Machine, Session, eventually

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.prepared(by=prepare),
    pytest.mark.usefixtures("unharmed"),
]


def leave_behind(machine: Machine, alice: Session, command: str) -> None:
    """Leave only a namespace that bob has made from the instance's own, with the command in it.

    alice starts it, so that bob has neither a session nor a slice.
    """
    lines = (
        "stat -Lc %i /proc/self/ns/mnt; echo mark >/tmp/mark",
        f"mkfifo /tmp/started; setsid unshare -Urm {command} </dev/null >/tmp/out 2>&1 &",
        "read </tmp/started",
    )
    machine.write("/srv/left-behind", "\n".join(lines))
    number = int(alice.run("sudo -iu bob bash /srv/left-behind"))
    eventually(lambda: observe.state(machine, "bob") == "draining", what="bob's instance drains")
    own = f"mnt:[{number}]"
    eventually(lambda: own not in observe.namespaces(machine), what="the namespace itself has ended")


def stays_bobs(machine: Machine) -> None:
    """bob's logins find the files, and in the end nothing is left."""
    assert machine.run("su", "-", "bob", "-c", "cat /tmp/mark").stdout == "mark\n"
    machine.sh("pkill -u bob; true")
    wait_until_gone(machine, "bob", 60)


def test_mounts_with_endless_paths(machine: Machine) -> None:
    """Half a gigabyte of mountinfo, made within moments: no login waits, and it does not fill the memory."""
    with attack(machine, "svc", program("tables.py", "mounts", "100", "2500"), "ready"):
        for _ in range(2):
            assert machine.run("su", "-", "alice", "-c", "echo in").stdout == "in\n"
            assert machine.run("su", "-", "bob", "-c", "echo in").stdout == "in\n"
            eventually(lambda: observe.gone(machine, "alice"), 120, "alice's instance is gone")
            machine.run("systemctl", "restart", "polytmpd")
        with machine.session("alice"):
            machine.run("polytmpctl", "ps", "alice")
            assert observe.daemon_memory(machine, "VmHWM") < 200 * 1024


def test_a_mount_whose_path_is_too_long(machine: Machine) -> None:
    """The kernel cases show what follows if it cannot be read; here systemd-nspawn refuses listmount(2)."""
    with attack(machine, "bob", program("tables.py", "endless", "66000"), "ready"):
        for user in ("bob", "alice"):
            assert machine.run("su", "-", user, "-c", "echo in").stdout == "in\n"
        wait_until_gone(machine)
    wait_until_gone(machine, "bob", 60)
    machine.run("rm", "-r", "/tmp/endless")


def test_a_trap_where_a_barrier_might_lie(machine: Machine) -> None:
    """A daemon that followed a mount's path to its owner would wait for a file system that never answers."""
    machine.sh("grep -q ^user_allow_other /etc/fuse.conf || echo user_allow_other >>/etc/fuse.conf")
    machine.sh(
        "install -d -o svc /srv/trap /srv/trap/polytmp-4242 /srv/trap/polytmp-4242/tmp /srv/elsewhere"
    )
    bait = "mount --bind /srv/trap/polytmp-4242/tmp /srv/elsewhere && echo ready && exec sleep infinity"
    with (
        attack(machine, "svc", f"unshare -Urm sh -c '{bait}'", "ready"),
        attack(machine, "svc", program("fuse.py", "trap", "/srv/trap"), "mounted"),
    ):
        for _ in range(2):
            assert machine.run("su", "-", "alice", "-c", "echo in").stdout == "in\n"
            eventually(lambda: observe.gone(machine, "alice"), what="alice's instance is gone")
            machine.run("systemctl", "restart", "polytmpd")
        assert machine.run("su", "-", "bob", "-c", "echo in").stdout == "in\n"
    machine.sh("umount -l /srv/trap; rm -r /srv/elsewhere", check=False)


def test_descriptors_without_end(machine: Machine) -> None:
    """20 million: no login waits until all are checked for one that may be bob's namespace."""
    with machine.session("alice") as alice:
        leave_behind(machine, alice, "sh -c 'echo >/tmp/started; exec sleep infinity'")
        with attack(machine, "svc", program("tables.py", "descriptors", "40"), "ready"):
            assert machine.run("su", "-", "bob", "-c", "cat /tmp/mark").stdout == "mark\n"
        stays_bobs(machine)


def test_descriptors_without_end_keep_no_instance(machine: Machine) -> None:
    with attack(machine, "svc", program("tables.py", "descriptors", "40"), "ready"):
        assert machine.run("su", "-", "alice", "-c", "echo in").stdout == "in\n"
        eventually(lambda: observe.state(machine, "alice") is None, 40, "alice's instance is gone")
    wait_until_gone(machine)


def test_a_storm_of_mounts_refuses_no_login(machine: Machine) -> None:
    """990 FUSE mounts that a user mounts and unmounts in three loops. Each login makes an instance."""
    machine.sh("install -d -o svc /srv/storm")
    with attack(machine, "svc", program("fuse.py", "storm", "/srv/storm"), "mounted"):
        for _ in range(10):
            assert machine.run("su", "-", "alice", "-c", "echo in").stdout == "in\n"
            eventually(lambda: observe.gone(machine, "alice"), 60, "alice's instance is gone")
    machine.sh("umount -l /srv/storm/*; rm -r /srv/storm", check=False)

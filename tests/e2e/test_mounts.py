# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objection 2: mounts and unmounts propagate both ways between users and the system; mounts below a private
/tmp stay private.

Not here: how that is built (tests/kernel/test_mountns).
"""

from collections.abc import Iterator

import pytest

from tests import observe
from tests.bed import Machine, eventually

pytestmark = pytest.mark.e2e

POINT = "/mnt/probe"


@pytest.fixture(autouse=True)
def mount_point(machine: Machine) -> Iterator[None]:
    machine.sh(f"mkdir -p {POINT} /mnt/other")
    yield
    machine.sh(f"umount -q {POINT} /mnt/other; true", check=False)


def mounted(text: str) -> bool:
    return text.strip() == "yes"


IS_MOUNTED = f"mountpoint -q {POINT} && echo yes || echo no"


def test_a_mount_made_in_a_session_reaches_everybody(machine: Machine) -> None:
    with machine.session("alice") as alice, machine.session("bob") as bob:
        alice.run(f"sudo mount -t tmpfs probe {POINT} && touch {POINT}/file")
        assert machine.run("ls", POINT).stdout.split() == ["file"]
        assert bob.run(f"ls {POINT}").split() == ["file"]
        alice.run(f"sudo umount {POINT}")
        assert not mounted(machine.sh(IS_MOUNTED).stdout)
        assert not mounted(bob.run(IS_MOUNTED))


def test_a_mount_made_on_the_host_reaches_the_sessions(machine: Machine) -> None:
    with machine.session("alice") as alice, machine.session("bob") as bob:
        machine.sh(f"mount -t tmpfs probe {POINT} && touch {POINT}/file")
        assert alice.run(f"ls {POINT}").split() == ["file"]
        assert bob.run(f"ls {POINT}").split() == ["file"]
        bob.run(f"sudo umount {POINT}")
        assert not mounted(machine.sh(IS_MOUNTED).stdout)
        assert not mounted(alice.run(IS_MOUNTED))


def test_the_host_unmounts_what_was_mounted_before_the_login(machine: Machine) -> None:
    machine.sh(f"mount -t tmpfs probe {POINT}")
    with machine.session("alice") as alice:
        assert mounted(alice.run(IS_MOUNTED))
        machine.sh(f"umount {POINT}")
        assert not mounted(alice.run(IS_MOUNTED))


def test_a_mount_of_a_mount_unit_is_seen(machine: Machine) -> None:
    with machine.session("alice") as alice:
        machine.run("systemd-mount", "--no-block", "--type=tmpfs", "probe", POINT)
        eventually(lambda: mounted(alice.run(IS_MOUNTED)), what="the mount unit's mount is seen")
        machine.run("systemd-umount", POINT)
        eventually(lambda: not mounted(alice.run(IS_MOUNTED)), what="and so is the unmount")


@pytest.mark.parametrize("directory", ["/tmp", "/var/tmp"])
def test_mounts_under_the_own_directories_stay_private(machine: Machine, directory: str) -> None:
    with machine.session("alice") as alice, machine.session("bob") as bob:
        before = observe.mounts(machine)
        alice.run(
            f"mkdir {directory}/m && sudo mount -t tmpfs private {directory}/m && touch {directory}/m/secret"
        )
        assert observe.mounts(machine) == before
        assert bob.result(f"ls {directory}/m", check=False).returncode != 0
        host = observe.directories(machine, "alice")[directory]
        assert machine.run("ls", f"{host}/m").stdout == ""
        alice.run(f"sudo umount {directory}/m && rmdir {directory}/m")


def test_a_host_mount_below_tmp_is_not_kept_busy(machine: Machine) -> None:
    """A copy of it hidden in a user's namespace would keep the file system busy after the unmount."""
    machine.sh("mkdir -p /tmp/iso /mnt/probe && truncate -s 8M /root/fs.img && mkfs.ext4 -q -F /root/fs.img")
    device = machine.sh("losetup --find --show /root/fs.img").stdout.strip()
    try:
        machine.run("mount", device, "/tmp/iso")
        with machine.session("alice") as alice:
            alice.run("true")
            machine.run("umount", "/tmp/iso")
            # Opens the device exclusively: EBUSY as long as the file system is mounted anywhere.
            machine.run("mkfs.ext4", "-q", "-F", device)
    finally:
        machine.sh(f"umount -q /tmp/iso; losetup -d {device}; rm -rf /tmp/iso /root/fs.img", check=False)


def test_mount_events_during_logins_are_not_missed(machine: Machine) -> None:
    """Between MS_PRIVATE and MOVE_MOUNT_SET_GROUP, an event could be missed.

    So something is mounted and unmounted all the time.
    """
    observe.log_everybody_out(machine)
    storm = machine.popen(
        "bash", "-c", "while :; do mount -t tmpfs storm /mnt/other; umount /mnt/other; done", "storm"
    )
    try:
        for _ in range(10):
            machine.sh("su - alice -c true")
    finally:
        storm.kill()
        storm.communicate()
    machine.sh("while umount -q /mnt/other; do :; done", check=False)
    with machine.session("alice") as alice:
        assert alice.run("grep -c ' /mnt/other ' /proc/self/mountinfo || true").strip() == "0"
        machine.sh("mount -t tmpfs last /mnt/other")
        assert alice.run("grep -c ' /mnt/other ' /proc/self/mountinfo").strip() == "1"
        alice.run("sudo umount /mnt/other")
        assert "/mnt/other" not in observe.mounts(machine)


def test_the_hosts_own_propagation_is_untouched(machine: Machine) -> None:
    show = "findmnt --noheadings --list --output TARGET,PROPAGATION | grep -v ^/run/user/ | sort"
    before = machine.sh(show).stdout
    with machine.session("alice") as alice:
        root = alice.run("findmnt -no PROPAGATION /").strip()
        assert root == "shared"
        assert machine.sh(show).stdout == before

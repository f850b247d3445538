# SPDX-License-Identifier: LGPL-2.1-or-later
"""A device that is mounted below a private directory goes away; the host's systemd does not see the mount.

Not here: the events of a device (tests/kernel/test_devices).
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import observe
from tests.bed import Machine, Session, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("quiet")]


def mount_stick(session: Session, name: str) -> str:
    """Mount a file system on a loop device in the user's /tmp, and return the device's name."""
    return session.run(
        f"truncate -s 2M {name}.img && /sbin/mkfs.ext4 -q {name}.img && mkdir /tmp/{name} && "
        f"sudo mount -o loop {name}.img /tmp/{name} && findmnt -no SOURCE /tmp/{name}"
    ).strip()


def pull_out(device: str) -> None:
    """Send the event that the kernel sends if a device is removed: no device here can be pulled out."""
    uevent = Path("/sys/class/block", Path(device).name, "uevent")
    uevent.write_text("remove")
    uevent.write_text("add")


def is_mounted(session: Session, name: str) -> bool:
    return f" /tmp/{name} " in session.run("cat /proc/self/mountinfo")


def test_what_is_mounted_from_it_is_unmounted(machine: Machine) -> None:
    with machine.session("alice") as alice, machine.session("bob") as bob:
        stick, other = mount_stick(alice, "stick"), mount_stick(alice, "other")
        bobs = mount_stick(bob, "stick")
        assert len({stick, other, bobs}) == 3
        pull_out(stick)
        eventually(lambda: not is_mounted(alice, "stick"), what="alice's mount is gone")
        assert is_mounted(alice, "other")
        assert is_mounted(bob, "stick")
        line = "Unmounted /tmp/stick in the instance of user alice: the device is gone"
        eventually(
            lambda: line in machine.journal("-u", "polytmpd", "--output=cat"), what="the journal reports it"
        )
        for session, name in ((alice, "other"), (bob, "stick")):
            session.run(f"sudo umount /tmp/{name}")


def test_while_the_instance_drains(machine: Machine, elsewhere: Callable[[list[str]], None]) -> None:
    """Nobody is logged in, and the daemon does not hold the namespace."""
    with machine.session("alice") as alice:
        stick = mount_stick(alice, "stick")
        pid = alice.run("nohup sleep infinity >/dev/null 2>&1 & echo $!").strip()
        elsewhere([pid])
    eventually(lambda: not observe.held(machine), 30, "the namespace is released")
    table = f"/proc/{pid}/mountinfo"
    assert b" /tmp/stick " in machine.read(table)
    pull_out(stick)
    eventually(lambda: b" /tmp/stick " not in machine.read(table), what="the mount is gone")
    machine.run("kill", pid)
    eventually(lambda: observe.gone(machine, "alice"), 30, "alice's instance is gone")


def test_the_device_that_the_instances_lie_on(machine: Machine) -> None:
    """The mounts that make directories private stay: without them, /tmp would be the shared one."""
    with machine.session("alice") as alice:
        stick = mount_stick(alice, "stick")
        alice.run("echo mine >/var/tmp/mark; echo mine >/tmp/mark")
        pull_out(machine.run("findmnt", "-n", "-o", "SOURCE", "/").stdout.strip())
        pull_out(stick)  # in this order: once this event is handled, so is the first
        eventually(lambda: not is_mounted(alice, "stick"), what="the stick is gone")
        assert alice.run("cat /tmp/mark /var/tmp/mark") == "mine\nmine\n"
        assert machine.sh("ls /tmp/mark /var/tmp/mark", check=False).stdout == ""
        assert (
            alice.run("stat -c %i /tmp/.X11-unix")
            == machine.run("stat", "-c", "%i", "/tmp/.X11-unix").stdout
        )

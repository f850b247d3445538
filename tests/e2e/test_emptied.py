# SPDX-License-Identifier: LGPL-2.1-or-later
"""Root empties /tmp or /var/tmp on the host while a user is logged in.

Not here: the age cleaner (test_age_cleaner, test_attacks).
"""

import time
from collections.abc import Callable

import pytest

from polytmpd.journal import MessageId
from tests import observe
from tests.bed import Machine, Session, eventually

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.usefixtures("quiet"),
    pytest.mark.prepared(by=observe.quick_logouts),
]

SOCKETS = "stat -c '%d %i %u %a' /tmp/.X11-unix /tmp/.ICE-unix /tmp/.XIM-unix /tmp/.font-unix"
AT_MOST = 1.0
"""Seconds until a session works again."""
CLEANERS = {
    "rm": "rm -rf /tmp/*",
    "tmpfiles": "systemd-tmpfiles --remove --create",
    # Without the file that keeps users out while the system boots.
    "tmpfiles-at-boot": "systemd-tmpfiles --remove --create --boot; rm -f /run/nologin",
}
DEBIAN_12 = "D /tmp 1777 root root -\n"
"""What its tmp.conf says of /tmp. Debian 13 has another line, and obeys our X lines even with this one."""
UNPROTECT = "chattr -f -i /tmp/polytmp-* /tmp/polytmp-*/tmp/.*-unix /var/tmp/polytmp-*; "


@pytest.fixture(autouse=True)
def as_on_debian_12(machine: Machine) -> None:
    machine.write("/etc/tmpfiles.d/tmp.conf", DEBIAN_12)


def said(machine: Machine) -> list[str]:
    found = machine.journal(f"MESSAGE_ID={MessageId.DIRECTORY_LOST}", "--output=cat").splitlines()
    return [line for line in found if not line.startswith("-- ")]


def assert_works(machine: Machine, session: Session, directory: str = "/tmp") -> None:
    """The session and a new login have the same working directory, within a second."""
    begun = time.monotonic()
    eventually(
        lambda: session.result(f"mktemp -p {directory}", check=False).returncode == 0, 10, "mktemp works"
    )
    eventually(
        lambda: session.result(SOCKETS, check=False).stdout == machine.sh(SOCKETS).stdout, 10, "the sockets"
    )
    assert time.monotonic() - begun < AT_MOST
    session.run(f"echo new >{directory}/new")
    script = f"mktemp -p {directory}; cat {directory}/new; {observe.NAMESPACE}; {SOCKETS}"
    login = machine.ssh(session.user, script).stdout.splitlines()
    assert login[1:] == [
        "new",
        session.run(observe.NAMESPACE).strip(),
        *machine.sh(SOCKETS).stdout.split("\n")[:-1],
    ]
    path = observe.directories(machine, session.user)[directory]
    assert machine.run("cat", f"{path}/new").stdout == "new\n", "where the bus says that it is"
    assert observe.state(machine, session.user) == "active"


def assert_nothing_left(machine: Machine) -> None:
    eventually(lambda: observe.gone(machine, "alice"), 30, "her instance is gone")
    assert (
        machine.sh("find /tmp /var/tmp -maxdepth 1 -name 'polytmp-*' | xargs -r lsattr -d").stdout.count(
            "i--"
        )
        == 0
    )


@pytest.mark.parametrize("cleaner", CLEANERS)
def test_what_is_protected_stays(machine: Machine, cleaner: str) -> None:
    before = said(machine)
    with machine.session("alice") as alice:
        alice.run("mktemp; touch /tmp/hers")
        places = observe.directories(machine, "alice")
        inode = machine.run("stat", "-c", "%i", places["/tmp"]).stdout
        machine.sh(CLEANERS[cleaner], check=False)
        assert machine.run("stat", "-c", "%i", places["/tmp"]).stdout == inode
        emptied = cleaner == "rm" or machine.release == "bookworm"
        assert bool(alice.run("ls /tmp")) == (not emptied), "as a shared /tmp is"
        assert_works(machine, alice)
        assert observe.directories(machine, "alice") == places
    assert said(machine) == before
    assert_nothing_left(machine)


@pytest.mark.parametrize("cleaner", CLEANERS)
def test_what_is_not_protected_is_made_again(machine: Machine, cleaner: str) -> None:
    """As on a file system without flags, or if an administrator insists."""
    before = len(said(machine))
    with machine.session("alice") as alice:
        alice.run("mktemp; touch /tmp/hers")
        places = observe.directories(machine, "alice")
        machine.sh(f"{UNPROTECT} {CLEANERS[cleaner]}", check=False)
        assert_works(machine, alice)
        assert observe.directories(machine, "alice") == places
        lines = said(machine)[before:]
        removed = cleaner == "rm" or machine.release == "bookworm"
        assert bool(lines) == removed
        assert (alice.result("ls /tmp/hers", check=False).returncode != 0) == removed
        assert all("/tmp of user alice was removed on the host" in line for line in lines)
        # and what was made is protected
        before = len(said(machine))
        machine.sh(CLEANERS[cleaner], check=False)
        assert_works(machine, alice)
        assert len(said(machine)) == before
    assert_nothing_left(machine)


def test_a_draining_instance_is_made_again_too(
    machine: Machine, elsewhere: Callable[[list[str]], None]
) -> None:
    with machine.session("alice") as alice:
        alice.run("nohup sleep 4321 >/dev/null 2>&1 &")
        pids = observe.processes(machine, "^sleep 4321")
        elsewhere(pids)
    eventually(lambda: observe.state(machine, "alice") == "draining", 20, "she is draining")
    machine.sh(f"{UNPROTECT} rm -rf /tmp/*", check=False)  # it may meet what is made again
    enter = f"nsenter -t {pids[0]} -m --"
    eventually(lambda: machine.sh(f"{enter} mktemp", check=False).returncode == 0, 5, "it works again")
    with machine.session("alice") as alice:
        assert_works(machine, alice)
    machine.run("kill", *pids)
    assert_nothing_left(machine)


def test_kept_directories(machine: Machine) -> None:
    """/var/tmp: protected while its user is logged in, made again, and root's to delete afterwards."""
    barrier = "/var/tmp/polytmp-1001"
    with machine.session("alice") as alice:
        alice.run("touch /var/tmp/hers")
        machine.sh("rm -rf /var/tmp/*", check=False)
        assert_works(machine, alice, "/var/tmp")
        machine.sh(f"{UNPROTECT} rm -rf {barrier}", check=False)
        assert_works(machine, alice, "/var/tmp")
    eventually(lambda: observe.gone(machine, "alice"), 30, "her instance is gone")
    assert machine.run("cat", f"{barrier}/tmp/new").stdout == "new\n"
    assert machine.run("readlink", f"{barrier}/user").stdout == "alice\n"
    machine.sh(f"chattr +i {barrier}; systemctl restart polytmpd")  # as after a crash
    machine.run("rm", "-r", barrier)


def test_while_the_daemon_is_down(machine: Machine) -> None:
    with machine.session("alice") as alice:
        machine.run("systemctl", "stop", "polytmpd")
        machine.sh(f"{UNPROTECT} rm -rf /tmp/*")
        assert alice.result("mktemp", check=False).returncode != 0
        machine.run("systemctl", "start", "polytmpd")
        assert_works(machine, alice)
        machine.run("systemctl", "stop", "polytmpd")
        machine.sh(f"{UNPROTECT} rm -rf /tmp/* /run/polytmpd/instances/*")
        machine.run("systemctl", "start", "polytmpd")
        assert_works(machine, alice)
    assert_nothing_left(machine)


def test_many_times(machine: Machine) -> None:
    """As fast as it can be removed: in the end it is there, and nothing piles up."""
    with machine.session("alice") as alice:
        mounts = "grep -c ' /tmp' /proc/self/mountinfo"
        before = alice.run(mounts)
        for _ in range(50):
            machine.sh(f"{UNPROTECT} rm -rf /tmp/*", check=False)
        eventually(lambda: alice.result("mktemp", check=False).returncode == 0, 5, "mktemp works")
        assert_works(machine, alice)
        assert alice.run(mounts) == before
    assert_nothing_left(machine)


def test_another_user_takes_the_name_meanwhile(machine: Machine) -> None:
    """svc sees the host's /tmp. Its directory is left alone, and alice gets one of another name."""
    with machine.session("alice") as alice:
        place = observe.directories(machine, "alice")["/tmp"]
        barrier = place.removesuffix("/tmp")
        pid = machine.run("systemctl", "show", "-P", "MainPID", "polytmpd").stdout.strip()
        svc = "setpriv --reuid svc --regid nogroup --clear-groups"  # su would ask the daemon
        squat = f"{svc} mkdir -p {place}; {svc} touch {place}/trap"
        machine.sh(f"kill -STOP {pid}; {UNPROTECT} rm -rf {barrier}; {squat}")
        machine.run("kill", "-CONT", pid)
        assert_works(machine, alice)
        assert alice.run("ls -A /tmp/trap 2>&1 || true").startswith("ls: cannot access")
        assert observe.directories(machine, "alice")["/tmp"] != place
        assert machine.sh(f"ls {place}").stdout == "trap\n"
        machine.run("systemctl", "restart", "polytmpd")
        assert_works(machine, alice)
    machine.run("rm", "-r", barrier)
    assert_nothing_left(machine)


def test_her_own_links_are_not_followed(machine: Machine) -> None:
    """Where a mount point was, she has put a link to a directory of root's."""
    machine.sh("mkdir -p /srv/victim; chmod 0700 /srv/victim")
    before = machine.sh("stat -c '%i %u %g %a %Z' /srv/victim; lsattr -d /srv/victim /etc").stdout
    with machine.session("alice") as alice:
        place = observe.directories(machine, "alice")["/tmp"]
        pid = machine.run("systemctl", "show", "-P", "MainPID", "polytmpd").stdout.strip()
        machine.sh(f"kill -STOP {pid}; {UNPROTECT} rm -rf {place}/.X11-unix {place}/.ICE-unix")
        alice.run("ln -s /srv/victim /tmp/.X11-unix; ln -s /etc /tmp/.ICE-unix")
        machine.run("kill", "-CONT", pid)
        assert_works(machine, alice)
        assert alice.run("readlink /tmp/.X11-unix.moved-* /tmp/.ICE-unix.moved-*") == "/srv/victim\n/etc\n"
    assert machine.sh("stat -c '%i %u %g %a %Z' /srv/victim; lsattr -d /srv/victim /etc").stdout == before
    assert_nothing_left(machine)


def test_users_cannot_cause_it(machine: Machine, unharmed: None) -> None:
    """Neither the owner, nor another user, nor one who sees the host's /tmp."""
    before = said(machine)
    with machine.session("alice") as alice, machine.session("bob") as bob:
        places = [
            *observe.directories(machine, "alice").values(),
            *observe.directories(machine, "bob").values(),
        ]
        barriers = " ".join(place.removesuffix("/tmp") for place in places)
        attempts = (
            "rmdir /tmp/.X11-unix; mv /tmp/.X11-unix /tmp/x; rm -rf /tmp/.*-unix; rm -rf /tmp /var/tmp; "
            "chattr -i /tmp /tmp/.X11-unix; unshare -Urm sh -c 'umount -l /tmp/.X11-unix; umount -l /tmp; "
            f"rmdir /tmp/.X11-unix; rm -rf /tmp/.*-unix {barriers}'; rm -rf {barriers}; "
            f"chattr -i {barriers}; mv -T {barriers.split()[0]} /tmp/x; true"
        )
        for session in (alice, bob):
            session.result(attempts, check=False)
        machine.run("su", "svc", "-c", attempts, check=False)
        assert_works(machine, alice)
        assert_works(machine, bob)
        assert [
            *observe.directories(machine, "alice").values(),
            *observe.directories(machine, "bob").values(),
        ] == places
    assert said(machine) == before


def test_nothing_of_ours_is_named_for_removal(machine: Machine) -> None:
    """No line of ours of tmpfiles.d(5) removes an instance, whatever systemd-tmpfiles is called with."""
    machine.run("rm", "/etc/tmpfiles.d/tmp.conf")
    with machine.session("alice") as alice:
        place = observe.directories(machine, "alice")["/tmp"]
        alice.run("touch /tmp/hers")
        machine.sh("chattr -i /tmp/polytmp-* /tmp/polytmp-*/tmp/.*-unix")
        machine.sh("cat /usr/lib/tmpfiles.d/polytmp.conf >/root/ours.conf")
        machine.run("systemd-tmpfiles", "--remove", "--clean", "--boot", "/root/ours.conf")
        assert machine.run("ls", place).stdout == "hers\n"

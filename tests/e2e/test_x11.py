# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objection 1: real X servers of one user, clients of another user and of the host, and display locks that
hold everywhere.

Not here: sockets by themselves (test_sockets), copies of locks (tests/kernel/displays).
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import observe
from tests.bed import Machine, Session, eventually

pytestmark = pytest.mark.e2e

# Without TCP and abstract sockets: only the path in /tmp/.X11-unix is left.
X11 = Path(__file__).parents[2] / "docs/x11.md"
OPTIONS = "-ac -noreset -nolisten tcp -nolisten local"
"""Without -noreset a server resets itself when its last client leaves, and refuses clients meanwhile."""
COPIES = (
    "find /tmp /tmp/polytmp-*/tmp -maxdepth 1 -name '.X*-lock' -uid 0 -perm 444 "
    "-exec getfattr --absolute-names -m trusted.polytmp {} + 2>/dev/null | sed -n 's/^# file: //p'"
)
PRETEND = """python3 -c '
import os, socket, sys
for display in range(int(sys.argv[1]), int(sys.argv[2])):
    if sys.argv[3]:
        open(f"/tmp/.X{display}-lock", "w").write(sys.argv[3])
    socket.socket(socket.AF_UNIX).bind(f"/tmp/.X11-unix/X{display}")
' """


@pytest.fixture(autouse=True)
def quiet(machine: Machine) -> Iterator[None]:
    """Both users linger, because each login and logout costs a second; no server and no lock is left."""
    machine.run("loginctl", "enable-linger", "alice", "bob")
    yield
    machine.sh("pkill -x Xvfb; rm -rf /tmp/.X11-unix/* /tmp/.X*-lock /tmp/polytmp-*/tmp/.X*-lock; true")


def start(session: Session, display: int = 7, prefix: str = "") -> int:
    """Start an X server in a session, and return its PID once it serves clients."""
    log = f"/var/tmp/xvfb-{display}.log"
    command = f"{prefix} Xvfb :{display} {OPTIONS} >{log} 2>&1 & echo $!"
    pid = int(session.run(command))
    eventually(lambda: can_connect(session, display), what=f"display {display} serves")
    return pid


def pretend(session: Session, first: int, end: int, content: str = "") -> None:
    """Make sockets that no process listens on, with locks of that content."""
    session.run(f"{PRETEND} {first} {end} '{content}'")


def can_connect(session: Session, display: int) -> bool:
    return session.result(f"DISPLAY=:{display} xdpyinfo >/dev/null", check=False).returncode == 0


def lock(session: Session, display: int = 7) -> str:
    """Return the display's lock as the session sees it; empty if there is none."""
    return session.run(f"cat /tmp/.X{display}-lock 2>/dev/null || true")


def host_lock(machine: Machine, display: int = 7) -> str:
    return machine.sh(f"cat /tmp/.X{display}-lock 2>/dev/null || true").stdout


def refusal(session: Session, display: int = 7) -> str:
    """Start a server on a display that is taken, and return its error messages."""
    result = session.result(f"timeout 10 Xvfb :{display} {OPTIONS}", check=False)
    assert result.returncode not in {0, 124}
    return result.stderr


def copies(machine: Machine) -> list[str]:
    return machine.sh(COPIES).stdout.split()


def end(session: Session, pid: int, signal: str = "TERM") -> None:
    session.run(f"kill -{signal} {pid}; wait {pid} 2>/dev/null; true")


def test_clients_of_another_user_and_of_the_host_reach_the_server(machine: Machine) -> None:
    with machine.session("alice") as alice, machine.session("bob") as bob:
        start(alice)
        sockets = machine.sh("ss --numeric --listening --tcp --unix | grep -E 'X11-unix|:6007'").stdout
        assert len(sockets.splitlines()) == 1, sockets
        assert "@" not in sockets
        assert "X.Org" in bob.run("DISPLAY=:7 xdpyinfo | grep vendor")
        assert "X.Org" in machine.sh("DISPLAY=:7 xdpyinfo | grep vendor").stdout


def test_a_lock_holds_for_other_users_and_for_the_host(machine: Machine) -> None:
    with machine.session("alice") as alice, machine.session("bob") as bob:
        pid = start(alice)
        eventually(lambda: lock(bob) == host_lock(machine) == f"{pid:10}\n", what="bob has alice's lock")
        assert bob.run("stat -c '%u %g %a %F' /tmp/.X7-lock") == "0 0 444 regular file\n"
        assert "Server is already active for display 7" in refusal(bob)
        result = machine.sh(f"timeout 10 Xvfb :7 {OPTIONS}", check=False)
        assert "Server is already active for display 7" in result.stderr
        # and a failed attempt does not remove the lock
        assert can_connect(bob, 7)
        assert lock(bob) == lock(alice) == f"{pid:10}\n"
        assert bob.result("rm -f /tmp/.X7-lock", check=False).returncode != 0


def test_a_server_that_looks_for_a_display_finds_a_free_one(machine: Machine) -> None:
    search = f"Xvfb -displayfd 1 {OPTIONS} 2>/dev/null >/var/tmp/display & echo $!"
    with machine.session("alice") as alice, machine.session("bob") as bob:
        for session in (alice, bob):
            session.run(search)
            eventually(lambda: session.run("cat /var/tmp/display"), what="it prints the display")  # noqa: B023
        assert alice.run("cat /var/tmp/display").strip() == "0"
        assert bob.run("cat /var/tmp/display").strip() == "1"
        assert can_connect(alice, 1)
        assert can_connect(bob, 0)


def test_a_tool_that_looks_for_a_free_lock_finds_one(machine: Machine) -> None:
    """As xrdp (neutrinolabs/xrdp#3095: every session picked :10) and vncserver do."""
    with machine.session("alice") as alice, machine.session("bob") as bob:
        start(alice, 10)
        eventually(lambda: lock(bob, 10), what="bob has the lock")
        tool = "xvfb-run --auto-servernum --server-num=10 sh -c 'echo $DISPLAY; xdpyinfo | grep vendor.s'"
        assert bob.run(tool).split()[0] == ":11"


def test_a_display_is_free_again_after_its_server_ended(machine: Machine) -> None:
    with machine.session("alice") as alice, machine.session("bob") as bob:
        pid = start(alice)
        eventually(lambda: lock(bob), what="bob has the lock")
        end(alice, pid)
        eventually(lambda: not lock(bob) and not host_lock(machine), what="the lock is gone everywhere")
        pid = start(bob)
        eventually(lambda: lock(alice) == f"{pid:10}\n", what="alice has bob's lock")
        assert "Server is already active for display 7" in refusal(alice)


def test_a_killed_server_leaves_a_stale_lock_as_on_any_host(machine: Machine) -> None:
    with machine.session("alice") as alice, machine.session("bob") as bob:
        pid = start(alice)
        eventually(lambda: lock(bob), what="bob has the lock")
        end(alice, pid, "KILL")
        assert "Could not create server lock file" in refusal(bob)  # stale, and bob may not remove it
        successor = start(alice)
        assert successor != pid
        eventually(lambda: lock(bob) == f"{successor:10}\n", what="bob has the new server's lock")


def test_locks_go_with_their_owners_instance(machine: Machine) -> None:
    with machine.session("bob") as bob:
        with machine.session("alice") as alice:
            pid = start(alice)
            eventually(lambda: lock(bob), what="bob has the lock")
            end(alice, pid, "KILL")
            assert lock(bob)
        machine.sh("loginctl disable-linger alice; loginctl terminate-user alice")
        eventually(lambda: not lock(bob) and not host_lock(machine), 30, "the lock is gone everywhere")
        assert machine.run("stat", "-c", "%U %F", "/tmp/.X11-unix/X7").stdout == "alice socket\n"


def test_users_see_the_lock_of_a_server_on_the_host(machine: Machine) -> None:
    with machine.session("alice") as alice:
        server = machine.popen("Xvfb", ":8", *OPTIONS.split())
        try:
            eventually(lambda: lock(alice, 8) == host_lock(machine, 8) != "", what="alice has the lock")
            assert "Server is already active for display 8" in refusal(alice, 8)
            with machine.session("bob") as bob:
                assert lock(bob, 8)
        finally:
            machine.sh("pkill -x Xvfb")
            server.communicate()
        eventually(lambda: not lock(alice, 8), what="the lock is gone")


def test_a_server_run_by_root_in_a_users_session(machine: Machine) -> None:
    """Xorg without kernel mode setting runs as root, but its lock is in the user's /tmp."""
    with machine.session("alice") as alice, machine.session("bob") as bob:
        alice.run(f"sudo sh -c 'Xvfb :9 {OPTIONS} >/dev/null 2>&1 &'")
        eventually(lambda: lock(bob, 9) and host_lock(machine, 9), what="bob and the host have the lock")
        assert lock(bob, 9) == lock(alice, 9)
        assert bob.run("stat -c %U /tmp/.X11-unix/X9").strip() == "root"
        alice.run("sudo pkill -x Xvfb")
        eventually(lambda: not lock(bob, 9) and not host_lock(machine, 9), what="the lock is gone")


def test_a_later_instance_starts_with_the_lock(machine: Machine) -> None:
    observe.log_everybody_out(machine)
    with machine.session("alice") as alice:
        pid = start(alice)
        eventually(lambda: host_lock(machine), what="the host has the lock")
        assert observe.state(machine, "bob") is None
        assert machine.ssh("bob", "cat /tmp/.X7-lock").stdout == f"{pid:10}\n"


BAD_LOCKS = {
    60: "ln -s /etc/passwd {lock}",
    61: "ln -s .X69-lock {lock}",
    62: "mkfifo {lock}",
    63: "mkdir {lock}",
    64: "truncate -s 1T {lock}",
    65: "printf '%17d\\n' 1 >{lock}",
    66: "printf '%10d\\n' 1 >{lock}; sudo chown bob {lock}",
    67: "printf '        -1\\n' >{lock}",
    68: "printf '         0\\n' >{lock}",
    70: ": >{lock}",
    71: "printf 'rm -rf /\\n' >{lock}",
    72: "ln -s X73 /tmp/.X11-unix/X72; printf '%10d\\n' 1 >{lock}",
    73: ": >/tmp/.X11-unix/X73; printf '%10d\\n' 1 >{lock}",
}


def test_only_valid_locks_are_shown(machine: Machine) -> None:
    with machine.session("alice") as alice, machine.session("bob") as bob:
        for display, make in BAD_LOCKS.items():
            alice.run(make.format(lock=f"/tmp/.X{display}-lock"))
            if display < 72:
                pretend(alice, display, display + 1)
        pretend(alice, 65536, 65537, f"{1:10}")
        pretend(alice, 69, 70, f"{1:10}")
        eventually(lambda: lock(bob, 69), what="bob has the good lock")
        assert bob.run("find /tmp -maxdepth 1 -name '.X*-lock'").split() == ["/tmp/.X69-lock"]
        found = machine.sh("find /tmp -maxdepth 1 -name '.X*-lock'").stdout
        assert found.split() == ["/tmp/.X69-lock"]
    assert "Traceback" not in machine.journal("--unit=polytmpd")


def test_existing_files_in_place_of_a_lock_stay(machine: Machine) -> None:
    with machine.session("alice") as alice, machine.session("bob") as bob:
        # sleep: change times advance with kernel ticks, and a later change must have a different one
        bob.run("echo mine >/tmp/.X7-lock; mkdir /tmp/.X8-lock; ln -s /etc/passwd /tmp/.X9-lock; sleep 0.1")
        before = bob.run("stat -c '%n %i %U %Z' /tmp/.X*-lock")
        pids = [start(alice, display) for display in (7, 8, 9)]
        eventually(lambda: all(host_lock(machine, n) for n in (7, 8, 9)), what="the host has the locks")
        assert bob.run("stat -c '%n %i %U %Z' /tmp/.X*-lock") == before
        for pid in pids:
            end(alice, pid)
        eventually(
            lambda: not any(host_lock(machine, n) for n in (7, 8, 9)), what="the host has none of them"
        )
        assert bob.run("stat -c '%n %i %U %Z' /tmp/.X*-lock") == before


def test_a_flood_of_sockets_affects_only_its_owner(machine: Machine) -> None:
    with machine.session("alice") as alice, machine.session("bob") as bob:
        pretend(alice, 100, 1100, f"{1:10}")
        eventually(lambda: len(copies(machine)) == 2 * 64, what="64 locks for bob and for the host")
        pid = start(bob, 99)
        eventually(lambda: lock(alice, 99) == f"{pid:10}\n", what="alice still sees bob's")
        lines = [line for line in machine.journal("--unit=polytmpd").splitlines() if "X displays" in line]
        assert len(lines) == 1, lines
        alice.run("rm /tmp/.X11-unix/X1*")
        eventually(
            lambda: copies(machine) == ["/tmp/.X99-lock"] or len(copies(machine)) == 2,
            what="alice's are gone",
        )
        end(bob, pid)
        eventually(lambda: copies(machine) == [], what="all are gone")


@pytest.mark.parametrize("how", ["restart", "kill --signal=KILL", "stop"])
def test_a_restarted_daemon_catches_up(machine: Machine, how: str) -> None:
    """Locks stay while it is down. Then those of dead servers go, and those of new servers appear."""
    with machine.session("alice") as alice, machine.session("bob") as bob:
        pids = {display: start(alice, display) for display in (7, 8)}
        eventually(lambda: lock(bob, 7) and lock(bob, 8), what="bob has the locks")
        inode = bob.run("stat -c %i /tmp/.X7-lock")
        if how == "stop":
            machine.run("systemctl", "stop", "polytmpd")
            end(alice, pids[8])
            start(alice, 9)
            assert lock(bob, 8), "no daemon removes it"
            assert not lock(bob, 9)
            machine.run("systemctl", "start", "polytmpd")
            eventually(lambda: not lock(bob, 8) and lock(bob, 9), what="bob has the current locks")
            eventually(lambda: not host_lock(machine, 8) and host_lock(machine, 9), what="and the host")
        else:
            machine.run("systemctl", *how.split(), "polytmpd")
            eventually(
                lambda: machine.run("systemctl", "is-active", "polytmpd").stdout == "active\n",
                what="the daemon is back",
            )
            end(alice, pids[8])
            eventually(
                lambda: not lock(bob, 8) and not host_lock(machine, 8), what="the daemon notices as before"
            )
        assert lock(bob, 7) == f"{pids[7]:10}\n"
        assert bob.run("stat -c %i /tmp/.X7-lock") == inode, "it was not touched"


@pytest.mark.parametrize("how", ["rm -rf /tmp/.X11-unix", "mv /tmp/.X11-unix /tmp/.former"])
def test_the_host_recreates_the_socket_directory(machine: Machine, how: str) -> None:
    """Users who are logged in get the new one; a server in the old one is lost, as on any host."""
    with machine.session("alice") as alice, machine.session("bob") as bob:
        start(alice, 7)
        eventually(lambda: lock(bob, 7), what="bob has the lock")
        machine.sh(f"{how}; systemd-tmpfiles --create --boot --prefix=/tmp")
        identity = "stat -c '%d %i %a %u' /tmp/.X11-unix"
        eventually(
            lambda: alice.run(identity) == bob.run(identity) == machine.sh(identity).stdout,
            30,
            "all have the new directory",
        )
        eventually(lambda: not lock(bob, 7), what="the lost server's lock is gone")
        pid = start(alice, 8)
        assert can_connect(bob, 8)
        assert machine.sh("DISPLAY=:8 xdpyinfo").returncode == 0
        eventually(lambda: lock(bob, 8) == f"{pid:10}\n", what="bob has the new server's lock")
        assert bob.run("findmnt -no PROPAGATION /tmp/.X11-unix").strip() == "private"
        assert bob.run("grep -c ' /tmp/.X11-unix ' /proc/self/mountinfo").strip() == "1"
        machine.sh("rm -rf /tmp/.former")
    # and the namespaces still end
    observe.log_everybody_out(machine)
    assert observe.held(machine) == []


def test_the_remedy_for_a_socket_directory_that_a_user_made(machine: Machine) -> None:
    """As docs/x11.md has it. The lines of x11.conf are for the boot (tmpfiles.d(5), "!")."""
    remedy = next(line for line in X11.read_text().splitlines() if line.startswith("rm -r /tmp/.X11-unix"))
    observe.log_everybody_out(machine)
    machine.sh("rm -r /tmp/.X11-unix; setpriv --reuid=svc --clear-groups mkdir -m 1777 /tmp/.X11-unix")
    is_mounted = "findmnt -no TARGET /tmp/.X11-unix || true"
    with machine.session("alice") as alice:
        assert alice.run(is_mounted) == ""
    observe.log_everybody_out(machine)
    machine.sh(remedy)
    assert machine.run("stat", "-c", "%U %a", "/tmp/.X11-unix").stdout == "root 1777\n"
    with machine.session("alice") as alice:
        assert alice.run(is_mounted) == "/tmp/.X11-unix\n"

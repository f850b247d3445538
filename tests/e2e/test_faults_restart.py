# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon, the service manager or the package is restarted, replaced or removed while users are logged
in; and root changes an instance behind the daemon's back.

Not here: the daemon dies in the middle of a step (test_faults).
"""

import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import observe
from tests.bed import eventually
from tests.faults.bed import Host, resident

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.prepared(by=observe.quick_logouts),
]

ALICE, BOB = 1001, 1002


@contextlib.contextmanager
def nobody_notices(host: Host) -> Iterator[None]:
    """bob stays logged in. Afterwards bob's next login joins, alice's first one works, and all of it ends as
    usual.
    """
    with resident(host.machine) as bob:
        yield
        bob.check()
        eventually(lambda: host.state(BOB) == "active", 60, "the daemon knows bob's instance")
        again = host.login("bob", f"cat /tmp/mine; {observe.NAMESPACE}").stdout.split()
        assert again == ["mine", bob.namespace]
        assert host.login("alice", "touch /tmp/x; ls /tmp").stdout.split() == ["x"]
        bob.check()
        eventually(lambda: host.instances() == {BOB: "active"}, 60, "alice's instance is gone")
    host.wait_gone()


LOGINS = """number=0; for user in alice alice bob; do number=$((number + 1))
  (while test ! -e /run/enough; do
    su - $user -c "readlink /proc/self/ns/mnt" 2>&1 && printf . >> /run/logins
  done | sort | uniq -c > /run/seen-$number) &
done
wait
"""
"""Users who log in and out, over and over; a refused login prints the reason."""

# Restarts


@pytest.mark.parametrize("end", ["systemctl restart polytmpd", "systemctl kill -s KILL polytmpd"])
def test_nobody_is_refused_while_the_daemon_is_restarted(host: Host, end: str) -> None:
    """A login whose request the old daemon does not answer asks the new one."""
    host.machine.sh("rm -f /run/enough /run/logins /run/seen-*; : > /run/logins")
    logins = Path(host.root / "run/logins")
    crowd = host.machine.popen("bash", "-c", LOGINS)
    try:
        for _ in range(8):
            count = len(logins.read_text())
            eventually(lambda: len(logins.read_text()) > count + 3, 60, "logins go on")  # noqa: B023
            host.machine.run("systemctl", "reset-failed", "polytmpd")
            host.machine.sh(end)
    finally:
        (host.root / "run/enough").touch()
        crowd.communicate(timeout=60)
    seen = host.machine.sh("cat /run/seen-*").stdout.splitlines()
    assert len(logins.read_text()) > 24
    namespaces = [line.split()[1] for line in seen]
    assert [line for line in seen if "mnt:[" not in line] == []
    assert host.host_namespace() not in namespaces
    host.wait_gone()


def test_systemctl_restart(host: Host) -> None:
    with nobody_notices(host):
        before = host.pid()
        host.machine.run("systemctl", "restart", "polytmpd")
        assert host.pid() != before


def test_the_socket_is_started_as_often_as_the_service(host: Host) -> None:
    """systemd gives up on other sockets at the sixth start in ten seconds."""
    with nobody_notices(host):
        for _ in range(7):
            host.machine.run("systemctl", "stop", "polytmpd.service", "polytmpd.socket")
            host.machine.run("systemctl", "start", "polytmpd.service")
        assert host.machine.run("systemctl", "is-active", "polytmpd.socket").stdout == "active\n"


def test_what_it_does_goes_to_the_journal(host: Host) -> None:
    """SIGUSR1 would end a program that does not expect it."""
    show = ("systemctl", "show", "--property=MainPID,NRestarts", "polytmpd")
    with nobody_notices(host):
        before, begin = host.machine.run(*show).stdout, host.machine.now()
        host.machine.run("systemctl", "kill", "--kill-whom=main", "--signal=SIGUSR1", "polytmpd")

        def written() -> bool:
            text = host.machine.journal("-u", "polytmpd", "--since", begin, "--output=cat")
            return "different stacks" in text and "in run_forever" in text

        eventually(written, 20, "the stacks are in the journal")
        assert host.machine.run(*show).stdout == before


def test_stop_and_start(host: Host) -> None:
    """Debian 12's systemd drops the FD store at a stop: the namespace is found through its processes."""
    with nobody_notices(host):
        host.machine.run("systemctl", "stop", "polytmpd")
        kept = host.service()["NFileDescriptorStore"]
        assert kept == ("0" if host.machine.release == "bookworm" else "2")
        host.machine.run("systemctl", "start", "polytmpd")
        assert host.traces().watches == 1


def test_a_logout_while_the_daemon_is_stopped(host: Host) -> None:
    with resident(host.machine):
        host.machine.run("systemctl", "stop", "polytmpd")
    eventually(lambda: not host.machine.sh("pgrep -u bob; true").stdout, 60, "bob is gone")
    assert len(host.on_disk()) == 1
    host.machine.run("systemctl", "start", "polytmpd")
    host.wait_gone()


def test_a_logout_while_the_daemon_stands_still(host: Host) -> None:
    pid = str(host.pid())
    with resident(host.machine):
        host.machine.run("kill", "-STOP", pid)
    eventually(lambda: not host.machine.sh("pgrep -u bob; true").stdout, 60, "bob is gone")
    host.machine.run("kill", "-CONT", pid)
    host.wait_gone()
    assert str(host.pid()) == pid


def test_the_watchdog_restarts_a_daemon_that_stands_still(host: Host) -> None:
    with host.watchdog(), nobody_notices(host):
        before = host.running()
        host.machine.run("kill", "-STOP", str(before))
        # A login meanwhile waits and is answered, by the next daemon or with a refusal.
        result = host.login("alice", observe.NAMESPACE, check=False)
        if result.returncode:
            assert "polytmp: cannot give you a private /tmp" in result.stdout + result.stderr
        else:
            assert result.stdout.strip() != host.host_namespace()
        eventually(lambda: host.running() not in {0, before}, 60, "another daemon runs")
        assert "atchdog timeout" in host.machine.journal("-u", "polytmpd")


def test_daemon_reexec(host: Host) -> None:
    with nobody_notices(host):
        host.machine.run("systemctl", "daemon-reexec")
        assert host.service()["NFileDescriptorStore"] == "2"
        host.machine.run("systemctl", "restart", "polytmpd")


MANY = 300
PEOPLE = f"""
for uid in $(seq 20001 {20000 + MANY}); do
  echo "many$uid:x:$uid:$uid::/:/bin/sh" >>/etc/passwd
  systemd-run --quiet --collect --unit=many-$uid --slice=user-$uid.slice sleep infinity
  busctl call org.polytmp1 /org/polytmp1 org.polytmp1.Manager AcquireNamespace u $uid >/dev/null
done
"""


def test_daemon_reexec_with_many_users(host: Host) -> None:
    """They have more slices than the bus lets a program wait for answers about."""
    try:
        host.machine.sh(PEOPLE, timeout=200)
        assert len(host.instances()) == MANY
        since = host.machine.sh("date +%s").stdout.strip()
        host.machine.run("systemctl", "daemon-reexec")
        assert host.login("alice", "echo in").stdout == "in\n"
        for end in ("systemctl stop many-20001", "systemctl restart polytmpd; systemctl stop many-20002"):
            before = len(host.instances())
            host.machine.sh(end)
            eventually(lambda: len(host.instances()) == before - 1, 60, "one instance is gone")  # noqa: B023
        assert "Failed to query" not in host.machine.journal("-u", "polytmpd", f"--since=@{since}")
    finally:
        host.machine.sh("systemctl stop 'many-*'; sed -i /^many/d /etc/passwd")
    host.wait_gone()


def test_a_second_daemon_refuses_to_run(host: Host) -> None:
    with nobody_notices(host):
        before = host.traces()
        result = host.machine.run("/usr/libexec/polytmpd", check=False, timeout=30)
        assert result.returncode == 1
        assert "another polytmpd is running" in host.machine.journal("--grep=Cannot start")
        assert host.traces() == before


# Behind the daemon's back


def test_the_barrier_is_removed_by_root(host: Host) -> None:
    with host.machine.session("alice") as alice:
        alice.run("touch /tmp/x")
        namespace = alice.run(observe.NAMESPACE).strip()
        for path in host.on_disk():
            host.machine.sh(f"chattr -R -f -i {path}; rm -rf {path}", check=False)
        assert alice.run("ls /tmp").split() == []
        assert host.login("alice", observe.NAMESPACE).stdout.strip() == namespace
        assert host.state(ALICE) == "active"
    host.wait_gone()
    assert host.login("alice", "touch /tmp/x; ls /tmp").stdout.split() == ["x"]
    host.wait_gone()


def test_the_barrier_is_replaced_by_root(host: Host) -> None:
    """Files that are not polytmp's stay, the journal reports it, and the next login works."""
    machine = host.machine
    with machine.session("alice") as alice:
        alice.run("touch /tmp/x")
        [path] = host.on_disk()
        machine.sh(f"chattr -i {path}; mv {path} /tmp/moved; mkdir -m 0755 {path}; touch {path}/precious")
        assert alice.run("ls /tmp").split() == ["x"]
    eventually(lambda: host.state(ALICE) in {"failed", None}, 60, "alice's instance has ended")
    assert machine.run("ls", path).stdout.split() == ["precious"]
    assert host.journal_of("Failed to delete the instance", path)
    assert host.login("alice", "touch /tmp/y; ls /tmp").stdout.split() == ["y"]
    machine.sh(f"chattr -R -f -i /tmp/moved; rm -rf {path} /tmp/moved")
    host.wait_gone()


def test_a_bind_mount_in_a_namespace_of_the_users_own(
    host: Host, elsewhere: Callable[[list[str]], None]
) -> None:
    """It has no sentinel, and the slice does not know it; the instance stays until the namespace ends."""
    machine = host.machine
    with machine.session("alice") as alice:
        alice.run("echo kept > /tmp/kept")
        alice.run(
            "setsid -f bwrap --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/lib /lib "
            "--symlink usr/lib64 /lib64 --bind /tmp /tmp sleep infinity >/tmp/log 2>&1"
        )
        pid = eventually(lambda: machine.run("pgrep", "-x", "sleep").stdout.split(), what="bwrap runs")[0]
        elsewhere([pid])
        machine.run("pkill", "-KILL", "-x", "bwrap")
    eventually(lambda: host.journal_of(f"Process {pid} has the instance of UID {ALICE} mounted"), 20)
    [path] = host.on_disk()

    def stays() -> None:
        assert machine.run("cat", f"{path}/tmp/kept").stdout == "kept\n"
        assert host.state(ALICE) == "draining"

    stays()
    for command in ("restart", "stop", "start"):
        machine.run("systemctl", command, "polytmpd")
    stays()
    rejoined = host.login("alice", f"cat /tmp/kept; {observe.NAMESPACE}").stdout.split()
    assert rejoined[0] == "kept"
    eventually(lambda: host.traces().held == 0 and host.state(ALICE) == "draining", 60, "it drains again")
    stays()
    machine.run("kill", pid)
    host.wait_gone()


# The package, and the next boot


def test_an_upgrade(host: Host, package: str) -> None:
    with nobody_notices(host):
        before = host.pid()
        host.machine.run("dpkg", "--install", package)
        assert host.pid() != before


def test_removal_and_purge(host: Host, package: str) -> None:
    """Users who are logged in go on working; new logins get the host's /tmp.

    In the end, bob's /tmp is left, which the next boot or the next installation deletes, and bob's /var/tmp.
    """
    machine = host.machine
    with resident(machine) as bob:
        machine.run("dpkg", "--remove", "polytmp")
        bob.check()
        new = host.login("alice", f"{observe.NAMESPACE}; ls -d /tmp/polytmp-*").stdout.split()
        [path] = host.on_disk()
        assert new == [host.host_namespace(), path]
        flags = machine.sh(f"lsattr -d {path} {path}/tmp/.*-unix /var/tmp/polytmp-1002").stdout
        assert [line for line in flags.splitlines() if "i" in line.split()[0]] == [], "root can delete them"
        assert host.login("bob", observe.NAMESPACE).stdout.strip() == host.host_namespace()
        assert machine.run("systemctl", "is-active", "polytmpd", check=False).stdout == "inactive\n"
        machine.run("dpkg", "--purge", "polytmp")
        assert not (host.root / "run/polytmpd").exists()
        bob.check()
    eventually(lambda: bob.namespace not in observe.namespaces(machine), 60, "bob's namespace has ended")
    assert host.on_disk() == (path,)
    assert machine.run("cat", "/var/tmp/polytmp-1002/tmp/mine").stdout == "mine\n"
    found = machine.sh("find / -xdev -name '*polytmp*' ! -path '/tmp/*' ! -path '/var/tmp/*' | sort").stdout
    assert [line for line in found.split() if line != package and "/var/lib/systemd" not in line] == []
    machine.run("dpkg", "--install", package)
    host.wait_gone()
    assert host.login("bob", f"cat /var/tmp/mine; ls /tmp; {observe.NAMESPACE}").stdout.split()[0] == "mine"


def test_reboot_with_leftovers(host: Host) -> None:
    machine = host.machine
    name = f"polytmp-removing-{secrets.token_hex(8)}"
    machine.sh(f"mkdir -m 0700 /var/tmp/{name}; touch /var/tmp/{name}/file")
    with resident(machine):
        [path, _] = host.on_disk()
        machine.reboot()
    assert path not in host.on_disk()
    host.wait_gone()
    assert host.login("bob", "cat /var/tmp/mine; ls /tmp").stdout.split() == ["mine"]
    host.wait_gone()


def test_a_soft_reboot(host: Host) -> None:
    """systemd ends every process and starts the services again: /run, /tmp, FD store and boot ID stay."""
    machine = host.machine
    if machine.release == "bookworm":
        pytest.skip("expected: systemd 252 has no soft-reboot")
    command = ("systemctl", "show", "--property=SoftRebootsCount", "--value")
    before = int(machine.run(*command).stdout)
    with resident(machine):
        machine.run("loginctl", "enable-linger", "alice")
        eventually(lambda: host.state(ALICE), 30, "alice's manager has started")
        [old, *_] = [path for path in host.on_disk() if "-1001-" in path]
        machine.run("systemctl", "soft-reboot", check=False)
        eventually(lambda: int(machine.run(*command, timeout=10).stdout) == before + 1, 120, "soft-reboot")
        up = ("systemctl", "is-system-running", "--wait")
        eventually(lambda: machine.run(*up, check=False).stdout in {"running\n", "degraded\n"}, 120, "up")
        eventually(lambda: host.login("bob", "true").returncode == 0, 30, "bob logs in")
    eventually(lambda: host.state(BOB) is None, 30, "bob's old instance is gone")
    assert host.login("bob", "cat /var/tmp/mine; ls /tmp").stdout.split() == ["mine"]
    with machine.session("alice") as alice:
        namespace = alice.run(observe.NAMESPACE)
        manager = machine.run("pgrep", "-u", "alice", "-x", "systemd").stdout.strip()
        assert machine.run("readlink", f"/proc/{manager}/ns/mnt").stdout == namespace
        assert namespace.strip() != host.host_namespace()
        assert old not in host.on_disk(), "the old instance has ended"
    machine.run("loginctl", "disable-linger", "alice")
    host.wait_gone()

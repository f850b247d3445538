# SPDX-License-Identifier: LGPL-2.1-or-later
"""State files and FD stores that make no sense or are lost, and no room left for an instance.

Not here: restarts (test_faults_restart), the reading of a state file (tests/unit/test_state).
"""

import contextlib
import json
from collections.abc import Callable, Iterator

import pytest

from tests import observe
from tests.bed import eventually
from tests.faults.bed import Host, Resident, prepare, resident
from tests.faults.launcher import Plan

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.prepared(by=prepare)]

ALICE, BOB = 1001, 1002
STATES = "/run/polytmpd/instances"
STATE = f"{STATES}/{BOB}"


def restart(host: Host) -> None:
    host.machine.run("systemctl", "restart", "polytmpd")


def assert_found_again(host: Host, bob: Resident) -> None:
    """The daemon has all of bob's instance again: bob can join, and the daemon will notice the end."""
    bob.check()
    eventually(lambda: host.state(BOB) == "active", 60, "bob's instance is active again")
    again = host.login("bob", f"cat /tmp/mine; {observe.NAMESPACE}").stdout.split()
    assert again == ["mine", bob.namespace]
    shown = observe.status(host.machine, "bob")
    assert f"mnt:[{shown['namespace']}]" == bob.namespace
    assert [entry["directory"] for entry in shown["directories"]] == ["/tmp", "/var/tmp"]
    assert host.states() == (str(BOB),)
    if (host.root / STATE.removeprefix("/")).is_file():
        assert json.loads(host.machine.read(STATE))["watches"], "nothing will report the end"


@contextlib.contextmanager
def bob_and_the_end(host: Host) -> Iterator[Resident]:
    with resident(host.machine) as bob:
        yield bob
    host.wait_gone()


def changed(**values: object) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | values)


BAD: dict[str, Callable[[str], str]] = {
    "empty": lambda _: "",
    "truncated": lambda text: text[: len(text) // 2],
    "binary": lambda _: "\0\0\0\0",
    "of another type": lambda _: "[1, 2]",
    "of a future version": changed(version=99),
    "of an earlier version": lambda _: '{"uid": 1002}',
    "of another user": changed(uid=ALICE),
    "of wrong directories": changed(directories=[{"path": "../etc", "lifetime": "x"}]),
    "too large": lambda text: text + " " * 70000,
    "deep": lambda _: "[" * 60000,
}
PLACED = {
    "a symbolic link": f"ln -s /etc/passwd {STATE}",
    "a FIFO": f"mkfifo {STATE}",
}


def test_state_files_that_make_no_sense(host: Host) -> None:
    """The journal names them; the namespace in the FD store provides the rest."""
    machine = host.machine
    with bob_and_the_end(host) as bob:
        good = machine.read(STATE).decode()
        for what, change in BAD.items():
            machine.write(STATE, change(good), 0o600)
            since = machine.sh("journalctl -n 0 --show-cursor | sed -n 's/^-- cursor: //p'").stdout.strip()
            restart(host)
            lines = machine.journal("-u", "polytmpd", f"--after-cursor={since}")
            assert f"{STATE}: " in lines, what
            assert "ignoring the file" in lines, what
            bob.check()
            assert json.loads(machine.read(STATE))["namespace"] == json.loads(good)["namespace"], what
        for command in PLACED.values():
            machine.sh(f"rm {STATE}; {command}")
            restart(host)
            bob.check()
            assert json.loads(machine.read(STATE))["uid"] == BOB
        assert_found_again(host, bob)
    assert machine.run("getent", "passwd", "bob").stdout.startswith("bob:")


def test_a_state_file_that_cannot_be_a_file(host: Host) -> None:
    """root has put a directory there: it is moved, and everything else works."""
    machine = host.machine
    with bob_and_the_end(host) as bob:
        machine.sh(f"rm {STATE}; mkdir {STATE}; touch {STATE}/notes")
        restart(host)
        assert_found_again(host, bob)
        assert host.journal_of(f"{STATE} is not a regular file; moved to")
        machine.sh(f"test -f {STATE}; rm {STATE}; mkdir {STATE}")  # and once more while it runs
    assert machine.sh("cd /run/polytmpd; ls found-*/").stdout.split().count("notes") == 1
    machine.sh("rm -r /run/polytmpd/found-*")


def test_the_state_is_lost(host: Host) -> None:
    with bob_and_the_end(host) as bob:
        host.machine.sh(f"rm {STATES}/*")
        restart(host)
        assert_found_again(host, bob)


SEARCH = "SystemCallFilter=~open_by_handle_at"


@pytest.fixture(params=["by ID", "by search"])
def way(request: pytest.FixtureRequest, host: Host) -> Iterator[str]:
    """How the daemon finds a namespace: by ID on kernels that do that, and otherwise in /proc."""
    if request.param == "by ID":
        if not observe.opens_by_id(host.machine):
            pytest.skip("expected: needs Linux 6.18, before 6.18.50: the machine is a container")
        yield request.param
    else:
        with host.setting(SEARCH):
            yield request.param


@pytest.mark.usefixtures("way")
def test_the_fd_store_is_lost(host: Host) -> None:
    with bob_and_the_end(host) as bob:
        stop_and_clear_the_store(host)
        host.machine.run("systemctl", "start", "polytmpd")
        assert_found_again(host, bob)


@pytest.mark.usefixtures("way")
def test_state_and_fd_store_are_lost(host: Host) -> None:
    with bob_and_the_end(host) as bob:
        stop_and_clear_the_store(host)
        host.machine.sh(f"rm -r {STATES}")
        host.machine.run("systemctl", "start", "polytmpd")
        assert_found_again(host, bob)


IN_FLIGHT = """
import os, signal, socket, sys
ours, theirs = socket.socketpair()
fd = os.open(f"/proc/{sys.argv[1]}/ns/mnt", os.O_RDONLY)
socket.send_fds(ours, [b"."], [fd])
os.close(fd)
print("sent", flush=True)
signal.pause()
"""


def test_no_process_is_left_to_be_found(host: Host, way: str) -> None:
    """Only a descriptor in flight keeps the namespace. Its ID opens it; without, bob gets another one."""
    machine = host.machine
    with contextlib.ExitStack() as stack:
        with resident(machine) as bob:
            pid = machine.run("pgrep", "-u", "bob", "-x", "bash").stdout.split()[0]
            keeper = machine.popen("python3", "-I", "-c", IN_FLIGHT, pid)
            stack.callback(keeper.communicate)
            stack.callback(keeper.kill)
            assert keeper.stdout is not None
            assert keeper.stdout.readline() == b"sent\n"
        eventually(lambda: not machine.sh("pgrep -u bob; true").stdout, 60, "bob is gone")
        eventually(lambda: host.state(BOB) == "draining", 60, "the namespace is kept")
        stop_and_clear_the_store(host)
        machine.run("systemctl", "start", "polytmpd")
        again = host.login("bob", f"{observe.NAMESPACE}; cat /tmp/mine", check=False).stdout.split()
        assert (again == [bob.namespace, "mine"]) == (way == "by ID")
    host.wait_gone()


MANY = 50
PEOPLE = f"""
for uid in $(seq 20001 {20000 + MANY}); do
  echo "many$uid:x:$uid:$uid::/:/bin/sh" >>/etc/passwd
  systemd-run --quiet --collect --unit=many-$uid --slice=user-$uid.slice sh -c "
    busctl call org.polytmp1 /org/polytmp1 org.polytmp1.Manager AcquireNamespace u $uid >/dev/null
    exec polytmpctl enter many$uid sh -c 'echo mine >/tmp/mine; exec sleep infinity'"
done
"""
SEEN = f"""
for uid in $(seq 20001 {20000 + MANY}); do
  pid=$(systemctl show --property=MainPID --value many-$uid)
  echo $uid $(readlink /proc/$pid/ns/mnt) $(cat /proc/$pid/root/tmp/mine)
done
"""


def seen_by(host: Host) -> dict[int, str]:
    """UID → namespace of those who have their file, as the processes in it see it."""
    lines = [line.split() for line in host.machine.sh(SEEN).stdout.splitlines()]
    return {int(uid): namespace for uid, namespace, mine in lines if mine == "mine"}


@pytest.mark.usefixtures("way")
def test_the_fd_store_is_lost_with_many_users(host: Host) -> None:
    """All keep their namespaces, and ends are noticed: also of those who leave while no daemon runs."""
    machine = host.machine
    try:
        machine.sh(PEOPLE, timeout=200)
        eventually(lambda: len(seen_by(host)) == MANY, 60, "all have their files")
        before = seen_by(host)
        stop_and_clear_the_store(host)
        machine.sh("systemctl stop many-2000{1..9}")
        machine.run("systemctl", "start", "polytmpd")
        left = {uid: namespace for uid, namespace in before.items() if uid > 20009}
        eventually(lambda: host.instances().keys() == left.keys(), 120, "41 are left")
        eventually(lambda: host.traces().held == len(left), 60, "they are held again")
        for uid, namespace in left.items():
            assert f"mnt:[{observe.status(machine, str(uid))['namespace']}]" == namespace
            assert json.loads(machine.read(f"{STATES}/{uid}"))["watches"], "nothing will report the end"
        machine.run("polytmpctl", "enter", "many20050", "test", "-e", "/tmp/mine")
        assert (
            machine.run("polytmpctl", "enter", "many20050", "readlink", "/proc/self/ns/mnt").stdout.strip()
            == left[20050]
        )
    finally:
        machine.sh("systemctl stop 'many-*'; sed -i /^many/d /etc/passwd")
    host.wait_gone()


def stop_and_clear_the_store(host: Host) -> None:
    host.machine.run("systemctl", "stop", "polytmpd")
    if host.machine.release != "bookworm":  # systemd 252 has done so itself
        host.machine.run("systemctl", "clean", "--what=fdstore", "polytmpd")
    assert host.service()["NFileDescriptorStore"] == "0"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (f"ns-{BOB}", "/etc/passwd"),
        (f"ns-{BOB}", "/proc/1/ns/net"),
        (f"ns-{BOB}", "/proc/1/ns/mnt"),
        (f"ns-{ALICE}", "/proc/1/ns/mnt"),
        (f"ns-{BOB}x", "/dev/null"),
        ("sentinels", "/dev/null"),
        ("nonsense", "/etc"),
    ],
)
def test_the_fd_store_holds_what_makes_no_sense(host: Host, name: str, path: str) -> None:
    """Instead of polytmpd's own descriptor, or beside it."""
    with bob_and_the_end(host) as bob:
        before = host.pid()
        (host.root / "run/polytmp-faults/store").write_text(json.dumps([[name, path]]))
        host.machine.run("kill", "-KILL", str(before))
        # the next daemon stores it and dies, and the one after that finds it
        eventually(lambda: host.running() not in {0, before}, 60, "the daemon runs again")
        assert host.journal_of("FD store", "closing it")
        assert_found_again(host, bob)
        assert host.traces().stored == 2


# No room


def assert_refused(host: Host, *words: str) -> None:
    result = host.login("alice", "true", check=False)
    assert result.returncode
    assert "polytmp: cannot give you a private /tmp" in result.stdout + result.stderr
    assert host.journal_of("Failed to make private directories for user alice", *words)
    host.wait_gone("nothing is left of the refused login")


def assert_works(host: Host) -> None:
    assert host.login("alice", "touch /tmp/x; ls /tmp").stdout.split() == ["x"]
    host.wait_gone()


@pytest.fixture
def small_tmp(host: Host) -> Iterator[None]:
    """/tmp is a small file system."""
    machine = host.machine
    machine.sh(
        "truncate -s 4M /root/small.img; mkfs.ext4 -q -F -N 512 /root/small.img; "
        "mount -o loop /root/small.img /tmp; chmod 1777 /tmp; rmdir /tmp/lost+found; "
        "systemd-tmpfiles --create --prefix=/tmp"
    )
    yield
    host.wait_gone()
    machine.sh("umount /tmp || umount -l /tmp; rm /root/small.img")


def test_a_full_disk(host: Host, small_tmp: None) -> None:
    assert_works(host)
    # ext4 reserves some blocks, which directories may still use
    host.machine.sh(
        "mkdir /tmp/more; cat /dev/zero > /tmp/fill; n=0; "
        "while mkdir /tmp/more/$n; do n=$((n+1)); done 2>/dev/null; df -i /tmp | grep -v ' 100% '",
    )
    assert_refused(host, "No space left on device", "/tmp/polytmp-")
    host.machine.run("rm", "-r", "/tmp/fill", "/tmp/more")
    assert_works(host)


def test_no_inodes(host: Host, small_tmp: None) -> None:
    host.machine.sh("n=0; while touch /tmp/fill$n; do n=$((n+1)); done 2>/dev/null; true", check=False)
    assert_refused(host, "No space left on device", "/tmp/polytmp-")
    host.machine.sh("rm /tmp/fill*")
    assert_works(host)


def test_a_disk_that_fills_up_under_an_instance(host: Host, small_tmp: None) -> None:
    """It can still be removed."""
    with host.machine.session("alice") as alice:
        alice.run("cat /dev/zero > /tmp/fill", check=False)
        host.machine.sh("cat /dev/zero > /tmp/fill; true", check=False)
        assert host.login("alice", "ls /tmp").stdout.split() == ["fill"]
    host.wait_gone()
    host.machine.run("rm", "/tmp/fill")


def test_no_room_for_the_state(host: Host) -> None:
    """The login works without a state file; the FD store is enough to find the instance again."""
    machine = host.machine
    machine.sh(f"mount -t tmpfs -o nr_inodes=1,mode=0700 tmpfs {STATES}")
    try:
        with resident(machine) as bob:
            assert host.journal_of(f"Failed to write the state file of UID {BOB}", "No space left on device")
            machine.run("kill", "-KILL", str(host.pid()))
            eventually(lambda: host.state(BOB) == "active", 60, "bob's instance is active again")
            bob.check()
            assert host.login("bob", "cat /tmp/mine").stdout.split() == ["mine"]
    finally:
        eventually(lambda: not host.instances() and not host.on_disk(), 60, "bob's instance is gone")
        machine.run("umount", "--lazy", STATES)
        restart(host)
    host.wait_gone()


@pytest.mark.parametrize("step", ["mountns.unshare", "mountns.open_tree", "Sentinels.watch"])
def test_a_limit_of_the_kernels(host: Host, step: str) -> None:
    """user.max_mnt_namespaces, fs.mount-max, fs.inotify.max_user_watches.

    They are injected, because the real limits are for the whole system; tests/kernel/test_create_faults.py
    reaches the real ones in namespaces.
    """
    with host.fault(Plan(1, "ENOSPC", step, lasting=True)):
        assert_refused(host, "No space left on device")
    assert_works(host)

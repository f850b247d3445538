# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objection 4: an instance is removed when its last process has ended, wherever that runs, and not before.

Not here: users who try to escape (test_attacks_namespaces).
"""

from collections.abc import Callable

import pytest

from tests import observe
from tests.bed import Machine, eventually

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.prepared(by=observe.quick_logouts),
    pytest.mark.usefixtures("quiet"),
]


def wait_for(machine: Machine, user: str, state: str) -> None:
    eventually(lambda: observe.state(machine, user) == state, 30, f"{user}'s instance is {state}")


def wait_until_gone(machine: Machine, user: str = "alice", timeout: float = 30) -> None:
    """timeout is in seconds."""
    eventually(lambda: observe.gone(machine, user), timeout, f"{user}'s instance is gone")


def stays(machine: Machine, user: str = "alice") -> None:
    """Check that the user has no session any more, the instance drains, and the files are there."""
    eventually(
        lambda: machine.sh(f"pgrep -u {user} sshd || true").stdout.strip() == "",
        20,
        "no login is left",
    )
    wait_for(machine, user, "draining")
    host = observe.directories(machine, user)["/tmp"]
    assert machine.run("cat", f"{host}/mark").stdout == "mark\n"


def test_it_is_gone_after_the_logout(machine: Machine) -> None:
    with machine.session("alice") as alice:
        alice.run("touch /tmp/file")
        assert observe.state(machine, "alice") == "active"
    wait_until_gone(machine)
    assert observe.stored(machine) == 1  # the inotify instance alone
    assert observe.on_disk(machine) == []


def test_terminate_user_removes_it(machine: Machine) -> None:
    with machine.session("alice") as alice:
        alice.run("mkdir -p /tmp/a/b/c; touch /tmp/a/b/c/d")
        machine.run("loginctl", "terminate-user", "alice")
        wait_until_gone(machine)
        alice.kill()


def test_a_broken_connection_removes_it(machine: Machine) -> None:
    session = machine.session("alice")
    session.run("touch /tmp/file")
    session.kill()
    wait_until_gone(machine)


# Processes left behind

NOHUP = "nohup sleep infinity >/dev/null 2>&1 &"


def leave(machine: Machine, command: str, move: Callable[[list[str]], None] | None = None) -> None:
    """Start a command in a session of alice, move its processes if asked to, and end the session."""
    with machine.session("alice") as alice:
        alice.run("echo mark > /tmp/mark")
        alice.run(command)
        if move is not None:
            started = ("pgrep", "-f", "-x", "sleep infinity")
            eventually(lambda: machine.run(*started).stdout, what="the command has started")
            move(observe.processes(machine, "sleep infinity"))


def end(machine: Machine) -> None:
    """End the process that was left behind; the instance ends too."""
    machine.run("pkill", "-f", "sleep infinity")
    wait_until_gone(machine)


@pytest.mark.parametrize(
    "command",
    [NOHUP, "setsid -f sleep infinity >/dev/null 2>&1", "tmux new-session -d 'sleep infinity'"],
    ids=["nohup", "setsid", "tmux"],
)
def test_a_process_left_behind(machine: Machine, command: str) -> None:
    leave(machine, command)
    stays(machine)
    end(machine)


def test_who_is_logged_in_again_finds_the_same_files_and_drains_nothing(machine: Machine) -> None:
    leave(machine, NOHUP)
    stays(machine)
    before = observe.status(machine, "alice")["namespace"]
    with machine.session("alice") as alice:
        assert alice.run(observe.NAMESPACE).strip() == f"mnt:[{before}]"
        assert alice.run("cat /tmp/mark").strip() == "mark"
        wait_for(machine, "alice", "active")
        machine.run("systemctl", "restart", "polytmpd")
        wait_for(machine, "alice", "active")
    wait_for(machine, "alice", "draining")
    machine.run("systemctl", "restart", "polytmpd")
    wait_for(machine, "alice", "draining")
    machine.run("systemctl", "daemon-reexec")
    stays(machine)
    end(machine)


def test_a_user_service_under_linger(machine: Machine) -> None:
    with machine.session("alice") as alice:
        alice.run("echo mark > /tmp/mark")
        machine.run("loginctl", "enable-linger", "alice")
        alice.run("systemd-run --user --quiet --unit=probe sleep infinity")
    stays(machine)
    machine.run("loginctl", "disable-linger", "alice")
    wait_until_gone(machine)


def test_linger_alone_makes_an_instance_without_a_login(machine: Machine) -> None:
    """A single one, although systemd's own processes come and go in the slice before the manager starts."""
    made = observe.instances_made(machine)
    machine.run("loginctl", "enable-linger", "alice")
    wait_for(machine, "alice", "draining")  # alice is not logged in
    manager = eventually(
        lambda: machine.sh("pgrep -u alice -x systemd").stdout.split(), what="alice's manager"
    )
    inode = observe.status(machine, "alice")["namespace"]
    assert machine.run("readlink", f"/proc/{manager[0]}/ns/mnt").stdout.strip() == f"mnt:[{inode}]"
    assert observe.instances_made(machine) == made + 1
    assert observe.held(machine), "sessions join it"
    machine.run("loginctl", "disable-linger", "alice")
    wait_until_gone(machine)


EARLY = """
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=touch /tmp/early /var/tmp/early

[Install]
WantedBy=default.target
"""


def test_a_lingering_user_at_boot(machine: Machine) -> None:
    """Their service manager starts before anyone logs in, and so do their services."""
    place = "/home/alice/.config/systemd/user"
    machine.write(f"{place}/early.service", EARLY)
    machine.sh(f"mkdir {place}/default.target.wants; ln -s ../early.service {place}/default.target.wants/")
    machine.sh("chown -R alice: /home/alice/.config; loginctl enable-linger alice")
    try:
        machine.reboot()
        wait_for(machine, "alice", "draining")  # alice is not logged in
        places = " ".join(f"{path}/early" for path in observe.directories(machine, "alice").values())
        eventually(lambda: not machine.sh(f"ls -d {places}", check=False).returncode, 30, "it has started")
        inode = observe.status(machine, "alice")["namespace"]
        manager = machine.run("pgrep", "-u", "alice", "-x", "systemd").stdout.strip()
        assert machine.run("readlink", f"/proc/{manager}/ns/mnt").stdout == f"mnt:[{inode}]\n"
        assert machine.sh("ls -d /tmp/early /var/tmp/early", check=False).stdout == "", "not on the host"
        with machine.session("alice") as alice:
            assert alice.run(observe.NAMESPACE) == f"mnt:[{inode}]\n"
            assert alice.run("ls /tmp/early /var/tmp/early").split() == ["/tmp/early", "/var/tmp/early"]
    finally:
        machine.sh(
            "loginctl disable-linger alice; rm -r /home/alice/.config; rm -f /var/tmp/polytmp-1001/tmp/early"
        )
    wait_until_gone(machine)


def test_a_cron_job(machine: Machine) -> None:
    """cron has neither a logind session nor a process in the user's slice: only the namespace shows it."""
    job = "#!/bin/sh\necho mark > /tmp/mark\nreadlink /proc/self/ns/mnt > /home/alice/ns\nsleep infinity\n"
    machine.write("/usr/local/bin/job", job, mode=0o755)
    machine.write("/etc/cron.d/probe", "* * * * * alice /usr/local/bin/job\n")
    try:
        eventually(lambda: observe.processes(machine, "sleep infinity"), 90, "cron starts the job")
        machine.run("rm", "/etc/cron.d/probe")
        stays(machine)
        inode = observe.status(machine, "alice")["namespace"]
        assert machine.run("cat", "/home/alice/ns").stdout.strip() == f"mnt:[{inode}]"
        assert observe.held(machine) == []
    finally:
        machine.sh("rm -f /etc/cron.d/probe; pkill -x sleep", check=False)
    wait_until_gone(machine)


def test_a_command_as_another_user(machine: Machine) -> None:
    """bob's process lives in alice's namespace: her logout takes no file from under it."""
    leave(machine, "sudo -u bob sh -c 'exec 9>/tmp/of-bob; exec sleep infinity' >/dev/null 2>&1 &")
    stays(machine)
    pid = eventually(lambda: machine.run("pgrep", "-u", "bob", "sleep").stdout.strip(), what="bob's process")
    assert machine.run("cat", f"/proc/{pid}/root/tmp/mark").stdout == "mark\n"
    assert machine.run("stat", "-Lc", "%h %U", f"/proc/{pid}/fd/9").stdout == "1 bob\n"
    assert observe.state(machine, "bob") is None
    end(machine)


def test_a_login_by_another_user(machine: Machine) -> None:
    """The process is in bob's session and slice, but lives in alice's namespace."""
    with machine.session("bob") as bob:
        bob.run("sudo -iu alice sh -c 'echo mark > /tmp/mark; exec sleep infinity' >/dev/null 2>&1 &")
        started = ("pgrep", "-f", "-x", "sleep infinity")
        eventually(lambda: machine.run(*started).stdout, what="sudo has started it")
        stays(machine)
        machine.run("pkill", "-f", "-x", "sleep infinity")
        eventually(lambda: observe.state(machine, "alice") is None, 20, "alice's instance is gone")
        assert observe.state(machine, "bob") == "active"


def test_a_process_moved_to_another_cgroup(machine: Machine, elsewhere: Callable[[list[str]], None]) -> None:
    leave(machine, NOHUP, elsewhere)
    stays(machine)
    end(machine)


def test_a_login_while_draining_finds_the_same_files(
    machine: Machine, elsewhere: Callable[[list[str]], None]
) -> None:
    leave(machine, NOHUP, elsewhere)
    wait_for(machine, "alice", "draining")
    before = observe.status(machine, "alice")["namespace"]
    with machine.session("alice") as alice:
        assert alice.run("cat /tmp/mark").strip() == "mark"
        assert alice.run(observe.NAMESPACE).strip() == f"mnt:[{before}]"
        assert observe.state(machine, "alice") == "active"
        machine.run("pkill", "-f", "sleep infinity")
        assert alice.run("cat /tmp/mark").strip() == "mark"
    wait_until_gone(machine)


def test_a_namespace_held_by_a_descriptor_alone(machine: Machine) -> None:
    """No process lives in it, but one could enter it again: it stays until the descriptor is closed."""
    with machine.session("alice") as alice:
        alice.run("echo mark > /tmp/mark")
        shell = alice.run("echo $$").strip()
        holder = machine.popen("sh", "-c", f"exec 9</proc/{shell}/ns/mnt; echo open; cat")
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
    stays(machine)
    holder.communicate()
    wait_until_gone(machine)


def test_a_private_namespace_made_by_the_user_counts_too(
    machine: Machine, elsewhere: Callable[[list[str]], None]
) -> None:
    leave(machine, "unshare -Urm sleep infinity >/dev/null 2>&1 &", elsewhere)
    stays(machine)
    end(machine)


# What processes hide from who reads their mountinfo

CAGE = (
    "setsid -f bwrap --unshare-user --uid 0 --gid 0 --cap-add ALL --bind /usr /usr --symlink usr/lib /lib "
    "--symlink usr/lib64 /lib64 --symlink usr/bin /bin --dev /dev --bind /tmp /tmp sh -c '{}' "
    ">/dev/null 2>&1"
)
WRITER = 'sh -c "while date >/tmp/alive; do sleep 0.2; done"'
CHROOTED = "exec /usr/sbin/chroot /usr /bin/sleep infinity"


def cage(machine: Machine, move: Callable[[list[str]], None], command: str) -> list[str]:
    """Leave behind only a bwrap of alice's with nothing of polytmp's but a bind mount of her /tmp.

    Returns the PIDs of the processes in it, the lowest first.
    """
    with machine.session("alice") as alice:
        alice.run("echo mark > /tmp/mark")
        alice.run(CAGE.format(command))
        eventually(
            lambda: machine.run("pgrep", "-xf", "/bin/sleep infinity").stdout, what="the cage is there"
        )
        lowest = machine.run("pgrep", "-xf", "/bin/sleep infinity").stdout.strip()
        found = machine.sh(
            f"at=$(readlink /proc/{lowest}/ns/mnt); for pid in $(pgrep -u alice); do "
            "test $(readlink /proc/$pid/ns/mnt) != $at || echo $pid; done"
        ).stdout.split()
        move(found)
        # bwrap's own parent process stays in the instance's namespace.
        machine.run("pkill", "-KILL", "-u", "alice", "-xf", "bwrap.*")
    return found


def is_waited_for(machine: Machine, text: str) -> None:
    eventually(
        lambda: text in machine.journal("-u", "polytmpd", "-n", "20", "--output=cat"),
        20,
        "the search is over",
    )
    stays(machine)


def test_a_process_in_a_chroot_does_not_hide_what_another_writes(
    machine: Machine, elsewhere: Callable[[list[str]], None]
) -> None:
    """Both are in a namespace of alice's, outside of her slice; the one in the chroot has the lowest PID."""
    found = cage(machine, elsewhere, f"{WRITER} & {CHROOTED}")
    assert machine.run("readlink", f"/proc/{found[0]}/root").stdout.strip() == "/usr"
    assert len(found) > 1
    try:
        is_waited_for(machine, "has the instance of UID 1001 mounted")
        alive = f"{observe.directories(machine, 'alice')['/tmp']}/alive"
        machine.run("rm", alive)
        eventually(lambda: machine.run("cat", alive, check=False).stdout, what="it still writes")
        machine.run("systemctl", "restart", "polytmpd")
        is_waited_for(machine, "has the instance of UID 1001 mounted")
    finally:
        machine.sh("pkill -KILL -u alice; true")
    wait_until_gone(machine)


def test_all_processes_are_in_a_chroot(machine: Machine, elsewhere: Callable[[list[str]], None]) -> None:
    cage(machine, elsewhere, CHROOTED)
    try:
        is_waited_for(machine, "has the instance of UID 1001 mounted")
    finally:
        machine.sh("pkill -KILL -u alice; true")
    wait_until_gone(machine)


def test_a_chroot_hides_nobody_who_keeps_the_instance(machine: Machine) -> None:
    """The lowest PID of a copy of the namespace is in a chroot, from where none of its mounts is seen."""
    script = "/bin/sleep 8888 & exec /usr/sbin/chroot /usr /bin/sleep infinity"
    leave(machine, f"setsid -f unshare -Urm sh -c '{script}' >/dev/null 2>&1")
    stays(machine)
    shown = {entry["command"]: entry["how"] for entry in observe.status(machine, "alice")["processes"]}
    assert shown["/bin/sleep infinity"] == shown["/bin/sleep 8888"] == "derived"
    machine.run("pkill", "-KILL", "-u", "alice", "-x", "sleep")
    wait_until_gone(machine)


def test_a_users_own_namespace_held_by_a_descriptor_alone(
    machine: Machine, elsewhere: Callable[[list[str]], None]
) -> None:
    (inside,) = cage(machine, elsewhere, CHROOTED)
    holder = machine.popen("sh", "-c", f"exec 9</proc/{inside}/ns/mnt; echo open; cat")
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"open\n"
    machine.run("kill", "-KILL", inside)
    is_waited_for(machine, "has the instance of UID 1001 mounted")
    stays(machine)
    holder.communicate()
    wait_until_gone(machine, timeout=60)


def test_a_chroot_in_the_instance_does_not_hide_it_from_a_daemon_that_lost_everything(
    machine: Machine, elsewhere: Callable[[list[str]], None]
) -> None:
    with machine.session("alice") as alice:
        alice.run("echo mark > /tmp/mark")
        alice.run("sudo setsid -f chroot --userspec=1001:1001 /usr /bin/sleep infinity >/dev/null 2>&1")
        eventually(lambda: machine.run("pgrep", "-xf", "/bin/sleep infinity").stdout, what="it has started")
        alice.run("setsid -f sleep 7777")
        elsewhere(machine.run("pgrep", "-u", "alice", "-x", "sleep").stdout.split())
        before = alice.run(observe.NAMESPACE).strip()
    stays(machine)
    machine.run("systemctl", "stop", "polytmpd")
    if machine.release != "bookworm":  # systemd 252 has done so itself
        machine.run("systemctl", "clean", "--what=fdstore", "polytmpd")
    machine.run("rm", "-r", "/run/polytmpd/instances")
    machine.run("systemctl", "start", "polytmpd")
    stays(machine)
    assert f"mnt:[{observe.status(machine, 'alice')['namespace']}]" == before
    with machine.session("alice") as alice:
        assert alice.run(observe.NAMESPACE).strip() == before
        assert alice.run("cat /tmp/mark").strip() == "mark"
    machine.run("pkill", "-KILL", "-u", "alice", "-x", "sleep")
    wait_until_gone(machine)


def test_fifty_logins_leave_nothing(machine: Machine) -> None:
    with machine.session("bob") as bob:  # the first login has one-time costs
        bob.run("true")
    wait_until_gone(machine, "bob")
    before = (observe.mounts(machine), observe.daemon_fds(machine), observe.stored(machine))
    namespaces = len(observe.namespaces(machine))
    for number in range(50):
        machine.ssh(
            "alice", f"echo {number} > /tmp/file; test $(ls /tmp | wc -l) = 1 || {{ ls -A /tmp; exit 1; }}"
        )
    wait_until_gone(machine)
    eventually(
        lambda: (observe.mounts(machine), observe.daemon_fds(machine), observe.stored(machine)) == before,
        10,
        "mounts, descriptors and FD store are as before",
    )
    assert len(observe.namespaces(machine)) <= namespaces
    assert observe.on_disk(machine) == []

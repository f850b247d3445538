# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attacks on files and mounts, each run for real: names exchanged, squatted and held, mounts where root
deletes, views that should be closed. docs/SECURITY.md says which threat each test stands for.

Not here: attacks on the bus and with users' names (test_attacks_bus), faults (test_faults*).
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import observe
from tests.attacks import SENTINEL, attack, prepare, program, untouched
from tests.bed import Machine, eventually

pytestmark = pytest.mark.e2e

SLOW = bool(os.environ.get("POLYTMP_SLOW"))
HOST = "readlink /proc/1/ns/mnt"


@pytest.fixture(scope="module")
def machine(release: str, deb: Path) -> Iterator[Machine]:
    with Machine(release, deb, prepare=prepare) as booted:
        yield booted


@pytest.fixture(autouse=True)
def quiet(machine: Machine) -> Iterator[None]:
    observe.log_everybody_out(machine)
    yield
    machine.sh("systemctl stop 'attack-*'; systemctl reset-failed; true", check=False)
    assert machine.run("systemctl", "is-active", "polytmpd").stdout.strip() == "active"
    assert machine.run("systemctl", "show", "-P", "NRestarts", "polytmpd").stdout.strip() == "0"


def directories(machine: Machine, user: str) -> dict[str, str]:
    return {entry["directory"]: entry["path"] for entry in observe.status(machine, user)["directories"]}


def wait_until_gone(machine: Machine, user: str = "alice", timeout: float = 30) -> None:
    eventually(lambda: observe.state(machine, user) is None, timeout, f"{user}'s instance is gone")
    uid = machine.run("id", "-u", user).stdout.strip()
    eventually(
        lambda: not [path for path in observe.on_disk(machine) if f"-{uid}-" in path or "removing" in path],
        timeout,
        "and its files",
    )


# CVE-2025-6020: names that are exchanged while root works on them


def test_names_are_exchanged_while_instances_are_made_and_removed(machine: Machine) -> None:
    """svc in the host's /tmp, alice from a namespace of her own, the daemon in between."""
    squat = program("swap.py", "squat")
    with (
        untouched(machine),
        attack(machine, "svc", f"{squat} /tmp {SENTINEL}") as in_tmp,
        attack(machine, "svc", f"{squat} /var/tmp {SENTINEL}") as in_var_tmp,
    ):
        for _ in range(8):
            with contextlib.ExitStack() as stack:
                inside = (
                    f"mkdir -p /tmp/d/d/d /var/tmp/d/d; ln -s {SENTINEL} /tmp/link; ln -s {SENTINEL} "
                    "/var/tmp/link; "
                    f"timeout 0.3 unshare -Urm {program('swap.py', 'pair', '/tmp/d', '/tmp/link')} & "
                    f"timeout 0.3 {program('swap.py', 'pair', '/var/tmp/d', '/var/tmp/link')} & "
                    "wait; rm -rf /var/tmp/d /var/tmp/link"
                )
                process = machine.popen("su", "-", "alice", "-c", inside)
                stack.callback(process.communicate, timeout=30)
                assert machine.run("su", "bob", "-c", "touch /tmp/x && ls /tmp").stdout.split() == ["x"]
        wait_until_gone(machine)
        wait_until_gone(machine, "bob")
        for attacker in (in_tmp, in_var_tmp):
            tried, worked = map(int, attacker.stop().split())
            assert tried > 1000
            assert worked == 0


def test_the_parent_of_a_mount_is_exchanged_while_a_namespace_is_made(machine: Machine) -> None:
    """What is mounted below the host's /tmp is taken out of a new namespace. Were its path believed, svc
    would have any mount of the host taken away: /tmp/a is his, and a link to / half of the time.
    """
    machine.sh("install -d -o svc /tmp/a /tmp/a/run /tmp/a/dev; ln -s / /tmp/b; chown -h svc /tmp/b")
    outside = "grep -v ' /tmp\\| /var/tmp\\| /run/user/' /proc/{}/mountinfo | cut -d' ' -f4,5 | sort"
    with (
        attack(machine, "svc", program("fuse.py", "hung", "/tmp/a/run"), "mounted"),
        attack(machine, "svc", program("fuse.py", "hung", "/tmp/a/dev"), "mounted"),
        attack(machine, "svc", program("swap.py", "pair", "/tmp/a", "/tmp/b")) as swap,
    ):
        before = machine.sh(outside.format(1)).stdout
        for _ in range(12):
            seen = machine.run("su", "alice", "-c", outside.format("self")).stdout
            assert seen == before
            assert machine.sh(outside.format(1)).stdout == before
            wait_until_gone(machine)
        assert int(swap.stop()) > 10000
    machine.sh("for d in /tmp/a /tmp/b; do test -L $d || umount $d/run $d/dev; done; rm -rf /tmp/a /tmp/b")


# CVE-2024-22365, and squatting: what stands where root opens a directory


@pytest.mark.parametrize(
    "squatter",
    [
        "mkfifo {0}",
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"{0}\")'",
        f"ln -s {SENTINEL}/fifo {{0}}",
        f"ln -s {SENTINEL}/directory {{0}}",
        "mkdir -m 1777 {0}",
        "touch {0}",
    ],
    ids=["fifo", "socket", "link-to-fifo", "link-to-directory", "directory", "file"],
)
def test_a_socket_directory_that_somebody_else_made(machine: Machine, squatter: str) -> None:
    """Root removed it, svc was first: logins go on, it is not shared, and it is never touched."""
    path = "/tmp/.X11-unix"
    show = f"stat -c '%F %a %u %g %i %Y' {path}"
    machine.run("rmdir", path)
    try:
        with untouched(machine):
            machine.run("su", "svc", "-c", squatter.format(path))
            before = machine.sh(show).stdout
            listing = machine.run("su", "alice", "-c", "ls -A /tmp; touch /tmp/x", timeout=20).stdout
            assert ".ICE-unix" in listing.split()
            assert ".X11-unix" not in listing.split()
            assert machine.sh(show).stdout == before
            wait_until_gone(machine)
            assert machine.sh(show).stdout == before
            assert f"{path} is not shared" in machine.journal("-u", "polytmpd", "-n", "30")
    finally:
        machine.sh(f"rm -rf {path}")
    machine.run("su", "alice", "-c", f"touch {path}/of-alice")
    assert machine.sh(f"stat -c '%F %a %u %g' {path}").stdout == "directory 1777 0 0\n"
    machine.run("rm", f"{path}/of-alice")


def test_a_barrier_with_something_mounted_on_it(machine: Machine) -> None:
    """A FUSE that never answers, at the one name that can be known before the first login."""
    path = "/var/tmp/polytmp-1001"
    machine.sh(f"rm -rf {path}; install -d -o svc -m 0700 {path}")
    with attack(machine, "svc", program("fuse.py", "hung", path), "mounted"):
        assert machine.run("su", "alice", "-c", "true", check=False, timeout=20).returncode != 0
        assert machine.run("su", "bob", "-c", "echo in", timeout=20).stdout == "in\n"
        assert "something is mounted on it" in machine.journal("-u", "polytmpd", "-n", "30")
    machine.sh(f"umount {path} && rmdir {path}")  # a dead FUSE is still mounted
    assert machine.run("su", "alice", "-c", "echo in").stdout == "in\n"


def test_a_squatter_of_another_type_in_var_tmp(machine: Machine) -> None:
    """FIFO, link and directory are in test_failures; here what takes root to make."""
    path = "/var/tmp/polytmp-1001"
    for make in ("mknod {0} c 5 0", "mknod {0} b 7 0", "mkdir -m 0711 {0}", "ln -s fifo {0}"):
        machine.sh(f"rm -rf {path}; {make.format(path)}")
        before = machine.sh(f"stat -c '%F %a %u %i' {path}").stdout
        assert machine.run("su", "alice", "-c", "true", check=False, timeout=20).returncode != 0, make
        assert machine.sh(f"stat -c '%F %a %u %i' {path}").stdout == before
    machine.sh(f"rm -rf {path}")


def test_a_socket_of_another_user_cannot_be_replaced(machine: Machine) -> None:
    path = "/tmp/.X11-unix/X7"
    serve = (
        "import socket, time; s = socket.socket(socket.AF_UNIX); s.bind('{0}'); s.listen(); time.sleep(99)"
    )
    with machine.session("alice") as alice, machine.session("bob") as bob, machine.session("svc") as svc:
        pid = alice.run(f'python3 -c "{serve.format(path)}" >/dev/null 2>&1 & echo $!').strip()
        eventually(lambda: machine.run("test", "-S", path).returncode == 0, what="the socket is there")
        before = machine.sh(f"stat -c '%i %u %a' {path}").stdout
        for other in (bob, svc):
            for try_it in (
                f"rm -f {path}",
                f"mv {path} {path}.old",
                f"ln -sfn /tmp/x {path}",
                f"touch /tmp/.X11-unix/mine && mv -f /tmp/.X11-unix/mine {path}",
                "mv /tmp/.X11-unix /tmp/.X11-old",
                "rmdir /tmp/.X11-unix",
                program("swap.py", "pair", f"/tmp/.X11-unix/by-{other.user}", path, "10") + " | grep -vx 0",
            ):
                other.run(f"touch /tmp/.X11-unix/by-{other.user}")
                assert other.result(try_it, check=False).returncode != 0, try_it
            other.run(f"rm -f /tmp/.X11-unix/mine /tmp/.X11-unix/by-{other.user}")
        assert alice.run(f"stat -c '%i %u %a' {path}") == before
        assert machine.sh(f"stat -c '%i %u %a' {path}").stdout == before
        alice.run(f"kill {pid}; rm {path}")


# Deleting what a hostile user made


def test_a_directory_that_somebody_outside_holds_and_fills(machine: Machine) -> None:
    with untouched(machine), machine.session("alice") as alice:
        alice.run("mkdir -m 0777 /tmp/open; mkdir -p /tmp/open/a/b/c; chmod -R 0777 /tmp/open")
        alice.run(f"{program('hold.py', 'give', 'attack', '/tmp/open')} >/tmp/out 2>&1 &")
        eventually(lambda: "ready" in alice.run("cat /tmp/out"), what="it is handed out")
        with attack(machine, "svc", program("hold.py", "create", "attack"), "ready"):
            eventually(lambda: int(alice.run("ls /tmp/open | wc -l")) > 50, what="svc is at work")
            alice.run("pkill -f hold.py")
            alice.close()
            wait_until_gone(machine)


def test_what_is_mounted_in_an_instance_when_it_ends(machine: Machine) -> None:
    with untouched(machine):
        with machine.session("alice") as alice:
            alice.run("mkdir /tmp/hung /tmp/files /tmp/bind /tmp/tmpfs /tmp/same /tmp/d && touch /tmp/d/x")
            alice.run(
                "for how in hung files; do setsid "
                f"{program('fuse.py', '$how', '/tmp/$how')} >/tmp/$how.out 2>&1 & done"
            )
            eventually(lambda: alice.run("cat /tmp/*.out").count("mounted") == 2, what="FUSEs are there")
            alice.run(
                f"sudo mount --bind {SENTINEL} /tmp/bind && sudo mount -t tmpfs x /tmp/tmpfs && "
                "sudo mount --bind /tmp/d /tmp/same && mkdir -p ~/there && touch /tmp/tmpfs/y"
            )
            alice.run("sudo mount --bind /home /tmp/d && ls /tmp/d/alice/there")
            machine.run("loginctl", "terminate-user", "alice")
            wait_until_gone(machine)
            alice.kill()
        machine.run("rmdir", "/home/alice/there")


def test_a_dead_and_a_hung_fuse_hold_nobody_else_up(machine: Machine) -> None:
    """One in alice's home, which the host sees as well; one whose server was killed."""
    with machine.session("alice") as alice:
        alice.run(
            "mkdir -p ~/hung ~/dead; for how in hung dead; do setsid "
            f"{program('fuse.py', 'hung', '~/$how')} >~/$how.out 2>&1 & done"
        )
        eventually(lambda: alice.run("cat ~/*.out").count("mounted") == 2, what="FUSEs are there")
        assert "/home/alice/hung" in observe.mounts(machine)
        alice.run("pkill -KILL -f 'fuse.py hung /home/alice/dead'")
        assert machine.run("su", "bob", "-c", "echo in", timeout=20).stdout == "in\n"
        assert machine.run("su", "alice", "-c", "echo in", timeout=20).stdout == "in\n"
        wait_until_gone(machine, "bob")
        alice.run(
            "pkill -KILL -f fuse.py; fusermount3 -uz ~/hung; fusermount3 -uz ~/dead; rm -r ~/hung ~/dead"
        )
    wait_until_gone(machine)


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_root_has_mounted_something_in_an_instance(machine: Machine, kind: str) -> None:
    """It stays until he unmounts it; nothing in it is deleted, and nobody waits for it."""
    with untouched(machine):
        with machine.session("alice") as alice:
            alice.run("mkdir -p /tmp/a/m /tmp/b; touch /tmp/a/x /tmp/b/y")
            place = directories(machine, "alice")["/tmp"]
            how = "-t tmpfs probe" if kind == "tmpfs" else f"--bind {SENTINEL}"
            machine.sh(f"mount {how} {place}/a/m")
        eventually(lambda: observe.state(machine, "alice") in {"failed", None}, what="it was tried")
        (aside,) = [path for path in observe.on_disk(machine) if "removing" in path]
        assert machine.sh(
            f"find {aside}/tmp -xdev -mindepth 1 ! -path '*/m/*' -printf '%P\\n'"
        ).stdout.split() == [
            "a",
            "a/m",
        ]
        assert machine.run("su", "alice", "-c", "touch /tmp/z; ls /tmp").stdout.split() == ["z"]
        machine.sh(f"umount {aside}/tmp/a/m")
    machine.run("systemctl", "restart", "polytmpd")
    eventually(lambda: not observe.on_disk(machine), what="the next start has deleted it")


def test_a_large_deletion_holds_nobody_up(machine: Machine) -> None:
    """200,000 files and more, some of them immutable: bob logs in while alice's are deleted."""
    for directories_made in (200, 400, 800):  # more where logins are slow
        with machine.session("alice") as alice:
            alice.run(
                "python3 -c '\n"
                "import os\n"
                f"for d in range({directories_made}):\n"
                '    os.mkdir(f"/tmp/{d}")\n'
                "    for f in range(1000):\n"
                '        os.close(os.open(f"/tmp/{d}/{f}", os.O_CREAT | os.O_WRONLY))\n'
                "'; sudo chattr -f +i /tmp/7/* /tmp/7 /tmp/199/5 || true",
                timeout=300,
            )
        eventually(
            lambda: any("removing" in path for path in observe.on_disk(machine)), what="it is being deleted"
        )
        assert machine.run("su", "bob", "-c", "echo in").stdout == "in\n"
        assert machine.run("su", "alice", "-c", "ls /tmp").stdout == ""
        still = any("removing" in path for path in observe.on_disk(machine))
        wait_until_gone(machine, timeout=300)
        if still:
            return
    pytest.fail("deleted too fast to tell")


# CVE-2026-3888: the cleaner


def test_the_age_cleaner_leaves_what_root_trusts(machine: Machine) -> None:
    machine.write(
        "/etc/tmpfiles.d/tmp.conf", "q /tmp 1777 root root aAmM:1d\nq /var/tmp 1777 root root aAmM:1d\n"
    )
    trusted = "stat -c '%n %i %u %g %a' {0}/.. {0}"
    try:
        with machine.session("alice") as alice:
            alice.run("mkdir -p /tmp/old/d /var/tmp/old; touch /tmp/old/f /var/tmp/old/f /tmp/new")
            places = directories(machine, "alice")
            machine.sh("touch /tmp/host-old /var/tmp/host-old")
            machine.sh("find /tmp /var/tmp ! -name new -exec touch -h -d 2001-01-01 {} +")
            before = "".join(machine.sh(trusted.format(place)).stdout for place in places.values())
            machine.run("systemd-tmpfiles", "--clean")
            after = "".join(machine.sh(trusted.format(place)).stdout for place in places.values())
            assert after == before
            assert machine.sh("ls -d /tmp/host-old /var/tmp/host-old", check=False).stdout == "", (
                "it did clean"
            )
            # The instances' contents take over the age, but not what it is counted by: ctime is new.
            assert alice.run("find /tmp /var/tmp -type f | wc -l").strip() == "3"
            machine.sh("sed -i 's/aAmM:1d/0/' /etc/tmpfiles.d/tmp.conf; systemd-tmpfiles --clean")
            assert alice.run("find /tmp /var/tmp -type f").strip() == "", "aged like all of /tmp"
            assert "".join(machine.sh(trusted.format(place)).stdout for place in places.values()) == before
            mounted = "stat -c '%d %i %u %a' /tmp/.X11-unix /tmp/.ICE-unix /tmp/.XIM-unix /tmp/.font-unix"
            assert alice.run(mounted) == machine.sh(mounted).stdout
            # and what is trusted is in nobody's reach
            barriers = [place.removesuffix("/tmp") for place in places.values()]
            for user in ("svc", "bob"):
                for barrier in barriers:
                    assert (
                        machine.run(
                            "su", user, "-c", f"rmdir {barrier} || mv {barrier} {barrier}.x", check=False
                        ).returncode
                        != 0
                    )
        with machine.session("alice") as again:
            again.run("touch /tmp/x /var/tmp/x")
    finally:
        machine.sh(
            "rm -rf /etc/tmpfiles.d/tmp.conf /var/tmp/polytmp-1001/tmp/*; systemd-tmpfiles --create",
            check=False,
        )


# CVE-2022-31214: which namespace is joined


def test_only_a_namespace_of_the_daemons_is_joined(machine: Machine) -> None:
    """The caller names a user and nothing else; where he lives himself decides whether he may."""
    call = "busctl call org.polytmp1 /org/polytmp1 org.polytmp1.Manager AcquireNamespace u 1001"
    for cage in (
        "unshare -m",
        "unshare -m --propagation private sh -c 'mount -t tmpfs x /tmp; exec \"$@\"' -",
        "unshare -rm",
    ):
        result = machine.sh(f"{cage} {call}", check=False)
        assert result.returncode != 0, cage
        assert "mount namespace of its own" in result.stderr or "denied" in result.stderr.lower(), result
    refused = machine.run("unshare", "-m", "su", "-", "alice", "-c", "echo in", check=False)
    assert refused.returncode != 0
    assert "in" not in refused.stdout.split()
    eventually(lambda: observe.instances(machine) == {}, 30, "what logind's signal began has ended")
    assert machine.sh(call).returncode == 0
    wait_until_gone(machine)


def test_a_session_in_a_chroot_is_left_alone(machine: Machine) -> None:
    machine.sh(
        "mkdir /srv/root && cd /srv/root && cp -d /bin /sbin /lib* . && "
        "for d in usr etc var run home proc dev; do mkdir $d && mount --bind /$d $d; done"
    )
    try:
        seen = machine.sh(
            "chroot /srv/root sh -c 'cd /home && su alice -c \"readlink /proc/self/ns/mnt; pwd\"'"
        )
        assert seen.stdout.split() == [machine.sh(HOST).stdout.strip(), "/home"]
        assert "user alice is in a chroot, keeping the chroot's /tmp" in machine.journal("-n", "50")
    finally:
        machine.sh("umount /srv/root/*; rm -r --one-file-system /srv/root", check=False)


# The host's /tmp from inside


def test_what_lies_beneath_stays_out_of_sight(machine: Machine) -> None:
    machine.sh("echo bare >/tmp/host-secret; chmod 0644 /tmp/host-secret; echo bare >/var/tmp/host-secret")
    reach = [
        "unshare -Urm sh -c 'umount {0}; cat {0}/host-secret'",
        "unshare -Urm sh -c 'umount -l {0}; umount -l {0}; cat {0}/host-secret'",
        "unshare -Urm sh -c 'mount --bind / ~/m && cat ~/m{0}/host-secret'",
        "unshare -Urm sh -c 'mount --rbind / ~/m; umount -l ~/m{0}; cat ~/m{0}/host-secret'",
        "unshare -Urm sh -c 'mount --make-rprivate /; mount --move {0} /mnt; cat {0}/host-secret'",
        "unshare -Urm sh -c 'mount --bind {0}/.. ~/m; cat ~/m/host-secret ~/m{0}/host-secret'",
        "bwrap --bind / / --tmpfs /mnt cat {0}/host-secret",
        "cat {0}/../../..{0}/host-secret",
        "cat {0}/.X11-unix/../host-secret",
        "cd {0}/.X11-unix && cat ../host-secret",
        "for p in /proc/[0-9]*; do cat $p/root{0}/host-secret; done 2>/dev/null | grep .",
        "for p in /proc/[0-9]*; do cat $p/cwd{0}/host-secret; done 2>/dev/null | grep .",
        "nsenter -t 1 -m cat {0}/host-secret",
        "unshare -Ur nsenter -t 1 -m cat {0}/host-secret",
        "systemd-run --user --quiet --wait --pipe cat {0}/host-secret",
        "systemd-run --user --quiet --wait --pipe -p RootDirectory=/ cat {0}/host-secret",
    ]
    with machine.session("alice") as alice:
        alice.run("mkdir ~/m")
        for directory in ("/tmp", "/var/tmp"):
            for line in reach:
                result = alice.result(line.format(directory), check=False, timeout=20)
                assert result.returncode != 0, line
                assert "bare" not in result.stdout, line
        alice.run("rmdir ~/m")
    machine.sh("cat /tmp/host-secret /var/tmp/host-secret && rm /tmp/host-secret /var/tmp/host-secret")


def test_a_file_handle_does_not_reach_another_instance(machine: Machine) -> None:
    with machine.session("alice") as alice, machine.session("bob") as bob:
        for directory in ("/tmp", "/var/tmp"):
            bob.run(f"umask 0; echo bare >{directory}/open")
            place = directories(machine, "bob")[directory]
            handle = machine.sh(program("hold.py", "handle", f"{place}/open")).stdout.strip()
            ways = f"/ /tmp /var/tmp /tmp/.X11-unix /tmp/.ICE-unix /home {directory}"
            line = program("hold.py", "open", handle, ways)
            assert "bare" in machine.sh(line).stdout, "root can: the handle is right"
            for how in ("", "unshare -Ur ", "unshare -Urm "):
                shown = alice.run(how + line)
                assert shown.count("\n") == 7
                assert "bare" not in shown
            bob.run(f"rm {directory}/open")


def test_no_process_of_a_user_lives_on_the_host(machine: Machine) -> None:
    """One that did would show him the host's /tmp, by /proc/PID/root."""
    with machine.session("alice") as alice:
        alice.run("systemd-run --user --quiet sleep 77; tmux new-session -d; (sleep 78 &)")
        own = machine.sh(
            "for p in $(pgrep -u alice); do readlink /proc/$p/ns/mnt; done | sort | uniq -c"
        ).stdout
        assert own.split()[1:] == [alice.run(observe.NAMESPACE).strip()], own
        assert int(own.split()[0]) > 4
        alice.run("tmux kill-server; pkill sleep; true", check=False)


# Away from the tracking


def escape(machine: Machine, command: str, process: str) -> None:
    """Started in a session that then ends; the instance stays while the process lives, and ends with it."""
    with machine.session("alice") as alice:
        alice.run("echo mark >/tmp/mark")
        alice.run(command)
        eventually(lambda: machine.run("pgrep", "-f", "-x", process).stdout.split(), 70, "it has started")
        place = directories(machine, "alice")["/tmp"]
    eventually(lambda: not machine.sh("pgrep -u alice sshd || true").stdout, what="no login is left")
    eventually(lambda: observe.state(machine, "alice") == "draining", what="the logout was noticed")
    assert machine.run("cat", f"{place}/mark").stdout == "mark\n"
    machine.run("pkill", "-KILL", "-f", "-x", process)
    wait_until_gone(machine)


OTHER_CGROUP = (
    'sudo sh -c \'mkdir -p /sys/fs/cgroup/elsewhere; until pgrep -f -x "sleep {0}"; do sleep 0.02; done; '
    'for p in $(pgrep -f "sleep {0}"); do echo $p >/sys/fs/cgroup/elsewhere/cgroup.procs; done\''
)


@pytest.mark.parametrize(
    ("command", "process"),
    [
        (
            "setsid -f bwrap --bind / / --dev /dev sleep 2001 >/dev/null 2>&1; " + OTHER_CGROUP.format(2001),
            "sleep 2001",
        ),
        (
            "setsid -f bwrap --bind /usr /usr --symlink usr/lib /lib --symlink usr/lib64 /lib64 "
            "--bind /tmp /tmp sleep 2002 >/dev/null 2>&1; " + OTHER_CGROUP.format(2002),
            "sleep 2002",
        ),
        (
            "sh -c '(setsid sh -c \"sleep 2003 &\" &)' >/dev/null 2>&1",
            "sleep 2003",
        ),
        ("echo 'exec sleep 2004' | at now 2>/dev/null", "sleep 2004"),
        ("sudo systemd-run --quiet --uid=alice -p PAMName=login sleep 2005", "(/usr/bin/)?sleep 2005"),
        ("setsid -f unshare -Urmpf sleep 2006 >/dev/null 2>&1; " + OTHER_CGROUP.format(2006), "sleep 2006"),
    ],
    ids=["bwrap", "bwrap-bind", "double-fork", "at", "system-unit", "unshare"],
)
def test_escapes(machine: Machine, command: str, process: str) -> None:
    escape(machine, command, process)


def test_a_namespace_in_flight(machine: Machine) -> None:
    """The only reference is a descriptor in a socket's queue, which no /proc shows."""
    with machine.session("alice") as alice:
        alice.run("echo mark >/tmp/mark")
        before = alice.run(observe.NAMESPACE)
        place = directories(machine, "alice")["/tmp"]
        holder = attack(machine, "root", program("hold.py", "flight", f"/proc/{alice.pid}/ns/mnt"), "ready")
        holder.__enter__()
    eventually(lambda: not observe.held(machine), 60, "the namespace is let go")
    assert observe.state(machine, "alice") == "draining"
    assert machine.run("cat", f"{place}/mark").stdout == "mark\n"
    with machine.session("alice") as alice:  # a second namespace over the same files
        assert alice.run("cat /tmp/mark") == "mark\n"
        assert alice.run(observe.NAMESPACE) != before
    eventually(lambda: not observe.held(machine), 60, "the second one is let go")
    assert observe.state(machine, "alice") == "draining"
    assert machine.run("cat", f"{place}/mark").stdout == "mark\n"
    holder.__exit__(None, None, None)
    wait_until_gone(machine)


def test_a_mount_that_only_looks_like_another_users_instance(machine: Machine) -> None:
    """svc sees the name of bob's barrier on the host, and mounts something of his own by that name."""
    with machine.session("bob") as bob:
        bob.run("echo secret >/tmp/secret")
        barrier = directories(machine, "bob")["/tmp"].split("/")[2]
        fake = (
            "unshare -Urm sh -c 'mount -t tmpfs x /mnt; "
            f"for at in /mnt /var/lib/svc; do mkdir -p $at/{barrier}/tmp; "
            f"mount --bind $at/{barrier}/tmp $at/{barrier}/tmp; done; echo mounted; exec sleep 600'"
        )
        spoofer = attack(machine, "svc", fake, "mounted")
        spoofer.__enter__()
    wait_until_gone(machine, "bob")
    spoofer.__exit__(None, None, None)
    machine.sh("rm -rf /var/lib/svc/polytmp-*")


# Login against removal


def test_logins_against_removals(machine: Machine) -> None:
    """Two at once, and the next two as soon as these end: one namespace for both, and nothing is left."""
    rounds = 1000 if SLOW else 200  # of two logins each
    script = f"""
for round in $(seq {rounds}); do
    for who in 1 2; do
        su alice -c 'readlink /proc/self/ns/mnt; echo $$ >/tmp/$$; test -s /tmp/$$ || echo lost' &
    done
    wait
    sleep 0.0$((RANDOM % 5))
done
"""
    seen = machine.sh(script, timeout=240).stdout.split()
    assert len(seen) == 2 * rounds, "every login succeeded"
    assert all(line.startswith("mnt:[") for line in seen)
    wait_until_gone(machine)
    assert observe.held(machine) == []
    assert observe.stored(machine) == 1

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attacks on files and mounts, each run for real: names are exchanged, squatted and held, and file systems
are mounted where root deletes. docs/SECURITY.md says which threat each test stands for.

Not here: attacks on namespaces (test_attacks_namespaces), on the bus and with users' names
(test_attacks_bus), on what the daemon reads (test_attacks_tables); faults (test_faults*).
"""

import contextlib

import pytest

from tests import observe
from tests.attacks import SENTINEL, attack, prepare, program, untouched, wait_until_gone
from tests.bed import Machine, eventually

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.prepared(by=prepare),
    pytest.mark.usefixtures("unharmed"),
]


# CVE-2025-6020: names that are exchanged while root works on them


def test_names_are_exchanged_while_instances_are_made_and_removed(machine: Machine) -> None:
    """svc attacks in the host's /tmp, alice from her own namespace, and the daemon works in between."""
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
                assert machine.run("su", "-", "bob", "-c", "touch /tmp/x && ls /tmp").stdout.split() == ["x"]
        wait_until_gone(machine)
        wait_until_gone(machine, "bob")
        for attacker in (in_tmp, in_var_tmp):
            tried, worked = map(int, attacker.stop().split())
            assert tried > 1000
            assert worked == 0


def test_the_parent_of_a_mount_is_exchanged_while_a_namespace_is_made(machine: Machine) -> None:
    """Mounts below the host's /tmp are removed from a new namespace.

    If their paths were trusted, svc could have any mount of the host removed: /tmp/a belongs to svc, and is
    a link to / half of the time.
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
            seen = machine.run("su", "-", "alice", "-c", outside.format("self")).stdout
            assert seen == before
            assert machine.sh(outside.format(1)).stdout == before
            wait_until_gone(machine)
        assert int(swap.stop()) > 10000
    machine.sh("for d in /tmp/a /tmp/b; do test -L $d || umount $d/run $d/dev; done; rm -rf /tmp/a /tmp/b")


# CVE-2024-22365, and squatting: something else is where root opens a directory


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
    """Root has removed it and svc was first: logins work, it is not shared, and it is never touched."""
    path = "/tmp/.X11-unix"
    show = f"stat -c '%F %a %u %g %i %Y' {path}"
    machine.sh(f"systemctl restart polytmpd; rmdir {path}")  # what it has shared once, it makes again
    try:
        with untouched(machine):
            machine.run("su", "-", "svc", "-c", squatter.format(path))
            before = machine.sh(show).stdout
            listing = machine.run("su", "-", "alice", "-c", "ls -A /tmp; touch /tmp/x", timeout=20).stdout
            assert ".ICE-unix" in listing.split()
            assert ".X11-unix" not in listing.split()
            assert machine.sh(show).stdout == before
            wait_until_gone(machine)
            assert machine.sh(show).stdout == before
            lines = machine.journal("-u", "polytmpd", "-n", "30")
            assert f"Failed to share {path} with new instances" in lines
    finally:
        machine.sh(f"rm -rf {path}")
    machine.run("su", "-", "alice", "-c", f"touch {path}/of-alice")
    assert machine.sh(f"stat -c '%F %a %u %g' {path}").stdout == "directory 1777 0 0\n"
    machine.run("rm", f"{path}/of-alice")


def test_a_barrier_with_something_mounted_on_it(machine: Machine) -> None:
    """A FUSE that never answers, at the one name that is known before the first login."""
    path = "/var/tmp/polytmp-1001"
    machine.sh(f"rm -rf {path}; install -d -o svc -m 0700 {path}")
    with attack(machine, "svc", program("fuse.py", "hung", path), "mounted"):
        assert machine.run("su", "-", "alice", "-c", "true", check=False, timeout=20).returncode != 0
        assert machine.run("su", "-", "bob", "-c", "echo in", timeout=20).stdout == "in\n"
        assert "is a mount point" in machine.journal("-u", "polytmpd", "-n", "30")
    machine.sh(f"umount {path} && rmdir {path}")  # a dead FUSE is still mounted
    assert machine.run("su", "-", "alice", "-c", "echo in").stdout == "in\n"


def test_a_squatter_of_another_type_in_var_tmp(machine: Machine) -> None:
    """FIFO, link and directory are in test_failures; these take root to make."""
    path = "/var/tmp/polytmp-1001"
    for make in ("mknod {0} c 5 0", "mknod {0} b 7 0", "mkdir -m 0711 {0}", "ln -s fifo {0}"):
        machine.sh(f"rm -rf {path}; {make.format(path)}")
        before = machine.sh(f"stat -c '%F %a %u %i' {path}").stdout
        assert machine.run("su", "-", "alice", "-c", "true", check=False, timeout=20).returncode != 0, make
        assert machine.sh(f"stat -c '%F %a %u %i' {path}").stdout == before
    machine.sh(f"rm -rf {path}")


def test_a_socket_of_another_user_cannot_be_replaced(machine: Machine) -> None:
    path = "/tmp/.X11-unix/X7"
    serve = (
        "import signal, socket; s = socket.socket(socket.AF_UNIX); s.bind('{0}'); s.listen(); signal.pause()"
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


# Deleting what a hostile user has made


def test_a_directory_that_somebody_outside_holds_and_fills(machine: Machine) -> None:
    with untouched(machine), machine.session("alice") as alice:
        alice.run("mkdir -m 0777 /tmp/open; mkdir -p /tmp/open/a/b/c; chmod -R 0777 /tmp/open")
        alice.run(f"{program('hold.py', 'give', 'attack', '/tmp/open')} >/tmp/out 2>&1 &")
        eventually(lambda: "ready" in alice.run("cat /tmp/out"), what="it is offered")
        with attack(machine, "svc", program("hold.py", "create", "attack"), "ready"):
            eventually(lambda: int(alice.run("ls /tmp/open | wc -l")) > 50, what="svc creates files")
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
            eventually(
                lambda: alice.run("cat /tmp/*.out").count("mounted") == 2, what="both FUSEs are mounted"
            )
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
    """One is in alice's home, where the host sees it too; the server of the other was killed."""
    with machine.session("alice") as alice:
        alice.run(
            "mkdir -p ~/hung ~/dead; for how in hung dead; do setsid "
            f"{program('fuse.py', 'hung', '~/$how')} >~/$how.out 2>&1 & done"
        )
        eventually(lambda: alice.run("cat ~/*.out").count("mounted") == 2, what="both FUSEs are mounted")
        assert "/home/alice/hung" in observe.mounts(machine)
        alice.run("pkill -KILL -f 'fuse.py hung /home/alice/dead'")
        assert machine.run("su", "-", "bob", "-c", "echo in", timeout=20).stdout == "in\n"
        assert machine.run("su", "-", "alice", "-c", "echo in", timeout=20).stdout == "in\n"
        wait_until_gone(machine, "bob")
        alice.run(
            "pkill -KILL -f fuse.py; fusermount3 -uz ~/hung; fusermount3 -uz ~/dead; rm -r ~/hung ~/dead"
        )
    wait_until_gone(machine)


BIND = """python3 -c 'import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])' """


def test_a_hung_fuse_at_a_display_holds_nobody_up(machine: Machine) -> None:
    """One on a socket of the host's, one on a lock: an exempt user made them. A new daemon examines all."""
    machine.sh("grep -q ^user_allow_other /etc/fuse.conf || echo user_allow_other >>/etc/fuse.conf")
    machine.run("su", "svc", "-c", f"mkdir /tmp/.X11-unix/X5; touch /tmp/.X6-lock; {BIND} /tmp/.X11-unix/X6")
    try:
        with (
            attack(machine, "svc", program("fuse.py", "trap", "/tmp/.X11-unix/X5"), "mounted"),
            attack(machine, "svc", program("fuse.py", "trap", "/tmp/.X6-lock"), "mounted"),
        ):
            machine.run("systemctl", "restart", "polytmpd")
            with machine.session("alice") as alice:
                assert machine.run("su", "-", "bob", "-c", "echo in", timeout=20).stdout == "in\n"
                alice.run(f"echo '{4711:10}' >/tmp/.X7-lock; {BIND} /tmp/.X11-unix/X7")
                eventually(lambda: machine.sh("ls -A /tmp").stdout.count(".X7-lock"), what="it is shown")
            machine.run("systemctl", "restart", "polytmpd", timeout=20)
            assert "does not answer" not in machine.journal("-u", "polytmpd", "-n", "50")
            assert (
                machine.run("su", "-", "bob", "-c", "ls -A /tmp", timeout=20).stdout.count(".X5-lock") == 0
            )
    finally:
        machine.sh("umount -l /tmp/.X11-unix/X5 /tmp/.X6-lock; rm -rf /tmp/.X11-unix/* /tmp/.X[67]-lock")
    wait_until_gone(machine)
    wait_until_gone(machine, "bob")


def test_a_hung_fuse_in_place_of_a_socket_directory(machine: Machine) -> None:
    """An exempt user has mounted it when the name was free. No login waits for it."""
    path = "/tmp/.ICE-unix"
    machine.sh("grep -q ^user_allow_other /etc/fuse.conf || echo user_allow_other >>/etc/fuse.conf")
    machine.run("systemctl", "restart", "polytmpd")  # what it has shared once, it makes again
    machine.sh(f"rm -rf {path}; install -d -o svc {path}")
    try:
        with attack(machine, "svc", program("fuse.py", "trap", path), "mounted"):
            listing = machine.run("su", "-", "alice", "-c", "ls -A /tmp", timeout=20).stdout.split()
            assert ".X11-unix" in listing
            assert ".ICE-unix" not in listing
            assert f"Failed to share {path} with new" in machine.journal("-u", "polytmpd", "-n", "30")
        machine.sh(f"umount -l {path}")
        wait_until_gone(machine)
        machine.sh(f"mount -t tmpfs -o mode=1777 roots {path}")
        assert ".ICE-unix" in machine.run("su", "-", "alice", "-c", "ls -A /tmp").stdout.split()
    finally:
        machine.sh(f"umount -l {path}; rm -rf {path}")
    wait_until_gone(machine)


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_root_has_mounted_something_in_an_instance(machine: Machine, kind: str) -> None:
    """It stays until root unmounts it; nothing in it is deleted, and no login waits for it."""
    with untouched(machine):
        with machine.session("alice") as alice:
            alice.run("mkdir -p /tmp/a/m /tmp/b; touch /tmp/a/x /tmp/b/y")
            place = observe.directories(machine, "alice")["/tmp"]
            how = "-t tmpfs probe" if kind == "tmpfs" else f"--bind {SENTINEL}"
            machine.sh(f"mount {how} {place}/a/m")
        eventually(lambda: observe.state(machine, "alice") in {"failed", None}, what="the removal was tried")
        (aside,) = [path for path in observe.on_disk(machine) if "removing" in path]
        assert machine.sh(
            f"find {aside}/tmp -xdev -mindepth 1 ! -path '*/m/*' -printf '%P\\n'"
        ).stdout.split() == [
            "a",
            "a/m",
        ]
        assert machine.run("su", "-", "alice", "-c", "touch /tmp/z; ls /tmp").stdout.split() == ["z"]
        machine.sh(f"umount {aside}/tmp/a/m")
    machine.run("systemctl", "restart", "polytmpd")
    eventually(lambda: not observe.on_disk(machine), what="the next daemon has deleted it")


def test_a_large_deletion_holds_nobody_up(machine: Machine) -> None:
    """200,000 files or more, some of them immutable: bob logs in while alice's files are deleted."""
    for directories_made in (200, 400, 800):  # more if logins are slow
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
        assert machine.run("su", "-", "bob", "-c", "echo in").stdout == "in\n"
        assert machine.run("su", "-", "alice", "-c", "ls /tmp").stdout == ""
        still = any("removing" in path for path in observe.on_disk(machine))
        wait_until_gone(machine, timeout=300)
        if still:
            return
    pytest.fail("the deletion was always faster than two logins")


# CVE-2026-3888: the cleaner


def test_the_age_cleaner_leaves_what_root_trusts(machine: Machine) -> None:
    machine.write(
        "/etc/tmpfiles.d/tmp.conf", "q /tmp 1777 root root aAmM:1d\nq /var/tmp 1777 root root aAmM:1d\n"
    )
    trusted = "stat -c '%n %i %u %g %a' {0}/.. {0}"
    try:
        with machine.session("alice") as alice:
            alice.run("mkdir -p /tmp/old/d /var/tmp/old; touch /tmp/old/f /var/tmp/old/f /tmp/new")
            places = observe.directories(machine, "alice")
            machine.sh("touch /tmp/host-old /var/tmp/host-old")
            # what is immutable has no age to test
            machine.sh("find /tmp /var/tmp -type d -exec chattr -f -i {} +", check=False)
            machine.sh("find /tmp /var/tmp ! -name new -exec touch -h -d 2001-01-01 {} +")
            before = "".join(machine.sh(trusted.format(place)).stdout for place in places.values())
            machine.run("systemd-tmpfiles", "--clean")
            after = "".join(machine.sh(trusted.format(place)).stdout for place in places.values())
            assert after == before
            assert machine.sh("ls -d /tmp/host-old /var/tmp/host-old", check=False).stdout == "", (
                "the cleaner worked"
            )
            # The instances' contents get the age but not its aAmM: ctime counts too, which is new.
            assert alice.run("find /tmp /var/tmp -type f | wc -l").strip() == "3"
            machine.sh("sed -i 's/aAmM:1d/0/' /etc/tmpfiles.d/tmp.conf; systemd-tmpfiles --clean")
            assert alice.run("find /tmp /var/tmp -type f").strip() == "", "aged as all of /tmp is"
            assert "".join(machine.sh(trusted.format(place)).stdout for place in places.values()) == before
            mounted = "stat -c '%d %i %u %a' /tmp/.X11-unix /tmp/.ICE-unix /tmp/.XIM-unix /tmp/.font-unix"
            assert alice.run(mounted) == machine.sh(mounted).stdout
            # and no user can reach what root trusts
            barriers = [place.removesuffix("/tmp") for place in places.values()]
            for user in ("svc", "bob"):
                for barrier in barriers:
                    assert (
                        machine.run(
                            "su",
                            "-",
                            user,
                            "-c",
                            f"rmdir {barrier} || mv {barrier} {barrier}.x",
                            check=False,
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

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Attacks on mount namespaces, each run for real: joining the wrong one, looking out of one's own, living on
outside of the user's slice. docs/SECURITY.md says which threat each test stands for.

Not here: attacks on files and mounts (test_attacks), on what the daemon reads (test_attacks_tables).
"""

import os
from collections.abc import Callable

import pytest

from tests import observe
from tests.attacks import attack, prepare, program, wait_until_gone
from tests.bed import Machine, eventually

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.prepared(by=prepare),
    pytest.mark.usefixtures("unharmed"),
]

SLOW = bool(os.environ.get("POLYTMP_SLOW"))
HOST = "readlink /proc/1/ns/mnt"


# CVE-2022-31214: which namespace is joined


def test_only_a_namespace_of_the_daemons_is_joined(machine: Machine) -> None:
    """The caller names a user and nothing else; the namespace that the caller lives in decides the rest."""
    call = "busctl call org.polytmp1 /org/polytmp1 org.polytmp1.Manager AcquireNamespace u 1001"
    for cage in (
        "unshare -m",
        "unshare -m --propagation private sh -c 'mount -t tmpfs x /tmp; exec \"$@\"' -",
        "unshare -rm",
    ):
        result = machine.sh(f"{cage} {call}", check=False)
        assert result.returncode != 0, cage
        assert "its own mount namespace" in result.stderr or "denied" in result.stderr.lower(), result
    refused = machine.run("unshare", "-m", "su", "-", "alice", "-c", "echo in", check=False)
    assert refused.returncode != 0
    assert "in" not in refused.stdout.split()
    eventually(
        lambda: observe.instances(machine) == {}, 30, "the instance that logind's signal started has ended"
    )
    assert machine.sh(call).returncode == 0
    wait_until_gone(machine)


def test_a_session_in_a_chroot_is_left_alone(machine: Machine) -> None:
    machine.sh(
        "mkdir /srv/root && cd /srv/root && cp -d /bin /sbin /lib* . && "
        "for d in usr etc var run home proc dev; do mkdir $d && mount --bind /$d $d; done"
    )
    try:
        seen = machine.sh("chroot /srv/root sh -c 'su - alice -c \"readlink /proc/self/ns/mnt; pwd\"'")
        assert seen.stdout.split() == [machine.sh(HOST).stdout.strip(), "/home/alice"]
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
            place = observe.directories(machine, "bob")[directory]
            handle = machine.sh(program("hold.py", "handle", f"{place}/open")).stdout.strip()
            ways = f"/ /tmp /var/tmp /tmp/.X11-unix /tmp/.ICE-unix /home {directory}"
            line = program("hold.py", "open", handle, ways)
            assert "bare" in machine.sh(line).stdout, "root can open it: the handle is right"
            for how in ("", "unshare -Ur ", "unshare -Urm "):
                shown = alice.run(how + line)
                assert shown.count("\n") == 7
                assert "bare" not in shown
            bob.run(f"rm {directory}/open")


def test_no_process_of_a_user_lives_on_the_host(machine: Machine) -> None:
    """Such a process would show the user the host's /tmp through /proc/PID/root."""
    with machine.session("alice") as alice:
        alice.run("systemd-run --user --quiet sleep infinity; tmux new-session -d; (sleep infinity &)")
        own = machine.sh(
            "for p in $(pgrep -u alice); do readlink /proc/$p/ns/mnt; done | sort | uniq -c"
        ).stdout
        assert own.split()[1:] == [alice.run(observe.NAMESPACE).strip()], own
        assert int(own.split()[0]) > 4
        alice.run("tmux kill-server; pkill sleep; true", check=False)


# Away from the tracking


def escape(machine: Machine, command: str, move: Callable[[list[str]], None] | None) -> None:
    """Run a command in a session that then ends: the instance lives as long as the command's process."""
    process = "(/usr/bin/)?sleep infinity"
    with machine.session("alice") as alice:
        alice.run("echo mark >/tmp/mark")
        alice.run(command)
        eventually(lambda: machine.run("pgrep", "-f", "-x", process).stdout.split(), 70, "it has started")
        if move is not None:
            move(observe.processes(machine, "sleep infinity"))
        place = observe.directories(machine, "alice")["/tmp"]
    eventually(lambda: not machine.sh("pgrep -u alice sshd || true").stdout, what="no login is left")
    eventually(lambda: observe.state(machine, "alice") == "draining", what="polytmpd noticed the logout")
    assert machine.run("cat", f"{place}/mark").stdout == "mark\n"
    machine.run("pkill", "-KILL", "-f", "-x", process)
    wait_until_gone(machine)


@pytest.mark.parametrize(
    "command",
    [
        "sh -c '(setsid sh -c \"sleep infinity &\" &)' >/dev/null 2>&1",
        "echo 'exec sleep infinity' | at now 2>/dev/null",
        "sudo systemd-run --quiet --uid=alice -p PAMName=login sleep infinity",
    ],
    ids=["double-fork", "at", "system-unit"],
)
def test_escapes(machine: Machine, command: str) -> None:
    escape(machine, command, None)


@pytest.mark.parametrize(
    "command",
    [
        "setsid -f bwrap --bind / / --dev /dev sleep infinity >/dev/null 2>&1",
        (
            "setsid -f bwrap --bind /usr /usr --symlink usr/lib /lib --symlink usr/lib64 /lib64 "
            "--bind /tmp /tmp sleep infinity >/dev/null 2>&1"
        ),
        "setsid -f unshare -Urmpf sleep infinity >/dev/null 2>&1",
    ],
    ids=["bwrap", "bwrap-bind", "unshare"],
)
def test_escapes_into_another_cgroup(
    machine: Machine, elsewhere: Callable[[list[str]], None], command: str
) -> None:
    escape(machine, command, elsewhere)


def test_a_namespace_in_flight(machine: Machine) -> None:
    """The only reference is a descriptor in a socket's queue, which no /proc shows."""
    with machine.session("alice") as alice:
        alice.run("echo mark >/tmp/mark")
        before = alice.run(observe.NAMESPACE)
        place = observe.directories(machine, "alice")["/tmp"]
        holder = attack(machine, "root", program("hold.py", "flight", f"/proc/{alice.pid}/ns/mnt"), "ready")
        holder.__enter__()
    eventually(lambda: not observe.held(machine), 60, "the namespace is released")
    assert observe.state(machine, "alice") == "draining"
    assert machine.run("cat", f"{place}/mark").stdout == "mark\n"
    with machine.session("alice") as alice:  # a second namespace, if not found by ID
        assert alice.run("cat /tmp/mark") == "mark\n"
        assert (alice.run(observe.NAMESPACE) == before) == observe.opens_by_id(machine)
    eventually(lambda: not observe.held(machine), 60, "the second one is released")
    assert observe.state(machine, "alice") == "draining"
    assert machine.run("cat", f"{place}/mark").stdout == "mark\n"
    holder.__exit__(None, None, None)
    wait_until_gone(machine)


def test_a_mount_that_only_looks_like_another_users_instance(machine: Machine) -> None:
    """svc sees the name of bob's barrier on the host, and mounts something else under that name."""
    with machine.session("bob") as bob:
        bob.run("echo secret >/tmp/secret")
        barrier = observe.directories(machine, "bob")["/tmp"].split("/")[2]
        fake = (
            "unshare -Urm sh -c 'mount -t tmpfs x /mnt; "
            f"for at in /mnt /var/lib/svc; do mkdir -p $at/{barrier}/tmp; "
            f"mount --bind $at/{barrier}/tmp $at/{barrier}/tmp; done; echo mounted; exec sleep infinity'"
        )
        spoofer = attack(machine, "svc", fake, "mounted")
        spoofer.__enter__()
    wait_until_gone(machine, "bob")
    spoofer.__exit__(None, None, None)
    machine.sh("rm -rf /var/lib/svc/polytmp-*")


# Login against removal


def test_logins_against_removals(machine: Machine) -> None:
    """Two logins at once, and the next two as soon as they end: all succeed, and nothing is left."""
    rounds = 1000 if SLOW else 200  # of two logins each; the sleep varies how far a removal is at the next
    script = f"""
for round in $(seq {rounds}); do
    for who in 1 2; do
        su - alice -c 'readlink /proc/self/ns/mnt; echo $$ >/tmp/$$; test -s /tmp/$$ || echo lost' &
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

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bed itself, without the package: what the other end-to-end tests rely on.

Not here: polytmp.
"""

import contextlib
import os
import re
from pathlib import Path

import pytest

from tests.bed import CommandError, Machine, eventually
from tests.bed.tree import build_depends, cache_directory


def test_nothing_failed_at_boot(plain_machine: Machine) -> None:
    assert plain_machine.run("systemctl", "--failed", "--no-legend").stdout == ""
    assert plain_machine.run("systemctl", "is-system-running").stdout == "running\n"


def test_is_the_release(plain_machine: Machine, release: str) -> None:
    assert f"VERSION_CODENAME={release}\n".encode() in plain_machine.read("/etc/os-release")


def test_tmp_is_as_the_release_has_it(plain_machine: Machine, release: str) -> None:
    target, fstype = plain_machine.run("findmnt", "-no", "TARGET,FSTYPE", "-T", "/tmp").stdout.split()
    if release == "bookworm":
        assert target == "/"
    else:
        assert (target, fstype) == ("/tmp", "tmpfs")
    assert plain_machine.run("findmnt", "-no", "TARGET", "-T", "/var/tmp").stdout == "/\n"


def test_mounts_are_shared(plain_machine: Machine) -> None:
    assert plain_machine.run("findmnt", "-no", "PROPAGATION", "/").stdout == "shared\n"


def test_cgroups_are_unified(plain_machine: Machine) -> None:
    assert plain_machine.run("stat", "-fc", "%T", "/sys/fs/cgroup").stdout == "cgroup2fs\n"
    assert "\n0::/init.scope\n" in f"\n{plain_machine.read('/proc/1/cgroup').decode()}"
    assert "0::/system.slice/bed.service\n" in plain_machine.run("cat", "/proc/self/cgroup").stdout
    plain_machine.run("test", "-e", "/sys/fs/cgroup/user.slice/cgroup.events")


@pytest.mark.parametrize(
    ("user", "uid"), [("root", "0"), ("alice", "1001"), ("bob", "1002"), ("svc", r"[1-9]\d\d")]
)
def test_users_log_in(plain_machine: Machine, user: str, uid: str) -> None:
    assert re.fullmatch(uid, plain_machine.ssh(user, "id -u").stdout.strip())


def test_sudo_asks_nothing(plain_machine: Machine) -> None:
    assert plain_machine.ssh("alice", "sudo id -u && sudo -u bob id -un").stdout == "0\nbob\n"


def test_logind_knows_a_login(plain_machine: Machine) -> None:
    with plain_machine.session("alice") as session:
        shown = plain_machine.run("loginctl", "list-sessions", "--no-legend").stdout
        assert re.search(r"\b1001 +alice\b", shown)
        cgroup = session.run("grep ^0:: /proc/self/cgroup")
        assert cgroup.startswith("0::/user.slice/user-1001.slice/session-")
        events = plain_machine.read("/sys/fs/cgroup/user.slice/user-1001.slice/cgroup.events")
        assert b"populated 1" in events


def test_user_manager_runs(plain_machine: Machine) -> None:
    with plain_machine.session("alice") as session:
        assert session.run("systemctl --user is-system-running --wait").strip() == "running"
        assert session.run("systemd-run --user --wait --pipe --quiet id -un") == "alice\n"


def test_cron_and_at_run(plain_machine: Machine) -> None:
    assert plain_machine.run("systemctl", "is-active", "cron", "atd").stdout == "active\nactive\n"
    plain_machine.ssh("alice", "echo 'id -un >at.out' | at now")
    eventually(lambda: plain_machine.read("/home/alice/at.out") == b"alice\n", what="the at job ran")


def test_udev_tells_of_devices(plain_machine: Machine) -> None:
    plain_machine.sh("truncate -s 8M /var/loop.img && mkfs.ext4 -q /var/loop.img")
    monitor = plain_machine.popen("stdbuf", "-oL", "udevadm", "monitor", "--udev", "--subsystem-match=block")
    assert monitor.stdout is not None
    try:
        while not monitor.stdout.readline().startswith(b"UDEV - "):
            pass
        plain_machine.sh("mount -o loop /var/loop.img /mnt && umount /mnt && rm /var/loop.img")
        events = (monitor.stdout.readline() for _ in range(20))
        assert any(b"/block/loop" in line for line in events)
    finally:
        monitor.kill()
        monitor.communicate()
        plain_machine.run("pkill", "udevadm", check=False)


def test_users_make_user_namespaces(plain_machine: Machine) -> None:
    plain_machine.ssh("alice", "unshare -Urm true && bwrap --ro-bind / / --dev /dev true")


def test_x_server_starts(plain_machine: Machine) -> None:
    with plain_machine.session("alice") as session:
        session.run("Xvfb :7 -nolisten tcp & XVFB=$!")
        eventually(lambda: session.run("DISPLAY=:7 xdpyinfo | head -n 1"), what="Xvfb answers")
        plain_machine.run("test", "-S", "/tmp/.X11-unix/X7")
        session.run("kill $XVFB; wait $XVFB || true")


def test_session_keeps_its_shell(plain_machine: Machine) -> None:
    with plain_machine.session("bob") as session:
        session.run("cd /usr; X=1; sleep infinity & disown")
        assert session.run("pwd; echo $X; echo $$; cat") == f"/usr\n1\n{session.pid}\n"
        result = session.result("printf out; printf err >&2; (exit 3)", check=False)
        assert (result.returncode, result.stdout, result.stderr) == (3, "out", "err")
        with pytest.raises(CommandError, match=r"exit status 7\n--- stderr\nwhy"):
            session.run("echo why >&2; (exit 7)")
    assert plain_machine.run("pgrep", "-u", "bob", "sleep").stdout  # Debian's KillUserProcesses=no
    plain_machine.run("pkill", "-u", "bob", "sleep")


def test_killed_session_ends(plain_machine: Machine) -> None:
    with plain_machine.session("bob") as session:
        session.kill()
        eventually(lambda: plain_machine.run("kill", "-0", str(session.pid), check=False).returncode)


def test_failed_commands_say_all(plain_machine: Machine) -> None:
    with pytest.raises(CommandError) as caught:
        plain_machine.sh("echo one; echo two >&2; exit 4")
    shown = "exit status 4\n--- stdout\none\n--- stderr\ntwo"
    assert str(caught.value) == f"echo one; echo two >&2; exit 4: {shown}"
    with pytest.raises(CommandError, match="no end within"):
        plain_machine.run("sleep", "infinity", timeout=0.2)
    assert plain_machine.ssh("alice", "exit 5", check=False).returncode == 5


def test_write_and_read(plain_machine: Machine) -> None:
    plain_machine.write("/etc/bed/file", b"\0\xff", 0o640, "alice:bob")
    assert plain_machine.read("/etc/bed/file") == b"\0\xff"
    assert plain_machine.run("stat", "-c%U %G %a", "/etc/bed/file").stdout == "alice bob 640\n"


def test_journal(plain_machine: Machine) -> None:
    plain_machine.run("systemd-cat", "--identifier=bedtest", "echo", "hello")
    eventually(lambda: "hello" in plain_machine.journal("--identifier=bedtest"))


def test_eventually_says_what_was_last() -> None:
    with pytest.raises(AssertionError, match=r"not within 0 s: the thing; the last was 0"):
        eventually(lambda: 0, timeout=0, what="the thing")
    with pytest.raises(AssertionError, match=r"ZeroDivisionError"):
        eventually(lambda: 1 // 0, timeout=0)
    assert eventually(lambda: "value") == "value"


def test_build_depends(tmp_path: Path) -> None:
    control = tmp_path / "control"
    control.write_text(
        "Source: x\nBuild-Depends: debhelper-compat (= 13), aa [amd64] <!nocheck> | bb,\n"
        "# a comment\n cc:any (>= 1), ${x}\nStandards-Version: 4\n\nPackage: x\nBuild-Depends: no\n"
    )
    assert build_depends(control) == ["aa", "cc", "debhelper"]


def test_second_boot_and_nothing_left(bed: None, release: str) -> None:
    with Machine(release, prepare=lambda root: (root / "etc/prepared").touch()) as machine:
        leader, boot_id = machine.leader, machine.read("/proc/sys/kernel/random/boot_id")
        machine.sh("test -e /etc/prepared && touch /var/tmp/kept /etc/fixed && chattr +i /etc/fixed")
        with machine.session("alice") as session:
            session.run("nohup sleep infinity >/dev/null 2>&1 &")
            machine.reboot()
            session.kill()
        assert machine.leader != leader
        assert machine.read("/proc/sys/kernel/random/boot_id") != boot_id
        machine.run("test", "-e", "/var/tmp/kept")
        assert machine.ssh("alice", "id -un").stdout == "alice\n"
        assert traces(machine.name)
    assert traces(machine.name) == []


def traces(name: str) -> list[str]:
    """Return a machine's traces on the host: mounts, processes, cgroups, files, loop devices."""
    found = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if name in line]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            known = (process / "cmdline").read_text() + (process / "cgroup").read_text()
            found += [str(process)] if name in known else []
    for top in ("/sys/fs/cgroup", "/run/systemd/nspawn", str(cache_directory() / "machines")):
        # not Path.glob(), which fails if other machines come and go
        for place, directories, files in os.walk(top):
            found += [f"{place}/{entry}" for entry in (*directories, *files) if name in entry]
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found += [str(path)] if name in path.read_text() else []
    return found

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Directories= of polytmpd.conf(5): other directories for temporary files, and those that break a host.

Not here: mistakes in the syntax (test_failures).
"""

from collections.abc import Iterator

import pytest

from tests import observe
from tests.bed import CommandError, Machine, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.prepared(by=observe.quick_logouts)]

CONF = "/etc/polytmpd.conf.d/directories.conf"


@pytest.fixture(autouse=True)
def defaults(machine: Machine) -> Iterator[None]:
    observe.log_everybody_out(machine)
    yield
    machine.run("rm", "-f", CONF)
    machine.run("systemctl", "restart", "polytmpd")
    observe.log_everybody_out(machine)


def write(machine: Machine, text: str) -> None:
    machine.write(CONF, f"[Polytmp]\n{text}\n")


@pytest.mark.parametrize(
    "path",
    ["/etc", "/usr", "/proc", "/dev", "/home", "/run", "/root", "/sys/fs", "/var", "/usr/../etc", "/"],
)
def test_directories_that_would_break_the_host(machine: Machine, path: str) -> None:
    """A reload refuses them and changes nothing; a start leaves them out, and logins work."""
    write(machine, f"Directories=/tmp {path}")
    with pytest.raises(CommandError):
        machine.run("systemctl", "reload", "polytmpd")
    begin = machine.now()
    machine.run("systemctl", "restart", "polytmpd")
    assert f"{CONF}:2: Directories=: " in machine.journal("-u", "polytmpd", f"--since={begin}", "-p", "err")
    with machine.session("alice") as alice:
        assert alice.run("touch /tmp/x; ls /tmp").split() == ["x"]
        assert list(observe.directories(machine, "alice")) == ["/tmp"]
        assert alice.run("ls /home; test -e /proc/self && test -c /dev/null; echo $?").split() == [
            "alice",
            "bob",
            "0",
        ]


def test_a_link_to_one(machine: Machine) -> None:
    machine.sh("mkdir -p /srv; ln -sfn /etc /srv/link; ln -sfn /tmp /srv/tmp")
    write(machine, "Directories=/tmp /srv/link /srv/tmp")
    with pytest.raises(CommandError):
        machine.run("systemctl", "reload", "polytmpd")
    text = machine.journal("-u", "polytmpd", "-n", "5")
    assert "/srv/link, a link to /etc, is a directory of the system" in text
    assert "/srv/tmp, a link to /tmp, is the same directory as /tmp" in text


def test_shared_memory_and_scratch(machine: Machine) -> None:
    machine.run("install", "-d", "-m", "1777", "/scratch")
    write(machine, "Directories=/tmp /var/tmp /dev/shm /scratch\nPersistentDirectories=/var/tmp /scratch")
    machine.run("systemctl", "reload", "polytmpd")
    machine.run("touch", "/dev/shm/of-the-host", "/scratch/of-the-host")
    with machine.session("alice") as alice, machine.session("bob") as bob:
        for path in ("/dev/shm", "/scratch"):
            assert alice.run(f"ls {path}") == ""
            alice.run(f"echo hers > {path}/x")
            assert bob.run(f"ls {path}") == ""
            host = observe.directories(machine, "alice")[path]
            assert machine.read(f"{host}/x") == b"hers\n"
            assert alice.run(f"stat -fc %T {path}") == machine.run("stat", "-fc", "%T", path).stdout
        script = (
            "from multiprocessing import shared_memory as m; s = m.SharedMemory('polytmp-x', True, 9); "
            "import os; print(os.listdir('/dev/shm')); s.close(); s.unlink()"
        )
        assert "polytmp-x" in alice.run(f'python3 -c "{script}"'), "shm_open(3) works"
        held = observe.directories(machine, "alice")
    eventually(lambda: observe.instances(machine) == {}, 60, "they end")
    assert machine.read(f"{held['/scratch']}/x") == b"hers\n"
    eventually(lambda: machine.sh("ls /dev/shm").stdout.split() == ["of-the-host"], 30, "nothing is left")
    machine.run("rm", "-rf", "/scratch", "/dev/shm/of-the-host")


def test_a_directory_that_is_not_sticky(machine: Machine) -> None:
    """A reload refuses it. At a start it may be a file system that comes later: logins wait for that."""
    machine.run("install", "-d", "-m", "0755", "/plain")
    write(machine, "Directories=/tmp /plain")
    with pytest.raises(CommandError):
        machine.run("systemctl", "reload", "polytmpd")
    with machine.session("alice") as alice:
        assert alice.run("touch /tmp/x; ls /tmp").split() == ["x"], "the last good configuration"
    observe.log_everybody_out(machine)
    begin = machine.now()
    machine.run("systemctl", "restart", "polytmpd")
    remedy = "chmod +t /plain, or add UncheckedDirectories=/plain if it is to be private as it is"
    text = machine.journal("-u", "polytmpd", f"--since={begin}", "-p", "err")
    assert "logins of regular users are refused: Directories=: /plain is not sticky, so " in text
    assert remedy in text
    result = machine.ssh("alice", "echo in", check=False)
    assert result.returncode != 0
    assert "/plain" in result.stdout + result.stderr
    assert "UncheckedDirectories=" in result.stdout + result.stderr
    check = machine.run("polytmpctl", "check", check=False)
    assert check.returncode == 1
    assert remedy in " ".join(check.stdout.split())
    machine.run("chmod", "1777", "/plain")
    assert machine.ssh("alice", "touch /plain/x; ls /plain").stdout.split() == ["x"]
    observe.log_everybody_out(machine)
    machine.run("rm", "-rf", "/plain")


def test_an_upgrade_names_what_it_does_not_accept(machine: Machine) -> None:
    """On the terminal: an administrator must not hear of it from users who cannot log in."""
    machine.run("install", "-d", "-m", "0755", "/plain")
    configure = "DPKG_MAINTSCRIPT_PACKAGE=polytmp /var/lib/dpkg/info/polytmp.postinst configure"
    write(machine, "Directories=/tmp /plain /etc")
    said = machine.sh(f"{configure} 0.0.9").stderr
    assert f"polytmp: {CONF}:2: Directories=: /etc is a directory of the system" in said
    assert "logins of regular users are refused: Directories=: /plain is not sticky" in said
    write(machine, "Directories=/tmp /plain\nUncheckedDirectories=/plain")
    assert "polytmp: " not in machine.sh(f"{configure} 0.0.9").stderr
    assert machine.ssh("alice", "stat -c %a /plain").stdout.strip() == "755"
    observe.log_everybody_out(machine)
    machine.run("rm", "-rf", "/plain")


def test_the_administrator_means_it(machine: Machine) -> None:
    machine.run("install", "-d", "-m", "0755", "/opt/plain")
    machine.run("touch", "/opt/plain/of-the-host")
    write(machine, "Directories=/tmp /opt/plain\nUncheckedDirectories=/opt/plain")
    machine.run("systemctl", "reload", "polytmpd")
    assert machine.ssh("alice", "ls /opt/plain; stat -c %a /opt/plain").stdout.split() == ["755"]
    observe.log_everybody_out(machine)
    machine.run("rm", "-rf", "/opt/plain")


def test_quotes_and_a_byte_order_mark(machine: Machine) -> None:
    machine.write(CONF, b"\xef\xbb\xbf[Polytmp]\r\nExemptUsers=\"alice\" 'bob'\r\n")
    machine.run("systemctl", "reload", "polytmpd")
    namespace = machine.run("readlink", "/proc/1/ns/mnt").stdout
    for user in ("alice", "bob"):
        assert machine.ssh(user, observe.NAMESPACE).stdout == namespace

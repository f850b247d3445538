# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sockets and files of servers in the host's /tmp, with PostgreSQL.

Not here: socket directories (test_sockets).
"""

import json
from collections.abc import Iterator

import pytest

from tests import observe
from tests.bed import Machine, Session, eventually

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.usefixtures("quiet"),
    pytest.mark.prepared(by=observe.quick_logouts),
]

SOCKET = "/tmp/.s.PGSQL.5432"
PSQL = "psql -h /tmp -d postgres -Atc 'select current_user'"
SETTINGS = "[Polytmp]\nSharedPaths=.X11-unix .ICE-unix .XIM-unix .font-unix .s.PGSQL.* plain.sock\n"
SERVER = """
import os, socket, sys, time
path = sys.argv[1]
if os.path.lexists(path):
    os.unlink(path)
listening = socket.socket(socket.AF_UNIX)
os.umask(0)
listening.bind(path)
listening.listen()
while True:
    client, _ = listening.accept()
    client.sendall(sys.argv[2].encode() + b"\\n")
    client.close()
"""
CLIENT = (
    "python3 -c 'import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
    'print(s.makefile().read(), end="")\' '
)


@pytest.fixture(scope="module")
def postgres(machine: Machine) -> None:
    """PostgreSQL listens in /tmp as soon as it is started; alice may connect to it."""
    machine.sh(
        "set -e; for d in /etc/postgresql/*/main; do mkdir -p $d/conf.d; "
        "echo \"unix_socket_directories = '/tmp'\" >$d/conf.d/tmp.conf; done; "
        "systemctl start postgresql; su postgres -s /bin/sh -c 'createuser -h /tmp alice'; "
        "systemctl stop postgresql",
        timeout=120,
    )
    machine.write("/root/server.py", SERVER, 0o644)
    machine.run("chmod", "711", "/root")


@pytest.fixture(autouse=True)
def shared(machine: Machine, postgres: None) -> Iterator[None]:
    machine.write("/etc/polytmpd.conf.d/50-shared.conf", SETTINGS)
    machine.run("systemctl", "reload", "polytmpd")
    yield
    machine.sh("systemctl stop postgresql; systemctl stop 'serve-*'; rm -f /tmp/.s.PGSQL.* /tmp/plain.sock")


def serve(machine: Machine, user: str, path: str, word: str) -> None:
    machine.run(
        *("systemd-run", f"--unit=serve-{word}", f"--uid={user}", "--collect"),
        *("python3", "/root/server.py", path, word),
    )
    eventually(lambda: machine.sh(f"test -S {path}", check=False).returncode == 0, 10, "the server listens")


def answers(session: Session, line: str, answer: str) -> None:
    eventually(lambda: session.result(line, check=False).stdout == answer, 10, f"{line}: {answer!r}")


def log(machine: Machine, since: str) -> str:
    return machine.journal("-u", "polytmpd", f"--since={since}", "--output=cat")


def test_a_server_that_runs_before_the_login(machine: Machine) -> None:
    machine.run("systemctl", "start", "postgresql", timeout=120)
    assert machine.ssh("alice", PSQL).stdout == "alice\n", "at once"
    assert machine.ssh("alice", f"stat -Lc '%F %U' {SOCKET}").stdout == "socket postgres\n"


def test_a_session_that_was_open_before_the_server_and_a_restart(machine: Machine) -> None:
    with machine.session("alice") as alice, machine.session("bob") as bob:
        assert alice.result(PSQL, check=False).returncode != 0
        machine.run("systemctl", "start", "postgresql", timeout=120)
        answers(alice, PSQL, "alice\n")
        for _ in range(3):
            made = machine.run("stat", "-c", "%z", SOCKET).stdout
            machine.run("systemctl", "restart", "postgresql", timeout=120)
            assert machine.run("stat", "-c", "%z", SOCKET).stdout != made
            answers(alice, PSQL, "alice\n")
        answers(bob, f"stat -Lc '%F %U' {SOCKET}", "socket postgres\n")
        machine.run("systemctl", "stop", "postgresql", timeout=120)
        answers(alice, "ls -A /tmp | grep -c PGSQL", "0\n")
        # The name is hers while the server does not run.
        alice.run(f"touch {SOCKET} && rm {SOCKET}")


def test_the_daemon_is_restarted_meanwhile(machine: Machine) -> None:
    machine.run("systemctl", "start", "postgresql", timeout=120)
    with machine.session("alice") as alice:
        answers(alice, PSQL, "alice\n")
        machine.run("systemctl", "stop", "polytmpd")
        assert alice.run(PSQL) == "alice\n", "needs no daemon"
        machine.run("systemctl", "restart", "postgresql", timeout=120)
        machine.run("systemctl", "start", "polytmpd")
        answers(alice, PSQL, "alice\n")
        machine.run("systemctl", "restart", "postgresql", timeout=120)
        answers(alice, PSQL, "alice\n")


def test_a_squatter_on_the_host(machine: Machine) -> None:
    """carol is exempt, so she is in the host's /tmp and may take any free name."""
    machine.sh("id carol 2>/dev/null || useradd --create-home --uid 1003 carol")
    machine.write("/etc/polytmpd.conf.d/60-carol.conf", "[Polytmp]\nExemptUsers=carol\n")
    machine.run("systemctl", "reload", "polytmpd")
    since = machine.now()
    try:
        with machine.session("alice") as alice:
            serve(machine, "carol", SOCKET, "trap")
            serve(machine, "postgres", "/tmp/.s.PGSQL.1", "real")  # whatever came before has been seen
            answers(alice, f"{CLIENT} /tmp/.s.PGSQL.1", "real\n")
            assert alice.run("ls -A /tmp | grep PGSQL") == ".s.PGSQL.1\n"
            assert alice.run("ls -A /tmp/.polytmp-shared") == ".s.PGSQL.1\n"
            assert alice.result(f"{CLIENT} {SOCKET}", check=False).returncode != 0
        assert machine.ssh("alice", "ls -A /tmp | grep PGSQL").stdout == ".s.PGSQL.1\n", "nor at a login"
        assert f"Not sharing {SOCKET} with sessions: owned by UID 1003" in log(machine, since)
        # She has no way to put something among what is shared, or to exchange it.
        for line in (
            "touch /tmp/.polytmp-shared/x",
            "rm -f /tmp/.polytmp-shared/.s.PGSQL.1",
            "mv /tmp/.polytmp-shared /tmp/x",
            "ln -sf /etc/passwd /tmp/.s.PGSQL.1",
        ):
            assert machine.run("runuser", "-u", "carol", "--", "sh", "-c", line, check=False).returncode != 0
    finally:
        machine.sh("rm /etc/polytmpd.conf.d/60-carol.conf; systemctl reload polytmpd")


def test_a_squatter_in_her_own_instance_has_it_to_herself(machine: Machine) -> None:
    since = machine.now()
    with machine.session("alice") as alice, machine.session("bob") as bob:
        alice.run(f"echo hers >{SOCKET}")
        machine.run("systemctl", "start", "postgresql", timeout=120)
        answers(bob, f"stat -Lc '%F %U' {SOCKET}", "socket postgres\n")
        assert alice.run(f"cat {SOCKET}") == "hers\n"
        assert f"Not sharing {SOCKET} with user alice, who has one of their own" in log(machine, since)
        alice.run(f"mv {SOCKET} /tmp/away")
        answers(alice, PSQL, "alice\n")
        assert alice.run("cat /tmp/away") == "hers\n"
        alice.run(f"rm -f {SOCKET}; mv /tmp/away {SOCKET}", check=False)
        assert alice.run(PSQL) == "alice\n", "now it is root's"
    assert machine.ssh("alice", PSQL).stdout == "alice\n"


def test_a_name_without_a_pattern_and_a_server_of_a_system_user(machine: Machine) -> None:
    with machine.session("alice") as alice:
        serve(machine, "svc", "/tmp/plain.sock", "one")
        answers(alice, f"{CLIENT} /tmp/plain.sock", "one\n")
        machine.run("systemctl", "stop", "serve-one")
        serve(machine, "svc", "/tmp/plain.sock", "two")
        answers(alice, f"{CLIENT} /tmp/plain.sock", "two\n")
        assert machine.sh(f"{CLIENT} $(polytmpctl path -u alice /tmp/plain.sock)").stdout == "two\n"


def test_root_removes_the_links(machine: Machine) -> None:
    serve(machine, "svc", "/tmp/plain.sock", "one")
    with machine.session("alice") as alice:
        line = f"{CLIENT} /tmp/plain.sock"
        answers(alice, line, "one\n")
        place = observe.directories(machine, "alice")["/tmp"]
        machine.sh(f"rm {place}/plain.sock")
        answers(alice, line, "one\n")
        machine.sh("rm /tmp/.polytmp-shared/*")
        answers(alice, line, "one\n")
        machine.sh("rm -rf /tmp/.polytmp-shared")
        answers(alice, line, "one\n")


def test_no_longer_shared(machine: Machine) -> None:
    serve(machine, "svc", "/tmp/plain.sock", "one")
    with machine.session("alice") as alice:
        line = f"{CLIENT} /tmp/plain.sock"
        answers(alice, line, "one\n")
        machine.run("rm", "/etc/polytmpd.conf.d/50-shared.conf")
        machine.run("systemctl", "reload", "polytmpd")
        assert alice.result(line, check=False).returncode != 0
        assert alice.run("ls -A /tmp | grep -c plain; true") == "0\n"
    eventually(lambda: observe.gone(machine, "alice"), 30, "her instance is gone")
    machine.run("systemctl", "restart", "polytmpd")
    assert machine.sh("ls -A /tmp").stdout.count("polytmp-shared") == 0


def test_check_names_servers_that_no_session_reaches(machine: Machine) -> None:
    def reported() -> dict[str, str]:
        found = json.loads(machine.run("polytmpctl", "--json=short", "check", check=False).stdout)["results"]
        return {entry["name"]: entry["remedy"] for entry in found if entry["verdict"] == "warn"}

    serve(machine, "svc", "/tmp/other.sock", "one")
    machine.run("systemctl", "start", "postgresql", timeout=120)
    with machine.session("alice") as alice:
        alice.run("nohup python3 /root/server.py /tmp/hers.sock hers >/dev/null 2>&1 &")
        answers(alice, f"{CLIENT} /tmp/hers.sock", "hers\n")
        found = reported()
        assert found["/tmp/other.sock"].endswith(
            "/tmp/.s.PGSQL.* /tmp/plain.sock other.sock in polytmpd.conf; "
            "or have the server listen in /run, for example /run/other.sock"
        )
        assert not [name for name in found if "PGSQL" in name or "hers" in name or ".X11-unix" in name]
        # and the remedy is one
        words = found["/tmp/other.sock"].removeprefix("SharedPaths=").partition(" in polytmpd.conf")[0]
        machine.write("/etc/polytmpd.conf.d/50-shared.conf", f"[Polytmp]\nSharedPaths={words}\n")
        machine.run("systemctl", "reload", "polytmpd")
        answers(alice, f"{CLIENT} /tmp/other.sock", "one\n")
        assert "/tmp/other.sock" not in reported()
    machine.sh("systemctl stop serve-one; rm /tmp/other.sock")


def test_a_directory_named_like_a_socket_keeps_the_socket(machine: Machine) -> None:
    """A name with a dot and no other is a directory: the advice does not remove what is there."""
    serve(machine, "svc", "/tmp/.live", "live")
    try:
        machine.write("/etc/polytmpd.conf.d/60-live.conf", "[Polytmp]\nSharedPaths=.live\n")
        machine.run("systemctl", "reload", "polytmpd")
        since = machine.now()
        assert machine.ssh("alice", "ls -A /tmp | grep -c live; true").stdout == "0\n"
        assert "not a directory; to share a socket or file, name /tmp/.live in SharedPaths=" in log(
            machine, since
        )
    finally:
        machine.sh("rm /etc/polytmpd.conf.d/60-live.conf; systemctl stop serve-live; rm /tmp/.live")

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who gets private directories: UIDs of all ranges, users of a directory, groups, user records.

Not here: attacks with names and UIDs (test_attacks_bus, test_uid_reuse), the rule alone (tests/unit).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests import observe
from tests.bed import CommandError, Machine, eventually
from tests.bed.tree import ssh_key

CONF = "/etc/polytmpd.conf.d/users.conf"
EXEMPT = "MESSAGE_ID=5f3b8c1d6c0a4f0db58c2e6a9d7b1e09"
LOCAL = {"homed": 60100, "local": 200001, "sssd": 1234567890, "far": 4294967000, "slurm": 64030}
DIRECTORY = {"DOM\\dora": 1234567891, "erin@example.com": 200002, "fred.smith": 60101, "wrong": 4294967001}
"""Users whom libnss-extrausers knows, and no file in /etc."""
STAFF = 7000
CALL = ("busctl", "call", "org.polytmp1", "/org/polytmp1", "org.polytmp1.Manager", "AcquireNamespace", "u")


def prepare(root: Path) -> None:
    """Add users to the files that the machine has, before it boots."""
    observe.quick_logouts(root)
    extra = root / "var/lib/extrausers"
    extra.mkdir(parents=True, exist_ok=True)
    for users, place in ((LOCAL, root / "etc"), (DIRECTORY, extra)):
        for file, line in (
            ("passwd", "{name}:x:{uid}:{gid}::{home}:/bin/bash"),
            ("shadow", "{name}:*:19000:0:99999:7:::"),
        ):
            with (place / file).open("a") as output:
                for name, uid in users.items():
                    home = f"/home/{uid}"
                    gid = STAFF if name == "local" else 100
                    output.write(line.format(name=name, uid=uid, gid=gid, home=home) + "\n")
    (extra / "group").write_text(f"staff-of-dom:x:{STAFF}:DOM\\dora,alice\nDOM\\domain users:x:7001:bob\n")
    nsswitch = root / "etc/nsswitch.conf"
    lines = []
    for line in nsswitch.read_text().splitlines():
        extends = line.startswith(("passwd:", "group:", "shadow:")) and "extrausers" not in line
        lines.append(f"{line} extrausers" if extends else line)
    nsswitch.write_text("\n".join(lines) + "\n")
    observe.write(root, "etc/pam.d/bed", "account required pam_permit.so\n@include common-session\n")
    key = ssh_key().with_suffix(".pub").read_text()
    for uid in (*LOCAL.values(), *DIRECTORY.values()):
        observe.write(root, f"home/{uid}/.ssh/authorized_keys", key)


pytestmark = [pytest.mark.e2e, pytest.mark.prepared(by=prepare)]


@pytest.fixture(autouse=True)
def homes(machine: Machine) -> None:
    for uid in (*LOCAL.values(), *DIRECTORY.values()):
        machine.run("chown", "-R", f"{uid}:100", f"/home/{uid}")


@pytest.fixture(autouse=True)
def nothing_configured(machine: Machine) -> Iterator[None]:
    yield
    machine.sh(f"rm -f {CONF}; systemctl reload-or-restart polytmpd")


def configure(machine: Machine, text: str) -> None:
    machine.write(CONF, f"[Polytmp]\n{text}\n")
    machine.run("systemctl", "reload", "polytmpd")


def is_private(machine: Machine, user: str) -> bool:
    """Whether a real login of the user is in a namespace of its own, with directories of its own."""
    marker = "/tmp/of-the-host"
    machine.run("touch", marker)
    host = machine.run("readlink", "/proc/1/ns/mnt").stdout
    seen = machine.ssh(user, f"{observe.NAMESPACE}; test -e {marker} && echo shared || echo private").stdout
    namespace, view = seen.splitlines()
    assert (namespace == host.strip()) == (view == "shared")
    return view == "private"


def reported(machine: Machine, since: str) -> dict[str, tuple[str, str]]:
    """USER_ID → POLYTMP_UID and reason of those who were let through."""
    text = machine.run("journalctl", "--sync").stdout
    text = machine.run("journalctl", "--output=json", f"--since={since}", EXEMPT).stdout
    entries = [json.loads(line) for line in text.splitlines()]
    assert {entry["PRIORITY"] for entry in entries} <= {"6"}
    assert len({entry["USER_ID"] for entry in entries}) == len(entries), "each is reported once"
    return {
        entry["USER_ID"]: (entry["POLYTMP_UID"], entry["MESSAGE"].partition("directories: ")[2])
        for entry in entries
    }


@contextmanager
def user_record(
    machine: Machine, name: str, uid: int, disposition: str, home: str = "/nonexistent"
) -> Iterator[None]:
    record = {"userName": name, "uid": uid, "gid": 100, "disposition": disposition, "homeDirectory": home}
    machine.write(f"/etc/userdb/{name}.user", json.dumps(record))
    machine.run("ln", "-sf", f"{name}.user", f"/etc/userdb/{uid}.user")
    yield
    machine.run("rm", "-r", "/etc/userdb")


@pytest.mark.parametrize("user", ["homed", "local", "sssd", "DOM\\dora", "erin@example.com", "fred.smith"])
def test_users_of_all_ranges(machine: Machine, user: str) -> None:
    uid = {**LOCAL, **DIRECTORY}[user]
    since = machine.now()
    assert is_private(machine, user)
    assert machine.ssh(user, "touch /tmp/x /var/tmp/x; ls /tmp").stdout.split() == ["x"]
    with machine.session(user):
        assert observe.state(machine, user) == "active"
        assert observe.directories(machine, user)["/var/tmp"] == f"/var/tmp/polytmp-{uid}/tmp"
    assert user not in reported(machine, since)


def test_su_and_cron_for_users_of_a_directory(machine: Machine) -> None:
    """They join the namespace of the ssh login, whatever the name and the number."""
    users = {"sssd": 1234567890, "DOM\\dora": 1234567891}
    jobs = [f"* * * * * {user} {observe.NAMESPACE} >/home/{uid}/cron\n" for user, uid in users.items()]
    with machine.session("sssd") as sssd, machine.session("DOM\\dora") as dora:
        machine.write("/etc/cron.d/users", "".join(jobs))  # not before: a minute may begin at any time
        for session, (user, uid) in zip((sssd, dora), users.items(), strict=True):
            namespace = session.run(observe.NAMESPACE).strip()
            assert namespace != machine.run("readlink", "/proc/1/ns/mnt").stdout.strip()
            assert machine.run("su", "-", user, "-c", observe.NAMESPACE).stdout.strip() == namespace
            eventually(partial(machine.run, "test", "-s", f"/home/{uid}/cron"), 75, "cron runs it")
            assert machine.read(f"/home/{uid}/cron").decode().strip() == namespace
    machine.sh("rm /etc/cron.d/users /home/*/cron")


@pytest.mark.parametrize("user", ["far", "wrong", "slurm", "svc"])
def test_those_who_are_no_regular_users_are_named(machine: Machine, user: str) -> None:
    machine.run("systemctl", "restart", "polytmpd")
    since = machine.now()
    machine.run("systemctl", "reload", "polytmpd")
    for _ in range(2):
        assert not is_private(machine, user)
    expected = {"far": "reserved", "wrong": "reserved", "slurm": "61184..65519", "svc": "below UID_MIN"}
    eventually(lambda: user in reported(machine, since), 10, "the journal names the user")
    uid, reason = reported(machine, since)[user]
    assert uid == machine.run("id", "-u", user).stdout.strip()
    assert expected[user] in reason
    entry = next(
        entry
        for entry in json.loads(machine.run("polytmpctl", "check", "--json=short", check=False).stdout)[
            "results"
        ]
        if entry["name"] == "exempt users"
    )
    if user in {"far", "slurm"}:
        assert f"{user} ({uid}): " in entry["text"]
    assert entry["verdict"] == "warn", "far has a UID that no person should have"
    assert "RegularUIDs=" in entry["remedy"]


def test_a_dynamic_user(machine: Machine) -> None:
    """systemd's own record of it, from PID 1 through userdbd and without it."""
    program = "import sys; from polytmpd import userdb; print(userdb.disposition(int(sys.argv[1])))"
    ask = f"/usr/bin/python3 -c '{program}'"
    machine.run(
        "systemd-run",
        "--quiet",
        "--unit=dynamic",
        "-p",
        "DynamicUser=yes",
        "-p",
        "Type=exec",
        "sleep",
        "600",
    )
    try:
        uid = machine.sh("stat -c %u /proc/$(systemctl show -P MainPID dynamic)").stdout.strip()
        assert 61184 <= int(uid) <= 65519
        assert machine.sh(f"{ask} {uid}").stdout == "dynamic\n"
        machine.run("systemctl", "stop", "systemd-userdbd.socket", "systemd-userdbd.service")
        assert machine.sh(f"{ask} {uid}").stdout == "dynamic\n"
        assert machine.sh(f"{ask} 1234567890").stdout == "None\n"
        named = machine.run("getent", "passwd", uid, check=False).returncode == 0  # by libnss-systemd
        refusal = "has the disposition dynamic" if named else f"there is no user with UID {uid}"
        with pytest.raises(CommandError, match=refusal):
            machine.run(*CALL, uid)
    finally:
        machine.run("systemctl", "stop", "dynamic")
        machine.run("systemctl", "start", "systemd-userdbd.socket")


@pytest.mark.parametrize("userdbd", ["start", "stop"])
def test_the_user_record_decides(machine: Machine, userdbd: str) -> None:
    machine.run("systemctl", userdbd, "systemd-userdbd.socket")
    try:
        since = machine.now()
        with user_record(machine, "local", LOCAL["local"], "system"):
            assert not is_private(machine, "local")
        eventually(lambda: "local" in reported(machine, since), 10, "the journal names the user")
        assert "has the disposition system" in reported(machine, since)["local"][1]
        assert is_private(machine, "local")
        with user_record(machine, "slurm", LOCAL["slurm"], "regular"):
            assert is_private(machine, "slurm")
        assert not is_private(machine, "slurm")
    finally:
        machine.run("systemctl", "start", "systemd-userdbd.socket")


def test_ranges(machine: Machine) -> None:
    configure(machine, "RegularUIDs=1002 4294967000-")
    assert is_private(machine, "bob")
    assert is_private(machine, "far")
    assert not is_private(machine, "alice")
    assert not is_private(machine, "sssd")


@pytest.mark.parametrize(
    ("text", "exempt"),
    [
        ("ExemptGroups=staff-of-dom", {"alice", "DOM\\dora", "local"}),
        (f"ExemptGroups={STAFF}", {"alice", "DOM\\dora", "local"}),
        (
            'ExemptUsers=@staff-of-dom "erin@example.com"',
            {"alice", "DOM\\dora", "local", "erin@example.com"},
        ),
        ('ExemptGroups="@DOM\\domain users"', {"bob"}),
        ("OnlyGroups=staff-of-dom", {"bob", "fred.smith", "erin@example.com"}),
        ("OnlyGroups=staff-of-dom no-such-group", set()),
        ("ExemptGroups=no-such-group", set()),
        ("ExemptUsers=DOM\\dora 1001 fred.smith", {"DOM\\dora", "alice", "fred.smith"}),
    ],
)
def test_groups_and_names(machine: Machine, text: str, exempt: set[str]) -> None:
    """In /etc/group's place a directory; local is in the group by its primary GID."""
    observe.log_everybody_out(machine)
    since = machine.now()
    configure(machine, text)
    users = ["alice", "bob", "DOM\\dora", "local", "erin@example.com", "fred.smith"]
    assert {user for user in users if not is_private(machine, user)} == exempt
    eventually(lambda: set(reported(machine, since)) >= exempt, 10, "the journal names them")
    assert set(reported(machine, since)) == exempt
    warned = machine.journal("-u", "polytmpd", f"--since={since}", "-p", "warning")
    assert ("No such group: no-such-group" in warned) == ("no-such-group" in text)


def test_settings_that_match_nobody(machine: Machine) -> None:
    since = machine.now()
    configure(machine, "ExemptUsers=alice alcie\nOnlyGroups=stuff\nRegularUIDs=90000-99999")

    def warned() -> str:
        return machine.journal("-u", "polytmpd", f"--since={since}", "-p", "warning")

    eventually(lambda: "OnlyGroups=: No such group: stuff" in warned(), 10, "a warning")
    assert "RegularUIDs=: No user in /etc/passwd has one of these UIDs" in warned()
    assert "ExemptUsers=: No such user: alcie; correct or remove it" in warned()
    done = machine.run("polytmpctl", "check", "--json=short", check=False)
    texts = [entry["text"] for entry in json.loads(done.stdout)["results"] if entry["verdict"] == "warn"]
    assert "OnlyGroups= names unknown groups: stuff" in texts


def test_a_user_database_that_hangs(machine: Machine) -> None:
    """Unknown is not exempt: the login is refused, in time, and others are served meanwhile."""
    configure(machine, "ExemptGroups=staff-of-dom\nExemptUsers=bob")
    machine.sh("cd /var/lib/extrausers; mv group kept; mkfifo group")
    try:
        begin = machine.now()
        hanging = [machine.popen(*CALL, "1001") for _ in range(6)]
        assert machine.run("polytmpctl", "list", timeout=9).returncode == 0, "meanwhile"
        with pytest.raises(CommandError, match="user bob is named in ExemptUsers="):
            machine.run(*CALL, "1002")
        for process in hanging:
            _, error = process.communicate(timeout=40)
            assert b"the user database did not answer for user alice within 10 s" in error
        done = machine.run("polytmpctl", "check", check=False, timeout=50)
        assert "the user database does not answer within 10 s" in " ".join(done.stdout.split())
        assert "User alice" not in machine.journal("-u", "polytmpd", f"--since={begin}")
    finally:
        machine.sh("cd /var/lib/extrausers; rm -f group; mv kept group; systemctl restart polytmpd")
    assert not is_private(machine, "alice")


def test_a_service_of_user_records_that_hangs(machine: Machine) -> None:
    """A record may call slurm regular, whatever the number says. Regular numbers stay private."""
    machine.run("systemctl", "stop", "systemd-userdbd.socket", "systemd-userdbd.service")
    program = (
        "import socket, time; s = socket.socket(socket.AF_UNIX); "
        "s.bind('/run/systemd/userdb/org.example.Hung'); s.listen(); time.sleep(600)"
    )
    machine.run("systemd-run", "--quiet", "--unit=hung", "/usr/bin/python3", "-c", program)
    try:
        eventually(
            lambda: machine.run("test", "-S", "/run/systemd/userdb/org.example.Hung"), 10, "it listens"
        )
        with pytest.raises(CommandError, match="a service of user records did not answer for user slurm"):
            machine.run(*CALL, str(LOCAL["slurm"]), timeout=30)
        assert machine.run(*CALL, str(LOCAL["sssd"]), timeout=30).stdout.startswith("h ")
        with pytest.raises(CommandError, match="below UID_MIN"):
            machine.run(*CALL, machine.run("id", "-u", "svc").stdout.strip())
    finally:
        machine.run("systemctl", "stop", "hung")
        machine.sh("rm /run/systemd/userdb/org.example.Hung; systemctl start systemd-userdbd.socket")
    with pytest.raises(CommandError, match=r"in 61184\.\.65519"):
        machine.run(*CALL, str(LOCAL["slurm"]))


def test_lookups_at_the_same_time(machine: Machine) -> None:
    """libnss-extrausers has one file for all threads, and glibc does not lock: the process would abort."""
    machine.write(
        "/root/lookups.py",
        """
import threading
from polytmpd import userdb

def look_up():
    for _ in range(500):
        found = userdb.memberships(1234567891, "DOM\\\\dora", ["staff-of-dom"])
        assert found == (frozenset({"staff-of-dom"}), frozenset()), found

threads = [threading.Thread(target=look_up) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
""",
    )
    machine.run("/usr/bin/python3", "/root/lookups.py", timeout=60)


@pytest.fixture
def without_the_daemon(machine: Machine) -> Iterator[None]:
    observe.log_everybody_out(machine)
    machine.run("systemctl", "mask", "--runtime", "--now", "polytmpd")
    yield
    machine.run("systemctl", "unmask", "--runtime", "polytmpd")
    machine.run("systemctl", "start", "polytmpd")


def assert_refused(machine: Machine, user: str) -> None:
    result = machine.ssh(user, "echo in", check=False)
    assert result.returncode != 0, user
    assert "in" not in result.stdout.splitlines(), user


@pytest.mark.usefixtures("without_the_daemon")
def test_without_the_daemon(machine: Machine) -> None:
    """The module lets in only those whom no user record can make regular users."""
    machine.write(CONF, "[Polytmp]\nExemptUsers=bob\nExemptGroups=staff-of-dom\n")
    for user in ("svc", "root"):
        assert machine.ssh(user, "echo in").stdout == "in\n", user
    for user in (*LOCAL, *DIRECTORY, "bob", "alice"):
        assert_refused(machine, user)
    with user_record(machine, "slurm", LOCAL["slurm"], "regular"):
        assert_refused(machine, "slurm")
    since = machine.now()
    with user_record(machine, "far", LOCAL["far"], "regular"):
        assert_refused(machine, "far")
    log = machine.journal("-u", "ssh", f"--since={since}")
    assert "no private /tmp for user far, refusing the session" in log


@pytest.mark.usefixtures("without_the_daemon")
def test_units_and_greeters_without_the_daemon(machine: Machine) -> None:
    """Units with DynamicUser= start, and so does a greeter of GDM 49; a person with such a UID may not."""

    def start(*properties: str) -> str:
        words = [f"--property={word}" for word in ("PAMName=bed", *properties)]
        done = machine.run("systemd-run", "--quiet", "--wait", "--pipe", *words, "id", "-u", check=False)
        return done.stdout.strip() if done.returncode == 0 else "refused"

    assert 61184 <= int(start("DynamicUser=yes")) <= 65519
    since = machine.now()
    with user_record(machine, "gdm-greeter", 60578, "dynamic", home="/run/gdm3/home/gdm-greeter"):
        assert start("User=gdm-greeter") == "60578"
    log = machine.journal(f"--since={since}")
    assert "system user gdm-greeter stays in the caller's directories, polytmpd cannot be reached" in log
    with user_record(machine, "gerda", 60579, "regular", home="/home/gerda"):
        assert start("User=gerda") == "refused"
    assert start("User=slurm") == "refused"
    assert start("User=alice") == "refused"
    assert start("User=svc") == machine.run("id", "-u", "svc").stdout.strip()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check finds on hosts, each of which is a directory. The host of the tests is not examined."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from polytmpd import config, userdb
from polytmpd.bus.connection import BusError
from polytmpd.ctl import check, host, regular, settings, units, users

pytestmark = pytest.mark.unit


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def one(results: "list[host.Result]", name: str) -> host.Result:
    (found,) = [result for result in results if result.name == name]
    assert found.verdict == "pass" or found.remedy, "no remedy"
    return found


def test_directories(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: the directories have to belong to UID 0")
    make(tmp_path, {"proc/1/mountinfo": "22 1 0:2 / / rw shared:1 - ext4 /dev/x rw\n"})
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "tight").mkdir(0o1770)
    (tmp_path / "tight").chmod(0o1770)
    results = list(host.directories(tmp_path, ["/tmp", "/open", "/tight", "/missing"]))
    assert [result.verdict for result in results] == ["pass", "fail", "warn", "fail", "pass"]
    assert "sticky" in one(results, "/open").text


def squatted(root: Path) -> dict[str, str]:
    results = list(host.directories(root, [], ["/kept", "/missing"]))
    assert all(result.remedy for result in results if result.verdict == "fail")
    return {result.name: result.text for result in results if result.name.startswith("/kept")}


def test_foreign_entries_in_a_persistent_directory(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: polytmpd's directories belong to UID 0")
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("polytmp-1001", "polytmp-1002", "polytmp-1003"):
        (kept / name).mkdir(mode=0o700)
    (kept / "polytmp-1002").chmod(0o755)
    os.chown(kept / "polytmp-1003", 1003, 0)
    (kept / "polytmp-1004").symlink_to("polytmp-1001")
    (kept / "polytmp-1005").touch(0o700)
    for name in ("polytmp-1006.old", "polytmp-former-1001-x", "polytmp-removing-0", "mine"):
        (kept / name).mkdir()
    assert {
        name.rpartition("-")[2]: text.partition(":")[0] for name, text in squatted(tmp_path).items()
    } == {
        "1002": "not made by polytmpd (mode 0755)",
        "1003": "not made by polytmpd (owned by 1003",
        "1004": "not made by polytmpd (not a directory)",
        "1005": "not made by polytmpd (not a directory)",
    }


@pytest.mark.parametrize(("number", "lacks"), [(25, True), (95, True), (13, False)])
def test_a_file_system_without_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, lacks: bool
) -> None:
    """For information: the daemon makes again what is removed."""

    def ioctl(*_: object) -> None:
        raise OSError(number, "x")

    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    monkeypatch.setattr("fcntl.ioctl", ioctl)
    assert host._lacks_flags(tmp_path / "tmp") is lacks
    if os.geteuid() == 0:
        found = host._directory(tmp_path, "/tmp")
        assert (found.verdict, "no chattr +i" in found.text) == ("pass", lacks)


def test_many_foreign_entries(tmp_path: Path) -> None:
    """Any process on the host's side can make them: the report stays short."""
    make(tmp_path, {f"kept/polytmp-{uid}": "" for uid in range(1000, 1100)})
    found = squatted(tmp_path)
    assert len(found) == 6
    assert found["/kept/polytmp-*"] == "95 more that were not made by polytmpd"


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("22 1 0:2 / / rw shared:1 - ext4 /dev/x rw\n", "pass"),
        ("22 1 0:2 / / rw - ext4 /dev/x rw\n", "fail"),
        ("22 1 0:2 / / rw master:1 - ext4 shared:1 rw\n", "fail"),
    ],
)
def test_propagation(tmp_path: Path, table: str, expected: str) -> None:
    make(tmp_path, {"proc/1/mountinfo": table})
    assert one(list(host.directories(tmp_path, [])), "/ (propagation)").verdict == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"sys/fs/cgroup/cgroup.controllers": "", "sys/fs/cgroup/cgroup.procs": ""}, "pass"),
        ({"sys/fs/cgroup/unified/cgroup.procs": ""}, "pass"),
        ({"sys/fs/cgroup/systemd/cgroup.procs": ""}, "fail"),
        ({"sys/fs/cgroup/cgroup.procs": ""}, "fail"),
    ],
)
def test_cgroups(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    assert one(list(host.cgroups(make(tmp_path, files))), "cgroups").verdict == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"usr/lib/tmpfiles.d/polytmp.conf": "x /tmp/polytmp-*\n"}, {"tmpfiles.d": "pass"}),
        ({}, {"tmpfiles.d": "fail"}),
        (
            {"usr/lib/tmpfiles.d/polytmp.conf": "x", "etc/tmpfiles.d/polytmp.conf": ""},
            {"tmpfiles.d": "fail"},
        ),
        (
            {"usr/lib/tmpfiles.d/polytmp.conf": "x", "etc/tmpfiles.d/polytmp.conf": "x"},
            {"tmpfiles.d": "warn"},
        ),
        (
            {"usr/lib/tmpfiles.d/polytmp.conf": "x", "etc/cron.daily/tmpreaper": "x"},
            {"tmpfiles.d": "pass", "tmpreaper": "warn"},
        ),
    ],
)
def test_cleaners(tmp_path: Path, files: dict[str, str], expected: dict[str, str]) -> None:
    results = list(host.cleaners(make(tmp_path, files)))
    assert {result.name: result.verdict for result in results} == expected


def test_a_masked_snippet(tmp_path: Path) -> None:
    make(tmp_path, {"usr/lib/tmpfiles.d/polytmp.conf": "x", "etc/tmpfiles.d/other.conf": "x"})
    (tmp_path / "etc/tmpfiles.d/polytmp.conf").symlink_to("/dev/null")
    assert one(list(host.cleaners(tmp_path)), "tmpfiles.d").verdict == "fail"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "pass"),
        ("[libdefaults]\n default_realm = X\n", "warn"),
        ("[libdefaults]\n default_ccache_name = FILE:/tmp/krb5cc_%{uid}\n", "warn"),
        ("[libdefaults]\n default_ccache_name = /var/tmp/krb5cc_%{uid}\n", "warn"),
        ("[libdefaults]\n default_ccache_name = KEYRING:persistent:%{uid}\n", "pass"),
        (
            "[libdefaults]\n# default_ccache_name = KCM:\n default_ccache_name=FILE:/run/user/%{uid}/cc\n",
            "pass",
        ),
    ],
)
def test_kerberos(tmp_path: Path, text: str, expected: str) -> None:
    assert one(list(host.kerberos(make(tmp_path, {"etc/krb5.conf": text}))), "Kerberos").verdict == expected


@pytest.mark.parametrize(("value", "expected"), [("100000\n", "pass"), ("0\n", "fail"), ("x", "skip")])
def test_limits(tmp_path: Path, value: str, expected: str) -> None:
    make(tmp_path, {"proc/sys/user/max_mnt_namespaces": value, "proc/sys/fs/mount-max": "100000"})
    results = [result.verdict for result in host.limits(tmp_path, 10)]
    assert results == [expected, "pass"]


@pytest.mark.parametrize(
    ("unit", "restarted"),
    [("ssh.service", "ssh.service"), ("user@.service", "user@*.service"), ("getty@tty1.service",) * 2],
)
def test_the_remedy_for_a_sandbox(unit: str, restarted: str) -> None:
    """systemd ignores an empty boolean, and would take 'no' for a path."""
    remedy = units.undo(unit, ["PrivateTmp", "ProtectSystem", "ReadOnlyPaths", "RootDirectory"])
    lines = "[Service] PrivateTmp=no ProtectSystem=no ReadOnlyPaths= RootDirectory= (one per line)"
    assert remedy == f"systemctl edit {unit}: {lines}; then: systemctl restart {restarted}"


class FakeHost:
    """The daemon and its neighbours, as check calls them: client and connection of its context."""

    def __init__(self, restarts: int, *, state: str = "active", answers: bool = True) -> None:
        self.client = self.connection = self
        self.restarts = restarts
        self.state = state
        self.answers = answers

    async def version(self) -> str:
        if not self.answers:
            raise BusError("org.freedesktop.DBus.Error.ServiceUnknown", "no such name")
        return "0.1.0"

    async def ask(self, *question: Any) -> list[str]:
        assert question[3:] in {("LoadUnit", "s", (f"polytmpd.{kind}",)) for kind in ("service", "socket")}
        return ["/unit"]

    async def get_properties(self, service: str, path: str, interface: str) -> dict[str, Any]:
        return {"UnitFileState": "enabled", "NRestarts": self.restarts, "ActiveState": self.state}

    async def get_property(self, service: str, path: str, interface: str, name: str) -> str:
        return "257"

    async def has_owner(self, name: str) -> bool:
        return True


@pytest.mark.parametrize(
    ("restarts", "text"),
    [(0, ""), (1, "restarted 1 time automatically"), (2, "restarted 2 times automatically")],
)
async def test_restarts(restarts: int, text: str) -> None:
    context: Any = FakeHost(restarts)
    results = [result async for result in check._daemon(context)]
    assert [result.text for result in results if result.verdict != "pass"] == ([text] if text else [])


@pytest.mark.parametrize(
    ("state", "text", "remedy"),
    [
        ("inactive", "not running (inactive)", "systemctl start polytmpd.service"),
        ("failed", "not running (failed)", "systemctl start polytmpd.service"),
        ("active", "runs but does not answer", "systemctl restart polytmpd.service"),
    ],
)
async def test_a_daemon_that_does_not_answer(state: str, text: str, remedy: str) -> None:
    context: Any = FakeHost(0, state=state, answers=False)
    found = one([result async for result in check._daemon(context)], "polytmpd.service")
    assert (found.verdict, found.remedy) == ("fail", remedy)
    assert found.text.startswith(text)


@pytest.mark.parametrize(
    ("state", "verdict"), [("active", "pass"), ("failed", "fail"), ("inactive", "fail")]
)
async def test_the_socket_for_logins(state: str, verdict: str) -> None:
    context: Any = FakeHost(0, state=state)
    found = await check._socket(context)
    assert (found.name, found.verdict) == ("polytmpd.socket", verdict)
    assert bool(found.remedy) == (verdict == "fail")


# Users


@pytest.mark.parametrize(
    ("exempt", "verdict"), [("", "pass"), ("ada", "pass"), ("ada bob", "fail"), ("1000 bob", "fail")]
)
def test_settings_that_exempt_everybody(tmp_path: Path, exempt: str, verdict: str) -> None:
    passwd = "root:x:0:0::/:/bin/sh\nada:x:1000:1000::/:/bin/sh\nbob:x:1001:1001::/:/bin/bash\n"
    others = "www:x:2000:2000::/:/usr/sbin/nologin\nnobody:x:65534:65534::/:/bin/sh\n"
    make(
        tmp_path, {"etc/passwd": passwd + others, "etc/polytmpd.conf": f"[Polytmp]\nExemptUsers={exempt}\n"}
    )
    people = regular.people(tmp_path, config.load(tmp_path)[0])
    assert [person.name for person in people] == ["ada", "bob"]
    (found,) = check._everybody(people)
    assert found.verdict == verdict
    assert bool(found.remedy) == (verdict == "fail")


# polytmpd.conf, login.defs and passwd

PASSWD = (
    "root:x:0:0::/root:/bin/sh\nbin:x:2:2::/:/bin/sh\nada:x:1000:1000::/:/bin/sh\n"
    "nobody:x:65534:65534::/:/bin/sh\nslurm:x:64030:64030::/:/bin/sh\n+::::::\n"
)
SLURM = "slurm (64030): UID 64030 is in 61184..65519 (a dynamic or system user)"
REST = "beside root and 2 system users"


@pytest.mark.parametrize(
    ("conf", "here", "text"),
    [
        ("", {}, f"1 user {REST}: {SLURM}"),
        ("", {1234567890: "DOM\\dora", 70000: "eve"}, f"1 user {REST}: {SLURM}"),
        ("ExemptUsers=ada", {}, f"2 users {REST}: ada (1000): user ada is named in ExemptUsers=; {SLURM}"),
        ("ExemptUsers=1234567890", {1234567890: "dora"}, "dora (1234567890): UID 1234567890 is named in"),
        ("RegularUIDs=64030-70000", {}, f"1 user {REST}: ada (1000): UID 1000 is not in RegularUIDs="),
        (
            "RegularUIDs=5",
            dict.fromkeys(range(2000, 2024), "x"),
            "UID 2018 is not in RegularUIDs=; and 6 more",
        ),
        ("", {4294967000: "far"}, "far (4294967000): UID 4294967000 is in 2147483647..4294967295"),
        ("RegularUIDs=2 1000 64030", {}, "root and 1 system user keep the host's directories"),
        (
            "RegularUIDs=1-\nExemptUsers=bin",
            {},
            "1 user beside root and 1 system user: bin (2): user bin is named in ExemptUsers=",
        ),
    ],
)
def test_who_keeps_the_hosts_directories(tmp_path: Path, conf: str, here: dict[int, str], text: str) -> None:
    make(tmp_path, {"etc/passwd": PASSWD, "etc/polytmpd.conf": f"[Polytmp]\n{conf}\n"})
    found = settings.exempt_users(tmp_path, config.load(tmp_path)[0], here, {90000})
    assert text in found.text
    assert found.verdict == ("warn" if 4294967000 in here else "pass")
    assert ("RegularUIDs=" in found.remedy) == (found.verdict == "warn")


def test_members_of_exempt_groups_whom_only_a_directory_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also local users: one name for each UID, and no more looked up than there is time for."""
    make(tmp_path, {"etc/passwd": PASSWD, "etc/polytmpd.conf": "[Polytmp]\nExemptGroups=staff\n"})
    uids = {"ada": 1000, "dora": 1234567891, "bin": 2}
    monkeypatch.setattr(userdb, "_user", lambda word: SimpleNamespace(pw_uid=uids[word], pw_name=word))
    monkeypatch.setattr(userdb, "_group", lambda _: SimpleNamespace(gr_mem=[*uids, "gone"]))
    monkeypatch.setattr(userdb, "memberships", lambda *_: (frozenset({"staff"}), frozenset()))

    def text() -> str:
        return settings.exempt_users(tmp_path, config.load(tmp_path)[0], {}, ()).text

    because = "group staff is exempt"
    expected = f"3 users {REST}: ada (1000): {because}; {SLURM}; dora (1234567891): {because}"
    assert text() == expected
    monkeypatch.setattr(userdb, "_LOOKED_UP_AT_MOST", 3)
    assert text() == f"{expected}; and up to 1 more whom the settings name"
    monkeypatch.setattr(userdb, "_LOOKED_UP_AT_MOST", 0)
    monkeypatch.setattr(userdb, "memberships", lambda *_: (frozenset(), frozenset({"staff"})))
    assert text() == f"1 user {REST}: {SLURM}; and up to 4 more whom the settings name"


def test_users_below_uid_min_whom_regular_uids_lists(tmp_path: Path) -> None:
    passwd = "root:x:0:0::/:/bin/sh\nold:x:500:500::/:/bin/sh\ndb:x:400:400::/:/bin/sh\n"
    conf = "[Polytmp]\nRegularUIDs=450-60000\n"
    make(tmp_path, {"etc/passwd": passwd, "etc/polytmpd.conf": conf})
    people = regular.people(tmp_path, config.load(tmp_path)[0])
    assert people == [regular.Person(500, "old")]


def test_a_host_without_exempt_users(tmp_path: Path) -> None:
    make(tmp_path, {"etc/passwd": "root:x:0:0::/root:/bin/sh\n"})
    found = settings.exempt_users(tmp_path, config.load(tmp_path)[0], {}, ())
    assert (found.verdict, found.text) == ("pass", "root and 0 system users keep the host's directories")


def test_a_user_database_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, {"etc/passwd": PASSWD, "etc/polytmpd.conf": "[Polytmp]\nOnlyGroups=staff\n"})
    release = threading.Event()
    monkeypatch.setattr(users, "PATIENCE", 0.05)
    monkeypatch.setattr(userdb, "unmatched", lambda _: iter([release.wait(20)][:0]))
    try:
        found = one(list(settings.judge(tmp_path, *config.load(tmp_path), None)), "polytmpd.conf")
        assert (found.verdict, found.text) == ("skip", "the user database does not answer within 0 s")
    finally:
        release.set()


def test_a_directory_that_is_not_sticky(tmp_path: Path) -> None:
    make(tmp_path, {"etc/polytmpd.conf": "[Polytmp]\nDirectories=/tmp /plain\n", "tmp/x": "", "plain/x": ""})
    found = one(list(settings.judge(tmp_path, *config.load(tmp_path), None)), "polytmpd.conf")
    assert found.verdict == "fail"
    assert found.text == (
        "logins are refused: Directories=: /plain is not sticky, so not a directory for temporary files"
    )
    assert found.remedy.startswith("chmod +t /plain, or add UncheckedDirectories=/plain ")


def test_a_directory_that_keeps_the_configuration_from_taking_effect(tmp_path: Path) -> None:
    """A reload is refused while the directory is missing. Once it exists, a reload is the remedy."""
    make(tmp_path, {"etc/polytmpd.conf": "[Polytmp]\nDirectories=/tmp /scratch\n", "tmp/x": ""})
    before = one(list(settings.judge(tmp_path, *config.load(tmp_path), ["/tmp"])), "polytmpd.conf")
    assert before.remedy.startswith("create /scratch, ")
    assert before.remedy.endswith("then: systemctl reload polytmpd.service")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch").chmod(0o1777)
    after = one(list(settings.judge(tmp_path, *config.load(tmp_path), ["/tmp"])), "polytmpd.conf")
    assert after.remedy == "systemctl reload polytmpd.service"


@pytest.mark.parametrize(
    ("text", "in_force", "expected"),
    [
        ("", ["/tmp", "/var/tmp"], [("polytmpd.conf", "pass", "private to each user: /tmp /var/tmp")]),
        ("", None, [("polytmpd.conf", "pass", "private to each user")]),
        ("", ["/tmp"], [("polytmpd.conf", "warn", "not in force: polytmpd uses Directories=/tmp")]),
        ("ExemptUsers=root 1\nExemptGroups=root\n", None, [("polytmpd.conf", "pass", "private")]),
        (
            "ExemptUsers=bin no-such-1\nOnlyGroups=no-such-2\n",
            None,
            [
                ("polytmpd.conf", "warn", "ExemptUsers= names unknown users: no-such-1"),
                ("polytmpd.conf", "warn", "OnlyGroups= names unknown groups: no-such-2"),
            ],
        ),
        (
            "Foo=\nDirectories=tmp /tmp\n",
            ["/tmp"],
            [
                ("/etc/polytmpd.conf:2", "warn", "Unknown setting Foo="),
                ("/etc/polytmpd.conf:3", "warn", "'tmp' is not an absolute path"),
            ],
        ),
    ],
)
def test_the_configuration(
    tmp_path: Path, text: str, in_force: list[str] | None, expected: list[tuple[str, str, str]]
) -> None:
    make(tmp_path, {"etc/polytmpd.conf": f"[Polytmp]\n{text}"})
    found = list(settings.judge(tmp_path, *config.load(tmp_path), in_force))
    assert [(result.name, result.verdict) for result in found] == [entry[:2] for entry in expected]
    assert all(text in result.text for result, (_, _, text) in zip(found, expected, strict=True))
    assert all(bool(result.remedy) == (result.verdict == "warn") for result in found)

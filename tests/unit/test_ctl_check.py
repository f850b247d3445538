# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check finds on hosts, each of which is a directory. The host of the tests is not examined."""

import os
from pathlib import Path
from typing import Any

import pytest

from polytmpd import config
from polytmpd.ctl import check, host, pamstacks, settings

pytestmark = pytest.mark.unit

COMMON = "session required pam_unix.so\nsession optional pam_systemd.so\nsession required pam_polytmp.so\n"
OLD_COMMON = "session required pam_unix.so\nsession optional pam_systemd.so\n"


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def verdict(root: Path, service: str) -> tuple[str, str] | None:
    found = [finding for finding in pamstacks.judge(root) if finding.service == service]
    assert len(found) < 2
    assert all(finding.remedy for finding in found if finding.verdict != "pass"), "no remedy"
    return (found[0].verdict, found[0].text) if found else None


@pytest.mark.parametrize(
    ("service", "text", "expected"),
    [
        ("sshd", "@include common-session\n", ("pass", "required")),
        ("sshd", "session include common-session\n", ("pass", "required")),
        ("sshd", "session substack common-session # x\n", ("pass", "required")),
        (
            "sshd",
            "-session required pam_systemd.so\nsession  required\tpam_polytmp.so\n",
            ("pass", "required"),
        ),
        ("sshd", "session required pam_unix.so\n", ("fail", "no pam_polytmp.so")),
        ("sshd", "# session required pam_polytmp.so\n", ("fail", "no pam_polytmp.so")),
        ("sshd", "auth required pam_polytmp.so\n", ("fail", "no pam_polytmp.so")),
        ("cron", "@include nosuch\n", ("fail", "no pam_polytmp.so")),
        ("other-login", "session required pam_systemd.so\n", ("fail", "no pam_polytmp.so")),
        (
            "sshd",
            "session required pam_polytmp.so\nsession optional pam_systemd.so\n",
            ("warn", "before pam_systemd.so"),
        ),
        ("systemd-user", "session required pam_polytmp.so\nsession optional pam_systemd.so\n", ("pass", "")),
        (
            "sshd",
            "session required pam_namespace.so\n@include common-session\n",
            ("warn", "pam_namespace.so"),
        ),
        ("sshd", "@include common-session\nsession optional pam_tmpdir.so\n", ("warn", "pam_tmpdir.so")),
        ("sshd", "@include common-session\nsession optional pam_mktemp.so\n", ("warn", "pam_mktemp.so")),
        ("sshd", "session optional pam_polytmp.so\n", ("warn", "continues with the shared /tmp")),
        ("sshd", "session [success=ok default=die] pam_polytmp.so\n", ("pass", "default=die")),
        ("sshd", "session [success=ok default=ignore] pam_polytmp.so\n", ("warn", "default=ignore")),
        (
            "sshd",
            "session [success=ok default=1] pam_polytmp.so\n",
            ("warn", "continues with the shared /tmp"),
        ),
        ("sshd", "session [success=ok] pam_polytmp.so\n", ("pass", "success=ok")),
        ("sshd", "session [default=ignore perm_denied=bad] pam_polytmp.so\n", ("pass", "perm_denied")),
        ("sshd", "session [perm_denied=ignore default=bad] pam_polytmp.so\n", ("warn", "continues")),
        ("sshd", "session [perm_denied=done default=bad] pam_polytmp.so\n", ("warn", "continues")),
        ("sshd", "session \\\n required /lib/security/pam_polytmp.so\n", ("pass", "required")),
        ("passwd", "@include common-password\n", None),
        ("runuser", "session required pam_unix.so\n", None),
        ("sshd.dpkg-dist", "session required pam_systemd.so\n", None),
    ],
)
def test_pam(tmp_path: Path, service: str, text: str, expected: tuple[str, str] | None) -> None:
    make(tmp_path, {"etc/pam.d/common-session": COMMON, f"etc/pam.d/{service}": text})
    found = verdict(tmp_path, service)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert found[0] == expected[0]
        assert expected[1] in found[1]


PASSED_OVER = {
    "sufficient": ("session sufficient pam_permit.so\n@include common-session\n", "fail"),
    "done": ("session [success=done default=ignore] pam_x.so\n@include common-session\n", "fail"),
    "done by default": ("session [default=done] pam_x.so\n@include common-session\n", "fail"),
    "in what is included": ("@include early\n@include common-session\n", "fail"),
    "before a substack": ("session sufficient pam_x.so\nsession substack common-session\n", "fail"),
    "a substack that ends": ("session substack early\nsession include common-session\n", "pass"),
    "both": ("session [default=9] pam_x.so\nsession sufficient pam_y.so\n@include common-session\n", "fail"),
    "it comes after": ("@include common-session\nsession sufficient pam_x.so\n", "pass"),
    "another type": ("auth sufficient pam_x.so\n@include common-session\n", "pass"),
    "a jump": ("session [success=1 default=ignore] pam_x.so\nsession required pam_polytmp.so\n", "warn"),
    "a jump as far": ("session [default=3] pam_x.so\n@include common-session\n", "warn"),
    "a jump not so far": ("session [default=2] pam_x.so\n@include common-session\n", "pass"),
    "over a substack": ("session [default=1] pam_x.so\nsession substack common-session\n", "warn"),
    "before a substack's end": (
        "session [default=1] pam_x.so\nsession required pam_y.so\nsession substack common-session\n",
        "pass",
    ),
    "in a substack": ("session substack jump\nsession required pam_polytmp.so\n", "pass"),
    "Debian's own": (
        "session [default=1] pam_permit.so\nsession requisite pam_deny.so\n@include common-session\n",
        "pass",
    ),
}


@pytest.mark.parametrize("case", PASSED_OVER)
def test_rules_that_skip_the_module(tmp_path: Path, case: str) -> None:
    text, expected = PASSED_OVER[case]
    early = "session [success=ok new_authtok_reqd=done] pam_x.so\n"
    jump = "session [default=9] pam_x.so\n"
    files = {"common-session": COMMON, "early": early, "jump": jump, "sshd": text}
    make(tmp_path, {f"etc/pam.d/{name}": content for name, content in files.items()})
    found = verdict(tmp_path, "sshd")
    assert found is not None
    assert found[0] == expected, found
    assert ("gets the shared /tmp" in found[1]) == (expected != "pass")


def test_pam_without_the_profile(tmp_path: Path) -> None:
    make(tmp_path, {"etc/pam.d/common-session": OLD_COMMON, "etc/pam.d/su": "@include common-session\n"})
    assert verdict(tmp_path, "su") == (
        "fail",
        "no pam_polytmp.so in its session stack: users of su get the shared /tmp",
    )


def test_the_remedy_if_pam_auth_update_changes_nothing(tmp_path: Path) -> None:
    make(tmp_path, {"etc/pam.d/common-session": OLD_COMMON, "etc/pam.d/su": "@include common-session\n"})
    [finding] = pamstacks.judge(tmp_path)
    assert '"Local modifications"' in finding.remedy
    assert "--force" in finding.remedy


def test_etc_comes_before_usr(tmp_path: Path) -> None:
    make(tmp_path, {"usr/lib/pam.d/systemd-user": COMMON, "etc/pam.d/systemd-user": OLD_COMMON})
    found = verdict(tmp_path, "systemd-user")
    assert found is not None
    assert found[0] == "fail"


def test_a_loop_of_includes_ends(tmp_path: Path) -> None:
    make(tmp_path, {"etc/pam.d/sshd": "@include sshd\nsession required pam_polytmp.so\n"})
    found = verdict(tmp_path, "sshd")
    assert found is not None
    assert found[0] == "pass"


def test_the_module_itself(tmp_path: Path) -> None:
    assert host.module(tmp_path).verdict == "fail"
    make(tmp_path, {"usr/lib/x86_64-linux-gnu/security/pam_polytmp.so": ""})
    assert host.module(tmp_path).verdict == "pass"


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
        "1002": "not polytmpd's (mode 0755)",
        "1003": "not polytmpd's (owned by 1003",
        "1004": "not polytmpd's (not a directory)",
        "1005": "not polytmpd's (not a directory)",
    }


def test_many_foreign_entries(tmp_path: Path) -> None:
    """Any process on the host's side can make them: the report stays short."""
    make(tmp_path, {f"kept/polytmp-{uid}": "" for uid in range(1000, 1100)})
    found = squatted(tmp_path)
    assert len(found) == 6
    assert found["/kept/polytmp-*"] == "95 more that are not polytmpd's"


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
    remedy = check.undo(unit, ["PrivateTmp", "ProtectSystem", "ReadOnlyPaths", "RootDirectory"])
    lines = "[Service] PrivateTmp=no ProtectSystem=no ReadOnlyPaths= RootDirectory= (one per line)"
    assert remedy == f"systemctl edit {unit}: {lines}; then: systemctl restart {restarted}"


class FakeHost:
    """The daemon and its neighbours, as check calls them: client and connection of its context."""

    def __init__(self, restarts: int) -> None:
        self.client = self.connection = self
        self.restarts = restarts

    async def version(self) -> str:
        return "0.1.0"

    async def ask(self, *question: Any) -> list[str]:
        assert question[3:] == ("LoadUnit", "s", ("polytmpd.service",))
        return ["/unit"]

    async def get_properties(self, service: str, path: str, interface: str) -> dict[str, Any]:
        return {"UnitFileState": "enabled", "NRestarts": self.restarts}

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


# polytmpd.conf, login.defs and passwd

PASSWD = "root:x:0:0::/root:/bin/sh\nada:x:1000:1000::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n+::::::\n"
FAR = "eve:x:70000:70000::/:/bin/sh\nbackup:x:70001:70001::/:/bin/sh\n"


@pytest.mark.parametrize(
    ("defs", "here", "named"),
    [
        ("", {}, ["backup (70001)", "eve (70000)"]),
        ("UID_MAX 70000\n", {}, ["backup (70001)"]),
        ("#UID_MAX 80000\nUID_MAX\t0x13880\n", {}, []),
        ("UID_MAX 80000\n", {1234567: "DOM\\dora", 70000: "eve"}, ["DOM\\dora (1234567)"]),
        ("UID_MAX 80000\n", {2000: "bob", 90000: "has-one", 80001: "x", 80002: "y"}, ["y (80002)"]),
        ("SYS_UID_MAX 80000\nUID_MAX x\nUID_MAX 99999999999\n", {}, ["backup (70001)", "eve (70000)"]),
        ("UID_MAX 999\n", {}, ["backup (70001)", "eve (70000)"]),
    ],
)
def test_users_above_uid_max(tmp_path: Path, defs: str, here: dict[int, str], named: list[str]) -> None:
    exempt = "[Polytmp]\nExemptUsers=x 1234568\n"
    make(tmp_path, {"etc/passwd": PASSWD + FAR, "etc/login.defs": defs, "etc/polytmpd.conf": exempt})
    found = settings.users_above(tmp_path, config.load(tmp_path)[0], here, {90000})
    assert found.verdict == ("warn" if named else "pass")
    assert sorted(found.text.partition("directories: ")[2].split(", ")) == (named or [""])
    assert bool(found.remedy) == bool(named)


def test_a_host_without_users_above_uid_max(tmp_path: Path) -> None:
    make(tmp_path, {"etc/passwd": PASSWD, "etc/login.defs": "UID_MIN 500\n"})
    found = settings.users_above(tmp_path, config.load(tmp_path)[0], {}, ())
    assert (found.verdict, found.text) == ("pass", "regular users have UIDs 500 to 60000")


def test_a_directory_that_keeps_the_configuration_from_taking_effect(tmp_path: Path) -> None:
    """A reload is refused while the directory is missing. Once it exists, a reload is the remedy."""
    make(tmp_path, {"etc/polytmpd.conf": "[Polytmp]\nDirectories=/tmp /scratch\n", "tmp/x": ""})
    before = one(list(settings.judge(tmp_path, *config.load(tmp_path), ["/tmp"])), "polytmpd.conf")
    assert before.remedy.startswith("create /scratch, ")
    assert before.remedy.endswith("then: systemctl reload polytmpd.service")
    (tmp_path / "scratch").mkdir()
    after = one(list(settings.judge(tmp_path, *config.load(tmp_path), ["/tmp"])), "polytmpd.conf")
    assert after.remedy == "systemctl reload polytmpd.service"


@pytest.mark.parametrize(
    ("text", "in_force", "expected"),
    [
        ("", ["/tmp", "/var/tmp"], [("polytmpd.conf", "pass", "private to each user: /tmp /var/tmp")]),
        ("", None, [("polytmpd.conf", "pass", "private to each user")]),
        ("", ["/tmp"], [("polytmpd.conf", "warn", "not in force: polytmpd uses Directories=/tmp")]),
        ("ExemptUsers=root 77\n", None, [("polytmpd.conf", "pass", "private")]),
        (
            "ExemptUsers=bin no-such-1\n",
            None,
            [("polytmpd.conf", "warn", "unknown users: no-such-1")],
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

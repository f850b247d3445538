# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check finds in PAM configurations, each of which is a directory."""

import re
from collections.abc import Collection
from pathlib import Path

import pytest

from polytmpd.ctl import pamcheck
from polytmpd.ctl.pamcheck import Finding
from polytmpd.ctl.pammodules import FUNCTIONS, Module

pytestmark = pytest.mark.unit

UNIX = "session required pam_unix.so\n"
OURS = "session required pam_polytmp.so\n"
OLD_COMMON = f"{UNIX}session optional pam_systemd.so\n"
COMMON = f"{OLD_COMMON}{OURS}"
INCLUDE = "@include common-session\n"


def make(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / (name if "/" in name else f"etc/pam.d/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def judged(root: Path, files: dict[str, str], bad: "dict[str, Module] | None" = None) -> dict[str, Finding]:
    def load(paths: Collection[str]) -> dict[str, Module]:
        return {path: (bad or {}).get(path, Module(f"/security/{path}")) for path in paths}

    found = pamcheck.judge(make(root, files), load=load)
    assert all(finding.remedy for finding in found if finding.verdict != "pass"), "no remedy"
    assert len({finding.service for finding in found}) == len(found)
    return {finding.service: finding for finding in found}


SHARED = "get the shared /tmp"
REFUSED = "are refused"
SESSIONS = "sessions of sshd"


@pytest.mark.parametrize(
    ("text", "verdict", "says"),
    [
        (INCLUDE, "pass", "required"),
        ("session include common-session\n", "pass", "required"),
        ("session substack common-session # x\n", "pass", "required"),
        ("-session required pam_systemd.so\nsession  required\tpam_polytmp.so\n", "pass", "required"),
        ("session \\\n required /lib/security/pam_polytmp.so\n", "pass", "required"),
        (UNIX, "fail", f"no pam_polytmp.so in its session stack: sessions of sshd {SHARED}"),
        (f"# {OURS}", "fail", REFUSED),
        ("auth required pam_polytmp.so\n", "fail", REFUSED),
        ("@include nosuch\n", "fail", f"it includes nosuch, which does not exist: {SESSIONS} {REFUSED}"),
        (f"@include sshd\n{OURS}", "fail", "includes itself"),
        ("session required \\\n# x\n pam_polytmp.so\n", "fail", "depending on the version of libpam"),
        (f"{OURS}session optional pam_systemd.so\n", "warn", "before pam_systemd.so"),
        (f"session required pam_namespace.so\n{INCLUDE}", "warn", "pam_namespace.so"),
        (f"{INCLUDE}session optional pam_tmpdir.so\n", "warn", "pam_tmpdir.so"),
        (f"{INCLUDE}session optional pam_mktemp.so\n", "warn", "pam_mktemp.so"),
        (f"session requird pam_unix.so\n{OURS}", "fail", "unknown control"),
        (f"session required\n{OURS}", "fail", "cannot use"),
        (f"session required pam_deny.so\n{OURS}", "fail", f"refuses: sessions of sshd {REFUSED}"),
        (f"session required pam_access.so\n{OURS}", "pass", ""),
        (f"account required pam_deny.so\n{OURS}", "fail", f"refuses: sessions of sshd {REFUSED}"),
        (f"account required pam_access.so\n{OURS}", "pass", ""),
        (f"account [success=1] x.so\naccount required pam_deny.so\naccount required y\n{OURS}", "pass", ""),
    ],
)  # fmt: skip
def test_a_service(tmp_path: Path, text: str, verdict: str, says: str) -> None:
    found = judged(tmp_path, {"common-session": COMMON, "sshd": text})["sshd"]
    assert (found.verdict, says in found.text) == (verdict, True), found


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ("optional", "warn"),
        ("[success=ok default=die]", "pass"),
        ("[success=ok default=ignore]", "warn"),
        ("[success=ok default=1]", "warn"),
        ("[success=ok]", "pass"),
        ("[default=ignore perm_denied=bad]", "pass"),
        ("[perm_denied=ignore default=bad success=ok]", "warn"),
        ("[perm_denied=done default=bad success=ok]", "pass"),
        ("sufficient", "warn"),
    ],
)
def test_a_daemon_that_fails(tmp_path: Path, line: str, verdict: str) -> None:
    text = f"{UNIX}session {line} pam_polytmp.so\nsession optional pam_x.so\n{UNIX}"
    found = judged(tmp_path, {"sshd": text})["sshd"]
    assert found.verdict == verdict, found
    assert ("continues with the shared /tmp" in found.text) == (verdict == "warn")


SKIPPED = {
    "sufficient": (f"session sufficient pam_permit.so\n{INCLUDE}", "fail"),
    "done": (f"session [success=done default=ignore] pam_x.so\n{INCLUDE}", "fail"),
    "done by default": (f"session [default=done] pam_x.so\n{INCLUDE}", "fail"),
    "done by a value that refuses": (f"@include early\n{INCLUDE}", "pass"),
    "before a substack": ("session sufficient pam_x.so\nsession substack common-session\n", "fail"),
    "a substack that ends": ("session substack early\nsession include common-session\n", "pass"),
    "both": (f"session [default=9] pam_x.so\nsession sufficient pam_y.so\n{INCLUDE}{UNIX * 9}", "fail"),
    "it comes after": (f"{INCLUDE}session sufficient pam_x.so\n", "pass"),
    "another type": (f"auth sufficient pam_x.so\n{INCLUDE}", "pass"),
    "a jump": (f"session [success=1 default=ignore] pam_x.so\n{OURS}{UNIX}", "fail"),
    "a jump as far": (f"session [default=3] pam_x.so\n{INCLUDE}{UNIX}", "fail"),
    "a jump not so far": (f"session [default=2] pam_x.so\n{INCLUDE}", "pass"),
    "over a substack": (f"session [default=1] pam_x.so\nsession substack common-session\n{UNIX}", "fail"),
    "before a substack's end": (
        f"session [default=1] pam_x.so\n{UNIX}session substack common-session\n",
        "pass",
    ),
    "a jump in a substack": (f"session substack jump\n{OURS}", "pass"),
    "Debian's own": (
        f"session [default=1] pam_permit.so\nsession requisite pam_deny.so\n{INCLUDE}",
        "pass",
    ),
    "who decides": (f"session [success=1 default=ignore] pam_succeed_if.so x\n{OURS}{UNIX}", "fail"),
    "who decides, the other way": (f"session [default=1 success=ok] pam_access.so\n{OURS}{UNIX}", "fail"),
    "who fails": (f"{UNIX}session [success=ok default=1] pam_x.so\n{OURS}{UNIX}", "warn"),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_lines_that_skip_the_module(tmp_path: Path, case: str) -> None:
    text, expected = SKIPPED[case]
    early = "session [success=ok new_authtok_reqd=done] pam_x.so\n"
    jump = f"session [default=1] pam_x.so\n{UNIX}"
    found = judged(tmp_path, {"common-session": COMMON, "early": early, "jump": jump, "sshd": text})["sshd"]
    assert found.verdict == expected, found
    assert (SHARED in found.text) == (expected != "pass")


@pytest.mark.parametrize(
    "service", ["passwd", "runuser", "su", "sudo", "sshd.dpkg-dist", "gdm-launch-environment", "common-x"]
)
def test_what_is_no_login(tmp_path: Path, service: str) -> None:
    text = OLD_COMMON if service != "passwd" else UNIX
    assert judged(tmp_path, {service: text}) == {}


@pytest.mark.parametrize(
    ("service", "arguments", "verdict", "says"),
    [
        ("su", "", "pass", "leaves sessions in their caller's directories"),
        ("sudo", "caller", "pass", "leaves sessions in their caller's directories"),
        ("sudo", "caller user", "pass", ""),
        ("sshd", "user", "pass", ""),
        ("dovecot", "", "pass", "leaves sessions in the server's directories"),
        ("mailserver", "caller", "pass", "leaves sessions in the server's directories"),
        ("sshd", "timeout=5 caller", "fail", "stay in the directories of the program that opens them"),
        ("cron", "user caller debug", "fail", "'caller'"),
    ],
)
def test_commands_stay_with_their_caller(
    tmp_path: Path, service: str, arguments: str, verdict: str, says: str
) -> None:
    found = judged(tmp_path, {service: f"{OLD_COMMON}session required pam_polytmp.so {arguments}\n"})[
        service
    ]
    assert found.verdict == verdict, found
    assert ("director" in found.text or "caller" in found.text) == bool(says)
    assert says in found.text


def test_the_module_has_the_same_services() -> None:
    text = (Path(__file__).parents[2] / "pam/pam_polytmp.c").read_text()
    tables = re.findall(r"(\w+)_SERVICES\[\] = \{(.*?)\};", text, re.DOTALL)
    found = {name: tuple(re.findall(r'^\s*"([^"]+)"', table, re.MULTILINE)) for name, table in tables}
    assert found == {"COMMAND": pamcheck.COMMANDS, "SERVER": pamcheck.SERVERS}


def test_a_command_that_is_refused(tmp_path: Path) -> None:
    found = judged(tmp_path, {"sudo": f"session required pam_deny.so\n{COMMON}"})["sudo"]
    assert (found.verdict, REFUSED in found.text) == ("fail", True), found


def test_faults_are_grouped_by_file(tmp_path: Path) -> None:
    files = {"common-session": OLD_COMMON, **dict.fromkeys(("cron", "su-l", "sshd"), INCLUDE)}
    found = judged(tmp_path, {**files, "vsftpd": UNIX, "atd": COMMON})
    assert {name: finding.verdict for name, finding in found.items()} == {
        "/etc/pam.d/common-session": "fail",
        "vsftpd": "fail",
        "atd": "pass",
    }
    common = found["/etc/pam.d/common-session"]
    assert common.text == f"no pam_polytmp.so in its session stack: sessions of cron, sshd, su-l {SHARED}"
    assert common.remedy.startswith("pam-auth-update --enable polytmp")
    assert '"Local modifications"' in common.remedy
    assert "--force" in common.remedy
    assert found["vsftpd"].remedy == "add 'session required pam_polytmp.so' at the end of /etc/pam.d/vsftpd"


def test_one_fault_in_a_common_file_names_it(tmp_path: Path) -> None:
    found = judged(tmp_path, {"common-session": OLD_COMMON, "su-l": INCLUDE})["su-l"]
    assert found.text.startswith("/etc/pam.d/common-session: no pam_polytmp.so")


def test_etc_comes_before_usr(tmp_path: Path) -> None:
    files = {"usr/lib/pam.d/systemd-user": COMMON, "etc/pam.d/systemd-user": OLD_COMMON}
    assert judged(tmp_path, files)["systemd-user"].verdict == "fail"


def test_the_user_manager_has_pam_systemd_last(tmp_path: Path) -> None:
    text = f"{OURS}session optional pam_systemd.so\n"
    assert judged(tmp_path, {"systemd-user": text})["systemd-user"].verdict == "pass"


@pytest.mark.parametrize(
    ("other", "verdict", "says"),
    [
        (COMMON, "pass", "by /etc/pam.d/other"),
        (OLD_COMMON, "fail", SHARED),
        ("session required pam_deny.so\n", "fail", REFUSED),
        ("@include nosuch\n", "fail", REFUSED),
        (None, "fail", REFUSED),
    ],
)
def test_other_serves_programs_without_a_file(
    tmp_path: Path, other: str | None, verdict: str, says: str
) -> None:
    files = {"usr/sbin/cron": "", "su": COMMON} | ({} if other is None else {"other": other})
    found = judged(tmp_path, files)
    assert any(finding.service == "cron" or "cron," in finding.text for finding in found.values())
    finding = found.get("cron") or found["/etc/pam.d/other"]
    assert (finding.verdict, says in finding.text) == (verdict, True), found
    # what cannot be read refuses also those that do not need it
    refused = other == "@include nosuch\n"
    assert ("su" in found and found["su"].verdict == "pass") != refused


def test_a_service_that_sshd_is_told_to_use(tmp_path: Path) -> None:
    make(tmp_path, {"bastion": UNIX, "other": COMMON})
    (found,) = pamcheck.judge(tmp_path, also=("bastion",))
    assert (found.service, found.verdict) == ("bastion", "fail")
    assert pamcheck.judge(tmp_path) == []


def test_a_module_that_is_missing_is_one_finding(tmp_path: Path) -> None:
    missing = {"pam_polytmp.so": Module("/security/pam_polytmp.so", "the file does not exist", ())}
    (found,) = judged(tmp_path, {"common-session": COMMON, "su": INCLUDE, "cron": COMMON}, missing).values()
    assert found.service == "/security/pam_polytmp.so"
    assert found.text == "the file does not exist: sessions of cron, su are refused"
    assert found.remedy == "apt install --reinstall polytmp"


BAD = Module("/security/x.so", "the file is empty", ())
NO_SESSION = Module("/security/x.so", symbols=(FUNCTIONS["account"],))
FOREIGN = Module("/security/pam_polytmp.so", "the file is another module")


@pytest.mark.parametrize(
    ("text", "module", "verdict", "says"),
    [
        (COMMON, {"pam_polytmp.so": BAD}, "fail", REFUSED),
        (f"{UNIX}session optional pam_polytmp.so\n", {"pam_polytmp.so": BAD}, "fail", SHARED),
        (COMMON, {"pam_polytmp.so": FOREIGN}, "fail", SHARED),
        (COMMON, {"pam_unix.so": BAD}, "fail", REFUSED),
        (COMMON, {"pam_systemd.so": BAD}, "pass", ""),
        (f"-session required pam_x.so\n{COMMON}", {"pam_x.so": BAD}, "fail", REFUSED),
        (f"account required pam_x.so\n{COMMON}", {"pam_x.so": BAD}, "fail", REFUSED),
        (f"session required pam_x.so\n{COMMON}", {"pam_x.so": NO_SESSION}, "fail", REFUSED),
        (f"session [success=1 default=ignore] pam_x.so\n{COMMON}", {"pam_x.so": BAD}, "pass", ""),
        (f"session [module_unknown=3] pam_x.so\n{COMMON}{UNIX}", {"pam_x.so": BAD}, "fail", SHARED),
    ],
)  # fmt: skip
def test_a_module_that_cannot_be_loaded(
    tmp_path: Path, text: str, module: dict[str, Module], verdict: str, says: str
) -> None:
    (found,) = judged(tmp_path, {"sshd": text}, module).values()
    assert (found.verdict, says in found.text) == (verdict, True), found


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("/tmp /tmp/tmp-inst/ level root,adm\n", "fail"),
        ("# /tmp /tmp/tmp-inst/ level root,adm\n", "warn"),
        ("/home /home/inst/ user\n", "warn"),
        ("/var/tmp/ /var/tmp/tmp-inst/ user\n", "fail"),
    ],
)
@pytest.mark.parametrize("file", ["etc/security/namespace.conf", "etc/security/namespace.d/x.conf"])
def test_pam_namespace(tmp_path: Path, text: str, verdict: str, file: str) -> None:
    found = judged(tmp_path, {"sshd": f"{COMMON}session required pam_namespace.so\n", file: text})["sshd"]
    assert found.verdict == verdict
    assert found.remedy == "remove pam_namespace.so from /etc/pam.d/sshd"

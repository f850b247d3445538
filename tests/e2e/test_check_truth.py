# SPDX-License-Identifier: LGPL-2.1-or-later
"""check tells the truth: a host is broken in one way at a time, and its verdict compared with a real login.

Not here: how check shows it (test_ctl.py), what a probe leaves (test_check_probe.py), and verdicts on other
stacks (tests/unit/test_ctl_pamcheck.py).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import observe, pamstacks
from tests.bed import Machine
from tests.e2e.polytmpctl import check

pytestmark = [pytest.mark.prepared(by=observe.quick_logouts)]

SAVED = (
    *("/etc/pam.d", "/usr/lib/pam.d", "/etc/ssh", "/etc/security", "/etc/default/ssh", "/etc/login.defs"),
    *("/etc/systemd/system", "/etc/polytmpd.conf"),
)
MODULE = "$(ls /usr/lib/*-linux-gnu/security/pam_polytmp.so)"
MODULE_BACK = "mv /root/pam_polytmp.so /usr/lib/*-linux-gnu/security/"
COMMON = "/etc/pam.d/common-session"
PERMIT = "auth required pam_permit.so\\naccount required pam_permit.so\\nsession required pam_permit.so\\n"
PLAIN = "account required pam_unix.so\\nsession required pam_unix.so\\nsession optional pam_systemd.so\\n"
RESTART_SSH = "; systemctl daemon-reload; systemctl restart ssh"


def first(line: str) -> str:
    """Put a line at the beginning of sshd's stack."""
    return f"sed -i '1i {line}' /etc/pam.d/sshd"


def before(line: str) -> str:
    """Put a line before our module in the common stack."""
    return f"sed -i '/pam_polytmp/i {line}' {COMMON}"


def unit(line: str) -> str:
    """A setting for ssh.service."""
    place = "/etc/systemd/system/ssh.service.d"
    return f"mkdir -p {place}; printf '[Service]\\n%s\\n' '{line}' >{place}/x.conf{RESTART_SSH}"


def setting(text: str) -> str:
    """Settings for polytmpd."""
    return f"printf '[Polytmp]\\n%s\\n' '{text}' >/etc/polytmpd.conf; systemctl restart polytmpd"


def ssh_setting(text: str) -> str:
    return f"printf '{text}\\n' >/etc/ssh/sshd_config.d/0.conf{RESTART_SSH}"


@dataclass(frozen=True)
class Row:
    """How a host is broken, and what is true then.

    login: of alice through ssh: private, shared, refused, or elsewhere (a namespace, but not the
    instance's). verdict: of check; topic, name: of the result that says why. stricter: why check fails
    although the login is private. probe: whether a session that is probed goes the same way as the login.
    only, why: the one release that the row is about, and why.
    """

    breaks: str
    login: str
    verdict: str
    topic: str = "PAM"
    name: str = "sshd"
    repairs: str = ""
    stricter: str = ""
    probe: bool = True
    only: str = ""
    why: str = "sshd has no PAMServiceName"


SERVICES = "services"
ROWS = {
    "nothing": Row("true", "private", "pass", "", ""),
    # sshd
    "UsePAM no": Row(ssh_setting("UsePAM no"), "shared", "fail", name="sshd -T", probe=False),
    "UsePAM no, as an option": Row(
        f"echo 'SSHD_OPTS=\"-o UsePAM=no\"' >/etc/default/ssh{RESTART_SSH}",
        "shared",
        "fail",
        name="sshd -o UsePAM=no -T",
        probe=False,
    ),
    "another service": Row(
        f"printf '{PLAIN}' >/etc/pam.d/bastion; {ssh_setting('PAMServiceName bastion')}",
        "shared",
        "fail",
        name="bastion",
        probe=False,
        only="trixie",
    ),
    "another service for alice": Row(
        f"printf '{PLAIN}' >/etc/pam.d/bastion; "
        + ssh_setting("Match User alice\\n PAMServiceName bastion\\nMatch all"),
        "shared",
        "fail",
        name="bastion",
        probe=False,
        only="trixie",
    ),
    "another service that is private": Row(
        f"cp /etc/pam.d/sshd /etc/pam.d/bastion; {ssh_setting('PAMServiceName bastion')}",
        "private",
        "pass",
        only="trixie",
    ),
    # which file serves
    "no file, other is private": Row("rm /etc/pam.d/sshd", "private", "pass"),
    "no file, other shares": Row(
        f"rm /etc/pam.d/sshd; printf '{PERMIT}' >/etc/pam.d/other", "shared", "fail"
    ),
    "no file, other refuses": Row(
        "rm /etc/pam.d/sshd; printf 'account required pam_permit.so\\nsession required pam_deny.so\\n' "
        ">/etc/pam.d/other",
        "refused",
        "fail",
    ),
    "no session line, other shares": Row(
        f"sed -i '/session/d' /etc/pam.d/sshd; printf '{PERMIT}' >/etc/pam.d/other", "shared", "fail"
    ),
    "other cannot be read": Row(
        "echo '@include nosuch' >>/etc/pam.d/other", "refused", "fail", name="/etc/pam.d/other"
    ),
    "the file in /usr": Row("mv /etc/pam.d/sshd /usr/lib/pam.d/sshd", "private", "pass"),
    "the file in /usr is masked": Row(
        f"mv /etc/pam.d/sshd /usr/lib/pam.d/sshd; printf '{PLAIN}' >/etc/pam.d/sshd", "shared", "fail"
    ),
    # what is in the stack
    "no line in the common file": Row(f"sed -i '/pam_polytmp/d' {COMMON}", "shared", "fail", name=COMMON),
    "the common file is not included": Row(
        "sed -i '/@include common-session/d' /etc/pam.d/sshd", "shared", "fail"
    ),
    "only in a comment": Row(
        f"sed -i 's/^session.*pam_polytmp/# &/' {COMMON}", "shared", "fail", name=COMMON
    ),
    "sufficient before it": Row(first("session sufficient pam_permit.so"), "shared", "fail"),
    "a jump over it": Row(
        before("session [success=1 default=ignore] pam_permit.so"), "shared", "fail", name=COMMON
    ),
    "a jump over it for alice": Row(
        before("session [success=1 default=ignore] pam_succeed_if.so quiet user = alice"),
        "shared",
        "fail",
        name=COMMON,
    ),
    "a jump over it for bob": Row(
        before("session [success=1 default=ignore] pam_succeed_if.so quiet user = bob"),
        "private",
        "fail",
        name=COMMON,
        stricter="check does not evaluate conditions: some user's session is shared",
    ),
    "a jump past the end": Row(
        first("session [success=99 default=ignore] pam_permit.so"), "refused", "fail"
    ),
    "done in a substack": Row(
        "printf 'session sufficient pam_permit.so\\n' >/etc/pam.d/common-x; "
        + first("session substack common-x"),
        "private",
        "pass",
    ),
    "deny": Row(first("session required pam_deny.so"), "refused", "fail"),
    "deny an account": Row(first("account required pam_deny.so"), "refused", "fail"),
    "an unknown control": Row(first("session requird pam_permit.so"), "refused", "fail"),
    "an unknown type": Row(first("sesion required pam_permit.so"), "private", "pass"),
    "no module": Row(first("session required"), "refused", "fail"),
    "an include of nothing": Row(first("@include nosuch"), "refused", "fail"),
    "an include of nothing for a type": Row(first("session include nosuch"), "refused", "fail"),
    "an include of itself": Row(first("@include sshd"), "refused", "fail"),
    "the last line is continued": Row(
        "printf 'session optional pam_permit.so \\\\' >>/etc/pam.d/sshd", "refused", "fail"
    ),
    "a comment inside a continued line": Row(
        "printf 'session required \\\\\\n# x\\n pam_permit.so\\n' >>/etc/pam.d/sshd",
        "refused",
        "fail",
        only="trixie",
        why="libpam 1.5 reads it as it is meant",
    ),
    "lenient": Row(
        f"sed -i 's/required\\(.*pam_polytmp\\)/optional\\1/' {COMMON}", "private", "pass", name=COMMON
    ),
    # modules
    "our module is missing": Row(f"mv {MODULE} /root", "refused", "fail", repairs=MODULE_BACK, name="*"),
    "our module is missing, lenient": Row(
        f"sed -i 's/required\\(.*pam_polytmp\\)/optional\\1/' {COMMON}; mv {MODULE} /root",
        "shared",
        "fail",
        repairs=MODULE_BACK,
        name="*",
    ),
    "our module is empty": Row(
        f"cp {MODULE} /root; : >{MODULE}",
        "refused",
        "fail",
        repairs=MODULE_BACK,
        name="*",
    ),
    "our module is garbage": Row(
        f"cp {MODULE} /root; echo garbage >{MODULE}",
        "refused",
        "fail",
        repairs=MODULE_BACK,
        name="*",
    ),
    "our module is another one": Row(
        f"cp {MODULE} /root; cat /usr/lib/*/security/pam_permit.so >{MODULE}",
        "shared",
        "fail",
        repairs=MODULE_BACK,
        name="*",
    ),
    "our module elsewhere": Row(
        f"sed -i 's,pam_polytmp.so,/lib/security/&,' {COMMON}",
        "refused",
        "fail",
        name="/lib/security/pam_polytmp.so",
    ),
    "a missing module": Row(first("session required pam_nosuch.so"), "refused", "fail"),
    "a missing module, silently": Row(first("-session required pam_nosuch.so"), "refused", "fail"),
    "a missing module, optional": Row(first("session optional pam_nosuch.so"), "private", "pass"),
    "a missing module of accounts": Row(first("account required pam_nosuch.so"), "refused", "fail"),
    "pam_namespace beside us": Row(
        "mkdir -m 000 /tmp/tmp-inst; echo '/tmp /tmp/tmp-inst/ user root' >>/etc/security/namespace.conf; "
        "echo 'session required pam_namespace.so' >>/etc/pam.d/sshd",
        "elsewhere",
        "fail",
        repairs="rm -rf /tmp/tmp-inst",
    ),
    # settings
    "everybody is exempt": Row(
        setting("ExemptUsers=alice bob"), "shared", "fail", "settings", "/etc/passwd", probe=False
    ),
    "nobody is regular": Row(
        "sed -i 's/^UID_MIN.*/UID_MIN 5000/' /etc/login.defs; systemctl restart polytmpd",
        "shared",
        "fail",
        "settings",
        "/etc/passwd",
        probe=False,
    ),
    "an unknown setting": Row(setting("Foo=bar"), "private", "pass", "settings", "/etc/polytmpd.conf:2"),
    "a directory is missing": Row(
        setting("Directories=/tmp /var/tmp /srv/none"), "refused", "fail", "mounts", "/srv/none"
    ),
    "not sticky": Row("chmod 0777 /tmp", "refused", "fail", "mounts", "/tmp", repairs="chmod 1777 /tmp"),
    "not root's": Row(
        "chown bob /var/tmp", "refused", "fail", "mounts", "/var/tmp", repairs="chown root /var/tmp"
    ),
    "something in its place": Row(
        "mv /var/tmp/polytmp-1001 /root/kept; touch /var/tmp/polytmp-1001",
        "refused",
        "fail",
        "mounts",
        "/var/tmp/polytmp-1001",
        repairs="rm /var/tmp/polytmp-1001; mv /root/kept /var/tmp/polytmp-1001",
    ),
    # the daemon
    "masked": Row(
        "systemctl mask --now polytmpd",
        "refused",
        "fail",
        "daemon",
        "polytmpd.service",
        repairs="systemctl unmask polytmpd",
    ),
    "stopped": Row(
        "systemctl stop polytmpd",
        "private",
        "fail",
        "daemon",
        "polytmpd.service",
        stricter="the login starts it; until then it does not see who logs out",
    ),
    "cannot start": Row(
        "mkdir -p /etc/systemd/system/polytmpd.service.d; "
        "printf '[Service]\\nExecStart=\\nExecStart=/bin/false\\n' "
        ">/etc/systemd/system/polytmpd.service.d/x.conf; "
        "systemctl daemon-reload; systemctl --no-block restart polytmpd",
        "refused",
        "fail",
        "daemon",
        "polytmpd.service",
    ),
    # units
    "a sandbox": Row(unit("PrivateTmp=yes"), "refused", "fail", SERVICES, "ssh.service", probe=False),
    "a sandbox after a restart": Row(
        unit("PrivateTmp=yes").replace("systemctl restart ssh", "true"),
        "private",
        "pass",
        SERVICES,
        "ssh.service",
    ),
    "no capability": Row(
        unit("CapabilityBoundingSet=~CAP_SYS_ADMIN"), "refused", "fail", SERVICES, "ssh.service", probe=False
    ),
    "no namespaces": Row(
        unit("RestrictNamespaces=yes"), "refused", "fail", SERVICES, "ssh.service", probe=False
    ),
    "no setns": Row(
        unit("SystemCallFilter=~setns"), "refused", "fail", SERVICES, "ssh.service", probe=False
    ),
}


@pytest.fixture(scope="module")
def saved(machine: Machine) -> None:
    machine.ssh("alice", "true")
    machine.sh(f"mkdir /root/saved; cp -a --parents {' '.join(SAVED)} /root/saved 2>/dev/null; true")


@pytest.fixture
def row(request: pytest.FixtureRequest, machine: Machine, saved: None, quiet: None) -> Iterator[Row]:
    """A row, broken; repaired afterwards."""
    found = ROWS[request.param]
    if found.only and found.only != machine.release:
        pytest.skip(f"expected: not on {machine.release}: {found.why}")
    try:
        machine.sh(f"set -e; {found.breaks}")
        yield found
    finally:
        machine.sh(
            f"{found.repairs}\n"
            f"for path in {' '.join(SAVED)}; do rm -rf $path; cp -a /root/saved$path $path; done\n"
            "systemctl daemon-reload; systemctl reset-failed; systemctl restart polytmpd ssh"
        )


def login(machine: Machine) -> str:
    """Where alice is after she logged in."""
    line = "stat -Lc %i /proc/self/ns/mnt; polytmpctl --json=short status alice 2>/dev/null; true"
    done = machine.ssh("alice", line, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return "refused"
    if lines[0] == machine.run("stat", "-Lc", "%i", "/proc/1/ns/mnt").stdout.strip():
        return "shared"
    instance = json.loads(lines[1]).get("namespace") if len(lines) > 1 else None
    return "private" if str(instance) == lines[0] else "elsewhere"


def states(machine: Machine) -> str:
    """What check may not change."""
    return machine.sh(
        "systemctl show --property=ActiveState,SubState,MainPID polytmpd ssh cron; "
        "ls -la /etc/pam.d /etc/ssh /run/sshd",
        check=False,
    ).stdout


@pytest.mark.parametrize("row", ROWS, indirect=True)
def test_verdict_and_login_agree(machine: Machine, row: Row) -> None:
    before = states(machine)
    status, results = check(machine)
    if "bin/false" not in row.breaks:  # systemd restarts it all the time
        assert states(machine) == before, "check has changed something"
    failed = [result for result in results if result["verdict"] == "fail"]
    shown = [f"{result['topic']} {result['name']}: {result['text']}" for result in failed]
    found = login(machine)
    assert (found, "fail" if status else "pass") == (row.login, row.verdict), shown
    assert (status == 0) == (found == "private") or row.stricter
    assert bool(failed) == (status != 0)
    if row.verdict == "fail":
        assert {result["topic"] for result in failed} <= {row.topic, "daemon"}, shown
        assert any(row.name in {"*", result["name"]} for result in failed if result["topic"] == row.topic), (
            shown
        )
        assert all(result["remedy"] for result in failed)
    if row.probe and machine.release == "trixie":  # once is enough: it is a login, whatever is broken
        _, results = check(machine, "--probe=alice", "--service=sshd")
        (probed,) = [result for result in results if result["topic"] == "probe"]
        assert (probed["verdict"] == "pass") == (found == "private"), probed
        assert ("is refused" in probed["text"]) == (found == "refused"), probed
        assert ("gets the shared" in probed["text"]) == (found == "shared"), probed


def test_stacks_are_what_libpam_of_this_release_makes_of_them(machine: Machine) -> None:
    machine.write("/root/pamstacks.py", Path(pamstacks.__file__).read_bytes())
    done = machine.run("python3", "/root/pamstacks.py", check=False, timeout=300)
    assert done.returncode == 0, done


def test_there_are_thirty_ways() -> None:
    assert len([row for row in ROWS.values() if row.login != "private"]) >= 30

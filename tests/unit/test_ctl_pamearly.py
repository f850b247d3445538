# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check finds that PAM modules leave on the host, in configurations as Debian has them."""

from collections.abc import Collection
from pathlib import Path

import pytest

from polytmpd.ctl import pamcheck
from polytmpd.ctl.pamcheck import Finding
from polytmpd.ctl.pammodules import Module

pytestmark = pytest.mark.unit

OURS = "session required pam_polytmp.so\n"
SYSTEMD = "session optional pam_systemd.so\n"
COMMON = f"session required pam_unix.so\n{SYSTEMD}{OURS}"
EARLY = "session optional pam_polytmp.so\n"
AGENT = "session optional pam_ssh_add.so\n"
INCLUDE = "session include common-session\n"
PAM_SSH = "session optional pam_ssh.so\n"
KRB5 = "auth [success=1 default=ignore] pam_krb5.so minimum_uid=1000"
WINBIND = "auth [success=1 default=ignore] pam_winbind.so krb5_auth"
APPDEFAULTS = "[appdefaults]\n    pam = {\n        ccache = KEYRING:persistent:%u\n    }\n"


def judged(root: Path, absent: str = "", **files: str) -> dict[str, Finding]:
    def load(paths: Collection[str]) -> dict[str, Module]:
        missing = Module("", "not there", ())
        return {path: missing if path == absent else Module(f"/security/{path}") for path in paths}

    for name, text in {"common_session": COMMON, **files}.items():
        path = root / ("etc/krb5.conf" if name == "krb5_conf" else f"etc/pam.d/{name.replace('_', '-')}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {finding.service: finding for finding in pamcheck.judge(root, load=load)}


def test_cockpit(tmp_path: Path) -> None:
    found = judged(tmp_path, cockpit=f"{AGENT}{INCLUDE}session required pam_env.so\n")["cockpit"]
    assert found == Finding(
        "cockpit",
        "warn",
        "'session optional pam_ssh_add.so' starts an ssh-agent before pam_polytmp.so: "
        "sessions of cockpit do not find its socket, which is in the host's /tmp",
        "move that line to the end of /etc/pam.d/cockpit",
    )


@pytest.mark.parametrize(
    "text", [f"{INCLUDE}{AGENT}", f"{EARLY}{AGENT}{INCLUDE}", f"auth optional x\n{INCLUDE}"]
)
def test_cockpit_after_the_remedy(tmp_path: Path, text: str) -> None:
    found = judged(tmp_path, cockpit=text)["cockpit"]
    assert (found.verdict, found.text) == ("pass", "pam_polytmp.so (required)")


def test_a_module_of_the_common_stack(tmp_path: Path) -> None:
    """It concerns all services, and is told once, for the file."""
    found = judged(tmp_path, common_session=f"{PAM_SSH}{COMMON}", sshd=INCLUDE, login=INCLUDE)
    [name] = found
    assert name == "/etc/pam.d/common-session"
    assert (found[name].verdict, found[name].remedy) == ("warn", "pam-auth-update --enable polytmp-early")
    assert "sessions of login, sshd do not find" in found[name].text
    found = judged(tmp_path, common_session=f"{EARLY}{PAM_SSH}{COMMON}")
    assert {finding.verdict for finding in found.values()} == {"pass"}


def test_a_module_that_the_early_profile_does_not_precede(tmp_path: Path) -> None:
    [found] = judged(tmp_path, common_session=f"{PAM_SSH}{EARLY}{COMMON}", sshd=INCLUDE).values()
    line = "add 'session optional pam_polytmp.so' before that line in /etc/pam.d/common-session"
    assert (found.verdict, found.remedy) == ("warn", line)


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ("-session optional pam_gnome_keyring.so auto_start\n", "warn"),
        ("-session optional pam_gnome_keyring.so only_if=x\n", "pass"),
        ("-session optional pam_kwallet5.so auto_start\n", "warn"),
        ("session optional pam_mount.so\n", "pass"),
    ],
)
def test_a_display_manager(tmp_path: Path, line: str, verdict: str) -> None:
    assert judged(tmp_path, sddm=f"{line}{INCLUDE}")["sddm"].verdict == verdict
    assert judged(tmp_path, sddm=f"{INCLUDE}{line}")["sddm"].verdict == "pass"


def test_a_module_that_is_not_installed(tmp_path: Path) -> None:
    line = "-session optional pam_kwallet5.so auto_start\n"
    assert judged(tmp_path, "pam_kwallet5.so", sddm=f"{line}{INCLUDE}")["sddm"].verdict == "pass"


@pytest.mark.parametrize(
    ("auth", "krb5_conf", "verdict"),
    [
        (KRB5, "", "warn"),
        (KRB5, "[libdefaults]\n default_ccache_name = KCM:\n", "warn"),
        (KRB5, APPDEFAULTS, "pass"),
        (KRB5, "[appdefaults]\n ccache_dir = /var/tmp\n", "warn"),
        (f"{KRB5} ccache_dir=/run/user", "", "pass"),
        (f"{KRB5} ccache=FILE:/tmp/krb5cc_%u", APPDEFAULTS, "warn"),
        (f"{KRB5} ccache=/tmpfs/krb5cc_%u", "", "pass"),
        (f"{KRB5} no_ccache", "", "pass"),
        (f"{WINBIND} krb5_ccache_type=FILE", "", "warn"),
        (f"{WINBIND} krb5_ccache_type=FILE:/tmp/krb5cc_%u", "", "warn"),
        (f"{WINBIND} krb5_ccache_type=KEYRING", "", "pass"),
        (f"{WINBIND} krb5_ccache_type=DIR:/run/user/%u/krb5cc", "", "pass"),
        (WINBIND, "", "pass"),
    ],
)
def test_tickets(tmp_path: Path, auth: str, krb5_conf: str, verdict: str) -> None:
    found = judged(tmp_path, sshd=f"{auth}\n{INCLUDE}", krb5_conf=krb5_conf)["sshd"]
    assert found.verdict == verdict, found
    assert ("writes tickets to /tmp" in found.text) == (verdict == "warn")
    assert bool(found.remedy) == (verdict == "warn")


@pytest.mark.parametrize(
    ("line", "verdict"), [("", "pass"), ("session required pam_polytmp.so user\n", "warn")]
)
def test_commands_stay_in_their_callers_directories(tmp_path: Path, line: str, verdict: str) -> None:
    """And so does what modules start for them, unless the argument makes them logins."""
    assert judged(tmp_path, su=f"{AGENT}{INCLUDE}{line}")["su"].verdict == verdict

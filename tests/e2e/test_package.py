# SPDX-License-Identifier: LGPL-2.1-or-later
"""The package on hosts whose administrator has edited PAM by hand: no operation locks users out.

Not here: removal and upgrade while users are logged in (test_faults_restart).
"""

from collections.abc import Iterator

import pytest

from tests import observe
from tests.bed import Machine, Result

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

COMMON = ("/etc/pam.d/common-session", "/etc/pam.d/common-session-noninteractive")
BY_HAND = "/etc/pam.d/slurm"
LINE = "session required pam_polytmp.so\n"
BLOCK = '# and here are more per-package modules (the "Additional" block)'
LOCAL = "session optional pam_umask.so umask=027"


@pytest.fixture(autouse=True)
def restored(machine: Machine, package: str) -> Iterator[None]:
    """Each test finds the package as it is delivered, and PAM as Debian has it."""
    yield
    machine.run("rm", "-f", BY_HAND, f"{BY_HAND}.dpkg-old")
    machine.run("dpkg", "--install", package)
    unwanted = ("--disable", "polytmp-lenient", "polytmp-early")
    machine.run("pam-auth-update", "--force", *unwanted, "--enable", "polytmp")
    assert is_private(machine)


def is_private(machine: Machine) -> bool:
    return machine.ssh("alice", observe.NAMESPACE).stdout != machine.sh(observe.NAMESPACE).stdout


def remove(machine: Machine) -> Result:
    return machine.run("dpkg", "--remove", "polytmp", check=False)


def named(result: Result) -> list[str]:
    """Return the files that a refused removal names."""
    return [line.split()[1] for line in result.stderr.splitlines() if line.startswith("polytmp:   /")]


def assert_all_there(machine: Machine) -> None:
    """Check that everything a line left in PAM needs is installed, and that all users can log in."""
    assert "install ok installed" in machine.run("dpkg", "--status", "polytmp").stdout
    assert machine.run("systemctl", "is-active", "polytmpd").stdout == "active\n"
    assert machine.sh("ls /usr/lib/*/security/pam_polytmp.so").stdout
    for user in ("root", "alice"):
        machine.ssh(user, "true")


def test_a_removal_that_would_lock_out_everybody_is_refused(machine: Machine) -> None:
    """pam-auth-update does not touch a file whose block contains a line of the administrator."""
    machine.run("sed", "-i", f"/^{BLOCK}/a {LOCAL}", COMMON[0])
    refused = remove(machine)
    assert refused.returncode != 0, refused
    assert named(refused) == list(COMMON)
    remedy = "pam-auth-update --force --package --remove polytmp polytmp-lenient polytmp-early"
    assert remedy in refused.stderr
    assert_all_there(machine)
    assert is_private(machine)
    machine.run("sed", "-i", "/pam_polytmp/d", *COMMON)
    assert remove(machine).returncode == 0
    assert LOCAL in machine.run("cat", COMMON[0]).stdout
    machine.ssh("root", "true")


def test_a_refused_removal_names_the_remedy(machine: Machine) -> None:
    machine.run("sed", "-i", f"/^{BLOCK}/a {LOCAL}", COMMON[0])
    refused = remove(machine)
    [remedy] = [line for line in refused.stderr.splitlines() if "--force" in line and "polytmp:" in line]
    machine.sh(remedy.removeprefix("polytmp:"))
    assert remove(machine).returncode == 0
    machine.ssh("root", "true")


def test_the_emergency_exit(machine: Machine) -> None:
    """The way out of docs/troubleshooting.md, if the plain form changes nothing."""
    machine.run("sed", "-i", f"/^{BLOCK}/a {LOCAL}", COMMON[0])
    said = machine.run("pam-auth-update", "--disable", "polytmp")
    assert "Local modifications" in said.stderr
    assert is_private(machine)
    machine.run("pam-auth-update", "--disable", "polytmp", "--force")
    assert not is_private(machine)


def test_a_removal_with_lines_by_hand_is_refused(machine: Machine) -> None:
    """It leaves the profile as it was: enabled, or disabled by an administrator in an emergency."""
    machine.write(BY_HAND, LINE)
    machine.write(f"{BY_HAND}.dpkg-old", LINE)
    machine.sh(
        f"echo 'slurm2 {LINE.strip()}' > /etc/pam.conf; echo '# {LINE.strip()}' > /etc/pam.d/commented"
    )
    try:
        refused = remove(machine)
        assert refused.returncode != 0, refused
        assert named(refused) == ["/etc/pam.conf", BY_HAND]
        assert_all_there(machine)
        assert is_private(machine)
        machine.run("pam-auth-update", "--disable", "polytmp")
        assert remove(machine).returncode != 0
        assert not is_private(machine)
    finally:
        machine.run("rm", "/etc/pam.conf", "/etc/pam.d/commented", BY_HAND)
    assert remove(machine).returncode == 0


def profile_lines(machine: Machine) -> list[str]:
    return [
        " ".join(line.split())
        for line in machine.sh(f"cat {' '.join(COMMON)} | grep pam_polytmp").stdout.splitlines()
    ]


def test_the_lenient_profile_stays(machine: Machine, package: str) -> None:
    """An upgrade and a refused removal keep it."""
    lenient = ["session optional pam_polytmp.so"] * 2
    machine.run("pam-auth-update", "--disable", "polytmp", "--enable", "polytmp-lenient")
    assert profile_lines(machine) == lenient
    assert is_private(machine)
    machine.run("dpkg", "--install", package)
    assert profile_lines(machine) == lenient
    machine.write(BY_HAND, LINE)
    assert remove(machine).returncode != 0
    assert profile_lines(machine) == lenient
    machine.run("pam-auth-update", "--enable", "polytmp", "--disable", "polytmp-lenient")
    assert profile_lines(machine) == ["session required pam_polytmp.so"] * 2
    machine.run("pam-auth-update", "--disable", "polytmp", "--enable", "polytmp-lenient")
    machine.run("rm", BY_HAND)
    assert remove(machine).returncode == 0
    assert "pam_polytmp" not in machine.run("cat", *COMMON).stdout


def test_the_early_profile_stays(machine: Machine, package: str) -> None:
    """It comes in addition to one of the others; an upgrade and a refused removal keep it."""
    early = ["session optional pam_polytmp.so", *["session required pam_polytmp.so"] * 2]
    machine.run("pam-auth-update", "--enable", "polytmp-early")
    assert profile_lines(machine) == early
    assert is_private(machine)
    machine.run("dpkg", "--install", package)
    assert profile_lines(machine) == early
    machine.write(BY_HAND, LINE)
    assert remove(machine).returncode != 0
    assert profile_lines(machine) == early
    machine.run("rm", BY_HAND)
    assert remove(machine).returncode == 0
    assert "pam_polytmp" not in machine.run("cat", *COMMON).stdout


def test_an_upgrade_with_lines_by_hand(machine: Machine, package: str) -> None:
    """The module is there afterwards, so the upgrade is not refused."""
    machine.write(BY_HAND, LINE)
    machine.run("dpkg", "--install", package)
    assert_all_there(machine)


def test_the_links_of_what_is_installed_lead_somewhere(machine: Machine) -> None:
    """The package must install docs/ below /usr/share/doc, where debhelper compresses files."""
    script = """
        cd /usr/share/doc/polytmp
        find . -name '*.md' | while read -r page; do
            grep -oE '\\]\\([^)#:]+' "$page" | sed 's/^](//' | while read -r link; do
                test -e "${page%/*}/$link" && echo good || echo "$page: $link"
            done
        done
    """
    found = machine.sh(script).stdout.splitlines()
    assert len(found) > 10
    assert set(found) == {"good"}

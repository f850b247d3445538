# SPDX-License-Identifier: LGPL-2.1-or-later
"""X cookies in /tmp, as SDDM makes them: a command as another user finds the cookie, and a login does not.

Not here: sockets and locks of X servers (test_x11.py).
"""

from collections.abc import Iterator
from typing import Final

import pytest

from tests.bed import Machine, Session, eventually
from tests.e2e.test_x11 import OPTIONS

pytestmark = pytest.mark.e2e

COOKIE: Final = "/tmp/xauth_gXqYzA"
SERVER: Final = f"Xvfb :7 -auth {COOKIE} {OPTIONS.replace('-ac ', '')}"
VENDOR: Final = "xdpyinfo | grep 'vendor string'"


@pytest.fixture(scope="module")
def alice(machine: Machine) -> Iterator[Session]:
    """alice has a display that only a cookie opens, in a private file in /tmp."""
    machine.sh("for user in root alice bob; do echo $user:secret; done | chpasswd")
    with machine.session("alice") as session:
        session.run(f"touch {COOKIE}; chmod 600 {COOKIE}; xauth -qf {COOKIE} add :7 . $(mcookie)")
        session.run(f"{SERVER} >/dev/null 2>&1 & export DISPLAY=:7 XAUTHORITY={COOKIE}")
        eventually(lambda: session.run(VENDOR), what="the display serves")
        assert session.result(f"XAUTHORITY=/dev/null {VENDOR}", check=False).returncode != 0
        yield session


@pytest.mark.parametrize(
    "command", ["sudo {}", "su -c '{}'", "pkexec env DISPLAY=:7 XAUTHORITY=$XAUTHORITY {}"]
)
def test_a_command_as_root(machine: Machine, alice: Session, command: str) -> None:
    machine.write(
        "/etc/polkit-1/rules.d/10-bed.rules",
        "polkit.addRule(function(action, subject) { return polkit.Result.YES; });\n",
    )
    line = command.format("xdpyinfo")
    assert "X.Org" in alice.run(f"echo secret | {line}"), line


@pytest.mark.parametrize("command", ["sudo -u bob {}", "su bob -c {}"])
def test_a_command_as_bob_who_may_read_the_cookie(alice: Session, command: str) -> None:
    """Permissions decide, as on a plain system."""
    line = f"echo secret | {command.format('xdpyinfo')}"
    refused = alice.result(line, check=False)
    assert refused.returncode != 0
    alice.run(f"setfacl -m user:bob:r {COOKIE}")
    assert "X.Org" in alice.run(line)
    alice.run(f"setfacl -b {COOKIE}")


def test_su_with_pam_xauth(machine: Machine, alice: Session) -> None:
    """pam_xauth reads the caller's cookie with the caller's rights, and gives bob a copy at home."""
    machine.sh("cp /etc/pam.d/su /root/su; echo 'session optional pam_xauth.so' >>/etc/pam.d/su")
    try:
        found = alice.run("echo secret | su bob -c 'echo $XAUTHORITY; xdpyinfo'")
        assert found.startswith("/home/bob/.xauth")
        assert "X.Org" in found
    finally:
        machine.run("mv", "/root/su", "/etc/pam.d/su")


@pytest.mark.parametrize(
    "command",
    [
        f'DISPLAY=:7 XAUTHORITY="$(polytmpctl path {COOKIE} --user=alice)" xdpyinfo',
        f"polytmpctl enter alice env DISPLAY=:7 XAUTHORITY={COOKIE} xdpyinfo",
    ],
)
def test_a_login_of_roots_own(machine: Machine, alice: Session, command: str) -> None:
    """It is on the host, where the name leads nowhere; the two ways of docs/x11.md lead there."""
    refused = machine.ssh("root", f"DISPLAY=:7 XAUTHORITY={COOKIE} xdpyinfo", check=False)
    assert refused.returncode != 0
    assert "X.Org" in machine.ssh("root", command).stdout


def test_a_login_of_bobs_does_not_find_it(alice: Session) -> None:
    alice.run(f"setfacl -m user:bob:r {COOKIE}")
    line = f"sudo -iu bob env DISPLAY=:7 XAUTHORITY={COOKIE} xdpyinfo"
    assert alice.result(line, check=False).returncode != 0
    alice.run(f"setfacl -b {COOKIE}")

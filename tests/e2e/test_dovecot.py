# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real dovecot, which opens PAM sessions in a sandbox only to check passwords: users read their mail, and no
session comes to be in a shared /tmp.

Not here: units with PAMName= (test_sandboxes), the decision by itself (tests/unit/test_placement).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests import observe
from tests.bed import Machine

CONFIGURATION: Final = {
    "bookworm": """
protocols = imap
listen = 127.0.0.1
ssl = no
disable_plaintext_auth = no
mail_location = maildir:~/Maildir
passdb {
  driver = pam
  args = session=yes SERVICE
}
userdb {
  driver = passwd
}
""",
    "trixie": """
dovecot_config_version = 2.4.0
dovecot_storage_version = 2.4.0
protocols = imap
listen = 127.0.0.1
ssl = no
auth_allow_cleartext = yes
mail_driver = maildir
mail_path = ~/Maildir
passdb pam {
  service_name = SERVICE
  session = yes
}
userdb passwd {
}
""",
}
READ: Final = """
import imaplib, sys
connection = imaplib.IMAP4("127.0.0.1")
try:
    print(connection.login(sys.argv[1], sys.argv[2])[0], connection.select()[0])
    connection.logout()
except imaplib.IMAP4.error as error:
    print("refused", error)
"""
DROP_IN: Final = "/etc/systemd/system/dovecot.service.d/bed.conf"


def prepare(root: Path) -> None:
    observe.write(root, "usr/local/lib/read-mail.py", READ)


pytestmark = [pytest.mark.e2e, pytest.mark.prepared(by=prepare)]

Start = Callable[..., None]


@pytest.fixture(scope="module", autouse=True)
def passwords(machine: Machine) -> None:
    machine.sh(
        "for user in alice bob; do echo $user:secret; done | chpasswd; cp /etc/pam.d/dovecot /etc/pam.d/mail"
    )


@pytest.fixture
def start(machine: Machine, release: str) -> Iterator[Start]:
    """A function that starts dovecot, with the PAM service and the settings of its unit."""

    def act(service: str, *settings: str) -> None:
        machine.write("/etc/dovecot/dovecot.conf", CONFIGURATION[release].replace("SERVICE", service))
        machine.write(DROP_IN, "\n".join(["[Service]", *settings, ""]))
        machine.sh("systemctl daemon-reload; systemctl restart polytmpd dovecot")

    yield act
    machine.sh(f"systemctl stop dovecot; rm -f {DROP_IN}")


def read_mail(machine: Machine, user: str, password: str = "secret") -> str:
    argv = ("python3", "/usr/local/lib/read-mail.py", user, password)
    return machine.run(*argv).stdout.strip()


def service_has_its_own_tmp(machine: Machine) -> bool:
    inodes = machine.sh(
        "stat -c %i /tmp /proc/$(systemctl show -P MainPID dovecot)/root/tmp/."
    ).stdout.split()
    return inodes[0] != inodes[1]


@pytest.mark.parametrize("service", ["dovecot", "mail"])
def test_users_read_their_mail(machine: Machine, start: Start, service: str) -> None:
    """The name dovecot is known. Any other server stays in its sandbox if that is private."""
    begin = machine.now()
    start(service)
    assert service_has_its_own_tmp(machine)
    for user in ("alice", "bob", "alice"):
        assert read_mail(machine, user) == "OK OK"
    assert read_mail(machine, "alice", "wrong").startswith("refused")
    lines = machine.journal("-u", "polytmpd", "--since", begin)
    text = "dovecot.service opens sessions in its own mount namespace, which has its own /tmp and /var/tmp: "
    assert lines.count(text) == (1 if service == "mail" else 0)
    report = json.loads(machine.run("polytmpctl", "--json=short", "check", check=False).stdout)
    (found,) = [entry for entry in report["results"] if entry["name"] == "dovecot.service"]
    assert found["verdict"] == "warn"
    assert found["text"].endswith(": sessions that it opens stay in its own /tmp and /var/tmp")


@pytest.mark.parametrize(
    "settings",
    [
        ["PrivateTmp=no", "ProtectSystem=full"],
        ["PrivateTmp=no", "TemporaryFileSystem=/tmp"],
        ["PrivateTmp=no", "TemporaryFileSystem=/var/tmp"],
    ],
    ids=" ".join,
)
def test_a_sandbox_that_shows_a_directory_of_the_hosts(
    machine: Machine, start: Start, settings: list[str]
) -> None:
    start("mail", *settings)
    for user in ("alice", "bob"):
        assert read_mail(machine, user).startswith("refused")
    assert "has its own mount namespace" in machine.journal("-g", "no private /tmp for user bob")


def test_without_a_sandbox_a_session_is_the_users(machine: Machine, start: Start) -> None:
    """And the process, which checks the next user's password, comes back."""
    settings = ["PrivateTmp=no", "PrivateDevices=no", "ProtectSystem=no", "ProtectHome=no"]
    start(
        "mail", *settings, "ProtectKernelTunables=no", "ProtectControlGroups=no", "ProtectKernelModules=no"
    )
    assert not service_has_its_own_tmp(machine)
    begin = machine.now()
    for user in ("alice", "bob", "alice"):
        assert read_mail(machine, user) == "OK OK"
    host = machine.run("readlink", "/proc/1/ns/mnt").stdout
    workers = "for pid in $(pgrep -f 'dovecot/auth'); do readlink /proc/$pid/ns/mnt; done | sort -u"
    assert machine.sh(workers).stdout == host
    assert "several users" not in machine.journal("--since", begin)

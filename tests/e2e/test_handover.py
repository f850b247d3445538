# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs that hand over between users: a login goes to its user's directories, a command that is run as
another user stays in the caller's.

Not here: the decision by itself (tests/pam/test_handover), Ansible and Samba (test_handover_servers),
a command that outlives its caller (test_lifetime).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Final

import pytest

from tests import handover, observe
from tests.bed import Machine, Session
from tests.handover import WITNESS

USERS: Final = {"alice": 1001, "bob": 1002}
ROOT: Final = 0

POLKIT_RULE = """
polkit.addRule(function(action, subject) {
    if (subject.user == "alice") return polkit.Result.YES;
});
"""


def prepare(root: Path) -> None:
    handover.install(root)
    observe.write(root, "etc/polkit-1/rules.d/10-bed.rules", POLKIT_RULE)
    observe.write(root, "etc/doas.conf", "permit nopass alice\npermit nopass root\n")
    (root / "etc/doas.conf").chmod(0o400)


pytestmark = [pytest.mark.e2e, pytest.mark.prepared(by=prepare)]


@dataclass(frozen=True, slots=True)
class Row:
    """A program and who its command runs as: place is "caller", "host" or a user."""

    name: str
    command: str  # {} is the witness with its label; {q} is the same as one word
    user: str
    place: str
    origins: str = "alice root sudo-s"
    releases: str = "bookworm trixie"


PASSWORD = "printf 'secret\\n' | "
ROWS: Final = [
    # commands
    Row("sudo", "sudo {}", "root", "caller"),
    Row("sudo -u bob", "sudo -u bob {}", "bob", "caller"),
    Row("sudo -s -u bob", "sudo -u bob -s {}", "bob", "caller"),
    Row("sudo -i", "sudo -i {}", "root", "caller"),
    Row("su bob -c", PASSWORD + "su bob -c {q}", "bob", "caller"),
    Row("su bob", "echo {q} | su bob", "bob", "caller", "root sudo-s"),
    Row("su -", PASSWORD + "su - -c {q}", "root", "caller"),
    Row("runuser -u bob", "runuser -u bob -- {}", "bob", "caller", "root sudo-s"),
    Row("runuser -l bob", "runuser -l bob -c {q}", "bob", "caller", "root sudo-s"),
    Row("pkexec", "pkexec {}", "root", "caller"),
    Row("pkexec --user bob", "pkexec --user bob {}", "bob", "caller"),
    Row("doas", "doas {}", "root", "caller"),
    Row("doas -u bob", "doas -u bob {}", "bob", "caller"),
    Row("newgrp", "echo {q} | newgrp $(id -gn)", "", "caller"),
    # logins
    Row("sudo -iu bob", "sudo -iu bob {}", "bob", "bob"),
    Row("su - bob", PASSWORD + "su - bob -c {q}", "bob", "bob"),
    Row("sudo -iu svc", "sudo -iu svc {}", "svc", "host"),
    Row("su - svc", PASSWORD + "su - svc -c {q}", "svc", "host"),
    Row("run0 --user=bob", "run0 --user=bob {}", "bob", "bob", releases="trixie"),
    Row(
        "systemd-run -p PAMName=login --uid=bob",
        "systemd-run -qGP -p PAMName=login --uid=bob {}",
        "bob",
        "bob",
    ),
    Row("machinectl shell bob@.host", "machinectl -q shell bob@.host {}", "bob", "bob"),
    Row("at", "echo {q} | at now", "", "own"),
    Row("sudo -u bob at", "cd / && echo {q} | sudo -u bob at now", "bob", "bob"),
    Row("systemd-run --user", "systemd-run --user -qGP {}", "alice", "alice", "alice"),
    # neither: PID 1 runs it, without PAM
    Row("systemd-run --uid=bob", "systemd-run -qGP --uid=bob {}", "bob", "host"),
]
TABLE: Final = Path(__file__).parents[2] / "docs/install.md"
CASES = [(origin, row) for row in ROWS for origin in row.origins.split()]


@pytest.fixture(scope="module")
def origins(machine: Machine) -> Iterator[dict[str, Session]]:
    """Sessions of alice and root; bob has one, so that he has directories that could be missed."""
    machine.sh("for user in root alice bob svc; do echo $user:secret; done | chpasswd")
    handover.start(machine)
    machine.write("/etc/cron.d/handover", f"* * * * * bob {WITNESS} cron-bob\n")
    with machine.session("alice") as alice, machine.session("root") as root, machine.session("bob"):
        alice.run(f"echo '* * * * * {WITNESS} cron-alice' | crontab -")
        yield {"alice": alice, "root": root, "sudo-s": alice}


def line(origin: str, command: str) -> str:
    return f"sudo -s sh -c {quote(command)}" if origin == "sudo-s" else command


@pytest.mark.parametrize(
    ("origin", "row"), CASES, ids=[f"{row.name} by {origin}".replace(" ", "_") for origin, row in CASES]
)
def test_who_runs_where(
    machine: Machine, origins: dict[str, Session], release: str, origin: str, row: Row
) -> None:
    if release not in row.releases:
        assert machine.run("which", row.name.split()[0], check=False).returncode != 0
        return
    label = f"{ROWS.index(row)}-{origin}"
    command = line(origin, row.command.format(f"{WITNESS} {label}", q=quote(f"{WITNESS} {label}")))
    result = origins[origin].result(command, check=False)
    try:
        seen = handover.record(machine, label)
    except Exception as error:
        raise AssertionError(str(result)) from error
    places = handover.places(machine, USERS)
    caller = "host" if origin == "root" else "alice"
    user = row.user or ("alice" if origin == "alice" else "root")
    place = {"caller": caller, "own": user if user != "root" else "host"}.get(row.place, row.place)
    assert seen.witness.uid == int(machine.run("id", "-u", user).stdout)
    assert seen.witness.namespace == places[place], f"not in the directories of {place}: {places}"
    assert handover.strangers(seen, places, USERS) == []


def test_the_documentation_has_the_same_table() -> None:
    documented: dict[str, list[str]] = {}
    for text in TABLE.read_text().splitlines():
        if text.startswith("| `"):
            first, user, *cells = text.strip("|").split("|")
            documented |= {
                name: [user.strip(), *(cell.strip() for cell in cells)] for name in first.split("`")[1::2]
            }
    for row in ROWS:
        user, *cells = documented[row.name]
        assert user == (row.user or "the caller"), row
        for origin, cell in zip(("alice", "root", "sudo-s"), cells, strict=True):
            caller = "the host" if origin == "root" else "alice"
            own = "alice" if origin == "alice" else "the host"
            place = {"caller": caller, "own": own, "host": "the host"}.get(row.place, row.place)
            if origin in row.origins.split():
                assert cell == f"{place}'s", (row, origin)


@pytest.mark.parametrize("origin", ["alice", "root", "sudo-s"])
def test_sudoedit_keeps_the_editor_out(
    machine: Machine, origins: dict[str, Session], release: str, origin: str
) -> None:
    """The editor runs as the caller; the edit works, since the copy lies in the caller's /var/tmp."""
    label = f"sudoedit-{origin}"
    machine.write("/home/bob/edited", "by bob\n", owner="bob:bob")
    command = f"SUDO_EDITOR='{WITNESS} {label}' sudoedit -u bob /home/bob/edited"
    result = origins[origin].result(line(origin, command))
    seen = handover.record(machine, label)
    places = handover.places(machine, USERS)
    uid = USERS["alice"] if origin == "alice" else ROOT
    assert handover.strangers(seen, places, USERS) == []
    assert seen.witness.uid == uid
    assert seen.witness.namespace == places["host" if origin == "root" else "alice"]
    assert machine.read("/home/bob/edited").decode() == f"by bob\nedited by {uid}\n", result


def test_ssh(machine: Machine, origins: dict[str, Session]) -> None:
    machine.ssh("bob", f"{WITNESS} ssh")
    seen = handover.record(machine, "ssh")
    places = handover.places(machine, USERS)
    assert (seen.witness.uid, seen.witness.namespace) == (USERS["bob"], places["bob"])
    assert handover.strangers(seen, places, USERS) == []


MEETING = """
cd /tmp
sudo -u alice sh -c 'echo x >of-alice; chmod 666 of-alice; ln -s /srv/open link'
try() { sudo -u $1 sh -c "$2" >/dev/null 2>&1; echo "$1: $2: $?"; }
try bob 'rm -f of-alice'
try bob 'mv of-alice mine'
try bob 'ln of-alice hard'
try bob 'echo x >>of-alice'
try bob 'cat link'
try bob 'umask 077; echo x >of-bob'
try alice 'cat of-bob'
try alice 'rm -f of-bob'
rm -f of-alice of-bob link mine hard
"""


def test_who_meet_in_an_instance_are_as_protected_as_on_a_plain_system(
    machine: Machine, origins: dict[str, Session]
) -> None:
    """The sticky bit and fs.protected_*: the same answers in the host's /tmp and in alice's."""
    machine.write("/srv/meeting", MEETING)
    machine.sh("echo open >/srv/open; chmod 666 /srv/open")
    on_the_host = origins["root"].run("sh /srv/meeting")
    assert origins["alice"].run("sudo sh /srv/meeting") == on_the_host
    for refused in (
        "bob: rm -f of-alice",
        "bob: mv of-alice mine",
        "alice: cat of-bob",
        "alice: rm -f of-bob",
    ):
        assert f"{refused}: 0" not in on_the_host
    assert "bob: umask 077; echo x >of-bob: 0\n" in on_the_host


def test_cron(machine: Machine, origins: dict[str, Session]) -> None:
    """The last test, because the jobs wait for a full minute."""
    for user in ("bob", "alice"):
        seen = handover.record(machine, f"cron-{user}", timeout=75)
        places = handover.places(machine, USERS)
        assert (seen.witness.uid, seen.witness.namespace) == (USERS[user], places[user])
        assert handover.strangers(seen, places, USERS) == []

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Exim, a set-user-ID program that works for others: alice sends mail to bob, whose .forward runs a program.

Not here: programs that run a command as another user (test_handover).
"""

from collections.abc import Iterator
from typing import Final

import pytest

from tests import handover
from tests.bed import Machine, Session
from tests.handover import WITNESS

USERS: Final = {"alice": 1001, "bob": 1002}
FORWARD: Final = "/home/bob/.forward"
SEND: Final = "printf 'Subject: x\\n\\nx\\n' | /usr/sbin/sendmail bob"
TEMPLATE: Final = "/etc/exim4/exim4.conf.template"

pytestmark = [pytest.mark.e2e, pytest.mark.prepared(by=handover.install)]


@pytest.fixture(scope="module")
def alice(machine: Machine) -> Iterator[Session]:
    handover.start(machine)
    with machine.session("alice") as session, machine.session("bob"):
        yield session


def forward(machine: Machine, label: str) -> None:
    machine.write(FORWARD, f'"|{WITNESS} {label}"\n', owner="bob:bob")


def test_mail_that_is_delivered_at_once(machine: Machine, alice: Session) -> None:
    """bob's program is in alice's directories, because alice's session started it."""
    forward(machine, "at-once")
    alice.run(SEND)
    seen = handover.record(machine, "at-once")
    places = handover.places(machine, USERS)
    assert (seen.witness.uid, seen.witness.namespace) == (USERS["bob"], places["alice"])


def test_mail_that_waits_for_the_daemon(machine: Machine, alice: Session) -> None:
    """With queue_only, as docs/SECURITY.md advises, the daemon delivers, where it is."""
    forward(machine, "queued")
    machine.sh(f"sed -i '1i queue_only = true' {TEMPLATE} && update-exim4.conf")
    alice.run(SEND)
    assert machine.run("exim4", "-bpc").stdout == "1\n"
    machine.run("systemctl", "start", "exim4")  # it runs the queue at once
    seen = handover.record(machine, "queued")
    assert seen.witness.uid == USERS["bob"]
    places = handover.places(machine, USERS)
    assert seen.witness.namespace not in {places["alice"], places["bob"]}
    machine.run("systemctl", "stop", "exim4")

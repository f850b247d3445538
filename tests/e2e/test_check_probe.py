# SPDX-License-Identifier: LGPL-2.1-or-later
"""check --probe opens a real session, as whom it says, and leaves nothing. Services of which another unit
opens the sessions.

Not here: whether its verdict is that of a login on a host that is broken (test_check_truth.py).
"""

import json

import pytest

from tests import observe
from tests.bed import Machine
from tests.e2e.polytmpctl import check

pytestmark = [pytest.mark.prepared(by=observe.quick_logouts)]


def test_a_probe_says_whose_session_and_leaves_nothing(machine: Machine, quiet: None) -> None:
    status, results = check(machine, "--probe")
    probed = {result["name"]: result for result in results if result["topic"] == "probe"}
    assert status == 0, probed
    assert list(probed) == ["sshd", "login", "su-l", "sudo-i", "cron", "atd"]
    assert all("a session of alice is private" in result["text"] for result in probed.values())
    observe.log_everybody_out(machine)  # waits until nobody is there
    assert machine.sh("systemctl list-units --all --plain --no-legend 'run-*.service'").stdout == ""


def test_a_probe_from_within_another_users_session(machine: Machine, quiet: None) -> None:
    with machine.session("alice") as alice:
        line = "sudo polytmpctl check --json=short --probe=bob --service=sshd --service=cron"
        results = json.loads(alice.run(line, timeout=120))["results"]
        probed = [result for result in results if result["topic"] == "probe"]
        own = alice.run("stat -Lc %i /proc/self/ns/mnt").strip()
        assert [result["verdict"] for result in probed] == ["pass", "pass"]
        assert all(own not in result["text"] for result in probed)


def test_a_probe_of_a_user_who_is_exempt(machine: Machine, quiet: None) -> None:
    status, results = check(machine, "--probe=svc", "--service=sshd")
    (probed,) = [result for result in results if result["topic"] == "probe"]
    assert (status, probed["verdict"]) == (0, "warn")
    assert "gets the shared /tmp and /var/tmp: UID" in probed["text"]


def test_a_probe_that_cannot_be(machine: Machine, quiet: None) -> None:
    done = machine.run("polytmpctl", "check", "--probe=nosuch", check=False)
    assert (done.returncode, "Failed to look up user 'nosuch'" in done.stderr) == (1, True)
    status, results = check(machine, "--probe=alice", "--service=nosuch")
    (probed,) = [result for result in results if result["topic"] == "probe"]
    assert (status, probed["verdict"]) == (0, "pass"), "other serves it, and is private"
    done = machine.ssh("alice", "polytmpctl check --json=short --probe", check=False, timeout=120)
    (probed,) = [result for result in json.loads(done.stdout)["results"] if result["topic"] == "probe"]
    assert (probed["verdict"], probed["remedy"]) == ("skip", "run as root")


def test_a_web_server_keeps_its_sandbox(machine: Machine, quiet: None) -> None:
    """Cockpit's sessions are opened by another unit than the one that users connect to."""
    service = "[Service]\nExecStart=/bin/sleep 777\n"
    units = {
        "cockpit.service": f"{service}PrivateTmp=yes\nProtectSystem=strict\n",
        "cockpit-wsinstance-http.service": f"{service}PrivateTmp=yes\n",
        "cockpit-session@.service": service,
    }
    places = [f"/etc/systemd/system/{name}" for name in units]
    machine.run("rm", *places)  # masked
    for place, text in zip(places, units.values(), strict=True):
        machine.write(place, text)
    machine.sh("systemctl daemon-reload; systemctl start cockpit cockpit-wsinstance-http")
    try:
        status, results = check(machine)
        found = {result["name"]: result["verdict"] for result in results if "cockpit" in result["name"]}
        assert (status, found) == (0, {"cockpit-session@.service": "pass"})
        machine.sh("ln -sf /dev/null /etc/systemd/system/cockpit-session@.service; systemctl daemon-reload")
        status, results = check(machine)
        found = {result["name"]: result["verdict"] for result in results if "cockpit" in result["name"]}
        assert (status, found) == (1, {"cockpit-wsinstance-http.service": "fail"})
    finally:
        machine.sh(
            "systemctl stop cockpit cockpit-wsinstance-http; "
            f"for place in {' '.join(places)}; do ln -sf /dev/null $place; done; systemctl daemon-reload"
        )

# SPDX-License-Identifier: LGPL-2.1-or-later
"""polytmpctl check on a booted system: what it finds, and whether its remedies work."""

import json

import pytest

from tests import observe
from tests.bed import Machine, Session
from tests.e2e.polytmpctl import ctl, values

pytestmark = [pytest.mark.e2e, pytest.mark.prepared(by=observe.quick_logouts)]


def test_check_passes_on_this_host(machine: Machine, alice: Session) -> None:
    done = ctl(machine, "check", check=False)
    assert done.returncode == 0, done
    assert " fail" not in done.stdout
    found = values(machine, "check")
    assert found["verdict"] == "pass"
    names = {entry["name"]: entry["verdict"] for entry in found["results"]}
    expected = (
        "polytmpd.service",
        "polytmpd.socket",
        "move_mount(MOVE_MOUNT_SET_GROUP)",
        "cgroups",
        "sshd",
        "cron",
        "su",
        "systemd-user",
    )
    assert {name: names.get(name) for name in expected} == dict.fromkeys(expected, "pass")
    assert names["/ (propagation)"] == "pass"
    narrow = machine.sh("COLUMNS=80 polytmpctl check").stdout
    assert "\n✓ pass mounts   / (propagation)\n                shared: mounts reach sessions" in narrow
    assert max(map(len, narrow.splitlines()[3:])) <= 80


def test_check_finds_a_missing_directory_and_users_without_an_instance(
    machine: Machine, alice: Session
) -> None:
    machine.write("/etc/polytmpd.conf.d/x.conf", "[Polytmp]\nDirectories=/tmp /var/tmp /srv/none\n")
    machine.run("useradd", "--no-log-init", "--uid", "4294967000", "distant")
    try:
        done = ctl(machine, "check", "--json=short", check=False)
        results = {entry["name"]: entry for entry in json.loads(done.stdout)["results"]}
        assert results["/srv/none"]["verdict"] == "fail", "checked although it is not in effect"
        assert "create /srv/none" in results["polytmpd.conf"]["remedy"]
        machine.run("systemctl", "restart", "polytmpd")
        done = ctl(machine, "check", "--json=short", check=False)
        results = {entry["name"]: entry for entry in json.loads(done.stdout)["results"]}
        verdicts = {name: entry["verdict"] for name, entry in results.items() if entry["verdict"] != "pass"}
        assert verdicts == {"/srv/none": "fail", "exempt users": "warn"}
        assert "install -d -m 1777 /srv/none" in results["/srv/none"]["remedy"]
        assert "distant (4294967000): UID 4294967000 is in" in results["exempt users"]["text"]
        assert "add their UIDs to RegularUIDs=" in results["exempt users"]["remedy"]
    finally:
        machine.sh("userdel distant; rm /etc/polytmpd.conf.d/x.conf; systemctl restart polytmpd")


def test_check_finds_mistakes_in_the_configuration(machine: Machine, alice: Session) -> None:
    """Mistakes are found whether or not the daemon has read them. An exempt user is no finding."""
    machine.write("/etc/polytmpd.conf.d/x.conf", "[Polytmp]\nExemptUsers=bob nobody-knows\nFoo=bar\n")
    machine.run("systemd-run", "--quiet", "--unit=outside", "--uid=bob", "sleep", "777")
    try:
        done = ctl(machine, "check", "--json=short", check=False)
        assert done.returncode == 0
        found = [entry for entry in json.loads(done.stdout)["results"] if entry["verdict"] != "pass"]
        assert [(entry["name"], entry["verdict"]) for entry in found] == [
            ("/etc/polytmpd.conf.d/x.conf:3", "warn"),
            ("polytmpd.conf", "warn"),
        ]
        assert "Unknown setting Foo=" in found[0]["text"]
        assert "nobody-knows" in found[1]["text"]
    finally:
        machine.sh("systemctl stop outside; rm /etc/polytmpd.conf.d/x.conf")


def test_check_finds_what_blocks_a_users_logins(machine: Machine) -> None:
    observe.log_everybody_out(machine)
    machine.run("useradd", "--uid", "1009", "--create-home", "ninth")
    machine.run("mkdir", "-p", "/var/tmp/polytmp-1009/tmp")
    try:
        assert machine.run("su", "-", "ninth", "-c", "true", check=False).returncode != 0
        done = ctl(machine, "check", "--json=short", check=False)
        found = {entry["name"]: entry for entry in json.loads(done.stdout)["results"]}[
            "/var/tmp/polytmp-1009"
        ]
        assert (found["verdict"], "logins of UID 1009 are refused" in found["text"]) == ("fail", True)
        machine.sh(found["remedy"].partition("then: ")[2].partition(",")[0])
        machine.run("su", "-", "ninth", "-c", "true")
        assert ctl(machine, "check", check=False).returncode == 0
    finally:
        observe.log_everybody_out(machine)
        machine.sh("userdel --remove ninth; rm -r /var/tmp/not-polytmp-1009 /var/tmp/polytmp-1009")


def cron_is_cured(machine: Machine, remedy: str) -> bool:
    """Follow the remedy to the letter. Each setting has its own empty value, see systemd.exec(5)."""
    edit, _, then = remedy.partition(" (one per line); then: ")
    command, _, lines = edit.partition(": ")
    assert command == "systemctl edit cron.service"
    machine.write("/etc/systemd/system/cron.service.d/y.conf", lines.replace(" ", "\n") + "\n")
    machine.sh(f"systemctl daemon-reload; {then}")
    found = json.loads(ctl(machine, "check", "--json=short", check=False).stdout)["results"]
    return [entry["verdict"] for entry in found if entry["name"] == "cron.service"] == ["pass"]


def test_check_finds_what_is_wrong(machine: Machine, alice: Session) -> None:
    machine.write(
        "/etc/systemd/system/cron.service.d/x.conf",
        "[Service]\nProtectSystem=full\nPrivateTmp=yes\nReadOnlyPaths=/mnt\n",
    )
    machine.write("/etc/pam.d/vsftpd", "session required pam_unix.so\n")
    machine.write("/etc/tmpfiles.d/polytmp.conf", "")
    machine.write("/etc/krb5.conf", "[libdefaults]\n default_ccache_name = FILE:/tmp/krb5cc_%{uid}\n")
    machine.sh("systemctl daemon-reload; systemctl restart cron")
    machine.run("systemd-run", "--quiet", "--unit=outside", "--uid=alice", "sleep", "777")
    try:
        done = ctl(machine, "check", "--json=short", check=False)
        assert done.returncode == 1
        results = {entry["name"]: entry for entry in json.loads(done.stdout)["results"]}
        verdicts = {name: entry["verdict"] for name, entry in results.items() if entry["verdict"] != "pass"}
        assert verdicts == {
            "cron.service": "fail",
            "vsftpd": "fail",
            "tmpfiles.d": "fail",
            "Kerberos": "warn",
            "alice": "warn",
        }
        assert all(entry["remedy"] for entry in results.values() if entry["verdict"] in {"warn", "fail"})
        assert "ProtectSystem=" in results["cron.service"]["text"]
        assert cron_is_cured(machine, results["cron.service"]["remedy"])
        assert "sleep" in results["alice"]["text"]
    finally:
        machine.sh(
            "systemctl stop outside; rm -r /etc/systemd/system/cron.service.d /etc/pam.d/vsftpd "
            "/etc/tmpfiles.d/polytmp.conf /etc/krb5.conf; systemctl daemon-reload; systemctl restart cron"
        )

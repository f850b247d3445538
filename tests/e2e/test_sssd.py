# SPDX-License-Identifier: LGPL-2.1-or-later
"""Users of a real SSSD, which is installed after polytmp: their directories are private while it answers,
and no login of theirs is shared when it does not.

SSSD reads them from libnss-extrausers, which nsswitch.conf does not list.

Not here: ranges of UIDs, names, groups and a user database that hangs in general (test_users).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests import observe
from tests.bed import CommandError, Machine, eventually
from tests.bed.tree import ssh_key

CONFIGURATION: Final = """
[sssd]
services = nss, pam
domains = example

[domain/example]
id_provider = proxy
proxy_lib_name = extrausers
auth_provider = none
entry_cache_timeout = 600
"""
USERS: Final = {"sara": 1234567890, "siri": 1234567891}
CALL: Final = ("busctl", "call", "org.polytmp1", "/org/polytmp1", "org.polytmp1.Manager", "AcquireNamespace")
CONF: Final = "/etc/polytmpd.conf.d/sssd.conf"


def prepare(root: Path) -> None:
    observe.quick_logouts(root)
    lines = [f"{name}:x:{uid}:100::/home/{uid}:/bin/bash\n" for name, uid in USERS.items()]
    observe.write(root, "var/lib/extrausers/passwd", "".join(lines))
    observe.write(root, "var/lib/extrausers/group", "staff-of-dom:x:7000:siri\n")
    observe.write(root, "var/lib/extrausers/shadow", "")
    observe.write(root, "etc/sssd/sssd.conf", CONFIGURATION)
    (root / "etc/sssd/sssd.conf").chmod(0o600)
    key = ssh_key().with_suffix(".pub").read_text()
    for uid in USERS.values():
        observe.write(root, f"home/{uid}/.ssh/authorized_keys", key)


pytestmark = [pytest.mark.e2e, pytest.mark.prepared(by=prepare)]


@pytest.fixture(scope="module", autouse=True)
def sssd(machine: Machine) -> None:
    assert machine.run("getent", "passwd", "sara", check=False).returncode
    machine.install_kept("sssd")
    machine.run("systemctl", "restart", "sssd")
    for uid in USERS.values():
        machine.run("chown", "-R", f"{uid}:100", f"/home/{uid}")
    eventually(lambda: machine.run("getent", "passwd", "sara").stdout, 30, "SSSD answers")


@pytest.fixture
def restored(machine: Machine) -> Iterator[None]:
    """SSSD answers again after the test."""
    yield
    machine.run("systemctl", "restart", "sssd")
    eventually(lambda: machine.run("id", "sara").stdout, 30, "SSSD answers")


def view(machine: Machine, user: str) -> str:
    """What a login over ssh gets: "private", "shared" or "refused"."""
    machine.run("touch", "/tmp/of-the-host")
    line = f"{observe.NAMESPACE}; test -e /tmp/of-the-host && echo shared || echo private"
    done = machine.ssh(user, line, check=False)
    if not done.stdout:
        return "refused"
    namespace, seen = done.stdout.split()
    host = machine.run("readlink", "/proc/1/ns/mnt").stdout.strip()
    assert (namespace == host) == (seen == "shared")
    return seen


def test_a_user_whom_only_sssd_knows(machine: Machine) -> None:
    host = machine.run("readlink", "/proc/1/ns/mnt").stdout
    assert machine.run("grep", "-r", "sara:x:", "/etc", check=False).stdout == ""
    assert machine.run("grep", "extrausers", "/etc/nsswitch.conf", check=False).stdout == ""
    with machine.session("sara") as sara:
        namespace = sara.run(observe.NAMESPACE)
        assert namespace != host
        assert sara.run("id -u").split() == ["1234567890"]
        assert sara.run("touch /tmp/x /var/tmp/x; ls /tmp").split() == ["x"]
        assert observe.state(machine, "sara") == "active"
        assert observe.directories(machine, "sara")["/var/tmp"] == "/var/tmp/polytmp-1234567890/tmp"
        assert machine.ssh("sara", observe.NAMESPACE).stdout == namespace
        assert machine.run("su", "-", "sara", "-c", observe.NAMESPACE).stdout == namespace
        assert view(machine, "siri") == "private"
    eventually(lambda: observe.gone(machine, "sara"), 30, "sara's instance is gone")
    assert machine.ssh("sara", "ls /var/tmp").stdout == "x\n", "kept between logins"


def test_exempt_members_are_listed_before_they_log_in(machine: Machine) -> None:
    machine.write(CONF, "[Polytmp]\nExemptGroups=staff-of-dom\n")
    machine.run("systemctl", "reload", "polytmpd")
    try:
        done = machine.run("polytmpctl", "check", "--json=short", check=False)
        (found,) = [entry for entry in json.loads(done.stdout)["results"] if entry["name"] == "exempt users"]
        assert "siri (1234567891): group staff-of-dom is exempt" in found["text"]
        assert "sara" not in found["text"]
        assert view(machine, "siri") == "shared"
        assert view(machine, "sara") == "private"
    finally:
        machine.sh(f"rm {CONF}; systemctl reload polytmpd")


@pytest.mark.usefixtures("restored")
def test_while_sssd_is_down(machine: Machine) -> None:
    """Whether someone may log in is SSSD's decision. A session that is there keeps its directories."""
    with machine.session("sara") as sara:
        sara.run("echo mark >/tmp/mark")
        machine.run("systemctl", "stop", "sssd")
        assert view(machine, "sara") in {"private", "refused"}, "libnss_sss has a cache of its own"
        machine.sh("rm -f /var/lib/sss/mc/*")
        assert machine.run("getent", "passwd", "sara", check=False).stdout == ""
        assert view(machine, "sara") == "refused"
        assert view(machine, "siri") == "refused"
        machine.run("systemctl", "restart", "polytmpd")  # it has mapped the cache
        with pytest.raises(CommandError, match="there is no user with UID 1234567891"):
            machine.run(*CALL, "u", str(USERS["siri"]))
        assert view(machine, "alice") == "private"
        assert observe.state(machine, "sara") == "active"
        assert sara.run("cat /tmp/mark") == "mark\n"
        eventually(lambda: observe.state(machine, "sara") == "active", 20, "sara is still there")
        [path] = [path for path in observe.on_disk(machine) if "-1234567890-" in path]
    eventually(lambda: path not in observe.on_disk(machine), 30, "her directory is gone")


@pytest.fixture
def holding(machine: Machine) -> Iterator[None]:
    """siri has logged out, and a service is left in her directories."""
    with machine.session("siri") as siri:
        argv = ["nsenter", f"--mount=/proc/{siri.pid}/ns/mnt", "sleep", "infinity"]
        machine.run("systemd-run", "--quiet", "--unit=holding", *argv)
        eventually(lambda: observe.processes(machine, "sleep infinity"), what="it is there")
    eventually(lambda: observe.held(machine) == [], 30, "polytmpd has released her namespace")
    assert observe.state(machine, "siri") == "draining"
    yield
    machine.run("systemctl", "stop", "holding")


@pytest.mark.usefixtures("holding", "restored")
def test_while_sssd_hangs(machine: Machine) -> None:
    """Others are served, however many wait. Who is to join what lives may be another user by now."""
    machine.sh("pkill -STOP -x sssd_nss; rm -f /var/lib/sss/mc/*; systemctl restart polytmpd")
    try:
        hanging = [machine.popen(*CALL, "u", str(USERS["sara"])) for _ in range(10)]
        assert machine.run(*CALL, "u", "1001", timeout=9).stdout.startswith("h ")
        assert machine.run("polytmpctl", "list", timeout=9).returncode == 0
        hanging.append(machine.popen(*CALL, "u", str(USERS["siri"])))
        for uid, process in zip([1234567890] * 10 + [1234567891], hanging, strict=True):
            _, error = process.communicate(timeout=40)
            assert f"failed to look up the name of UID {uid} within 10 s".encode() in error
    finally:
        machine.sh("pkill -CONT -x sssd_nss")
    assert view(machine, "sara") == "private"
    assert view(machine, "siri") == "private"


def test_check_has_nothing_to_say(machine: Machine) -> None:
    """pam_sss opens its session without a file in /tmp."""
    done = machine.run("polytmpctl", "check", "--json=short", check=False)
    found = json.loads(done.stdout)["results"]
    assert [entry for entry in found if entry["verdict"] == "fail"] == []
    assert [entry for entry in found if "sss" in entry["text"]] == []

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon is stopped, or input makes no sense: errors are clear, nothing is created, the daemon stays up.

Not here: attacks (test_attacks*), faults (test_faults*).
"""

import json
from collections.abc import Iterator

import pytest

from tests import observe
from tests.bed import CommandError, Machine, eventually

pytestmark = pytest.mark.e2e

CALL = ("busctl", "call", "org.polytmp1", "/org/polytmp1", "org.polytmp1.Manager")


@pytest.fixture
def stopped(machine: Machine) -> Iterator[None]:
    """polytmpd is stopped and masked. Otherwise a login would start it, which has its own test."""
    observe.log_everybody_out(machine)
    machine.run("systemctl", "mask", "--runtime", "--now", "polytmpd")
    yield
    machine.run("systemctl", "unmask", "--runtime", "polytmpd")
    machine.run("systemctl", "start", "polytmpd")


def test_without_the_daemon_a_regular_user_is_refused(machine: Machine, stopped: None) -> None:
    """The profile as shipped: `required` refuses."""
    result = machine.ssh("alice", "echo in", check=False)
    assert result.returncode != 0
    assert "in" not in result.stdout.splitlines()
    assert "polytmp" in result.stdout + result.stderr
    lines = [line for line in machine.journal().splitlines() if "pam_polytmp" in line]
    assert any("alice" in line or "1001" in line for line in lines), lines


@pytest.mark.parametrize(
    "command",
    ["sudo -iu bob touch /tmp/by-bob", "sudo su - bob -c 'touch /tmp/by-bob'"],
    ids=["sudo", "su"],
)
def test_without_the_daemon_nobody_becomes_somebody_else(machine: Machine, command: str) -> None:
    """sudo goes on after PAM_SESSION_ERR: bob would work in the caller's /tmp."""
    observe.log_everybody_out(machine)
    with machine.session("alice") as alice:
        machine.run("systemctl", "mask", "--runtime", "--now", "polytmpd")
        try:
            result = alice.result(command, check=False)
            assert result.returncode != 0
            assert "pam_open_session" in result.stderr or "polytmp" in result.stderr, result.stderr
            assert alice.result("ls /tmp/by-bob", check=False).returncode != 0
        finally:
            machine.run("systemctl", "unmask", "--runtime", "polytmpd")
            machine.run("systemctl", "start", "polytmpd")


def test_without_the_daemon_root_and_system_users_log_in(machine: Machine, stopped: None) -> None:
    assert machine.ssh("root", "echo in").stdout.strip() == "in"
    assert machine.ssh("svc", "echo in").stdout.strip() == "in"


def test_the_control_flag_decides(machine: Machine, stopped: None) -> None:
    machine.sh("sed -i 's/required\\(.*pam_polytmp\\)/optional\\1/' /etc/pam.d/common-session*")
    try:
        assert machine.ssh("alice", "echo in; ls /tmp").stdout.split()[0] == "in"
    finally:
        machine.sh("sed -i 's/optional\\(.*pam_polytmp\\)/required\\1/' /etc/pam.d/common-session*")
        observe_off = machine.sh("loginctl terminate-user alice; true", check=False)
        assert observe_off.returncode == 0


def test_who_waits_for_a_daemon_that_does_not_start(machine: Machine) -> None:
    """With timeout=600, who waits for it does not come in time: neither root nor system users do."""
    machine.sh("sed -i 's/pam_polytmp.so/& timeout=600/' /etc/pam.d/common-session*")
    unit = "/run/systemd/system/polytmpd.service.d/x.conf"
    machine.write(unit, "[Service]\nExecStart=\nExecStart=/bin/false\n")
    machine.sh("systemctl daemon-reload; systemctl --no-block restart polytmpd")
    try:
        alice = machine.popen("su", "-", "alice", "-c", observe.NAMESPACE)
        for user in ("root", "svc"):
            assert machine.run("su", "-", user, "-c", "echo in").stdout == "in\n"
        assert machine.ssh("svc", "echo in").stdout == "in\n"
        assert alice.poll() is None
        machine.sh(f"rm {unit}; systemctl daemon-reload; systemctl restart polytmpd")
        out, _ = alice.communicate(timeout=60)
        assert out.decode().startswith("mnt:[")
        assert out.decode() != machine.run("readlink", "/proc/1/ns/mnt").stdout
    finally:
        machine.sh(
            f"rm -f {unit}; sed -i 's/ timeout=600//' /etc/pam.d/common-session*; systemctl daemon-reload; "
            "systemctl restart polytmpd"
        )


@pytest.mark.parametrize(
    "unit",
    [
        None,
        "[Unit]\nRequires=broken.service\nAfter=broken.service\n",
        "[Unit]\nRequires=missing.service\n",
        "[Unit]\nConditionPathExists=/nosuch\n",
    ],
    ids=["masked", "broken", "missing", "condition"],
)
def test_nobody_waits_for_a_daemon_that_systemd_does_not_start(machine: Machine, unit: str | None) -> None:
    """systemd gives up, and closes the socket. To start the service repairs it."""
    machine.sh("sed -i 's/pam_polytmp.so/& timeout=600/' /etc/pam.d/common-session*")
    place = "/run/systemd/system/polytmpd.service.d/x.conf"
    machine.write("/run/systemd/system/broken.service", "[Service]\nType=oneshot\nExecStart=/bin/false\n")
    if unit is None:
        machine.sh("systemctl mask --runtime --now polytmpd")
    else:
        machine.write(place, unit)
        machine.sh("systemctl daemon-reload; systemctl stop polytmpd")
    try:
        for _ in range(2):
            done = machine.run("su", "-", "alice", "-c", "echo in", check=False)
            assert (done.returncode != 0, done.stdout) == (True, "")
            assert "polytmpd cannot be reached: Connection refused" in done.stderr
        assert machine.run("su", "-", "svc", "-c", "echo in").stdout == "in\n"
        failed = json.loads(machine.run("polytmpctl", "check", "--json=short", check=False).stdout)[
            "results"
        ]
        assert "polytmpd.service" in [entry["name"] for entry in failed if entry["verdict"] == "fail"]
    finally:
        machine.sh(
            f"systemctl unmask --runtime polytmpd; rm -f {place} /run/systemd/system/broken.service; "
            "sed -i 's/ timeout=600//' /etc/pam.d/common-session*; systemctl daemon-reload; "
            "systemctl start polytmpd"
        )
    assert machine.run("systemctl", "is-active", "polytmpd.socket").stdout == "active\n"
    assert machine.run("su", "-", "alice", "-c", "echo in").stdout == "in\n"


def test_a_login_starts_a_daemon_that_was_stopped(machine: Machine) -> None:
    observe.log_everybody_out(machine)
    machine.run("systemctl", "stop", "polytmpd")
    assert machine.ssh("alice", "touch /tmp/x; ls /tmp").stdout.split() == ["x"]
    assert machine.run("systemctl", "is-active", "polytmpd").stdout.strip() == "active"


def test_a_uid_that_does_not_exist(machine: Machine) -> None:
    with pytest.raises(CommandError, match="there is no user with UID 4242"):
        machine.run(*CALL, "AcquireNamespace", "u", "4242")
    assert not [path for path in observe.on_disk(machine) if "-4242-" in path]
    with pytest.raises(CommandError, match="UID 4242 has no instance"):
        machine.run(*CALL, "GetInstance", "u", "4242")


def test_exempt_users(machine: Machine) -> None:
    for uid in ("0", "1", "65534", "4294967295"):
        with pytest.raises(CommandError, match=r"root is never moved|below UID_MIN|stands for nobody"):
            machine.run(*CALL, "AcquireNamespace", "u", uid)


def test_unprivileged_callers_are_refused(machine: Machine) -> None:
    with machine.session("bob") as bob, machine.session("alice"):
        for call in (
            "AcquireNamespace u 1001",
            "AcquireNamespace u 1002",
            "RemoveInstance u 1001",
            "Reload",
        ):
            result = bob.result(f"{' '.join(CALL)} {call}", check=False)
            assert result.returncode != 0, call
            assert "denied" in result.stderr.lower() or "only root may call" in result.stderr, result.stderr
        other = bob.result(
            "busctl get-property org.polytmp1 /org/polytmp1/instance/_1001 org.polytmp1.Instance "
            "Directories",
            check=False,
        )
        assert other.returncode != 0
        own = bob.run(
            "busctl get-property org.polytmp1 /org/polytmp1/instance/_1002 org.polytmp1.Instance Directories"
        )
        assert "/tmp/polytmp-" in own


@pytest.mark.parametrize(
    "squatter",
    [
        "touch {0}",
        "ln -s /etc {0}",
        "mkdir -m 0755 {0}",
        "install -d -m 0700 -o svc {0}",
        "mkfifo {0}",
    ],
)
def test_an_instance_path_that_exists_already(machine: Machine, squatter: str) -> None:
    """Another user has made it: it is never adopted, and the login follows the control flag."""
    observe.log_everybody_out(machine)
    path = "/var/tmp/polytmp-1001"
    machine.sh(f"rm -rf {path}; {squatter.format(path)}")
    before = machine.sh(f"stat -c '%F %a %u %i' {path}; ls -la /etc | md5sum").stdout
    try:
        result = machine.ssh("alice", "echo in", check=False)
        assert result.returncode != 0
        assert machine.sh(f"stat -c '%F %a %u %i' {path}; ls -la /etc | md5sum").stdout == before
        assert not [found for found in observe.on_disk(machine) if "-1001-" in found]
        lines = machine.journal("-u", "polytmpd", "-n", "5").splitlines()
        assert [line for line in lines if path in line and "Failed to make private directories" in line]
    finally:
        machine.sh(f"rm -rf {path}")
    assert machine.ssh("alice", "touch /var/tmp/x; ls /var/tmp").stdout.split() == ["x"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Directories=/tmp\n", "Assignment outside of a section"),
        ("[Polytmp]\nDirectories=tmp\n", "not an absolute path"),
        ("[Polytmp]\nFoo=bar\n", "Unknown setting Foo="),
        ("[Nonsense]\nFoo=bar\n", "Unknown section"),
        ("[Polytmp]\nDirectories=\n", "names no directory"),
    ],
)
def test_a_configuration_that_makes_no_sense(machine: Machine, text: str, named: str) -> None:
    """A reload refuses it and changes nothing; a start reports it and uses the settings that make sense."""
    machine.write("/etc/polytmpd.conf.d/bad.conf", text)
    try:
        with pytest.raises(CommandError):
            machine.run("systemctl", "reload", "polytmpd")
        with pytest.raises(CommandError, match=r"bad\.conf"):
            machine.run(*CALL, "Reload")
        begin = machine.now()
        machine.run("systemctl", "restart", "polytmpd")
        lines = machine.journal("-u", "polytmpd", f"--since={begin}")
        assert named in lines
        assert "/etc/polytmpd.conf.d/bad.conf" in lines
        assert machine.ssh("alice", "touch /tmp/x; ls /tmp").stdout.split() == ["x"]
    finally:
        machine.run("rm", "-f", "/etc/polytmpd.conf.d/bad.conf")
        machine.run("systemctl", "reload", "polytmpd")
        observe.log_everybody_out(machine)


def test_the_configuration_is_followed(machine: Machine) -> None:
    observe.log_everybody_out(machine)
    machine.write("/etc/polytmpd.conf.d/test.conf", "[Polytmp]\nDirectories=/tmp\nExemptUsers=bob\n")
    try:
        machine.run("systemctl", "reload", "polytmpd")
        with machine.session("alice") as alice, machine.session("bob") as bob:
            assert [entry["directory"] for entry in observe.status(machine, "alice")["directories"]] == [
                "/tmp"
            ]
            alice.run("touch /var/tmp/public /tmp/private")
            assert (
                bob.run(observe.NAMESPACE).strip()
                == machine.run("readlink", "/proc/1/ns/mnt").stdout.strip()
            )
            assert "public" in bob.run("ls /var/tmp").split()
            assert "private" not in bob.run("ls /tmp").split()
            alice.run("rm /var/tmp/public")
        assert "bob" not in observe.instances(machine)
    finally:
        machine.run("rm", "/etc/polytmpd.conf.d/test.conf")
        machine.run("systemctl", "reload", "polytmpd")


def test_logind_and_the_bus_restart_with_users_logged_in(machine: Machine) -> None:
    with machine.session("alice") as alice:
        alice.run("echo kept > /tmp/kept")
        namespace = alice.run(observe.NAMESPACE)
        machine.run("systemctl", "restart", "systemd-logind")
        eventually(lambda: observe.state(machine, "alice") == "active", what="active after logind's restart")
        machine.run("systemctl", "restart", "dbus")
        # systemd needs a moment to find the new bus; meanwhile, activating polytmpd hangs for 25 s.
        eventually(lambda: observe.state(machine, "alice") == "active", 60, "active after the bus's restart")
        machine.run("systemctl", "restart", "systemd-logind")
        eventually(
            lambda: machine.ssh("alice", "cat /tmp/kept").stdout.strip() == "kept",
            60,
            "the next login joins",
        )
        assert machine.ssh("alice", observe.NAMESPACE).stdout == namespace
    eventually(lambda: observe.state(machine, "alice") is None, 60, "it ends as usual")

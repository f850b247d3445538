# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that are not Python: units, tmpfiles.d, D-Bus and polkit XML, maintainer scripts.

Each goes through the checker that its own project ships. A missing tool is a failure, not a skip:
`make setup` installs them all.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import polytmpd
from polytmpd import login

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
POLKIT_DTD = Path("/usr/share/polkit-1/policyconfig-1.dtd")

# Unknown to Debian 12's systemd (252), which logs this and continues.
NEWER_THAN_252 = {"FileDescriptorStorePreserve": 254}

ANYBODY = {
    "org.freedesktop.DBus.Introspectable",
    "org.freedesktop.DBus.Peer",
    "org.freedesktop.DBus.ObjectManager.GetManagedObjects",
    "org.freedesktop.DBus.Properties.Get",
    "org.freedesktop.DBus.Properties.GetAll",
    "org.polytmp1.Manager.GetInstance",
    "org.polytmp1.Manager.GetInstanceByPID",
    "org.polytmp1.Manager.ListInstances",
    "org.polytmp1.Manager.ListInstancesEx",
    "org.polytmp1.Manager.ResolvePath",
    "org.polytmp1.Manager.RemoveInstance",
    "org.polytmp1.Manager.RemoveInstanceWithFlags",
    "org.polytmp1.Manager.GetUserUsage",
    "org.polytmp1.Manager.GetRemovalProgress",
    "org.polytmp1.Manager.Reload",
    "org.polytmp1.Instance.ListHolders",
    "org.polytmp1.Instance.ListProcesses",
    "org.polytmp1.Instance.GetUsage",
}
ROOT_ONLY = {"org.polytmp1.Manager.AcquireNamespace"}


def run(*argv: str | Path, check: bool = True) -> "subprocess.CompletedProcess[str]":
    tool = shutil.which(str(argv[0]))
    assert tool, f"{argv[0]} is not installed: make setup"
    done = subprocess.run(
        [tool, *map(str, argv[1:])], capture_output=True, text=True, check=False, timeout=50
    )
    assert not check or done.returncode == 0, (
        f"{argv}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done


def systemd_version() -> int:
    return int(run("systemd-analyze", "--version").stdout.split()[1])


def unit() -> str:
    return (ROOT / "units/polytmpd.service").read_text()


def test_unit_is_valid(tmp_path: Path) -> None:
    # the program may not be installed on this machine
    text = re.sub(r"(?m)^ExecStart=.*", "ExecStart=/bin/true", unit())
    version = systemd_version()
    for key, since in NEWER_THAN_252.items():
        if version < since:
            text = re.sub(rf"(?m)^{key}=.*\n", "", text)
    copy, socket = tmp_path / "polytmpd.service", tmp_path / "polytmpd.socket"
    copy.write_text(text)
    shutil.copy(ROOT / "units/polytmpd.socket", socket)
    done = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", copy, socket)
    assert done.stderr == ""


def test_the_module_and_the_socket_unit_name_the_same_socket() -> None:
    text = (ROOT / "units/polytmpd.socket").read_text()
    source = (ROOT / "pam/polytmpd.c").read_text()
    path = re.search(r'(?m)^#define SOCKET_PATH "(.*)"$', source)
    assert path
    settings = set(text.splitlines())
    assert {f"ListenSequentialPacket={path[1]}", f"FileDescriptorName={login.NAME}"} <= settings
    assert {"SocketMode=0600", "DirectoryMode=0700"} <= settings
    assert path[1] in (login.__doc__ or "")
    assert "Sockets=polytmpd.socket\n" in unit()


def test_sandbox_stays_tight() -> None:
    """Without the mounts, which systemd-analyze cannot see: tests/kernel/test_confinement.py."""
    done = run(
        "systemd-analyze", "security", "--offline=true", "--threshold=45", ROOT / "units/polytmpd.service"
    )
    assert "exposure level" in done.stdout


def test_systemd_makes_no_mount_namespace_for_the_daemon() -> None:
    """With 9,000 instances that takes 16 s, see polytmpd/kernel/confinement.py."""
    settings = (
        r"Protect(System|Home|Control|Kernel|Proc)|Private(Tmp|Devices|Mounts|IPC)|ProcSubset|Root|Mount"
        r"|Bind|TemporaryFileSystem|(ReadOnly|ReadWrite|Inaccessible|Exec|NoExec)Paths|DynamicUser"
    )
    assert not re.findall(rf"(?m)^({settings})\w*=", unit())


def test_unit_starts_what_is_installed() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "ExecStart=/usr/libexec/polytmpd\n" in unit()
    assert "LIBEXECDIR ?= $(PREFIX)/libexec\n" in makefile


def test_activation_starts_the_unit() -> None:
    lines = (ROOT / "units/org.polytmp1.service").read_text().splitlines()
    assert {"[D-BUS Service]", "Name=org.polytmp1", "SystemdService=polytmpd.service", "User=root"} <= set(
        lines
    )


def test_tmpfiles_keeps_instances_and_ages_contents(tmp_path: Path) -> None:
    """With "age 0" the cleaner deletes everything that no line protects."""
    config = tmp_path / "usr/lib/tmpfiles.d"
    config.mkdir(parents=True)
    (config / "tmp.conf").write_text("q /tmp 1777 - - 0\nq /var/tmp 1777 - - 0\n")
    shutil.copy(ROOT / "units/polytmp.conf", config)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    (tmp_path / "etc").mkdir()
    kept = [f"tmp/polytmp-{boot_id}-1000-abc/tmp/.X11-unix", "var/tmp/polytmp-1000/tmp"]
    aged = [f"tmp/polytmp-{boot_id}-1000-abc/tmp/file", "var/tmp/polytmp-1000/tmp/directory/file"]
    for path in kept:
        (tmp_path / path).mkdir(parents=True)
    for path in aged:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()

    run("systemd-tmpfiles", "--clean", f"--root={tmp_path}")
    assert [path for path in kept if not (tmp_path / path).is_dir()] == []
    assert [path for path in aged if (tmp_path / path).exists()] == []

    run("systemd-tmpfiles", "--remove", "--boot", f"--root={tmp_path}")
    assert [path for path in kept if not (tmp_path / path).is_dir()] == [], (
        "polytmpd removes what is left over"
    )


@pytest.mark.parametrize("name", ["org.polytmp1.conf", "org.polytmp1.policy"])
def test_xml_is_well_formed(name: str) -> None:
    run("xmllint", "--noout", "--nonet", ROOT / "dbus-policy" / name)


def test_polkit_actions_are_valid() -> None:
    assert POLKIT_DTD.exists(), "polkitd is not installed: make setup"
    run("xmllint", "--noout", "--nonet", "--dtdvalid", POLKIT_DTD, ROOT / "dbus-policy/org.polytmp1.policy")


def bus_rules(policy: str) -> list[dict[str, str]]:
    xml = re.sub(r"(?s)<!--.*?-->", "", (ROOT / "dbus-policy/org.polytmp1.conf").read_text())
    body = re.search(rf'(?s)<policy {policy}">(.*?)</policy>', xml)
    assert body
    return [
        {"": rule, **dict(re.findall(r'(\w+)="([^"]*)"', attributes))}
        for rule, attributes in re.findall(r"<(allow|deny)\s([^>]*)/>", body[1])
    ]


def may_call(rules: list[dict[str, str]]) -> set[str]:
    calls = [rule for rule in rules if rule[""] == "allow" and "send_destination" in rule]
    assert all(rule["send_type"] == "method_call" for rule in calls)
    return {
        ".".join(rule[key] for key in ("send_interface", "send_member") if key in rule) for rule in calls
    }


def test_bus_policy_allows_what_the_contract_says() -> None:
    everybody, root = bus_rules('context="default'), bus_rules('user="root')
    name = {"send_destination": "org.polytmp1"}
    assert everybody[:3] == [
        {"": "deny", "own": "org.polytmp1"},
        {"": "deny", **name, "send_type": "method_call"},
        {"": "deny", **name, "send_type": "signal", "send_broadcast": "false"},
    ]
    assert may_call(everybody) == ANYBODY
    assert {"": "allow", "own": "org.polytmp1"} in root
    assert may_call(root) == ROOT_ONLY


@pytest.mark.parametrize("name", ["postinst", "prerm", "postrm"])
def test_maintainer_script(name: str) -> None:
    path = ROOT / f"debian/polytmp.{name}"
    run("shellcheck", path)
    assert "\n#DEBHELPER#\n" in path.read_text()


def test_pam_is_enabled_after_the_start_and_disabled_before_the_stop() -> None:
    postinst, prerm = ((ROOT / f"debian/polytmp.{name}").read_text() for name in ("postinst", "prerm"))
    assert postinst.index("#DEBHELPER#") < postinst.index("pam-auth-update --package\n")
    assert prerm.index("pam-auth-update --package --remove polytmp") < prerm.index("#DEBHELPER#")


def test_package_has_the_version_of_the_program() -> None:
    first = (ROOT / "debian/changelog").read_text().splitlines()[0]
    assert first.startswith(f"polytmp ({polytmpd.__version__}) ")

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check finds in the units of services that open sessions, and in what sshd says of itself."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from polytmpd.ctl import sshd, units
from tests.unit.test_ctl_check import make

pytestmark = pytest.mark.unit

# Units

SOUND: dict[str, Any] = {
    "ActiveState": "active",
    "CapabilityBoundingSet": 2**41 - 1,
    "RestrictNamespaces": 2**64 - 1,
    "SystemCallFilter": [False, []],
    "ProtectProc": "default",
    "ProcSubset": "all",
}


@pytest.mark.parametrize(
    ("changes", "verdict", "text"),
    [
        ({}, "pass", "in the host's mount namespace"),
        ({"PrivateTmp": True}, "fail", "(PrivateTmp=)"),
        ({"PrivateTmp": "yes"}, "fail", "(PrivateTmp=)"),
        ({"ProtectProc": "invisible"}, "fail", "(ProtectProc=)"),
        ({"CapabilityBoundingSet": 2**41 - 1 - 2**21}, "fail", "lacks CAP_SYS_ADMIN"),
        ({"RestrictNamespaces": 0}, "fail", "RestrictNamespaces= forbids mnt"),
        ({"RestrictNamespaces": 0x20000}, "pass", ""),
        ({"SystemCallFilter": [False, ["setns:EPERM", "reboot"]]}, "fail", "forbids setns"),
        ({"SystemCallFilter": [False, ["reboot"]]}, "pass", ""),
        ({"SystemCallFilter": [True, ["setns", "read"]]}, "fail", "forbids unshare"),
        ({"SystemCallFilter": [True, ["setns", "unshare"]]}, "pass", ""),
    ],
)
def test_a_unit(changes: dict[str, Any], verdict: str, text: str) -> None:
    found = units._judge("x.service", SOUND | changes)
    assert found is not None
    assert found.verdict == verdict
    assert text in found.text
    assert bool(found.remedy) == (found.verdict != "pass")


def test_services_that_have_loaded_libpam(tmp_path: Path) -> None:
    """As of dovecot, whose unit has PrivateTmp=yes; not of logind, of containers or of users."""
    for pid, (mnt, pids, program, group, library) in enumerate(
        [
            ("1", "1", "/usr/lib/systemd/systemd", "/init.scope", "libpam"),
            ("2", "1", "/usr/lib/dovecot/auth", "/system.slice/dovecot.service", "libpam"),
            ("2", "1", "/usr/lib/dovecot/imap", "/system.slice/other.service", "libc"),
            ("3", "1", "/usr/lib/systemd/systemd-logind", "/system.slice/systemd-logind.service", "libpam"),
            ("4", "2", "/usr/sbin/sshd", "/system.slice/box.service", "libpam"),
            ("5", "1", "/usr/bin/sudo", "/user.slice/user-1001.slice/user@1001.service", "libpam"),
            ("1", "1", "/usr/sbin/cron", "/system.slice/cron.service", "libpam"),
        ],
        1,
    ):
        proc = f"proc/{pid}"
        maps = f"7f0-7f1 r-xp 0 0:1 1 /usr/lib/x/{library}.so.0\n"
        make(tmp_path, {f"{proc}/cgroup": f"0::{group}\n", f"{proc}/maps": maps, f"{proc}/ns/x": ""})
        for name, target in (("ns/mnt", f"mnt:[{mnt}]"), ("ns/pid", f"pid:[{pids}]"), ("exe", program)):
            (tmp_path / proc / name).symlink_to(target)
    assert units._with_libpam(tmp_path) == {"dovecot.service"}


# sshd

asked: list[list[str]] = []


def sshd_with(root: Path, answer: str, files: "dict[str, str] | None" = None, title: str = "") -> sshd.Sshd:
    make(root, {"usr/sbin/sshd": "", "proc/7/cmdline": title, **(files or {})})
    asked.clear()

    def run(argv: Sequence[str]) -> tuple[int, str, str]:
        asked.append(list(argv))
        return (
            (1, "", "x\nMissing privilege separation directory\n") if answer == "fails" else (0, answer, "")
        )

    return sshd.judge(root, "ada", is_root=True, run=run)


@pytest.mark.parametrize(
    ("answer", "files", "verdict", "services"),
    [
        ("usepam yes\n", {}, "pass", ("sshd",)),
        ("usepam no\n", {}, "fail", ()),
        ("port 22\n", {}, "fail", ()),
        ("fails", {}, "fail", ()),
        ("usepam yes\npamservicename bastion\n", {}, "pass", ("bastion",)),
        (
            "usepam yes\n",
            {"etc/ssh/sshd_config": "Match User x\n  PAMServiceName other-one\n#PAMServiceName y\n"},
            "pass",
            ("sshd", "other-one"),
        ),
        ("usepam yes\n", {"etc/ssh/sshd_config.d/x.conf": "pamservicename=two\n"}, "pass", ("sshd", "two")),
    ],
)
def test_sshd(
    tmp_path: Path, answer: str, files: dict[str, str], verdict: str, services: tuple[str, ...]
) -> None:
    found = sshd_with(tmp_path, answer, files)
    assert found.services == services
    assert [result.verdict for result in found.results] == [verdict]
    assert all(result.remedy for result in found.results if result.verdict != "pass")
    assert asked == [["/usr/sbin/sshd", "-T", "-C", "user=ada,host=localhost,addr=127.0.0.1"]]


def test_sshd_is_asked_with_the_options_of_the_one_that_runs(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: the title of another user's process counts for nothing")
    title = "sshd: /usr/sbin/sshd -D -o UsePAM=no -f /etc/x -o Port 22 [listener] 0 of 10-100 startups\0"
    found = sshd_with(tmp_path, "usepam no\n", {"proc/8/cmdline": "sshd: alice [priv]\0"}, title)
    assert asked[0][:7] == ["/usr/sbin/sshd", "-o", "UsePAM=no", "-f", "/etc/x", "-o", "Port 22"]
    assert "UsePAM=no" in found.results[0].remedy


def test_no_sshd(tmp_path: Path) -> None:
    assert sshd.judge(tmp_path, "ada", is_root=True) == sshd.Sshd()

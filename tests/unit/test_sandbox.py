# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which units need the host's directories, and which unit a cgroup belongs to."""

from typing import Any

import pytest

from polytmpd.core import sandbox

pytestmark = pytest.mark.unit

DIRECTORIES = ("/tmp", "/var/tmp")


@pytest.mark.parametrize(
    ("properties", "found"),
    [
        ({}, []),
        ({"PrivateTmp": False, "WorkingDirectory": "", "RootDirectory": "", "BindPaths": []}, []),
        ({"PrivateTmp": True}, ["PrivateTmp=yes"]),
        ({"WorkingDirectory": "/tmp"}, []),
        ({"WorkingDirectory": "/tmp/"}, []),
        ({"WorkingDirectory": "/tmpx/y"}, []),
        ({"WorkingDirectory": "~"}, []),
        ({"WorkingDirectory": "/tmp/x"}, ["WorkingDirectory=/tmp/x"]),
        ({"WorkingDirectory": "!/tmp/x"}, ["WorkingDirectory=/tmp/x"]),
        ({"WorkingDirectory": "//tmp//x"}, ["WorkingDirectory=//tmp//x"]),
        ({"RootDirectory": "/var/tmp/root"}, ["RootDirectory=/var/tmp/root"]),
        ({"RootImage": "/tmp/image.raw"}, ["RootImage=/tmp/image.raw"]),
        (
            {"ReadWritePaths": ["/srv", "-/tmp/x", "/tmp", "+/var/tmp/y", "-+/tmp/z"]},
            ["ReadWritePaths=/tmp/x", "ReadWritePaths=/var/tmp/y", "ReadWritePaths=/tmp/z"],
        ),
        ({"InaccessiblePaths": ["-/tmp/x"]}, ["InaccessiblePaths=/tmp/x"]),
        ({"BindPaths": [["/tmp/x", "/mnt", False, 0]]}, ["BindPaths=/tmp/x"]),
        ({"BindReadOnlyPaths": [["/srv", "/tmp/x", True, 0]]}, ["BindReadOnlyPaths=/tmp/x"]),
        ({"BindPaths": [["/srv", "/mnt", False, 0]]}, []),
        ({"TemporaryFileSystem": [["/tmp", "mode=1777"]]}, []),
        ({"TemporaryFileSystem": [["/tmp/x", "/tmp/option"]]}, ["TemporaryFileSystem=/tmp/x"]),
        ({"MountImages": [["/tmp/i", "/mnt", False, []]]}, ["MountImages=/tmp/i"]),
        ({"ExecStart": [["/tmp/run", ["/tmp/run", "/tmp/x"], False]]}, ["ExecStart=/tmp/run"]),
        ({"ExecStart": [["/usr/bin/x", ["x", "/tmp/x"], False]]}, []),
        (
            {"ExecStartPre": [["/tmp/run", [], False], ["/tmp/run", [], False]]},
            ["ExecStartPre=/tmp/run"],
        ),
    ],
    ids=str,
)
def test_what_needs_the_hosts_directories(properties: dict[str, Any], found: list[str]) -> None:
    assert sandbox.conflicts(properties, DIRECTORIES) == found


def test_only_private_directories_count() -> None:
    unit = {"WorkingDirectory": "/var/tmp/x", "ReadWritePaths": ["/scratch/x"]}
    assert sandbox.conflicts(unit, ["/tmp"]) == []
    assert sandbox.conflicts(unit, ["/scratch/"]) == ["ReadWritePaths=/scratch/x"]


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/cron.service\n", "cron.service"),
        ("0::/system.slice/system-getty.slice/getty@tty1.service\n", "getty@tty1.service"),
        ("0::/system.slice/x.service/user@0.service\n", "x.service"),
        ("0::/user.slice/user-1001.slice/session-4.scope\n", "session-4.scope"),
        ("0::/user.slice/user-1001.slice/user@1001.service/app.slice/x.service\n", "user@1001.service"),
        ("0::/user.slice/user-1001.slice/user@1001.service/init.scope\n", "user@1001.service"),
        ("0::/system.slice/_cgroup.service\n", "cgroup.service"),
        ("12:cpu:/x.service\n1:name=systemd:/system.slice/y.service\n0::/z.service\n", "y.service"),
        ("12:cpu:/x.service\n0::/init.scope\n", "init.scope"),
        ("9:name=systemd:/\n0::/system.slice/x.service\n", "x.service"),
        ("9:name=systemd:/a\n0::/system.slice/x.service\n", ""),
        ("0::/\n", ""),
        ("0::/elsewhere\n", ""),
        ("0::/elsewhere/x.service\n", ""),
        ("0::/../../x.service\n", ""),
        ("", ""),
        ("nonsense", ""),
    ],
)
def test_the_unit_of_a_cgroup(cgroup: str, unit: str) -> None:
    assert sandbox.unit_of(cgroup) == unit


def test_kinds_of_units() -> None:
    assert sandbox.is_user_manager("user@1001.service")
    assert not sandbox.is_user_manager("user@x.service")
    assert not sandbox.is_user_manager("xuser@1.service")
    assert sandbox.is_login_service("cron.service")
    assert sandbox.is_login_service("ssh@1-2.service")
    assert not sandbox.is_login_service("dovecot.service")

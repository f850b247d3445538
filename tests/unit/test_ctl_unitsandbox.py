# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check finds in units that stay in their own or in the host's directories."""

import os
from pathlib import Path
from typing import Any, cast

import pytest

from polytmpd.bus.connection import BusError, Connection
from polytmpd.ctl import unitsandbox
from polytmpd.ctl.host import Result

pytestmark = pytest.mark.unit

OWN = "PrivateTmp=yes, WorkingDirectory=/tmp/x"
DIRECTORIES = ("/tmp", "/var/tmp")
UNITS: dict[str, dict[str, Any]] = {
    "shared.service": {"User": "nobody", "PAMName": "login", "WorkingDirectory": "/tmp/x"},
    "own.service": {"User": "65534", "PAMName": "x", "PrivateTmp": True, "WorkingDirectory": "/tmp/x"},
    "moves.service": {"User": "nobody", "PAMName": "login", "ReadWritePaths": ["/srv"]},
    "without-pam.service": {"User": "nobody", "PAMName": "", "WorkingDirectory": "/tmp/x"},
    "roots.service": {"User": "", "PAMName": "login", "WorkingDirectory": "/tmp/x"},
    "root.service": {"User": "root", "PAMName": "login", "WorkingDirectory": "/tmp/x"},
    "unknown.service": {"User": "no-such-user", "PAMName": "login", "ExecStart": [["/tmp/x", [], False]]},
    "user@1001.service": {"User": "1001", "PAMName": "systemd-user", "PrivateTmp": True},
}


class Systemd:
    async def ask(self, *question: Any) -> list[Any]:
        if question[3] == "ListUnitsByPatterns":
            return [[[name, "", "loaded", "", "", "", name, 0, "", "/"] for name in [*UNITS]]]
        return [question[5][0]]

    async def get_property(self, _: str, path: str, interface: str, name: str) -> Any:
        return UNITS[path][name]

    async def get_properties(self, _: str, path: str, interface: str) -> dict[str, Any]:
        return UNITS[path]


class NoSystemd:
    async def ask(self, *question: Any) -> list[Any]:
        raise BusError("org.x.Failed", "gone")


def exempt(uid: int, name: str) -> str | None:
    assert name in {"root", "nobody"}
    return "root" if uid == 0 else None


async def judge(systemd: object) -> list[Result]:
    found = unitsandbox.judge(cast("Connection", systemd), DIRECTORIES, exempt)
    return [result async for result in found]


async def test_units_of_users() -> None:
    found = {result.name: (result.verdict, result.text) for result in await judge(Systemd())}
    assert found == {
        "shared.service": (
            "warn",
            "runs as nobody in the shared /tmp, because of WorkingDirectory=/tmp/x",
        ),
        "own.service": (
            "pass",
            f"runs as 65534 with directories of its own, not the user's ({OWN})",
        ),
        "unknown.service": (
            "warn",
            "runs as no-such-user in the shared /tmp, because of ExecStart=/tmp/x",
        ),
    }


async def test_without_systemd() -> None:
    assert [result.verdict for result in await judge(NoSystemd())] == ["skip"]


def test_services_that_keep_their_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, tuple[int, int]] = {}

    def stat(path: Path) -> os.stat_result:
        if str(path) not in shown:
            raise FileNotFoundError(2, "No such file or directory", path)
        inode, uid = shown[str(path)]
        return os.stat_result((0, inode, 1, 0, uid, 0, 0, 0, 0, 0))

    monkeypatch.setattr("polytmpd.ctl.unitsandbox.Path.stat", stat)
    shown |= {"/proc/1/root/tmp": (1, 0), "/proc/1/root/var/tmp": (2, 0), "/proc/7": (3, 0)}
    assert not unitsandbox.keeps_sessions("x.service", 7, DIRECTORIES), "unknown"
    shown |= {"/proc/7/root/tmp": (11, 0), "/proc/7/root/var/tmp": (12, 0)}
    assert unitsandbox.keeps_sessions("x.service", 7, DIRECTORIES)
    assert not unitsandbox.keeps_sessions("cron.service", 7, DIRECTORIES)
    assert not unitsandbox.keeps_sessions("x.service", 7, ())
    shown["/proc/7"] = (3, 1001)
    assert not unitsandbox.keeps_sessions("x.service", 7, DIRECTORIES), "not root's"
    shown |= {"/proc/7": (3, 0), "/proc/7/root/var/tmp": (2, 0)}
    assert not unitsandbox.keeps_sessions("x.service", 7, DIRECTORIES), "shares one"

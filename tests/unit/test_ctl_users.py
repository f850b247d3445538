# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which users have no instance, and why."""

import asyncio
from typing import Any

import pytest

from polytmpd import config
from polytmpd.bus.connection import BusError
from polytmpd.config import Config
from polytmpd.core.policy import Exemptions
from polytmpd.ctl import remove, users
from polytmpd.ctl.arguments import Options
from polytmpd.ctl.commands import Context
from polytmpd.ctl.output import Failure, Style

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Config(exemptions=Exemptions(users=frozenset({"bob"})))
    monkeypatch.setattr(config, "load", lambda: (found, []))
    monkeypatch.setattr(users, "name_of", {1002: "bob"}.get)


@pytest.mark.parametrize(
    ("uid", "user", "text"),
    [
        (0, "root", "root has no instance: root is never moved"),
        (1002, "bob", "bob has no instance: user bob is named in ExemptUsers="),
        (1002, "1002", "1002 has no instance: user bob is named in ExemptUsers="),
        (70000, "high", "high has no instance"),
        (65534, "nobody", "nobody has no instance: UID 65534 stands for nobody"),
        (1003, "carol", "carol has no instance"),
    ],
)
def test_no_instance(uid: int, user: str, text: str) -> None:
    assert str(users.no_instance(uid, user)) == text


class Bus:
    """A daemon without instances that keeps files for UID 1003."""

    async def instances(self) -> list[Any]:
        return []

    async def properties(self, uid: int) -> dict[str, Any]:
        raise BusError("org.freedesktop.DBus.Error.UnknownObject", "no object")

    async def usage(self, uid: int) -> list[tuple[str, int, int]]:
        if uid != 1003:
            raise BusError("org.polytmp1.Error.NoSuchInstance", "nothing")
        return [("/var/tmp", 4096, 2)]


@pytest.mark.parametrize(
    ("user", "text", "hint"),
    [
        ("0", "root is never moved", "polytmpctl list"),
        ("1003", "1003 has no instance", "polytmpctl remove --persistent 1003"),
        ("1004", "no files are kept for them", ""),
    ],
)
def test_failures_and_their_hints(user: str, text: str, hint: str) -> None:
    context = Context(Bus(), None, Options(verb="remove", words=(user,)), Style())  # type: ignore[arg-type]  # a fake
    with pytest.raises(Failure) as failure:
        asyncio.run(remove.remove(context))
    assert text in str(failure.value)
    assert hint in failure.value.hint
    assert bool(hint) == bool(failure.value.hint)

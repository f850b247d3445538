# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which users have no instance, and why."""

import asyncio
import os
from typing import Any

import pytest

from polytmpd import config
from polytmpd.bus.client import Listed, Shown
from polytmpd.bus.connection import BusError
from polytmpd.config import Config
from polytmpd.core.policy import Exemptions
from polytmpd.ctl import remove, status, users
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


class Busy(Bus):
    """A daemon with many instances, which must not be asked about each of them."""

    def __init__(self, count: int) -> None:
        self.uids = range(1000, 1000 + count)

    async def instances(self) -> list[Any]:
        return [Listed(uid, f"user{uid}", "/") for uid in self.uids]

    async def instances_in_full(self) -> list[Any]:
        return [Shown(uid, f"user{uid}", "/", "active", 1) for uid in self.uids]


@pytest.mark.parametrize(
    ("count", "words", "json"), [(16, (), "off"), (17, ("1003",), "off"), (17, (), "short")]
)
def test_a_page_for_each_instance(count: int, words: tuple[str, ...], json: str) -> None:
    options = Options(verb="status", words=words, json=json)
    with pytest.raises(BusError, match="no object"):  # asked about one of them
        asyncio.run(status.status(Context(Busy(count), None, options, Style())))  # type: ignore[arg-type]  # fakes


def test_too_many_instances_for_a_page_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    context = Context(Busy(17), None, Options(verb="status"), Style())  # type: ignore[arg-type]  # fakes
    text = asyncio.run(status.status(context)).text
    assert text.count("active") == 17
    assert text.endswith("To see one of them in full: polytmpctl status USER")

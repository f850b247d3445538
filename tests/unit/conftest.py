# SPDX-License-Identifier: LGPL-2.1-or-later
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import settings

from polytmpd.blocking import accounts
from polytmpd.core.model import Directory, InstanceDirectory, Lifetime
from tests.unit.settled import no_descriptor_leaks, no_task_leaks
from tests.unit.world import ALICE, BOB, OWN_NAMESPACE, World

__all__ = ["no_descriptor_leaks", "no_task_leaks"]

settings.register_profile("no deadline", deadline=None)  # a slow machine is no failure
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def no_local_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the host do not matter."""
    monkeypatch.setattr(accounts, "LOCAL", "/nonexistent")


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> AsyncIterator[World]:
    """A daemon to which logind has listed no users. An internal error fails the test."""
    monkeypatch.setattr("polytmpd.kernel.host.namespace_inode", lambda: OWN_NAMESPACE)

    def getpwuid(uid: int) -> Any:
        users = {user.uid: user.name for user in (ALICE, BOB)} | {1002: "carol"}
        return type("passwd", (), {"pw_name": users[uid]})  # KeyError if there is none, as pwd's

    def kept(uid: int, _: object) -> tuple[InstanceDirectory, ...]:
        var_tmp = InstanceDirectory(Directory("/var/tmp", Lifetime.PERSISTENT), f"polytmp-{uid}")
        return (var_tmp,) if uid == BOB.uid else ()

    monkeypatch.setattr("pwd.getpwuid", getpwuid)
    monkeypatch.setattr("polytmpd.blocking.instances.kept", kept)
    made = World()
    made.presence.logind_changed()
    await made.settle()
    yield made
    await made.stop()
    messages = [record.getMessage() for record in caplog.get_records("call")]
    assert not [message for message in messages if message.startswith("Internal error")]

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who gets an instance, and what is reported of those who do not; questions that get no answer."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polytmpd import admission, userdb
from polytmpd.admission import Admission
from polytmpd.blocking import accounts
from polytmpd.bus.logind import Session, User
from polytmpd.core.model import State
from polytmpd.core.policy import Exemptions, Facts
from polytmpd.errors import ExemptError, PolytmpError
from polytmpd.journal import MessageId
from tests.unit.settled import eventually
from tests.unit.world import ALICE, World

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]

STAFF = Exemptions(exempt_groups=frozenset({"staff"}))


class FakeDatabase:
    """What userdb.facts() answers, and when."""

    def __init__(self) -> None:
        self.facts: dict[int, Facts] = {}
        self.asked: list[int] = []
        self.answers = threading.Event()
        self.answers.set()

    def __call__(self, uid: int, name: str, groups: Any, *, record: bool) -> Facts:
        self.asked.append(uid)
        assert self.answers.wait(20)
        return self.facts.get(uid, Facts())


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDatabase]:
    found = FakeDatabase()
    monkeypatch.setattr(userdb, "facts", found)
    yield found
    found.answers.set()


async def test_an_ordinary_user_asks_nobody(database: FakeDatabase) -> None:
    admitted = Admission(Exemptions())
    assert not admitted.must_ask(1000, "alice")
    assert await admitted.reason(1000, "alice") is None
    assert database.asked == []
    await admitted.close()


async def test_each_exempt_user_is_reported_once(
    database: FakeDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    admitted = Admission(STAFF)
    database.facts = {1001: Facts(member_of=frozenset({"staff"}))}
    for _ in range(3):
        assert await admitted.reason(1001, "alice") == "group staff is exempt"
        assert admitted.reason_at_once(999, "daemon")
        assert admitted.reason_at_once(0, "root")
    await eventually(lambda: len(caplog.records) == 2)
    records: list[Any] = caplog.records
    assert [record.getMessage().partition(": ") for record in records] == [
        ("User alice (UID 1001) keeps the host's directories", ": ", "group staff is exempt"),
        ("User daemon (UID 999) keeps the host's directories", ": ", Exemptions().reason(999)),
    ]
    assert [record.POLYTMP_UID for record in records] == ["1001", "999"]
    assert [record.USER_ID for record in records] == ["alice", "daemon"]
    assert {record.MESSAGE_ID for record in records} == {MessageId.EXEMPT.value}
    admitted.replace(STAFF)
    assert await admitted.reason(1001, "alice")
    await eventually(lambda: len(caplog.records) > 2)
    await admitted.close()


async def test_a_number_is_reported_with_its_name(
    database: FakeDatabase, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(accounts, "find_name", {33: "www-data"}.get)
    admitted = Admission(Exemptions())
    assert admitted.reason_at_once(33)
    assert admitted.reason_at_once(34)
    await eventually(lambda: len(caplog.records) == 2)
    said = sorted(record.getMessage().partition(" keeps")[0] for record in caplog.records)
    assert said == ["UID 34", "User www-data (UID 33)"]
    await admitted.close()


async def test_a_group_that_is_not_found(database: FakeDatabase, caplog: pytest.LogCaptureFixture) -> None:
    admitted = Admission(Exemptions(only_groups=frozenset({"staff"})))
    database.facts = {1001: Facts(unknown=frozenset({"staff"}))}
    assert await admitted.reason(1001, "alice") is None
    assert "Failed to find group staff, giving user alice private directories" in caplog.text
    await admitted.close()


async def test_no_answer(database: FakeDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a failure, not an exemption, and lookups that hang are counted."""
    monkeypatch.setattr(admission, "LOOKUP_TIMEOUT", 0.05)
    database.answers.clear()
    admitted = Admission(STAFF)
    for _ in range(6):
        with pytest.raises(PolytmpError, match="the user database did not answer for user alice within"):
            await admitted.reason(1001, "alice")
    assert len(database.asked) == 4
    database.answers.set()
    monkeypatch.setattr(admission, "LOOKUP_TIMEOUT", 10.0)
    assert await admitted.reason(1001, "alice") is None
    await admitted.close()


async def test_names_that_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold up neither the threads that make instances nor other questions, and are counted."""
    answer = threading.Event()
    asked: list[int] = []

    def find_name(uid: int) -> str | None:
        asked.append(uid)
        return {1001: "alice"}.get(uid) if uid == 1001 or answer.wait(20) else None

    monkeypatch.setattr(accounts, "find_name", find_name)
    monkeypatch.setattr(admission, "LOOKUP_TIMEOUT", 0.05)
    admitted = Admission(Exemptions())
    try:
        for uid in range(2000, 2015):
            with pytest.raises(PolytmpError, match=f"failed to look up the name of UID {uid} within"):
                await admitted.find_name(uid)
        assert await admitted.find_name(1001) == "alice"
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 5) == "free"
        for uid in (2015, 2016):
            with pytest.raises(PolytmpError):
                await admitted.find_name(uid)
        assert asked == [*range(2000, 2015), 1001, 2015]
    finally:
        answer.set()
    monkeypatch.setattr(admission, "LOOKUP_TIMEOUT", 10.0)
    assert await admitted.find_name(2017) is None
    await admitted.close()


async def test_a_local_user_does_not_wait_for_names_that_hang(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = threading.Event()
    monkeypatch.setattr(accounts, "find_name", lambda _: answer.wait(20) and None)
    monkeypatch.setattr(accounts, "LOCAL", str(tmp_path / "passwd"))
    (tmp_path / "passwd").write_text("alice:x:1001:1001::/:/bin/sh\n")
    admitted = Admission(Exemptions())
    hanging = [asyncio.ensure_future(admitted.find_name(uid)) for uid in range(2000, 2040)]
    try:
        await asyncio.sleep(0)
        assert await asyncio.wait_for(admitted.find_name(1001), 5) == "alice"
    finally:
        answer.set()
    assert await asyncio.gather(*hanging) == [None] * 40
    await admitted.close()


async def test_logins_whose_names_hang_hold_up_nobody_else(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """logind has announced them: their names are only checked. The same holds for former users' names."""
    answer, asked = threading.Event(), []

    def hang(*_: object) -> bool:
        asked.append(threading.current_thread().name)
        return answer.wait(20)

    monkeypatch.setattr(accounts, "find_name", lambda uid: hang() and None if uid >= 2000 else "alice")
    monkeypatch.setattr(accounts, "is_former", hang)
    try:
        for uid in range(2000, 2012):
            world.presence.session_new(Session(str(uid), User(uid, f"user{uid}")))
        former = asyncio.ensure_future(world.admission.is_former("carol", 1000, "alice"))
        await eventually(lambda: len(asked) == 13)
        await world.active()
        assert set(asked) == {"user-database"}
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 5) == "free"
        assert [entry for entry in world.executor.asked if entry[1] >= 2000] == []
    finally:
        answer.set()
    assert await former
    await eventually(lambda: len([entry for entry in world.executor.asked if entry[1] >= 2000]) == 12)


async def test_a_former_users_name_that_hangs_refuses_the_login(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The instance that lives may be another user's."""
    answer = threading.Event()
    await world.drained()
    monkeypatch.setattr(admission, "LOOKUP_TIMEOUT", 0.05)
    monkeypatch.setattr(accounts, "find_name", lambda _: "carol")
    monkeypatch.setattr(accounts, "is_former", lambda *_: answer.wait(20))
    try:
        with pytest.raises(PolytmpError, match="failed to look up user alice, who may have had UID 1000"):
            await world.login()
        assert not world.executor.waits("rejoin")
    finally:
        answer.set()
    monkeypatch.setattr(admission, "LOOKUP_TIMEOUT", 10.0)
    with pytest.raises(PolytmpError, match="instance of alice, a former user of UID 1000, is still in use"):
        await world.login()
    assert "Traceback" not in caplog.text


async def test_an_error(database: FakeDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Facts:
        raise OSError("broken")

    monkeypatch.setattr(userdb, "facts", broken)
    admitted = Admission(STAFF)
    with pytest.raises(PolytmpError, match="did not answer for user alice: broken"):
        await admitted.reason(1001, "alice")
    await admitted.close()


async def test_settings_that_match_nobody(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(userdb, "local_users", lambda: {0: "root", 1000: "ada"})
    admitted = Admission(Exemptions())
    many = frozenset(f"no-such-{number}" for number in range(7))
    admitted.replace(Exemptions(users=many, regular=((70000, 80000),), only_groups=frozenset({"none-such"})))
    await eventually(lambda: len(caplog.records) == 3)
    named = "no-such-0, no-such-1, no-such-2, no-such-3, no-such-4 and 2 more"
    assert [record.getMessage() for record in caplog.records] == [
        f"ExemptUsers=: No such user: {named}; correct or remove it",
        "OnlyGroups=: No such group: none-such; correct or remove it",
        "RegularUIDs=: No user in /etc/passwd has one of these UIDs; ignore this if directory users do",
    ]
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    await admitted.close()


# With the daemon


async def test_a_login_waits_for_the_answer(world: World, database: FakeDatabase) -> None:
    """Both the login and logind's signal ask; the instance is made once, and its claims are whole."""
    database.answers.clear()
    world.admission.replace(STAFF)
    world.presence.session_new(Session("1", ALICE))
    await eventually(lambda: database.asked == [1000])
    assert world.state() is None
    login = world.login()
    await eventually(lambda: database.asked == [1000, 1000])
    assert world.executor.log == []
    database.answers.set()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await world.handed_over(login)
    assert world.executor.log == ["prepare 1000", "hand_over 1000"]
    assert world.state() is State.ACTIVE
    world.presence.session_removed("1")
    assert world.state() is State.DRAINING


async def test_a_member_of_an_exempt_group(world: World, database: FakeDatabase) -> None:
    database.facts = {1000: Facts(member_of=frozenset({"staff"}))}
    world.admission.replace(STAFF)
    world.presence.user_new(ALICE)
    world.presence.session_new(Session("1", ALICE))
    with pytest.raises(ExemptError, match="group staff is exempt"):
        await world.login()
    await world.settle()
    assert world.executor.log == []
    assert list(world.views) == []


async def test_a_session_that_ends_before_the_answer(world: World, database: FakeDatabase) -> None:
    database.answers.clear()
    world.admission.replace(STAFF)
    world.presence.session_new(Session("1", ALICE))
    await eventually(lambda: database.asked == [1000])
    world.presence.session_removed("1")
    database.answers.set()
    await eventually(lambda: not world.presence._tasks._running)
    assert world.executor.log == []
    assert 1000 not in world.presence._people


async def test_a_login_that_gets_no_answer(
    world: World, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is refused. Once there is an answer, the next one gets an instance that the session claims."""
    monkeypatch.setattr(admission, "LOOKUP_TIMEOUT", 0.05)
    database.answers.clear()
    world.admission.replace(STAFF)
    world.presence.session_new(Session("1", ALICE))
    with pytest.raises(PolytmpError, match="did not answer for user alice"):
        await world.login()
    await eventually(lambda: "Cannot yet determine whether user alice is exempt" in caplog.text)
    database.answers.set()
    monkeypatch.setattr(admission, "LOOKUP_TIMEOUT", 10.0)
    login = world.login()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await world.handed_over(login)
    assert world.state() is State.ACTIVE
    world.presence.session_removed("1")
    assert world.state() is State.DRAINING


async def test_a_user_of_a_directory(world: World, database: FakeDatabase) -> None:
    user = User(1234567890, "DOM\\dora")
    world.presence.session_new(Session("1", user))
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await eventually(lambda: world.state(user.uid) is State.ACTIVE)
    assert database.asked == [user.uid]


async def test_a_record_that_cannot_be_had(database: FakeDatabase, caplog: pytest.LogCaptureFixture) -> None:
    """It might call the user regular, so the number does not exempt them."""
    admitted = Admission(Exemptions())
    database.facts = {64030: Facts(silent=True), 70000: Facts(silent=True)}
    with pytest.raises(PolytmpError, match="a service of user records did not answer for user slurm"):
        await admitted.reason(64030, "slurm")
    assert await admitted.reason(70000, "dora") is None
    assert caplog.records == []
    await admitted.close()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The clients of logind and systemd, against small fakes of them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from polytmpd.bus.connection import BusError, Connection
from polytmpd.bus.library import Message, MessageType, Variant
from polytmpd.bus.logind import Logind, Session, User
from polytmpd.bus.sessions import SessionDetails, list_sessions
from polytmpd.bus.systemd1 import Systemd
from tests.bus.world import PROPERTIES, Client, FakeLogind
from tests.unit.settled import eventually

pytestmark = pytest.mark.bus

ALICE = User(1000, "alice")
SYSTEMD = "org.freedesktop.systemd1"
SYSTEMD_PATH = "/org/freedesktop/systemd1"


class Listener(list[Any]):
    def user_new(self, user: User) -> None:
        self.append(("user_new", user))

    def user_removed(self, uid: int) -> None:
        self.append(("user_removed", uid))

    def session_new(self, session: Session) -> None:
        self.append(("session_new", session))

    def session_removed(self, session_id: str) -> None:
        self.append(("session_removed", session_id))

    def logind_changed(self) -> None:
        self.append("logind_changed")

    def slice_changed(self, uid: int) -> None:
        self.append(("slice_changed", uid))

    def scope_changed(self, session_id: str) -> None:
        self.append(("scope_changed", session_id))

    def systemd_changed(self) -> None:
        self.append("systemd_changed")


@pytest.fixture
async def fake(client: Client) -> FakeLogind:
    made = FakeLogind(client)
    await made.start()
    return made


@pytest.fixture
async def heard() -> Listener:
    return Listener()


@pytest.fixture
async def logind(fake: FakeLogind, connection: Connection, heard: Listener) -> AsyncIterator[Logind]:
    made = Logind(connection)
    await made.subscribe(heard)
    yield made
    await eventually(lambda: not made._tasks)


async def test_lists(logind: Logind, fake: FakeLogind) -> None:
    assert await logind.users() == []
    assert await logind.sessions() == []
    fake.users = {1000: "alice", 1001: "bob"}
    fake.sessions = {"c1": 1000, "2": 1001}
    assert await logind.users() == [ALICE, User(1001, "bob")]
    assert await logind.sessions() == [Session("c1", ALICE), Session("2", User(1001, "bob"))]


async def test_which_users_are_logged_in(logind: Logind, fake: FakeLogind) -> None:
    """A closing session is over even if processes are left in it. A manager or a job is no login."""
    fake.users, fake.sessions = {1000: "alice"}, {"1": 1000, "2": 1000, "3": 1000}
    fake.classes, fake.closing = {"2": "manager-early", "3": "background"}, set()
    assert [(session.id, session.is_login) for session in await logind.sessions()] == [
        ("1", True),
        ("2", False),
        ("3", False),
    ]
    fake.closing = {"1"}
    assert [session.id for session in await logind.sessions()] == ["2", "3"]
    assert [await logind.is_open(session) for session in ("1", "2", "gone")] == [False, True, False]


async def test_session_details_for_an_administrator(fake: FakeLogind, connection: Connection) -> None:
    """Closing sessions and jobs are listed, service managers are not."""
    fake.users = {1000: "alice", 1001: "bob"}
    fake.sessions = {"1": 1000, "2": 1000, "3": 1000, "4": 1001}
    fake.classes, fake.closing = {"2": "manager", "3": "background"}, {"1"}
    closing = SessionDetails(Session("1", ALICE), state="closing")
    job = SessionDetails(Session("3", ALICE, is_login=False), state="active")
    bobs = SessionDetails(Session("4", User(1001, "bob")), state="active")
    assert await list_sessions(connection, 1000) == [closing, job]
    assert await list_sessions(connection) == [closing, job, bobs]


async def test_a_login_and_a_logout(logind: Logind, fake: FakeLogind, heard: Listener) -> None:
    fake.user_new(1000, "alice")
    await eventually(lambda: len(heard) == 1)
    fake.session_new("c1", 1000)
    await eventually(lambda: len(heard) == 2)
    fake.session_removed("c1")
    fake.user_removed(1000)
    await eventually(lambda: len(heard) == 4)
    assert heard == [
        ("user_new", ALICE),
        ("session_new", Session("c1", ALICE)),
        ("session_removed", "c1"),
        ("user_removed", 1000),
    ]


async def test_a_user_who_left_before_the_reply_is_not_reported(
    logind: Logind, fake: FakeLogind, heard: Listener
) -> None:
    fake.client.send_signal("UserNew", "uo", [1000, fake.user_path(1000)])
    fake.client.send_signal("SessionNew", "so", ["c1", fake.session_path("c1")])
    fake.user_new(1001, "bob")
    await eventually(lambda: heard)
    assert heard == [("user_new", User(1001, "bob"))]


async def test_a_removal_never_overtakes_an_arrival(
    logind: Logind, fake: FakeLogind, heard: Listener, connection: Connection
) -> None:
    """One read returns the reply and the removal; the removal is handled first."""
    answer = fake._answer

    def answer_and_remove(message: Message) -> Message:
        reply = answer(message)
        fake.client.bus.send(reply)
        fake.client.send_signal("SessionRemoved", "so", ["c1", fake.session_path("c1")])
        fake.client.send_signal("UserRemoved", "uo", [1000, fake.user_path(1000)])
        fake.silent = True
        return Message.new_signal("/x", "org.example.Nothing", "Nothing", "", [])

    fake.users, fake.sessions = {1000: "alice"}, {"c1": 1000}
    fake._answer = answer_and_remove  # type: ignore[method-assign]
    fake.client.send_signal("UserNew", "uo", [1000, fake.user_path(1000)])
    await eventually(lambda: ("user_removed", 1000) in heard)
    await eventually(lambda: not logind._tasks)
    assert ("user_new", ALICE) not in heard[heard.index(("user_removed", 1000)) :]


async def test_a_session_that_came_back_is_reported(
    logind: Logind, fake: FakeLogind, heard: Listener
) -> None:
    for _ in range(2):
        fake.user_new(1000, "alice")
        fake.session_new("c1", 1000)
        await eventually(lambda: heard and heard[-1][0] == "session_new")
        fake.session_removed("c1")
        fake.user_removed(1000)
        await eventually(lambda: heard[-1] == ("user_removed", 1000))
    assert heard[:4] == heard[4:]


async def test_logind_is_restarted(logind: Logind, fake: FakeLogind, heard: Listener) -> None:
    await fake.stop()
    with pytest.raises(BusError):
        await logind.users()
    assert heard == []
    await fake.start()
    await eventually(lambda: heard == ["logind_changed"])
    fake.user_new(1000, "alice")
    await eventually(lambda: heard[-1] == ("user_new", ALICE))


async def test_forged_removals_are_not_believed(
    logind: Logind, fake: FakeLogind, heard: Listener, connection: Connection, new_client: Callable[[], Any]
) -> None:
    forger = await new_client()
    to = connection.unique_name
    forger.send_signal("UserRemoved", "uo", [1000, "/"], to=to)
    forger.send_signal("SessionRemoved", "so", ["c1", "/"], to=to)
    forger.send_signal("UserNew", "uo", [1000, "/"], to=to)
    forger.send_signal("SessionNew", "so", ["c1", "/"], to=to)
    await forger.result("GetId", to="org.freedesktop.DBus", path="/", interface="org.freedesktop.DBus")
    fake.user_new(1000, "alice")
    await eventually(lambda: heard)
    assert heard == [("user_new", ALICE)]


# systemd


class FakeSystemd:
    def __init__(self, client: Client) -> None:
        self.client = client
        self.subscribed = 0
        self.groups: dict[str, str] = {}
        self.error = ""
        self.asked: list[str] = []
        self.busy: list[Message] | None = None
        """What waits for an answer, if none is given."""
        client.bus.add_message_handler(self._on_message)

    def _on_message(self, message: Message) -> bool:
        path = message.path or ""
        if message.message_type is not MessageType.METHOD_CALL or not path.startswith(SYSTEMD_PATH):
            return False
        self.asked.append(message.member or "")
        if self.busy is not None:
            self.busy.append(message)
        else:
            self.client.bus.send(self._answer(message))
        return True

    async def answer_at_last(self) -> int:
        """Answer all that waits, again and again; returns how many calls waited at most."""
        most = 0
        while self.busy:
            most = max(most, len(self.busy))
            waiting, self.busy = self.busy, []
            for message in waiting:
                self.client.bus.send(self._answer(message))
            with contextlib.suppress(AssertionError):
                await eventually(lambda: self.busy, 1)
        return most

    def _answer(self, message: Message) -> Message:
        if self.error:
            return Message.new_error(message, self.error, "as told")
        if message.member == "Subscribe":
            self.subscribed += 1
            return Message.new_method_return(message)
        if message.member == "GetUnit":
            if message.body[0] not in self.groups:
                return Message.new_error(message, f"{SYSTEMD}.NoSuchUnit", "not loaded")
            escaped = message.body[0].replace("-", "_2d").replace(".", "_2e")
            return Message.new_method_return(message, "o", [f"/org/freedesktop/systemd1/unit/{escaped}"])
        if message.member == "ListUnitsByPatterns":
            assert message.body == [["active"], ["user-*.slice"]]
            rows = [[unit, "", "loaded", "active", "active", "", "/", 0, "", "/"] for unit in self.groups]
            return Message.new_method_return(message, "a(ssssssouso)", [rows])
        unit = (message.path or "").rpartition("/")[2].replace("_2d", "-").replace("_2e", ".")
        return Message.new_method_return(message, "v", [Variant("s", self.groups[unit])])

    def changed(self, unit: str, interface: str = f"{SYSTEMD}.Slice") -> None:
        self.client.send_signal(
            "PropertiesChanged",
            "sa{sv}as",
            [interface, {}, ["ControlGroup"]],
            path=f"/org/freedesktop/systemd1/unit/{unit}",
            interface=PROPERTIES,
        )


async def test_the_service_manager_comes_back(
    client: Client, connection: Connection, heard: Listener
) -> None:
    """After a restart of the bus, PID 1 is away for a moment. The daemon must start all the same."""
    systemd = Systemd(connection)
    await systemd.subscribe(heard)
    with pytest.raises(BusError, match="not on the bus"):
        await systemd.control_group(1000)
    fake = FakeSystemd(client)
    await client.own(SYSTEMD)
    await eventually(lambda: heard == ["systemd_changed"] and fake.subscribed)
    assert await systemd.control_group(1000) == ""


@pytest.fixture
async def fake_systemd(client: Client) -> FakeSystemd:
    made = FakeSystemd(client)
    await client.own(SYSTEMD)
    return made


async def test_control_group(fake_systemd: FakeSystemd, connection: Connection) -> None:
    systemd = Systemd(connection)
    await systemd.subscribe(Listener())
    fake_systemd.groups["user-1000.slice"] = "/user.slice/user-1000.slice"
    assert await systemd.control_group(1000) == "/user.slice/user-1000.slice"
    assert await systemd.control_group(1001) == "", "no such unit"
    fake_systemd.error = "org.freedesktop.DBus.Error.Failed"
    with pytest.raises(BusError, match="as told"):
        await systemd.control_group(1000)


async def test_all_control_groups_with_one_question(
    fake_systemd: FakeSystemd, connection: Connection
) -> None:
    systemd = Systemd(connection)
    await systemd.subscribe(Listener())
    assert await systemd.control_groups() == {}
    fake_systemd.asked.clear()
    fake_systemd.groups = {"user.slice": "/in/user.slice", "user-1-x.slice": "/in/user.slice/user-1-x.slice"}
    wanted = {uid: f"/in/user.slice/user-{uid}.slice" for uid in range(1000, 2000)}
    fake_systemd.groups |= {f"user-{uid}.slice": group for uid, group in wanted.items()}
    assert await systemd.control_groups() == wanted
    assert fake_systemd.asked == ["ListUnitsByPatterns", "GetUnit", "Get"]
    fake_systemd.error = "org.freedesktop.DBus.Error.Failed"
    with pytest.raises(BusError, match="as told"):
        await systemd.control_groups()


async def test_few_questions_wait_for_an_answer_at_once(
    fake_systemd: FakeSystemd, connection: Connection
) -> None:
    systemd = Systemd(connection)
    await systemd.subscribe(Listener())
    fake_systemd.busy = []
    asking = [asyncio.ensure_future(systemd.control_group(uid)) for uid in range(1000, 1100)]
    await eventually(lambda: fake_systemd.busy)
    assert await fake_systemd.answer_at_last() <= 16
    assert await asyncio.gather(*asking) == [""] * 100


async def test_only_changes_of_user_slices_are_reported(
    fake_systemd: FakeSystemd, connection: Connection, heard: Listener
) -> None:
    await Systemd(connection).subscribe(heard)
    assert fake_systemd.subscribed == 1
    for unit in (
        "user_2eslice",
        "system_2eslice",
        "user_2dx_2eslice",
        "user_401000_2eservice",
        "user_2d_2eslice",
    ):
        fake_systemd.changed(unit)
    fake_systemd.changed("user_2d1000_2eslice", f"{SYSTEMD}.Unit")
    fake_systemd.changed("user_2d1001_2eslice")
    await eventually(lambda: heard)
    assert heard == [("slice_changed", 1001)]


async def test_only_changes_of_session_scopes_are_reported(
    fake_systemd: FakeSystemd, connection: Connection, heard: Listener
) -> None:
    await Systemd(connection).subscribe(heard)
    for unit in ("init_2escope", "session_2d_2escope", "session_2dx_2ey_2escope", "user_2d1000_2eslice"):
        fake_systemd.changed(unit, f"{SYSTEMD}.Scope")
    fake_systemd.changed("session_2dc1_2escope", f"{SYSTEMD}.Unit")
    fake_systemd.changed("session_2dc2_2escope", f"{SYSTEMD}.Scope")
    await eventually(lambda: heard)
    assert heard == [("scope_changed", "c2")]

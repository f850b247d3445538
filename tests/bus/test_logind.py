# SPDX-License-Identifier: LGPL-2.1-or-later
"""The clients of logind and systemd, against small fakes of them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest

from polytmpd.bus.connection import BusError, Connection
from polytmpd.bus.library import Message, MessageType, Variant
from polytmpd.bus.logind import Logind, Session, User
from polytmpd.bus.sessions import SessionDetails, list_sessions
from polytmpd.bus.systemd1 import Systemd
from polytmpd.sdlogin import SessionFile, SessionFiles
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


# What logind's files say


class Files:
    """Stands in for SessionFiles."""

    def __init__(self) -> None:
        self.found: dict[str, SessionFile] = {}
        self.changed: Callable[[str | None], None] = lambda _: None
        self.is_closed = False

    def follow(self, changed: Callable[[str | None], None]) -> None:
        self.changed = changed

    def read(self, session: str) -> SessionFile | None:
        return self.found.get(session)

    def is_closing(self, session: str) -> bool:
        return session in self.found and self.found[session].is_closing

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
async def files(fake: FakeLogind, connection: Connection, heard: Listener) -> Files:
    made = Files()
    logind = Logind(connection, cast("SessionFiles", made))
    await logind.subscribe(heard)
    return made


async def test_a_session_with_a_file_is_not_asked_about(
    files: Files, fake: FakeLogind, heard: Listener
) -> None:
    files.found["c1"] = SessionFile(1000, "user", is_closing=False)
    files.found["c2"] = SessionFile(1000, "manager", is_closing=False)
    files.found["c3"] = SessionFile(1000, "user", is_closing=True)
    fake.user_new(1000, "alice")
    await eventually(lambda: heard == [("user_new", ALICE)])
    for session in ("c1", "c2", "c3"):
        fake.session_new(session, 1000)
    fake.silent = True
    await eventually(lambda: len(heard) == 3)
    assert heard[1:] == [
        ("session_new", Session("c1", ALICE)),
        ("session_new", Session("c2", ALICE, is_login=False)),
    ]


async def test_the_bus_knows_what_the_files_do_not(files: Files, fake: FakeLogind, heard: Listener) -> None:
    """The name of a user who is not known yet, and a session without a file."""
    files.found["c1"] = SessionFile(1000, "user", is_closing=False)
    fake.users[1000] = "alice"
    fake.session_new("c1", 1000)
    fake.session_new("c2", 1000)
    await eventually(lambda: len(heard) == 2)
    assert heard == [("session_new", Session("c1", ALICE)), ("session_new", Session("c2", ALICE))]


async def test_a_session_that_closes(files: Files, heard: Listener) -> None:
    """logind keeps it while processes are left in it, and signals nothing."""
    files.found["c1"] = SessionFile(1000, "user", is_closing=False)
    files.changed("c1")
    files.changed("c2")
    assert heard == []
    files.found["c1"] = SessionFile(1000, "user", is_closing=True)
    files.changed("c1")
    assert heard == [("session_removed", "c1")]
    files.changed(None)
    assert heard[1:] == ["logind_changed"], "changes were lost"


# systemd


class FakeSystemd:
    def __init__(self, client: Client) -> None:
        self.client = client
        self.root = ""
        self.error = ""
        self.asked: list[Message] = []
        self.is_busy = False
        client.bus.add_message_handler(self._on_message)

    def _on_message(self, message: Message) -> bool:
        path = message.path or ""
        if message.message_type is not MessageType.METHOD_CALL or not path.startswith(SYSTEMD_PATH):
            return False
        self.asked.append(message)
        if not self.is_busy:
            self.client.bus.send(self._answer(message))
        return True

    def answer_at_last(self) -> None:
        for message in self.asked:
            self.client.bus.send(self._answer(message))

    def _answer(self, message: Message) -> Message:
        if self.error:
            return Message.new_error(message, self.error, "as told")
        assert (message.path, message.member) == (SYSTEMD_PATH, "Get")
        assert message.body == [f"{SYSTEMD}.Manager", "ControlGroup"]
        return Message.new_method_return(message, "v", [Variant("s", self.root)])


async def test_the_service_manager_comes_back(client: Client, connection: Connection) -> None:
    """After a restart of the bus, PID 1 is away for a moment. The daemon must start all the same."""
    heard: list[str] = []
    systemd = Systemd(connection)
    await systemd.follow(lambda: heard.append("back"))
    with pytest.raises(BusError, match="not on the bus"):
        await systemd.user_slice()
    FakeSystemd(client)
    await client.own(SYSTEMD)
    await eventually(lambda: heard == ["back"])
    assert await systemd.user_slice() == "/user.slice"


@pytest.fixture
async def fake_systemd(client: Client) -> FakeSystemd:
    made = FakeSystemd(client)
    await client.own(SYSTEMD)
    return made


@pytest.mark.parametrize(
    ("root", "wanted"), [("", "/user.slice"), ("/", "/user.slice"), ("/a", "/a/user.slice")]
)
async def test_the_control_group_of_user_slice(
    fake_systemd: FakeSystemd, connection: Connection, root: str, wanted: str
) -> None:
    fake_systemd.root = root
    systemd = Systemd(connection)
    await systemd.follow(lambda: None)
    for _ in range(3):
        assert await systemd.user_slice() == wanted
    assert len(fake_systemd.asked) == 1


async def test_a_service_manager_that_refuses_is_asked_again(
    fake_systemd: FakeSystemd, connection: Connection
) -> None:
    systemd = Systemd(connection)
    await systemd.follow(lambda: None)
    fake_systemd.error = "org.freedesktop.DBus.Error.Failed"
    with pytest.raises(BusError, match="as told"):
        await systemd.user_slice()
    fake_systemd.error = ""
    assert await systemd.user_slice() == "/user.slice"


async def test_one_question_waits_for_an_answer(fake_systemd: FakeSystemd, connection: Connection) -> None:
    systemd = Systemd(connection)
    await systemd.follow(lambda: None)
    fake_systemd.is_busy = True
    asking = [asyncio.ensure_future(systemd.user_slice()) for _ in range(100)]
    await eventually(lambda: fake_systemd.asked)
    asking[0].cancel()
    fake_systemd.answer_at_last()
    assert await asyncio.gather(*asking[1:]) == ["/user.slice"] * 99
    assert len(fake_systemd.asked) == 1


async def test_the_daemon_hears_no_signal_of_units(
    fake_systemd: FakeSystemd, connection: Connection, logind: Logind
) -> None:
    """Each unit that changes sends several. They took half of the daemon's CPU time."""
    systemd = Systemd(connection)
    await systemd.follow(lambda: None)
    signals: list[Message] = []

    def note(message: Message) -> bool:
        if message.message_type is MessageType.SIGNAL:
            signals.append(message)
        return False

    connection._bus.add_message_handler(note)
    for kind in ("Slice", "Scope", "Unit"):
        fake_systemd.client.send_signal(
            "PropertiesChanged",
            "sa{sv}as",
            [f"{SYSTEMD}.{kind}", {}, ["ControlGroup"]],
            path=f"{SYSTEMD_PATH}/unit/user_2d1000_2eslice",
            interface=PROPERTIES,
        )
    await systemd.user_slice()
    assert not signals

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may what where polkit decides, and what happens when it is slow, silent or not there.

polkitd itself is in tests/e2e/test_polkit.py; here is a fake that answers when the test says so.
"""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from polytmpd.bus import callers, polkit
from polytmpd.bus.connection import Connection
from polytmpd.bus.contract import INSTANCE, MANAGER, PATH, SERVICE
from polytmpd.bus.library import Message, MessageFlag, MessageType
from polytmpd.bus.service import Service
from polytmpd.bus.turns import ASKED_AT_MOST
from polytmpd.core.names import object_path
from polytmpd.errors import BusyError, NotPolyinstantiatedError, PolytmpError
from tests.bus.world import PROPERTIES, STRANGER, Backend, Client, as_stranger, view
from tests.unit.settled import eventually

pytestmark = [pytest.mark.bus, pytest.mark.usefixtures("root")]

ALLOWED, DENIED, CHALLENGE = (True, False), (False, False), (False, True)


class FakePolkit:
    """Answers what the test says; where it says nothing, not at all."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.answer: tuple[bool, bool] | None = DENIED
        self.asked: list[list[Any]] = []
        self.withdrawn: list[str] = []
        client.bus.add_message_handler(self._on_message)

    def _on_message(self, message: Message) -> bool:
        if message.message_type is not MessageType.METHOD_CALL or message.path != polkit.PATH:
            return False
        if message.member == "CancelCheckAuthorization":
            self.withdrawn.append(message.body[0])
            self.client.bus.send(Message.new_method_return(message))
            return True
        self.asked.append(message.body)
        if self.answer is not None:
            reply = Message.new_method_return(message, "(bba{ss})", [[*self.answer, {}]])
            self.client.bus.send(reply)
        return True


@pytest.fixture
async def authority(new_client: Callable[[], Any]) -> AsyncIterator[FakePolkit]:
    client = await new_client()
    made = FakePolkit(client)
    await client.own(polkit.SERVICE)
    yield made
    await client.disown(polkit.SERVICE)


class Stranger:
    """busctl as nobody: a caller whom only polkit can allow something."""

    def __init__(self, bus: str) -> None:
        self.bus = bus
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(
        self, path: str, method: str, *arguments: str, interactive: bool = False
    ) -> asyncio.subprocess.Process:
        flag = [f"--allow-interactive-authorization={'yes' if interactive else 'no'}"]
        process = await asyncio.create_subprocess_exec(
            *("setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"),
            *("busctl", f"--address={self.bus}", *flag, "--timeout=15", "call", SERVICE, path),
            *(method.rpartition(".")[0], method.rpartition(".")[2], *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.processes.append(process)
        return process

    async def call(self, path: str, method: str, *arguments: str, interactive: bool = False) -> str:
        process = await self.start(path, method, *arguments, interactive=interactive)
        stdout, _ = await asyncio.wait_for(process.communicate(), 20)
        return stdout.decode()

    async def close(self) -> None:
        for process in self.processes:
            if process.returncode is None:
                process.kill()
            await process.communicate()


@pytest.fixture
async def stranger(bus: str) -> AsyncIterator[Stranger]:
    made = Stranger(bus)
    yield made
    await made.close()


@pytest.fixture
def shown(service: Service, backend: Backend) -> str:
    """bob's instance."""
    backend.views.show(view(1002, "bob"))
    return object_path(1002)


ACTIONS = [
    pytest.param(PATH, f"{MANAGER}.RemoveInstance", ("u", "1002"), "remove-instance", id="RemoveInstance"),
    pytest.param(
        PATH, f"{MANAGER}.RemoveInstanceWithFlags", ("ut", "1002", "1"), "remove-instance", id="WithFlags"
    ),
    pytest.param(PATH, f"{MANAGER}.Reload", (), "reload", id="Reload"),
    pytest.param(PATH, f"{MANAGER}.ResolvePath", ("us", "1002", "/tmp/x"), "inspect", id="ResolvePath"),
    pytest.param(PATH, f"{MANAGER}.GetUserUsage", ("u", "1002"), "inspect", id="GetUserUsage"),
    pytest.param(PATH, f"{MANAGER}.GetRemovalProgress", ("u", "1002"), "inspect", id="GetRemovalProgress"),
    pytest.param(object_path(1002), f"{INSTANCE}.ListProcesses", (), "inspect", id="ListProcesses"),
    pytest.param(object_path(1002), f"{INSTANCE}.ListHolders", (), "inspect", id="ListHolders"),
    pytest.param(object_path(1002), f"{INSTANCE}.GetUsage", (), "inspect", id="GetUsage"),
    pytest.param(object_path(1002), f"{PROPERTIES}.GetAll", ("s", INSTANCE), "inspect", id="GetAll"),
]


@pytest.mark.parametrize(("path", "method", "arguments", "action"), ACTIONS)
async def test_polkit_decides(
    shown: str,
    authority: FakePolkit,
    stranger: Stranger,
    path: str,
    method: str,
    arguments: tuple[str, ...],
    action: str,
) -> None:
    assert await stranger.call(path, method, *arguments) == "Call failed: Access denied\n"
    authority.answer = CHALLENGE
    assert "needs authentication" in await stranger.call(path, method, *arguments)
    authority.answer = ALLOWED
    allowed = await stranger.call(path, method, *arguments)
    assert "failed" not in allowed
    assert [asked[1] for asked in authority.asked] == [f"org.polytmp1.{action}"] * 3
    kind, subject = authority.asked[0][0]
    assert kind == "system-bus-name", "a pid may be another process's by now"
    assert subject["name"].value.startswith(":1.")
    details = {} if action == "reload" else {"uid": "1002", "user": "bob"}
    assert authority.asked[0][2] == details


async def test_ones_own_instance_is_another_action(
    service: Service, backend: Backend, authority: FakePolkit, stranger: Stranger
) -> None:
    backend.views.show(view(STRANGER, "nobody"))
    authority.answer = ALLOWED
    await stranger.call(PATH, f"{MANAGER}.RemoveInstance", "u", str(STRANGER))
    assert [asked[1] for asked in authority.asked] == ["org.polytmp1.remove-own-instance"]
    assert backend.removed == [(STRANGER, False)]
    await stranger.call(object_path(STRANGER), f"{INSTANCE}.ListProcesses")
    assert len(authority.asked) == 1, "looking at one's own needs nobody's leave"


async def test_root_is_not_asked_about(
    shown: str, authority: FakePolkit, client: Client, backend: Backend
) -> None:
    await client.result("RemoveInstance", "u", [1002])
    await client.result("Reload")
    await client.result("ListProcesses", path=shown, interface=INSTANCE)
    assert authority.asked == []


async def test_a_person_is_asked_only_where_the_caller_allows_it(
    shown: str, authority: FakePolkit, stranger: Stranger
) -> None:
    await stranger.call(PATH, f"{MANAGER}.Reload")
    await stranger.call(PATH, f"{MANAGER}.Reload", interactive=True)
    assert [(asked[3], bool(asked[4])) for asked in authority.asked] == [(0, False), (1, True)]


async def test_without_polkit_root_decides_alone(shown: str, stranger: Stranger, backend: Backend) -> None:
    assert "polkit is not available" in await as_stranger(
        stranger.bus, PATH, f"{MANAGER}.RemoveInstance", "uint32:1002"
    )
    assert "denied" in await stranger.call(PATH, f"{MANAGER}.Reload", interactive=True)
    assert (backend.removed, backend.reloads) == ([], 0)


async def as_nobody(new_client: Callable[[], Any]) -> Client:
    """A connection of another user's; the bus reads the UID when it is made."""
    os.setresuid(STRANGER, STRANGER, 0)
    try:
        made: Client = await new_client()
    finally:
        os.setresuid(0, 0, 0)
    return made


async def look(client: Client, uid: int = 1002, *, interactive: bool = True) -> Message:
    flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else MessageFlag.NONE
    return await client.call("GetUserUsage", "u", [uid], flags=flags)


async def test_a_password_holds_for_the_user_and_the_connection(
    shown: str, authority: FakePolkit, service: Service, backend: Backend, new_client: Callable[[], Any]
) -> None:
    authority.answer = ALLOWED
    alice, other = await as_nobody(new_client), await as_nobody(new_client)
    for _ in range(3):
        assert (await look(alice)).message_type is MessageType.METHOD_RETURN
        assert (await look(alice, interactive=False)).message_type is MessageType.METHOD_RETURN
    assert len(authority.asked) == 1
    authority.answer = DENIED
    assert (await look(other)).message_type is MessageType.ERROR, "another connection"
    assert (await look(alice, 1003)).message_type is MessageType.ERROR, "another user's"
    remove = await alice.call("RemoveInstance", "u", [1002])
    assert (remove.message_type, backend.removed) == (MessageType.ERROR, []), "another action"
    assert len(authority.asked) == 4
    assert set(service._callers._polkit._granted) == {alice.name}
    alice.bus.disconnect()
    await eventually(lambda: not service._callers._polkit._granted)


async def test_no_is_not_remembered_and_neither_is_what_a_rule_said(
    shown: str, authority: FakePolkit, new_client: Callable[[], Any]
) -> None:
    alice = await as_nobody(new_client)
    for answer, kind in (
        (DENIED, MessageType.ERROR),
        (CHALLENGE, MessageType.ERROR),
        (ALLOWED, MessageType.METHOD_RETURN),
    ):
        authority.answer = answer
        assert (await look(alice, interactive=False)).message_type is kind
    authority.answer = DENIED
    assert (await look(alice)).message_type is MessageType.ERROR
    assert len(authority.asked) == 4


async def test_what_changes_something_is_asked_about_every_time(
    shown: str, authority: FakePolkit, new_client: Callable[[], Any]
) -> None:
    authority.answer = ALLOWED
    alice = await as_nobody(new_client)
    for _ in range(2):
        await alice.call("RemoveInstance", "u", [1002], flags=MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION)
    assert len(authority.asked) == 2


async def test_so_many_are_remembered_and_no_more(
    service: Service, authority: FakePolkit, new_client: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polkit, "_GRANTED_AT_MOST", 2)
    authority.answer = ALLOWED
    alice = await as_nobody(new_client)
    for uid in (1002, 1003, 1004, 1004, 1003, 1002):
        assert (await look(alice, uid)).message_type is MessageType.METHOD_RETURN
    assert [asked[2]["uid"] for asked in authority.asked] == ["1002", "1003", "1004", "1004"]


async def test_a_bus_that_went_away_takes_what_was_allowed_along(
    shown: str,
    authority: FakePolkit,
    service: Service,
    connection: Connection,
    new_client: Callable[[], Any],
) -> None:
    authority.answer = ALLOWED
    await look(await as_nobody(new_client))
    assert service._callers._polkit._granted
    connection.close()
    await eventually(lambda: not service._callers._polkit._granted)


async def test_nobody_waits_for_a_polkit_that_thinks(
    shown: str, authority: FakePolkit, stranger: Stranger, client: Client
) -> None:
    authority.answer = None
    await stranger.start(PATH, f"{MANAGER}.Reload", interactive=True)
    await eventually(lambda: authority.asked)
    assert await client.result("ListInstances")
    assert await client.result("Reload") is None


async def test_one_user_has_so_many_questions_open(
    shown: str, authority: FakePolkit, stranger: Stranger, client: Client
) -> None:
    """And no more: with 128 of them the bus would let the service ask nobody anything."""
    authority.answer = None
    for _ in range(ASKED_AT_MOST):
        await stranger.start(PATH, f"{MANAGER}.Reload", interactive=True)
    await eventually(lambda: len(authority.asked) == ASKED_AT_MOST, 30)
    assert "too many requests" in await stranger.call(PATH, f"{MANAGER}.Reload", interactive=True)
    assert "too many requests" in await stranger.call(shown, f"{INSTANCE}.ListHolders")
    assert await client.result("Reload") is None
    await stranger.close()
    await eventually(lambda: len(authority.withdrawn) == ASKED_AT_MOST, 30)


async def test_a_silent_polkit_is_a_no(
    shown: str, authority: FakePolkit, stranger: Stranger, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polkit, "QUIET_TIMEOUT", 0.2)
    monkeypatch.setattr(polkit, "INTERACTIVE_TIMEOUT", 0.2)
    authority.answer = None
    assert "polkit does not answer" in await as_stranger(stranger.bus, PATH, f"{MANAGER}.Reload")
    assert authority.withdrawn == []
    assert "denied" in await stranger.call(PATH, f"{MANAGER}.Reload", interactive=True)
    assert authority.withdrawn == [authority.asked[1][4]], "the dialogue is closed"
    assert backend.reloads == 0


async def test_the_question_is_withdrawn_when_the_caller_leaves(
    shown: str, authority: FakePolkit, stranger: Stranger, backend: Backend
) -> None:
    authority.answer = None
    process = await stranger.start(PATH, f"{MANAGER}.Reload", interactive=True)
    await eventually(lambda: authority.asked)
    process.kill()
    await eventually(lambda: authority.withdrawn)
    assert authority.withdrawn == [authority.asked[0][4]]
    assert backend.reloads == 0


async def test_a_removal_is_refused_with_the_names_of_who_lives_there(
    service: Service, backend: Backend, client: Client
) -> None:
    backend.refusal = BusyError("the instance of bob is active")
    name, text = await client.error("RemoveInstance", "u", [1002])
    assert (name, text) == (
        "org.polytmp1.Error.Busy",
        "the instance of bob is active, processes live in it: sleep (17), [x] (18)",
    )
    backend.error = PolytmpError("too many questions")
    assert (await client.error("RemoveInstance", "u", [1002]))[1] == "the instance of bob is active"


async def test_flags_that_nobody_knows(shown: str, client: Client, backend: Backend) -> None:
    name, text = await client.error("RemoveInstanceWithFlags", "ut", [1002, 6])
    assert (name, "0x6" in text) == ("org.freedesktop.DBus.Error.InvalidArgs", True)
    assert backend.removed == []


@pytest.mark.parametrize("pid", [0, 1])
async def test_whose_a_process_is_takes_long(
    service: Service, backend: Backend, stranger: Stranger, client: Client, pid: int
) -> None:
    """One look-up of one user at a time, and root's at once."""
    asked = 0

    async def uid_of_process(_: int) -> int:
        nonlocal asked
        asked += 1
        await gate.wait()
        raise NotPolyinstantiatedError("nobody's")

    gate = asyncio.Event()
    backend.uid_of_process = uid_of_process  # type: ignore[method-assign, assignment]  # a monkeypatch
    for _ in range(3):
        await stranger.start(PATH, f"{MANAGER}.GetInstanceByPID", "u", str(pid))
    await eventually(lambda: service._look_ups._asked.get(STRANGER) == 3)
    assert asked == 1
    call = asyncio.ensure_future(client.error("GetInstanceByPID", "u", [pid]))
    await eventually(lambda: asked == 2)
    for process in stranger.processes:
        process.kill()
    await eventually(lambda: STRANGER not in service._look_ups._asked)
    gate.set()
    assert await call == ("org.polytmp1.Error.NotPolyinstantiated", "nobody's")


# Counting, and searching


class Counting:
    """Counts that take until the test says so."""

    def __init__(self, backend: Backend) -> None:
        self.gate = asyncio.Event()
        self.running = 0
        self.most = 0
        self.cancelled = 0
        backend.usage = self.usage  # type: ignore[method-assign]  # what a monkeypatch does
        backend.processes = self._wait  # type: ignore[method-assign, assignment]  # as above
        backend.holders = self._wait  # type: ignore[method-assign, assignment]  # as above

    async def usage(self, uid: int) -> list[tuple[str, int, int]]:
        await self._wait(uid)
        return [("/tmp", 1, 2)]

    async def _wait(self, _: int) -> list[Any]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return []


QUESTIONS = ["GetUsage", "ListProcesses", "ListHolders"]


@pytest.mark.parametrize("member", QUESTIONS)
async def test_counting_ends_when_the_caller_leaves(
    service: Service, backend: Backend, new_client: Callable[[], Any], member: str
) -> None:
    counting = Counting(backend)
    backend.views.show(view(1002))
    leaving = await new_client()
    asked = asyncio.ensure_future(leaving.call(member, path=object_path(1002), interface=INSTANCE))
    await eventually(lambda: counting.running == 1)
    leaving.bus.disconnect()
    await eventually(lambda: counting.cancelled == 1)
    asked.cancel()
    await asyncio.wait((asked,))


@pytest.mark.parametrize("member", QUESTIONS)
async def test_few_counts_at_once(service: Service, backend: Backend, client: Client, member: str) -> None:
    counting = Counting(backend)
    backend.views.show(view(1002))
    path = object_path(1002)
    calls = [asyncio.ensure_future(client.call(member, path=path, interface=INSTANCE)) for _ in range(20)]
    await eventually(lambda: sum(call.done() for call in calls) == 4)
    assert {call.result().error_name for call in calls if call.done()} == {"org.polytmp1.Error.Failed"}
    assert counting.running == 2
    counting.gate.set()
    await asyncio.wait(calls)
    assert counting.most == 2
    assert await client.result("GetUserUsage", "u", [1002]) == [["/tmp", 1, 2]]


@pytest.mark.parametrize("member", QUESTIONS)
async def test_root_does_not_wait_for_others(
    service: Service, backend: Backend, stranger: Stranger, client: Client, member: str
) -> None:
    counting = Counting(backend)
    backend.views.show(view(STRANGER))
    for _ in range(3):
        await stranger.start(object_path(STRANGER), f"{INSTANCE}.{member}")
    turns = service._counts if member == "GetUsage" else service._lists
    await eventually(lambda: turns._asked.get(STRANGER) == 3)
    asked = asyncio.ensure_future(client.call(member, path=object_path(STRANGER), interface=INSTANCE))
    await eventually(lambda: counting.running == 2)
    counting.gate.set()
    await asyncio.wait_for(asked, 10)
    await eventually(lambda: not counting.running)
    assert counting.most == 2, "root's, and one of the stranger's"


@pytest.mark.parametrize("member", QUESTIONS)
async def test_counting_has_an_end(
    service: Service, backend: Backend, client: Client, monkeypatch: pytest.MonkeyPatch, member: str
) -> None:
    monkeypatch.setattr(callers, "ANSWER_TIMEOUT", 0.2)
    counting = Counting(backend)
    backend.views.show(view(1002))
    name, text = await client.error(member, path=object_path(1002), interface=INSTANCE)
    assert (name, "found no answer within" in text) == ("org.polytmp1.Error.Failed", True)
    assert counting.cancelled == 1

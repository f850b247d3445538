# SPDX-License-Identifier: LGPL-2.1-or-later
"""What polkit allows, and what happens if it is slow, silent or missing.

Not here: the real polkitd (tests/e2e/test_polkit.py).
"""

from collections.abc import Callable
from typing import Any

import pytest

from polytmpd.bus import polkit
from polytmpd.bus.connection import Connection
from polytmpd.bus.contract import INSTANCE, MANAGER, PATH
from polytmpd.bus.library import Message, MessageFlag, MessageType
from polytmpd.bus.service import Service
from polytmpd.bus.turns import ASKED_AT_MOST
from polytmpd.core.names import object_path
from polytmpd.errors import BusyError, PolytmpError
from tests.bus.polkit_world import ALLOWED, CHALLENGE, DENIED, FakePolkit, Stranger, as_nobody
from tests.bus.world import PROPERTIES, STRANGER, Backend, Client, as_stranger, view
from tests.unit.settled import eventually

pytestmark = [pytest.mark.bus, pytest.mark.usefixtures("root")]

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
    assert kind == "system-bus-name", "a PID may have been reused"
    assert subject["name"].value.startswith(":1.")
    details = {} if action == "reload" else {"uid": "1002", "user": "bob"}
    assert authority.asked[0][2] == details


async def test_a_users_own_instance_has_a_separate_action(
    service: Service, backend: Backend, authority: FakePolkit, stranger: Stranger
) -> None:
    backend.views.show(view(STRANGER, "nobody"))
    authority.answer = ALLOWED
    await stranger.call(PATH, f"{MANAGER}.RemoveInstance", "u", str(STRANGER))
    assert [asked[1] for asked in authority.asked] == ["org.polytmp1.remove-own-instance"]
    assert backend.removed == [(STRANGER, False)]
    await stranger.call(object_path(STRANGER), f"{INSTANCE}.ListProcesses")
    assert len(authority.asked) == 1, "users need no authorization to inspect their own instance"


async def test_root_needs_no_authorization(
    shown: str, authority: FakePolkit, client: Client, backend: Backend
) -> None:
    await client.result("RemoveInstance", "u", [1002])
    await client.result("Reload")
    await client.result("ListProcesses", path=shown, interface=INSTANCE)
    assert authority.asked == []


async def test_polkit_may_ask_the_user_only_if_the_caller_allows_it(
    shown: str, authority: FakePolkit, stranger: Stranger
) -> None:
    await stranger.call(PATH, f"{MANAGER}.Reload")
    await stranger.call(PATH, f"{MANAGER}.Reload", interactive=True)
    assert [(asked[3], bool(asked[4])) for asked in authority.asked] == [(0, False), (1, True)]


async def test_without_polkit_only_root_is_allowed(shown: str, stranger: Stranger, backend: Backend) -> None:
    assert "polkit is not available" in await as_stranger(
        stranger.bus, PATH, f"{MANAGER}.RemoveInstance", "uint32:1002"
    )
    assert "denied" in await stranger.call(PATH, f"{MANAGER}.Reload", interactive=True)
    assert (backend.removed, backend.reloads) == ([], 0)


async def look(client: Client, uid: int = 1002, *, interactive: bool = True) -> Message:
    flags = MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else MessageFlag.NONE
    return await client.call("GetUserUsage", "u", [uid], flags=flags)


async def test_an_authorization_is_kept_for_one_user_and_one_connection(
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


async def test_denials_and_rule_decisions_are_not_remembered(
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


async def test_changes_are_authorized_every_time(
    shown: str, authority: FakePolkit, new_client: Callable[[], Any]
) -> None:
    authority.answer = ALLOWED
    alice = await as_nobody(new_client)
    for _ in range(2):
        await alice.call("RemoveInstance", "u", [1002], flags=MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION)
    assert len(authority.asked) == 2


async def test_the_number_of_remembered_authorizations_is_limited(
    service: Service, authority: FakePolkit, new_client: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polkit, "_GRANTED_AT_MOST", 2)
    authority.answer = ALLOWED
    alice = await as_nobody(new_client)
    for uid in (1002, 1003, 1004, 1004, 1003, 1002):
        assert (await look(alice, uid)).message_type is MessageType.METHOD_RETURN
    assert [asked[2]["uid"] for asked in authority.asked] == ["1002", "1003", "1004", "1004"]


async def test_authorizations_end_with_the_bus(
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


async def test_a_slow_polkit_delays_no_other_caller(
    shown: str, authority: FakePolkit, stranger: Stranger, client: Client
) -> None:
    authority.answer = None
    await stranger.start(PATH, f"{MANAGER}.Reload", interactive=True)
    await eventually(lambda: authority.asked)
    assert await client.result("ListInstances")
    assert await client.result("Reload") is None


async def test_the_open_requests_of_each_user_are_limited(
    shown: str, authority: FakePolkit, stranger: Stranger, client: Client
) -> None:
    """With 128 requests pending, the bus would not let the service send any more calls."""
    authority.answer = None
    for _ in range(ASKED_AT_MOST):
        await stranger.start(PATH, f"{MANAGER}.Reload", interactive=True)
    await eventually(lambda: len(authority.asked) == ASKED_AT_MOST, 30)
    assert "too many requests" in await stranger.call(PATH, f"{MANAGER}.Reload", interactive=True)
    assert "too many requests" in await stranger.call(shown, f"{INSTANCE}.ListHolders")
    assert await client.result("Reload") is None
    await stranger.close()
    await eventually(lambda: len(authority.withdrawn) == ASKED_AT_MOST, 30)


async def test_a_silent_polkit_means_denied(
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


async def test_the_polkit_check_is_cancelled_when_the_caller_leaves(
    shown: str, authority: FakePolkit, stranger: Stranger, backend: Backend
) -> None:
    authority.answer = None
    process = await stranger.start(PATH, f"{MANAGER}.Reload", interactive=True)
    await eventually(lambda: authority.asked)
    process.kill()
    await eventually(lambda: authority.withdrawn)
    assert authority.withdrawn == [authority.asked[0][4]]
    assert backend.reloads == 0


async def test_a_refused_removal_names_the_processes(
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


async def test_unknown_flags(shown: str, client: Client, backend: Backend) -> None:
    name, text = await client.error("RemoveInstanceWithFlags", "ut", [1002, 6])
    assert (name, "0x6" in text) == ("org.freedesktop.DBus.Error.InvalidArgs", True)
    assert backend.removed == []

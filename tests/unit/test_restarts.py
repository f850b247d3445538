# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restarts: what a new daemon takes over from a former one, and how it copes with a missing logind."""

import asyncio

import pytest

from polytmpd import presence
from polytmpd.bus.logind import Session
from polytmpd.core.model import State
from polytmpd.executor.actions import Restored
from tests.unit.settled import eventually
from tests.unit.world import ALICE, BOB, World, instance

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]


async def test_living_instances_are_taken_over(world: World) -> None:
    world.executor.restored = Restored([instance(1000, "alice", 7)], [instance(1001, "bob", 8)])
    world.logind.listed_users = [ALICE]
    world.logind.listed_sessions = [Session("1", ALICE)]
    await world.daemon.start()
    assert (world.state(1000), world.state(1001)) == (State.ACTIVE, State.DRAINING)
    assert "prepare 1000" not in world.executor.log
    await world.handed_over(world.login())


async def test_instances_that_ended_meanwhile_are_removed(world: World) -> None:
    world.executor.restored = Restored([], [instance(1000, "alice", 7)])
    await world.daemon.start()
    world.daemon.namespace_ended(1000)  # as the executor finds out after its start
    await eventually(lambda: world.executor.waits("remove 7"))
    world.executor.answer("remove 7")
    await eventually(lambda: world.state() is None)


async def test_logged_in_users_get_an_instance_for_new_sessions(world: World) -> None:
    world.logind.listed_users = [ALICE]
    world.logind.listed_sessions = [Session("1", ALICE)]
    await world.daemon.start()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await eventually(lambda: world.state() is State.ACTIVE)


async def test_the_daemon_starts_without_logind(world: World) -> None:
    world.logind.away = True
    await world.daemon.start()
    login = world.login()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await world.handed_over(login)


async def test_nothing_begins_while_the_daemon_stops(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """logind's signals arrive until the end, while the parts that act on them are closed one by one."""
    close = world.executor.close

    async def close_slowly() -> None:
        world.presence.session_new(Session("1", ALICE))
        login = world.login()
        await world.settle()
        login.cancel()
        await close()

    monkeypatch.setattr(world.executor, "close", close_slowly)
    await world.stop()
    assert "prepare 1000" not in world.executor.log


async def test_nothing_drains_until_logind_has_replied(world: World) -> None:
    """After a restart of the bus, logind returns late. Until then, users with an instance are present."""
    world = World()
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    world.slices.populated[1000] = True
    world.logind.away = True
    world.executor.restored = Restored([instance(1000, "alice", 7)], [])
    await world.daemon.start()
    assert world.state() is State.ACTIVE
    world.logind.away = False
    world.presence.logind_changed()
    await eventually(lambda: world.state() is State.DRAINING)
    assert 1000 in world.executor.held
    await world.stop()


async def test_a_logind_that_does_not_reply_at_start_is_asked_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was slow but never left the bus, so no signal says that it is back."""
    monkeypatch.setattr(presence, "_LIST_AGAIN", 0.01)
    world = World()
    world.logind.away = True
    world.executor.restored = Restored([instance(1000, "alice", 7)], [])
    await world.daemon.start()
    world.presence.logind_changed()
    await asyncio.sleep(0.1)  # ten attempts, none of which may change the state
    assert world.state() is State.ACTIVE
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len([record for record in warnings if "does not answer" in record.message]) == 1
    world.logind.away = False
    await eventually(lambda: world.state() is State.DRAINING)
    assert world.executor.log[-1] == "let_go 1000"
    world.logind.listed_sessions = [Session("1", BOB)]
    await asyncio.sleep(0.05)  # nothing must happen, so there is no condition to wait for
    assert world.state(1001) is None, "it is asked no more"
    await world.stop()


async def test_sessions_that_ended_while_logind_was_away_are_released(world: World) -> None:
    await world.active(ALICE, "1")
    await world.active(BOB, "2")
    world.logind.listed_users = [BOB]
    world.logind.listed_sessions = [Session("2", BOB)]
    world.presence.logind_changed()
    await eventually(lambda: world.state(1000) is State.DRAINING)
    assert world.state(1001) is State.ACTIVE


async def test_a_session_that_ended_but_not_its_user(world: World) -> None:
    world.presence.session_new(Session("1", ALICE))
    await world.active(ALICE, "2")
    world.logind.listed_users = [ALICE]
    world.logind.listed_sessions = [Session("2", ALICE)]
    world.presence.logind_changed()
    await world.settle()
    assert world.state() is State.ACTIVE
    world.presence.session_removed("2")
    assert world.state() is State.DRAINING


async def test_a_login_during_the_listing_is_kept(world: World) -> None:
    """logind's signals may arrive between its two replies."""
    await world.active(BOB, "2")
    world.logind.listed_users = [BOB]
    world.logind.listed_sessions = [Session("2", BOB)]
    world.logind.between = lambda: world.presence.session_new(Session("9", ALICE))
    world.presence.logind_changed()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await world.settle()
    assert world.state(1000) is State.ACTIVE


async def test_a_logout_during_the_listing_is_believed(world: World) -> None:
    await world.active(ALICE, "1")
    world.logind.listed_users = [ALICE]
    world.logind.listed_sessions = [Session("1", ALICE)]

    def gone() -> None:
        world.presence.session_removed("1")
        world.presence.user_removed(1000)

    world.logind.between = gone
    world.presence.logind_changed()
    await world.settle()
    assert world.state() is State.DRAINING
    assert not world.executor.waits("rejoin")


async def test_stop_leaves_instances(world: World) -> None:
    await world.active()
    await world.stop()
    assert world.state() is State.ACTIVE
    assert "let_go 1000" not in world.executor.log

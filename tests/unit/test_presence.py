# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which users are present, according to logind, systemd and the slices."""

import pytest

from polytmpd.bus.logind import Session
from polytmpd.core.model import State
from tests.unit.settled import eventually
from tests.unit.world import ALICE, World

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]


async def test_the_last_session_ends(world: World) -> None:
    await world.active(session="1")
    world.presence.session_new(Session("2", ALICE))
    world.presence.session_removed("1")
    assert world.state() is State.ACTIVE
    world.presence.session_removed("2")
    assert world.state() is State.DRAINING
    assert world.executor.log[-1] == "let_go 1000"
    world.presence.session_removed("2")
    world.presence.session_removed("never")
    assert world.executor.log.count("let_go 1000") == 1


async def test_processes_outlive_the_session(world: World) -> None:
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    world.slices.populated[1000] = True
    await world.active()
    world.presence.session_removed("1")
    world.presence.user_removed(1000)
    await world.settle()
    assert world.state() is State.DRAINING
    assert 1000 in world.executor.held, "for new sessions to join"
    assert next(iter(world.views)).control_group == "/user.slice/user-1000.slice"
    world.presence.session_new(Session("2", ALICE))
    assert world.state() is State.ACTIVE
    world.presence.session_removed("2")
    assert world.announced[-3:] == [("changed", (1000, ("state",)))] * 3
    world.slices.say(1000, False)
    assert world.state() is State.DRAINING
    assert 1000 not in world.executor.held
    assert len(world.announced.of("changed")) == 6, "still draining: nothing to tell"


async def test_a_session_that_closes_is_over(world: World) -> None:
    """It is reported as removed once while processes are left in it, and once when they are gone."""
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    world.slices.populated[1000] = True
    await world.active()
    for _ in range(2):
        world.presence.session_removed("1")
        await world.settle()
        assert world.state() is State.DRAINING
        assert 1000 in world.executor.held


async def test_the_slices_are_examined_again_when_the_service_manager_is_back(world: World) -> None:
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    await world.active()
    world.slices.populated[1000] = True
    world.presence.systemd_changed()
    await world.settle()
    world.presence.session_removed("1")
    await world.settle()
    assert 1000 in world.executor.held


async def test_a_slice_that_was_made_before_its_user_is_known(world: World) -> None:
    """systemd starts it while the daemon asks for the user's name, and reports nothing later."""
    await world.daemon.start()
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    world.slices.populated[1000] = True
    world.presence.slice_made(1000)
    await world.active()
    world.presence.session_removed("1")
    await world.settle()
    assert 1000 in world.executor.held


async def test_a_slice_that_is_made_after_its_user_came(world: World) -> None:
    await world.active()
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    world.slices.populated[1000] = True
    world.presence.slice_made(1000)
    await world.settle()
    assert next(iter(world.views)).control_group == "/user.slice/user-1000.slice"
    world.presence.session_removed("1")
    assert 1000 in world.executor.held


async def test_a_manager_session_is_not_a_login(world: World) -> None:
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    world.slices.populated[1000] = True
    await world.active()
    world.presence.session_new(Session("2", ALICE, is_login=False))
    world.presence.session_removed("1")
    await world.settle()
    assert world.state() is State.DRAINING
    assert 1000 in world.executor.held


async def test_linger_starts_without_a_session(world: World) -> None:
    world.presence.user_new(ALICE)
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await eventually(lambda: world.state() is State.ACTIVE)
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    world.slices.say(1000, True)  # systemd makes /run/user/1000
    world.slices.say(1000, False)
    assert world.state() is State.ACTIVE
    world.slices.populated[1000] = True  # not reported yet when the user's manager logs in
    await world.handed_over(world.login())
    assert world.state() is State.DRAINING, "no user is logged in"
    assert 1000 in world.executor.held
    world.slices.say(1000, False)
    assert 1000 not in world.executor.held


async def test_a_manager_whose_instance_has_just_ended(world: World) -> None:
    """The slice's reports are not heard while there is no instance."""
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    world.slices.populated[1000] = True
    login = world.login()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await world.handed_over(login)
    assert 1000 in world.executor.held


async def test_a_user_who_starts_but_never_logs_in(world: World) -> None:
    world.presence.user_new(ALICE)
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await eventually(lambda: world.state() is State.ACTIVE)
    world.presence.user_removed(1000)
    await world.settle()
    assert world.state() is State.DRAINING


async def test_a_slice_of_an_unknown_user(world: World) -> None:
    world.presence.slice_populated(1000, True)
    world.presence.slice_made(1000)
    world.presence.user_removed(1000)
    world.daemon.namespace_ended(1000)
    await world.settle()
    assert list(world.views) == []
    assert world.executor.log == []

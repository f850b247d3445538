# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon feeds the lifecycle and has its actions done: logins, draining, removal, configuration."""

import asyncio
import os
from dataclasses import replace

import pytest

from polytmpd.bus.logind import Session, User
from polytmpd.config import Config, Problem
from polytmpd.core.model import Directory, Instance, Lifetime, State
from polytmpd.core.policy import Exemptions
from polytmpd.errors import (
    BusyError,
    ExemptError,
    InvalidArgsError,
    NoSuchInstanceError,
    PolytmpError,
)
from polytmpd.kernel.descriptor import Descriptor
from tests.unit.settled import eventually
from tests.unit.world import ALICE, BOB, NOBODY_HAS, World

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]

# Logins


async def test_concurrent_first_logins_make_one_instance(world: World) -> None:
    logins = [world.login(), world.login()]
    await eventually(lambda: world.executor.waits("prepare"))
    world.presence.user_new(ALICE)
    world.presence.session_new(Session("1", ALICE))
    third = world.login()
    await world.settle()
    assert world.state() is State.PREPARING
    world.executor.answer("prepare")
    await world.handed_over(*logins, third)
    assert world.executor.log.count("prepare 1000") == 1
    assert world.state() is State.ACTIVE
    assert world.announced.of("new", "removed") == [("new", 1000)]


async def test_a_login_to_an_active_instance_does_not_wait(world: World) -> None:
    await world.active()
    await world.handed_over(world.login(), world.login())
    assert world.executor.log.count("prepare 1000") == 1


async def test_another_barrier_is_shown(world: World) -> None:
    await world.active()
    view = world.views.get(1000)
    assert view is not None
    [*others, last] = view.directories
    other = replace(last, barrier="polytmp-other")
    instance = Instance(1000, "alice", 0, 0, (*others, other))
    world.executor.change(instance)
    shown = world.views.get(1000)
    assert shown == replace(view, directories=instance.directories)
    world.executor.change(replace(instance, uid=1001))
    assert world.state(1001) is None


async def test_each_user_has_a_separate_instance(world: World) -> None:
    await world.active(ALICE, "1")
    await world.active(BOB, "2")
    assert [view.uid for view in world.views] == [1000, 1001]
    world.presence.session_removed("2")
    assert (world.state(1000), world.state(1001)) == (State.ACTIVE, State.DRAINING)


async def test_a_login_outside_of_any_slice_drains_at_once(world: World) -> None:
    """cron: neither a session nor a slice. The login's own descriptor keeps the namespace."""
    login = world.login()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await world.handed_over(login)
    assert world.executor.log[-2:] == ["hand_over 1000", "let_go 1000"]
    assert world.state() is State.DRAINING
    world.daemon.namespace_ended(1000)
    await eventually(lambda: world.executor.waits("remove 1"))
    world.executor.answer("remove 1")
    await eventually(lambda: world.state() is None)


async def test_exempt_users(world: World) -> None:
    for uid in (0, 999, 65534, 4294967295):
        with pytest.raises(ExemptError):
            await world.login(uid)
    with pytest.raises(ExemptError, match="carol"):
        await world.login(1002)
    world.presence.user_new(User(1002, "carol"))
    world.presence.session_new(Session("1", User(0, "root")))
    await world.settle()
    assert list(world.views) == []
    assert world.executor.log == []


async def test_unknown_user(world: World) -> None:
    with pytest.raises(InvalidArgsError, match=f"no user with UID {NOBODY_HAS}"):
        await world.login(NOBODY_HAS)
    assert list(world.views) == []


async def test_a_failed_prepare_fails_all_waiting_logins(world: World) -> None:
    logins = [world.login(), world.login()]
    await eventually(lambda: world.executor.waits("prepare"))
    # Each first looks up its user's name in a thread.
    await eventually(lambda: len(world.daemon._records[1000].waiting) == len(logins))
    world.executor.answer("prepare", OSError(2, "No such file or directory", "/proc/1/root/srv/none"))
    for login in logins:
        with pytest.raises(PolytmpError, match=r"^failed to make the instance: No such file .*: /srv/none$"):
            await asyncio.wait_for(login, 5)
    assert world.state() is None
    assert world.announced.of("new", "removed") == [("new", 1000), ("removed", 1000)]
    again = world.login()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await world.handed_over(again)


async def test_a_login_that_is_given_up_while_it_is_answered_leaves_no_descriptor(world: World) -> None:
    login = world.login()
    await eventually(lambda: world.executor.waits("prepare"))
    (waiting,) = world.daemon._records[1000].waiting
    handed_over = Descriptor.open("/dev/null", os.O_PATH)
    waiting.set_result(handed_over)
    login.cancel()
    with pytest.raises(asyncio.CancelledError):
        await login
    assert handed_over.closed
    world.executor.answer("prepare")
    await world.handed_over(world.login())


async def test_a_login_that_is_given_up_before_it_is_its_turn_gets_no_descriptor(world: World) -> None:
    """The service manager's login waits until its slice was examined. Nobody would close what it gets."""
    answered = asyncio.Event()

    async def user_slice() -> str:
        await answered.wait()
        return "/user.slice"

    world.systemd.user_slice = user_slice  # type: ignore[method-assign]
    world.presence.user_new(ALICE)
    await eventually(lambda: world.executor.waits("prepare"))
    login = world.login()
    await eventually(lambda: world.daemon._records[1000].waiting)
    await world.settle()
    login.cancel()
    with pytest.raises(asyncio.CancelledError):
        await login
    answered.set()
    world.executor.answer("prepare")
    await eventually(lambda: world.state() is State.ACTIVE)
    assert "hand_over 1000" not in world.executor.log
    await world.handed_over(world.login())


async def test_the_failed_instance_of_a_logged_in_user_is_shown_and_retried(world: World) -> None:
    world.presence.session_new(Session("1", ALICE))
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare", OSError(28, "No space left on device"))
    await eventually(lambda: world.state() is State.FAILED)
    login = world.login()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await world.handed_over(login)
    assert world.state() is State.ACTIVE


async def test_callers_are_told_of_unexpected_errors(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Python raises RuntimeError if it cannot start a thread."""
    login = world.login()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare", RuntimeError("can't start new thread"))
    try:
        with pytest.raises(PolytmpError):
            await asyncio.wait_for(login, 5)
    finally:
        caplog.clear()


# Draining and removing


async def test_a_login_joins_a_draining_instance(world: World) -> None:
    await world.drained()
    login = world.login()
    await eventually(lambda: world.executor.waits("rejoin"))
    world.presence.session_new(Session("2", ALICE))
    world.executor.answer("rejoin")
    await world.handed_over(login)
    assert world.state() is State.ACTIVE
    assert world.executor.log.count("prepare 1000") == 1
    assert world.announced.of("new", "removed") == [("new", 1000)], "it is the same instance"


async def test_an_instance_ends(world: World) -> None:
    await world.removing()
    world.executor.answer("remove 1")
    await eventually(lambda: world.state() is None)
    assert world.announced.of("new", "removed") == [("new", 1000), ("removed", 1000)]
    with pytest.raises(NoSuchInstanceError):
        await world.questions.resolve(1000, "/tmp/x")


async def test_a_login_does_not_wait_for_the_removal_of_the_old_instance(world: World) -> None:
    await world.removing()
    world.presence.session_new(Session("2", ALICE))
    login = world.login()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await world.handed_over(login)
    assert world.state() is State.ACTIVE
    assert world.announced.of("new", "removed") == [("new", 1000), ("removed", 1000), ("new", 1000)]
    world.executor.answer("remove 1")
    await world.settle()
    assert world.state() is State.ACTIVE, "the end of the old one is not the end of the new one"
    view = world.views.get(1000)
    assert view
    assert view.namespace == 2


async def test_a_late_failure_of_the_old_instance_does_not_affect_the_new_one(world: World) -> None:
    await world.removing()
    world.presence.session_new(Session("2", ALICE))
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("remove 1", OSError(1, "Operation not permitted"))
    await world.settle()
    assert world.state() is State.PREPARING
    world.executor.answer("prepare")
    await eventually(lambda: world.state() is State.ACTIVE)


async def test_a_login_at_the_moment_the_instance_ends(world: World) -> None:
    """One iteration of the loop reads both the end of the namespace and the login."""
    await world.drained()
    world.daemon.namespace_ended(1000)
    world.presence.session_new(Session("2", ALICE))
    await eventually(lambda: world.executor.waits("prepare"))
    await eventually(lambda: world.executor.waits("remove 1"))
    world.executor.answer("prepare")
    await eventually(lambda: world.state() is State.ACTIVE)


async def test_the_end_of_the_old_instance_does_not_reach_the_new_one(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.drained()
    world.daemon.namespace_ended(1000)
    world.presence.session_new(Session("2", ALICE))
    await eventually(lambda: world.executor.waits("remove 1"))
    world.executor.answer("remove 1")
    await world.settle()
    failed = "Internal error" in caplog.text
    caplog.clear()
    assert not failed


async def test_a_failed_removal_is_shown_until_an_administrator_retries_it(world: World) -> None:
    await world.removing()
    world.executor.answer("remove 1", OSError(1, "Operation not permitted"))
    await eventually(lambda: world.state() is State.FAILED)
    world.presence.user_removed(1000)
    assert world.state() is State.FAILED, "logind has forgotten the user, but the files are left"
    again = asyncio.ensure_future(world.daemon.remove(1000))
    await eventually(lambda: world.executor.waits("remove 1"))
    world.executor.answer("remove 1", OSError(16, "is a mount point"))
    with pytest.raises(PolytmpError, match="is a mount point"):
        await again
    assert world.state() is State.FAILED
    again = asyncio.ensure_future(world.daemon.remove(1000))
    await eventually(lambda: world.executor.waits("remove 1"))
    assert world.state() is State.FAILED, "until the removal is done"
    world.executor.answer("remove 1")
    await again
    assert world.state() is None


async def test_a_login_during_the_second_removal_gets_a_new_instance(world: World) -> None:
    await world.removing()
    world.executor.answer("remove 1", OSError(1, "Operation not permitted"))
    await eventually(lambda: world.state() is State.FAILED)
    again = asyncio.ensure_future(world.daemon.remove(1000))
    await eventually(lambda: world.executor.waits("remove 1"))
    world.presence.session_new(Session("2", ALICE))
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await eventually(lambda: world.state() is State.ACTIVE)
    world.executor.answer("remove 1")
    await again
    assert world.state() is State.ACTIVE


async def test_remove_is_refused_while_the_user_is_logged_in(world: World) -> None:
    await world.active()
    with pytest.raises(BusyError, match="alice is active"):
        await world.daemon.remove(1000)
    assert world.state() is State.ACTIVE
    with pytest.raises(NoSuchInstanceError):
        await world.daemon.remove(1001)


async def test_persistent_files_are_removed_after_the_user_has_left(world: World) -> None:
    with pytest.raises(NoSuchInstanceError):
        await world.daemon.remove(1000, persistent=True)
    world.executor.kept = {1000}
    await world.daemon.remove(1000, persistent=True)
    await world.active()
    with pytest.raises(BusyError):
        await world.daemon.remove(1000, persistent=True)
    assert world.executor.log.count("remove_persistent 1000") == 2


async def test_a_late_end_has_no_effect(world: World) -> None:
    """A rejoin failed. The namespace that could not be joined ends afterwards."""
    await world.drained()
    world.presence.session_new(Session("2", ALICE))
    await eventually(lambda: world.executor.waits("rejoin"))
    world.executor.answer("rejoin", OSError(28, "No space left on device"))
    await world.settle()
    world.daemon.namespace_ended(1000)
    await eventually(lambda: world.executor.waits("remove 1"))


async def test_an_end_during_a_failed_rejoin_is_not_lost(world: World) -> None:
    await world.drained()
    world.presence.session_new(Session("2", ALICE))
    await eventually(lambda: world.executor.waits("rejoin"))
    world.daemon.namespace_ended(1000)
    world.executor.ended.add(1000)
    world.executor.answer("rejoin", OSError(28, "No space left on device"))
    await eventually(lambda: world.executor.waits("remove 1"))


# Configuration


async def test_reloading_an_invalid_file_changes_nothing_and_names_it(world: World) -> None:
    world.problems = [Problem("/etc/polytmpd.conf:3: 'x' is no assignment; write Key=value", "ignoring")]
    world.config = replace(world.config, directories=())
    with pytest.raises(InvalidArgsError, match=r"/etc/polytmpd\.conf:3.*write Key=value$"):
        await world.daemon.reload()
    assert world.views.directories == ("/tmp", "/var/tmp")
    assert world.announced == []


async def test_reloading_a_valid_file_affects_new_instances(world: World) -> None:
    await world.active(ALICE, "1")
    world.config = Config((Directory("/srv", Lifetime.INSTANCE),), Exemptions(users=frozenset({"alice"})))
    await world.daemon.reload()
    assert world.announced.of("directories") == [("directories", None)]
    assert world.views.directories == ("/srv",)
    await world.active(BOB, "2")
    directories = {view.uid: [entry.directory.path for entry in view.directories] for view in world.views}
    assert directories == {1000: ["/tmp", "/var/tmp"], 1001: ["/srv"]}
    with pytest.raises(ExemptError):
        await world.login(1000)

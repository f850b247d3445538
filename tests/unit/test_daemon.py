# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events in, actions out: the daemon between a logind, slices and an executor that do as the test says."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from polytmpd import daemon
from polytmpd.bus.connection import BusError
from polytmpd.bus.logind import Session, User
from polytmpd.config import Config, Problem
from polytmpd.core.model import Directory, Instance, InstanceDirectory, Lifetime, State
from polytmpd.core.policy import Exemptions
from polytmpd.daemon import Daemon
from polytmpd.errors import (
    BusyError,
    ExemptError,
    InvalidArgsError,
    NoSuchInstanceError,
    NotPolyinstantiatedError,
    PolytmpError,
)
from polytmpd.executor import Restored
from tests.unit.settled import eventually

if TYPE_CHECKING:
    from polytmpd.bus.logind import Logind
    from polytmpd.bus.systemd1 import Systemd
    from polytmpd.executor import Executor
    from polytmpd.slices import Slices

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]

ALICE, BOB = User(1000, "alice"), User(1001, "bob")
NOBODY_HAS = 59999
OWN_NAMESPACE = Path("/proc/self/ns/mnt").stat().st_ino


class FakeExecutor:
    """Remembers what it was asked for; each operation ends when the test says how."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.asked: list[tuple[str, int, asyncio.Future[None]]] = []
        self.held: dict[int, int] = {}
        self.made = 0
        self.restored = Restored([], [])
        self.known: set[str] = set()
        self.kept: set[int] = set()
        self.ended: set[int] = set()
        self.spared: list[str] = []

    def restore(self, directories: Sequence[Directory]) -> Restored:
        for instance in self.restored.held:
            self.held[instance.uid] = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        return self.restored

    async def tell_age_cleaner(self, directories: Sequence[Directory]) -> None:
        self.spared = [directory.path for directory in directories]

    def start(self) -> None:
        self.log.append("start")

    async def close(self) -> None:
        for fd in self.held.values():
            os.close(fd)
        self.held.clear()

    async def _ask(self, what: str, uid: int) -> None:
        self.log.append(f"{what} {uid}")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.asked.append((what, uid, future))
        await future

    def answer(self, what: str, error: Exception | None = None) -> None:
        """End the oldest such operation."""
        entry = next(entry for entry in self.asked if entry[0] == what)
        self.asked.remove(entry)
        if error is None:
            entry[2].set_result(None)
        else:
            entry[2].set_exception(error)

    def waits(self, what: str) -> bool:
        return any(entry[0] == what for entry in self.asked)

    def _hold(self, uid: int) -> None:
        assert uid not in self.held
        self.held[uid] = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    async def prepare(self, uid: int, user: str, directories: Sequence[Directory]) -> Instance:
        await self._ask("prepare", uid)
        self._hold(uid)
        self.made += 1
        return instance(uid, user, self.made, directories)

    async def rejoin(self, old: Instance) -> Instance:
        await self._ask("rejoin", old.uid)
        self._hold(old.uid)
        return old

    def has_ended(self, uid: int) -> bool:
        return uid in self.ended

    def hand_over(self, uid: int) -> int:
        self.log.append(f"hand_over {uid}")
        return os.dup(self.held[uid])

    def let_go(self, uid: int) -> None:
        self.log.append(f"let_go {uid}")
        os.close(self.held.pop(uid))

    async def remove(self, old: Instance) -> None:
        await self._ask(f"remove {old.namespace}", old.uid)

    async def remove_persistent(self, uid: int, directories: Sequence[Directory]) -> bool:
        self.log.append(f"remove_persistent {uid}")
        return uid in self.kept

    def persistent(self, uid: int, directories: Sequence[Directory]) -> tuple[InstanceDirectory, ...]:
        if uid != BOB.uid:
            return ()
        return (InstanceDirectory(Directory("/var/tmp", Lifetime.PERSISTENT), f"polytmp-{uid}"),)

    async def find_leftovers(
        self, directories: Sequence[Directory], known: set[str]
    ) -> list[tuple[str, str]]:
        self.known = known
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.log.append("found")
        return [("/tmp", "left")]

    async def delete_leftovers(self, leftovers: Sequence[tuple[str, str]]) -> None:
        self.log.append(f"delete {leftovers}")


def instance(
    uid: int, user: str, number: int, directories: Sequence[Directory] = Config().directories
) -> Instance:
    entries = tuple(InstanceDirectory(entry, f"polytmp-{uid}-{number}") for entry in directories)
    return Instance(uid, user, 11, 22, entries, number)


class FakeLogind:
    def __init__(self) -> None:
        self.listed_users: list[User] = []
        self.listed_sessions: list[Session] = []
        self.away = False
        self.between: Callable[[], None] = lambda: None

    async def users(self) -> list[User]:
        await asyncio.sleep(0)
        if self.away:
            raise BusError("org.freedesktop.DBus.Error.ServiceUnknown", "away")
        return list(self.listed_users)

    async def sessions(self) -> list[Session]:
        listed = list(self.listed_sessions)
        self.between()
        await asyncio.sleep(0)
        return listed

    async def is_open(self, session: str) -> bool:
        await asyncio.sleep(0)
        if self.away:
            raise BusError("org.freedesktop.DBus.Error.ServiceUnknown", "away")
        return any(entry.id == session for entry in self.listed_sessions)


class FakeSystemd:
    def __init__(self) -> None:
        self.groups: dict[int, str] = {}

    async def control_group(self, uid: int) -> str:
        await asyncio.sleep(0)
        return self.groups.get(uid, "")


class FakeSlices:
    def __init__(self, heard: Callable[[int, bool], None]) -> None:
        self.heard = heard
        self.populated: dict[int, bool] = {}
        self.watched: list[tuple[int, str]] = []

    def watch(self, uid: int, control_group: str) -> None:
        self.watched.append((uid, control_group))
        self.heard(uid, bool(control_group) and self.populated.get(uid, False))

    def say(self, uid: int, populated: bool) -> None:
        self.populated[uid] = populated
        self.heard(uid, populated)


class Announced(list[tuple[str, Any]]):
    def instance_new(self, uid: int) -> None:
        self.append(("new", uid))

    def instance_removed(self, uid: int) -> None:
        self.append(("removed", uid))

    def instance_changed(self, uid: int, names: Sequence[str]) -> None:
        self.append(("changed", (uid, tuple(names))))

    def manager_changed(self, names: Sequence[str]) -> None:
        self.append(("manager", tuple(names)))

    def of(self, *kinds: str) -> list[tuple[str, Any]]:
        return [entry for entry in self if entry[0] in kinds]


class World:
    """The daemon and everything around it."""

    def __init__(self) -> None:
        self.executor = FakeExecutor()
        self.logind = FakeLogind()
        self.systemd = FakeSystemd()
        self.announced = Announced()
        self.config = Config(exemptions=Exemptions(users=frozenset({"carol"})))
        self.problems: list[Problem] = []
        self.daemon = Daemon(
            self.config, cast("Executor", self.executor), lambda: (self.config, self.problems)
        )
        self.slices = FakeSlices(self.daemon.slice_populated)
        self.daemon.connect(
            self.announced,
            cast("Logind", self.logind),
            cast("Systemd", self.systemd),
            cast("Slices", self.slices),
        )

    def state(self, uid: int = 1000) -> State | None:
        view = self.daemon.view(uid)
        return view.state if view else None

    def login(self, uid: int = 1000) -> "asyncio.Task[int]":
        return asyncio.ensure_future(self.daemon.acquire(uid, os.getpid()))

    async def active(self, user: User = ALICE, session: str = "1") -> None:
        """The user is logged in, and his instance is ready."""
        self.daemon.session_new(Session(session, user))
        await eventually(lambda: self.executor.waits("prepare"))
        self.executor.answer("prepare")
        await eventually(lambda: self.state(user.uid) is State.ACTIVE)

    async def settle(self) -> None:
        """Let everything that was begun go on as far as it can."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def handed_over(self, *logins: "asyncio.Task[int]") -> None:
        """Each login got a descriptor of its own."""
        fds = [await asyncio.wait_for(login, 5) for login in logins]
        assert len(set(fds)) == len(fds)
        for fd in fds:
            os.close(fd)


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr("polytmpd.kernel.host.namespace_inode", lambda: OWN_NAMESPACE)

    def getpwuid(uid: int) -> Any:
        users = {user.uid: user.name for user in (ALICE, BOB)} | {1002: "carol"}
        return type("passwd", (), {"pw_name": users[uid]})  # KeyError where there is none, as pwd's

    monkeypatch.setattr("pwd.getpwuid", getpwuid)
    made = World()
    made.daemon.logind_changed()
    await made.settle()
    yield made
    await made.daemon.stop()


@pytest.fixture(autouse=True)
def no_internal_error(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    messages = [record.getMessage() for record in caplog.get_records("call")]
    assert not [message for message in messages if message.startswith("Internal error")]


# Logins


async def test_two_first_logins_at_once_make_one_instance(world: World) -> None:
    logins = [world.login(), world.login()]
    await eventually(lambda: world.executor.waits("prepare"))
    world.daemon.user_new(ALICE)
    world.daemon.session_new(Session("1", ALICE))
    third = world.login()
    await world.settle()
    assert world.state() is State.PREPARING
    world.executor.answer("prepare")
    await world.handed_over(*logins, third)
    assert world.executor.log.count("prepare 1000") == 1
    assert world.state() is State.ACTIVE
    assert world.announced.of("new", "removed") == [("new", 1000)]


async def test_a_login_to_what_is_ready_does_not_wait(world: World) -> None:
    await world.active()
    await world.handed_over(world.login(), world.login())
    assert world.executor.log.count("prepare 1000") == 1


async def test_users_have_instances_of_their_own(world: World) -> None:
    await world.active(ALICE, "1")
    await world.active(BOB, "2")
    assert [view.uid for view in world.daemon.views()] == [1000, 1001]
    world.daemon.session_removed("2")
    assert (world.state(1000), world.state(1001)) == (State.ACTIVE, State.DRAINING)


async def test_a_login_of_nobodys_slice_drains_at_once(world: World) -> None:
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
    for uid in (0, 999, 60001):
        with pytest.raises(ExemptError):
            await world.login(uid)
    with pytest.raises(ExemptError, match="carol"):
        await world.login(1002)
    world.daemon.user_new(User(1002, "carol"))
    world.daemon.session_new(Session("1", User(0, "root")))
    await world.settle()
    assert world.daemon.views() == []
    assert world.executor.log == []


async def test_unknown_user(world: World) -> None:
    with pytest.raises(InvalidArgsError, match=f"no user with UID {NOBODY_HAS}"):
        await world.login(NOBODY_HAS)
    assert world.daemon.views() == []


async def test_a_caller_in_a_namespace_of_its_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polytmpd.kernel.host.namespace_inode", lambda: 1)
    with pytest.raises(NotPolyinstantiatedError, match=f"process {os.getpid()} lives in"):
        await world.login()
    await world.settle()
    assert world.executor.log == []


async def test_prepare_fails_for_all_who_wait_and_nothing_is_left(world: World) -> None:
    logins = [world.login(), world.login()]
    await eventually(lambda: world.executor.waits("prepare"))
    # Each has its user's name looked up in a thread first.
    await eventually(lambda: len(world.daemon._records[1000].waiting) == len(logins))
    world.executor.answer("prepare", OSError(2, "No such file or directory", "/proc/1/root/srv/none"))
    for login in logins:
        with pytest.raises(PolytmpError, match=r"^the instance cannot be made: No such file .*: /srv/none$"):
            await asyncio.wait_for(login, 5)
    assert world.state() is None
    assert world.announced.of("new", "removed") == [("new", 1000), ("removed", 1000)]
    again = world.login()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await world.handed_over(again)


async def test_a_failed_instance_of_a_user_who_is_here_is_shown_and_tried_again(world: World) -> None:
    world.daemon.session_new(Session("1", ALICE))
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare", OSError(28, "No space left on device"))
    await eventually(lambda: world.state() is State.FAILED)
    login = world.login()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await world.handed_over(login)
    assert world.state() is State.ACTIVE


async def test_what_is_no_oserror_is_answered_too(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Python says RuntimeError where no thread can be started."""
    login = world.login()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare", RuntimeError("can't start new thread"))
    try:
        with pytest.raises(PolytmpError):
            await asyncio.wait_for(login, 5)
    finally:
        caplog.clear()


# Claims


async def test_the_last_session_ends(world: World) -> None:
    await world.active(session="1")
    world.daemon.session_new(Session("2", ALICE))
    world.daemon.session_removed("1")
    assert world.state() is State.ACTIVE
    world.daemon.session_removed("2")
    assert world.state() is State.DRAINING
    assert world.executor.log[-1] == "let_go 1000"
    world.daemon.session_removed("2")
    world.daemon.session_removed("never")
    assert world.executor.log.count("let_go 1000") == 1


async def test_processes_outlive_the_session(world: World) -> None:
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    world.slices.populated[1000] = True
    await world.active()
    world.daemon.session_removed("1")
    world.daemon.user_removed(1000)
    await world.settle()
    assert world.state() is State.DRAINING
    assert 1000 in world.executor.held, "for new sessions to join"
    assert world.daemon.views()[0].control_group == "/user.slice/user-1000.slice"
    world.daemon.session_new(Session("2", ALICE))
    assert world.state() is State.ACTIVE
    world.daemon.session_removed("2")
    assert world.announced[-3:] == [("changed", (1000, ("State",)))] * 3
    world.slices.say(1000, False)
    assert world.state() is State.DRAINING
    assert 1000 not in world.executor.held
    assert len(world.announced.of("changed")) == 6, "still draining: nothing to tell"


async def test_a_session_that_is_closing_is_over(world: World) -> None:
    """logind keeps it while processes are left in it; systemd tells that its scope was abandoned."""
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    world.slices.populated[1000] = True
    world.logind.listed_sessions = [Session("1", ALICE)]
    await world.active()
    world.daemon.scope_changed("1")
    await world.settle()
    assert world.state() is State.ACTIVE
    world.logind.listed_sessions = []
    world.logind.away = True
    world.daemon.scope_changed("1")
    await world.settle()
    assert world.state() is State.ACTIVE, "nobody says otherwise"
    world.logind.away = False
    world.daemon.scope_changed("1")
    await eventually(lambda: world.state() is State.DRAINING)
    assert 1000 in world.executor.held


async def test_what_was_not_heard_while_the_service_manager_was_away(world: World) -> None:
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    world.slices.populated[1000] = True
    await world.active()
    world.daemon.systemd_changed()
    await eventually(lambda: world.state() is State.DRAINING)


async def test_a_managers_session_is_nobodys_login(world: World) -> None:
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    world.slices.populated[1000] = True
    await world.active()
    world.daemon.session_new(Session("2", ALICE, is_login=False))
    world.daemon.session_removed("1")
    await world.settle()
    assert world.state() is State.DRAINING
    assert 1000 in world.executor.held


async def test_linger_starts_without_a_session(world: World) -> None:
    world.daemon.user_new(ALICE)
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await eventually(lambda: world.state() is State.ACTIVE)
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    world.slices.say(1000, True)  # systemd makes /run/user/1000
    world.slices.say(1000, False)
    assert world.state() is State.ACTIVE
    world.slices.populated[1000] = True  # not told yet when his manager asks
    await world.handed_over(world.login())
    assert world.state() is State.DRAINING, "nobody is logged in"
    assert 1000 in world.executor.held
    world.slices.say(1000, False)
    assert 1000 not in world.executor.held


async def test_a_manager_whose_instance_just_went(world: World) -> None:
    """What the slice said while there was no instance was not heard."""
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    world.slices.populated[1000] = True
    login = world.login()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await world.handed_over(login)
    assert 1000 in world.executor.held


async def test_a_user_who_starts_and_never_comes(world: World) -> None:
    world.daemon.user_new(ALICE)
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await eventually(lambda: world.state() is State.ACTIVE)
    world.daemon.user_removed(1000)
    await world.settle()
    assert world.state() is State.DRAINING


async def test_a_slice_of_nobody_we_know(world: World) -> None:
    world.daemon.slice_populated(1000, True)
    world.daemon.slice_changed(1000)
    world.daemon.user_removed(1000)
    world.daemon.namespace_ended(1000)
    await world.settle()
    assert world.daemon.views() == []
    assert world.executor.log == []


# Draining and removing


async def drained(world: World) -> None:
    await world.active()
    world.daemon.session_removed("1")
    assert world.state() is State.DRAINING


async def test_a_login_joins_what_drains(world: World) -> None:
    await drained(world)
    login = world.login()
    await eventually(lambda: world.executor.waits("rejoin"))
    world.daemon.session_new(Session("2", ALICE))
    world.executor.answer("rejoin")
    await world.handed_over(login)
    assert world.state() is State.ACTIVE
    assert world.executor.log.count("prepare 1000") == 1
    assert world.announced.of("new", "removed") == [("new", 1000)], "it is the same instance"


async def removing(world: World) -> None:
    await drained(world)
    world.daemon.namespace_ended(1000)
    assert world.state() is State.REMOVING
    await eventually(lambda: world.executor.waits("remove 1"))


async def test_an_instance_ends(world: World) -> None:
    await removing(world)
    world.executor.answer("remove 1")
    await eventually(lambda: world.state() is None)
    assert world.announced.of("new", "removed") == [("new", 1000), ("removed", 1000)]
    with pytest.raises(NoSuchInstanceError):
        await world.daemon.resolve(1000, "/tmp/x")


async def test_a_login_does_not_wait_for_the_removal_of_the_old(world: World) -> None:
    await removing(world)
    world.daemon.session_new(Session("2", ALICE))
    login = world.login()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await world.handed_over(login)
    assert world.state() is State.ACTIVE
    assert world.announced.of("new", "removed") == [("new", 1000), ("removed", 1000), ("new", 1000)]
    world.executor.answer("remove 1")
    await world.settle()
    assert world.state() is State.ACTIVE, "the end of the old one is not the end of the new one"
    view = world.daemon.view(1000)
    assert view
    assert view.namespace == 2


async def test_a_late_failure_of_the_old_does_not_disturb_the_new(world: World) -> None:
    await removing(world)
    world.daemon.session_new(Session("2", ALICE))
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("remove 1", OSError(1, "Operation not permitted"))
    await world.settle()
    assert world.state() is State.PREPARING
    world.executor.answer("prepare")
    await eventually(lambda: world.state() is State.ACTIVE)


async def test_a_login_in_the_very_moment_of_the_end(world: World) -> None:
    """The end of the namespace and the login are read in one round of the loop."""
    await drained(world)
    world.daemon.namespace_ended(1000)
    world.daemon.session_new(Session("2", ALICE))
    await eventually(lambda: world.executor.waits("prepare"))
    await eventually(lambda: world.executor.waits("remove 1"))
    world.executor.answer("prepare")
    await eventually(lambda: world.state() is State.ACTIVE)


async def test_the_end_of_the_old_is_not_told_to_the_new(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await drained(world)
    world.daemon.namespace_ended(1000)
    world.daemon.session_new(Session("2", ALICE))
    await eventually(lambda: world.executor.waits("remove 1"))
    world.executor.answer("remove 1")
    await world.settle()
    failed = "Internal error" in caplog.text
    caplog.clear()
    assert not failed


async def test_what_cannot_be_removed_is_shown_until_an_administrator_says_so(world: World) -> None:
    await removing(world)
    world.executor.answer("remove 1", OSError(1, "Operation not permitted"))
    await eventually(lambda: world.state() is State.FAILED)
    world.daemon.user_removed(1000)
    assert world.state() is State.FAILED, "logind forgets the user, the files are there"
    again = asyncio.ensure_future(world.daemon.remove(1000))
    await eventually(lambda: world.executor.waits("remove 1"))
    world.executor.answer("remove 1", OSError(16, "something is mounted on it"))
    with pytest.raises(PolytmpError, match="something is mounted on it"):
        await again
    assert world.state() is State.FAILED
    again = asyncio.ensure_future(world.daemon.remove(1000))
    await eventually(lambda: world.executor.waits("remove 1"))
    assert world.state() is State.FAILED, "until it is done"
    world.executor.answer("remove 1")
    await again
    assert world.state() is None


async def test_a_login_during_the_second_removal_has_an_instance_of_its_own(world: World) -> None:
    await removing(world)
    world.executor.answer("remove 1", OSError(1, "Operation not permitted"))
    await eventually(lambda: world.state() is State.FAILED)
    again = asyncio.ensure_future(world.daemon.remove(1000))
    await eventually(lambda: world.executor.waits("remove 1"))
    world.daemon.session_new(Session("2", ALICE))
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await eventually(lambda: world.state() is State.ACTIVE)
    world.executor.answer("remove 1")
    await again
    assert world.state() is State.ACTIVE


async def test_remove_is_refused_while_somebody_is_here(world: World) -> None:
    await world.active()
    with pytest.raises(BusyError, match="alice is active"):
        await world.daemon.remove(1000)
    assert world.state() is State.ACTIVE
    with pytest.raises(NoSuchInstanceError):
        await world.daemon.remove(1001)


async def test_what_persists_is_removed_when_nobody_is_here(world: World) -> None:
    with pytest.raises(NoSuchInstanceError):
        await world.daemon.remove(1000, persistent=True)
    world.executor.kept = {1000}
    await world.daemon.remove(1000, persistent=True)
    await world.active()
    with pytest.raises(BusyError):
        await world.daemon.remove(1000, persistent=True)
    assert world.executor.log.count("remove_persistent 1000") == 2


async def test_an_end_that_comes_late_disturbs_nobody(world: World) -> None:
    """A rejoin failed; the namespace that could not be joined ends afterwards."""
    await drained(world)
    world.daemon.session_new(Session("2", ALICE))
    await eventually(lambda: world.executor.waits("rejoin"))
    world.executor.answer("rejoin", OSError(28, "No space left on device"))
    await world.settle()
    world.daemon.namespace_ended(1000)
    await eventually(lambda: world.executor.waits("remove 1"))


async def test_an_end_that_came_while_joining_failed_is_not_forgotten(world: World) -> None:
    await drained(world)
    world.daemon.session_new(Session("2", ALICE))
    await eventually(lambda: world.executor.waits("rejoin"))
    world.daemon.namespace_ended(1000)
    world.executor.ended.add(1000)
    world.executor.answer("rejoin", OSError(28, "No space left on device"))
    await eventually(lambda: world.executor.waits("remove 1"))


# Restarts


async def test_what_lives_is_taken_over(world: World) -> None:
    world.executor.restored = Restored([instance(1000, "alice", 7)], [instance(1001, "bob", 8)])
    world.logind.listed_users = [ALICE]
    world.logind.listed_sessions = [Session("1", ALICE)]
    await world.daemon.restore()
    await world.daemon.start()
    assert (world.state(1000), world.state(1001)) == (State.ACTIVE, State.DRAINING)
    await eventually(lambda: "delete [('/tmp', 'left')]" in world.executor.log)
    assert world.executor.known == {"polytmp-1000-7", "polytmp-1001-8"}
    assert "prepare 1000" not in world.executor.log
    await world.handed_over(world.login())


async def test_what_ended_meanwhile_is_removed(world: World) -> None:
    world.executor.restored = Restored([], [instance(1000, "alice", 7)])
    await world.daemon.restore()
    await world.daemon.start()
    world.daemon.namespace_ended(1000)  # as the executor finds out after its start
    await eventually(lambda: world.executor.waits("remove 7"))
    world.executor.answer("remove 7")
    await eventually(lambda: world.state() is None)


async def test_who_is_logged_in_already_gets_an_instance_for_what_comes(world: World) -> None:
    world.logind.listed_users = [ALICE]
    world.logind.listed_sessions = [Session("1", ALICE)]
    await world.daemon.restore()
    await world.daemon.start()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await eventually(lambda: world.state() is State.ACTIVE)


async def test_without_logind_it_starts_all_the_same(world: World) -> None:
    world.logind.away = True
    await world.daemon.restore()
    await world.daemon.start()
    login = world.login()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await world.handed_over(login)


async def test_nothing_is_begun_while_it_stops(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """logind's signals come until the end; what would do the work is closed one after the other."""
    close = world.executor.close

    async def close_slowly() -> None:
        world.daemon.session_new(Session("1", ALICE))
        login = world.login()
        await world.settle()
        login.cancel()
        await close()

    monkeypatch.setattr(world.executor, "close", close_slowly)
    await world.daemon.stop()
    assert "prepare 1000" not in world.executor.log


async def test_before_logind_tells_who_is_logged_in_nothing_drains(world: World) -> None:
    """After a restart of the bus logind takes its time; who held an instance is taken to be here."""
    world = World()
    world.systemd.groups[1000] = "/user.slice/user-1000.slice"
    world.slices.populated[1000] = True
    world.logind.away = True
    world.executor.restored = Restored([instance(1000, "alice", 7)], [])
    await world.daemon.restore()
    await world.daemon.start()
    assert world.state() is State.ACTIVE
    world.logind.away = False
    world.daemon.logind_changed()
    await eventually(lambda: world.state() is State.DRAINING)
    assert 1000 in world.executor.held
    await world.daemon.stop()


async def test_a_logind_that_does_not_answer_at_start_is_asked_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was slow, and never left the bus: nothing tells when it answers again."""
    monkeypatch.setattr(daemon, "_LIST_AGAIN", 0.01)
    world = World()
    world.logind.away = True
    world.executor.restored = Restored([instance(1000, "alice", 7)], [])
    await world.daemon.restore()
    await world.daemon.start()
    world.daemon.logind_changed()
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
    await world.daemon.stop()


async def test_a_logind_that_does_not_tell_of_a_session_is_asked_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "_LIST_AGAIN", 0.01)
    await world.active()
    world.logind.away = True
    world.daemon.scope_changed("1")
    await world.settle()
    assert world.state() is State.ACTIVE
    world.logind.away = False
    await eventually(lambda: world.state() is State.DRAINING)


async def test_sessions_that_ended_while_logind_was_away_are_released(world: World) -> None:
    await world.active(ALICE, "1")
    await world.active(BOB, "2")
    world.logind.listed_users = [BOB]
    world.logind.listed_sessions = [Session("2", BOB)]
    world.daemon.logind_changed()
    await eventually(lambda: world.state(1000) is State.DRAINING)
    assert world.state(1001) is State.ACTIVE


async def test_a_session_that_ended_but_not_its_user(world: World) -> None:
    world.daemon.session_new(Session("1", ALICE))
    await world.active(ALICE, "2")
    world.logind.listed_users = [ALICE]
    world.logind.listed_sessions = [Session("2", ALICE)]
    world.daemon.logind_changed()
    await world.settle()
    assert world.state() is State.ACTIVE
    world.daemon.session_removed("2")
    assert world.state() is State.DRAINING


async def test_a_login_while_the_lists_are_asked_for_is_kept(world: World) -> None:
    """logind's signals may come between its two answers."""
    await world.active(BOB, "2")
    world.logind.listed_users = [BOB]
    world.logind.listed_sessions = [Session("2", BOB)]
    world.logind.between = lambda: world.daemon.session_new(Session("9", ALICE))
    world.daemon.logind_changed()
    await eventually(lambda: world.executor.waits("prepare"))
    world.executor.answer("prepare")
    await world.settle()
    assert world.state(1000) is State.ACTIVE


async def test_a_logout_while_the_lists_are_asked_for_is_believed(world: World) -> None:
    await world.active(ALICE, "1")
    world.logind.listed_users = [ALICE]
    world.logind.listed_sessions = [Session("1", ALICE)]

    def gone() -> None:
        world.daemon.session_removed("1")
        world.daemon.user_removed(1000)

    world.logind.between = gone
    world.daemon.logind_changed()
    await world.settle()
    assert world.state() is State.DRAINING
    assert not world.executor.waits("rejoin")


async def test_stop_leaves_instances(world: World) -> None:
    await world.active()
    await world.daemon.stop()
    assert world.state() is State.ACTIVE
    assert "let_go 1000" not in world.executor.log


# Configuration


async def test_a_bad_file_changes_nothing_and_is_named(world: World) -> None:
    world.problems = [Problem("/etc/polytmpd.conf:3: 'x' is no assignment; write Key=value", "ignoring")]
    world.config = replace(world.config, directories=())
    with pytest.raises(InvalidArgsError, match=r"/etc/polytmpd\.conf:3.*write Key=value$"):
        await world.daemon.reload()
    assert world.daemon.directories() == ["/tmp", "/var/tmp"]
    assert world.announced == []


async def test_a_good_file_counts_for_what_comes(world: World) -> None:
    await world.active(ALICE, "1")
    world.config = Config((Directory("/srv", Lifetime.INSTANCE),), Exemptions(users=frozenset({"alice"})))
    await world.daemon.reload()
    assert world.announced.of("manager") == [("manager", ("Directories",))]
    assert world.daemon.directories() == ["/srv"]
    await world.active(BOB, "2")
    directories = {
        view.uid: [entry.directory.path for entry in view.directories] for view in world.daemon.views()
    }
    assert directories == {1000: ["/tmp", "/var/tmp"], 1001: ["/srv"]}
    with pytest.raises(ExemptError):
        await world.login(1000)


# Questions


@pytest.mark.parametrize(
    ("path", "host"),
    [
        ("/tmp/x", "/tmp/polytmp-1000-1/tmp/x"),
        ("/tmp", "/tmp/polytmp-1000-1/tmp"),
        ("/tmp/", "/tmp/polytmp-1000-1/tmp"),
        ("/tmp/../tmp/x", "/tmp/polytmp-1000-1/tmp/x"),
        ("/var/tmp/a/b", "/var/tmp/polytmp-1000-1/tmp/a/b"),
        ("/tmp/.X11-unix/X0", "/tmp/.X11-unix/X0"),
        ("/tmp/.X11-unixx", "/tmp/polytmp-1000-1/tmp/.X11-unixx"),
        ("//tmp/x", "/tmp/polytmp-1000-1/tmp/x"),
    ],
)
async def test_resolve(world: World, path: str, host: str) -> None:
    await world.active()
    assert await world.daemon.resolve(1000, path) == host


async def test_what_is_set_aside_has_no_path_and_what_is_kept_has(world: World) -> None:
    async def kept(path: str) -> str | None:
        try:
            return await world.daemon.resolve(1000, path)
        except NoSuchInstanceError:
            return None

    await removing(world)
    for state in (State.REMOVING, State.FAILED):
        await eventually(lambda state=state: world.state() is state)  # type: ignore[misc]  # its default
        assert [await kept(path) for path in ("/tmp/x", "/etc", "/var/tmp/x")] == [
            None,
            None,
            "/var/tmp/polytmp-1000-1/tmp/x",
        ]
        if state is State.REMOVING:
            world.executor.answer("remove 1", OSError(1, "Operation not permitted"))
    assert await world.daemon.resolve(1001, "/var/tmp/x") == "/var/tmp/polytmp-1001/tmp/x", "logged out"
    with pytest.raises(NoSuchInstanceError):
        await world.daemon.resolve(1001, "/tmp/x")


async def test_what_cannot_be_resolved(world: World) -> None:
    await world.active()
    with pytest.raises(InvalidArgsError, match="not an absolute path"):
        await world.daemon.resolve(1000, "tmp/x")
    for path in ("/etc/passwd", "/tmpfoo", "/tmp/../etc", "/"):
        with pytest.raises(NotPolyinstantiatedError):
            await world.daemon.resolve(1000, path)


async def test_processes(world: World) -> None:
    await world.active()
    assert await world.daemon.processes(1000) == [], "nobody lives in the namespace of the fake"
    with pytest.raises(NotPolyinstantiatedError):
        await world.daemon.uid_of_process(os.getpid())
    with pytest.raises(NoSuchInstanceError):
        await world.daemon.processes(1001)


@pytest.mark.parametrize("namespace", [OWN_NAMESPACE, 0])
async def test_whose_a_process_is(world: World, namespace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads are looked at once, whatever the number of instances, and not in the event loop."""
    looked: list[tuple[int, int]] = []

    def stat(path: str) -> int | None:
        looked.append((threading.get_ident(), len(path)))
        return OWN_NAMESPACE

    monkeypatch.setattr("polytmpd.kernel.processes._inode", stat)
    await world.active(ALICE, "1")
    await world.active(BOB, "2")
    looked.clear()
    record = world.daemon._records[BOB.uid]
    assert record.instance
    record.instance = replace(record.instance, namespace=namespace)
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208  # as the code does
    if namespace:
        assert await world.daemon.uid_of_process(os.getpid()) == BOB.uid
    else:
        with pytest.raises(NotPolyinstantiatedError):
            await world.daemon.uid_of_process(os.getpid())
    assert 1 <= len(looked) <= threads + 1
    assert threading.get_ident() not in {thread for thread, _ in looked}


async def test_a_number_that_the_kernel_gives_again_is_the_new_ones(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alice's namespace ended, and is shown while her instance is deleted; bob's has its number now."""
    monkeypatch.setattr("polytmpd.kernel.processes._inode", lambda _: 1)
    await world.active(ALICE, "1")
    world.daemon.session_removed("1")
    world.daemon.namespace_ended(ALICE.uid)
    await eventually(lambda: world.executor.waits("remove 1"))
    world.executor.made = 0
    await world.active(BOB, "2")
    assert await world.daemon.uid_of_process(os.getpid()) == BOB.uid
    views = {view.user: (view.state, view.namespace) for view in world.daemon.views()}
    assert views == {"alice": (State.REMOVING, 0), "bob": (State.ACTIVE, 1)}
    assert ("changed", (ALICE.uid, ("NamespaceID",))) in world.announced


async def test_a_login_service_with_threads_is_looked_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.active(ALICE, "1")
    await world.active(BOB, "2")
    looked: list[str] = []
    monkeypatch.setattr("polytmpd.kernel.host.namespace_inode", lambda: 1)
    monkeypatch.setattr("polytmpd.kernel.processes.namespace_paths", lambda _: iter(["leader", "thread"]))
    monkeypatch.setattr("polytmpd.kernel.processes._inode", lambda path: looked.append(path))
    with pytest.raises(NotPolyinstantiatedError):
        await world.login()
    assert looked == ["leader", "thread"]


@dataclass
class Search:
    """A search of /proc that lasts until it is told that nobody waits for it."""

    began: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, *arguments: Any) -> list[Any]:
        cancelled = arguments[-1]
        self.began.set()
        while not cancelled():
            assert not self.ended.wait(0.001)
        self.ended.set()
        return []


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Search:
    made = Search()
    monkeypatch.setattr("polytmpd.kernel.processes.living_in", made)
    monkeypatch.setattr("polytmpd.kernel.holders.find", made)
    return made


QUESTIONS: list[Callable[[Daemon], Coroutine[Any, Any, Any]]] = [
    lambda daemon: daemon.processes(1000),
    lambda daemon: daemon.holders(1000),
]


@pytest.mark.parametrize("question", QUESTIONS, ids=["processes", "holders"])
async def test_a_search_ends_when_nobody_waits_for_it(
    world: World, search: Search, question: Callable[[Daemon], Coroutine[Any, Any, Any]]
) -> None:
    await world.active()
    asked = asyncio.ensure_future(question(world.daemon))
    await eventually(search.began.is_set)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asked, 5)
    assert search.ended.is_set(), "whose turn it is next does not find the thread at work"


@pytest.mark.parametrize("question", QUESTIONS, ids=["processes", "holders"])
async def test_a_search_ends_when_the_daemon_stops(
    world: World, search: Search, question: Callable[[Daemon], Coroutine[Any, Any, Any]]
) -> None:
    await world.active()
    asked = asyncio.ensure_future(question(world.daemon))
    await eventually(search.began.is_set)
    await world.daemon.stop()
    with pytest.raises(PolytmpError, match="stopped"):  # half an answer is none
        await asyncio.wait_for(asked, 5)
    assert search.ended.is_set()
    with pytest.raises(PolytmpError, match="stopped"):
        await question(world.daemon)


async def test_usage_of_what_is_gone(world: World) -> None:
    await world.active()
    with pytest.raises(PolytmpError, match="cannot be counted"):
        await world.daemon.usage(1000)

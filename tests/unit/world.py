# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon whose logind, slices and executor do as the test says.

Daemon, Presence and Questions are the real ones.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from polytmpd.admission import Admission
from polytmpd.bus.connection import BusError
from polytmpd.bus.logind import Session, User
from polytmpd.config import Config, Problem
from polytmpd.core.model import Directory, Instance, InstanceDirectory, State, View
from polytmpd.core.policy import Exemptions
from polytmpd.core.sharing import Sharing
from polytmpd.core.views import Views
from polytmpd.daemon import Daemon
from polytmpd.executor.actions import Restored
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.presence import Presence
from polytmpd.questions import Questions
from tests.unit.settled import eventually

if TYPE_CHECKING:
    from polytmpd.bus.logind import Logind
    from polytmpd.bus.systemd1 import Systemd
    from polytmpd.executor.actions import Executor
    from polytmpd.slices import Slices

ALICE, BOB = User(1000, "alice"), User(1001, "bob")
NOBODY_HAS = 59999
OWN_NAMESPACE = Path("/proc/self/ns/mnt").stat().st_ino


def descriptor() -> Descriptor:
    """A stand-in for a descriptor of a namespace."""
    return Descriptor.open("/dev/null", os.O_RDONLY)


class FakeExecutor:
    """Records what it is asked for. Each operation ends when the test says how."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.asked: list[tuple[str, int, asyncio.Future[None]]] = []
        self.held: dict[int, Descriptor] = {}
        self.made = 0
        self.restored = Restored([], [])
        self.kept: set[int] = set()
        self.ended: set[int] = set()
        self.spared: list[str] = []

    async def restore(self, directories: Sequence[Directory]) -> Restored:
        await asyncio.sleep(0)
        for instance in self.restored.held:
            self.held[instance.uid] = descriptor()
        return self.restored

    def follow(self, ended: Callable[[int], None], changed: Callable[[Instance], None]) -> None:
        self.end = ended
        self.change = changed

    async def share_files(self, sharing: Sharing) -> None:
        pass

    async def tell_age_cleaner(self, directories: Sequence[Directory]) -> None:
        self.spared = [directory.path for directory in directories]

    def start(self) -> None:
        self.log.append("start")

    async def close(self) -> None:
        for fd in self.held.values():
            fd.close()
        self.held.clear()

    async def _ask(self, what: str, uid: int) -> None:
        self.log.append(f"{what} {uid}")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.asked.append((what, uid, future))
        await future

    def answer(self, what: str, error: Exception | None = None) -> None:
        """End the oldest operation of that kind."""
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
        self.held[uid] = descriptor()

    async def prepare(
        self, uid: int, user: str, directories: Sequence[Directory], is_former: object
    ) -> Instance:
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

    def hand_over(self, uid: int) -> Descriptor:
        self.log.append(f"hand_over {uid}")
        return self.held[uid].dup()

    def let_go(self, uid: int) -> None:
        self.log.append(f"let_go {uid}")
        self.held.pop(uid).close()

    async def remove(self, old: Instance) -> None:
        await self._ask(f"remove {old.namespace}", old.uid)

    async def remove_persistent(self, uid: int, directories: Sequence[Directory]) -> bool:
        self.log.append(f"remove_persistent {uid}")
        return uid in self.kept


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

    async def subscribe(self, listener: object) -> None:
        pass

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

    def close(self) -> None:
        pass


class FakeSystemd:
    def __init__(self) -> None:
        self.groups: dict[int, str] = {}

    async def follow(self, returned: Callable[[], None]) -> None:
        pass

    async def user_slice(self) -> str:
        await asyncio.sleep(0)
        return "/user.slice"


class FakeSlices:
    def __init__(self, groups: dict[int, str]) -> None:
        self.groups = groups
        self.populated: dict[int, bool] = {}
        self.reports: dict[int, Callable[[int, bool], None]] = {}

    def follow(self, control_group: str, made: Callable[[int], None]) -> None:
        pass

    def exists(self, control_group: str) -> bool:
        return control_group in self.groups.values()

    def watch(self, uid: int, control_group: str, report: Callable[[int, bool], None]) -> None:
        self.reports[uid] = report
        report(uid, self.exists(control_group) and self.populated.get(uid, False))

    def say(self, uid: int, populated: bool) -> None:
        self.populated[uid] = populated
        self.reports[uid](uid, populated)

    def close(self) -> None:
        pass


class Announced(list[tuple[str, Any]]):
    """What listeners of the views heard; changed fields by name."""

    def instance_new(self, view: View) -> None:
        self.append(("new", view.uid))

    def instance_removed(self, uid: int) -> None:
        self.append(("removed", uid))

    def instance_changed(self, before: View, view: View) -> None:
        names = tuple(
            entry.name for entry in fields(View) if getattr(before, entry.name) != getattr(view, entry.name)
        )
        self.append(("changed", (view.uid, names)))

    def directories_changed(self) -> None:
        self.append(("directories", None))

    def of(self, *kinds: str) -> list[tuple[str, Any]]:
        return [entry for entry in self if entry[0] in kinds]


class World:
    """The daemon, presence and questions, and fakes of everything around them."""

    def __init__(self) -> None:
        self.executor = FakeExecutor()
        self.logind = FakeLogind()
        self.systemd = FakeSystemd()
        self.slices = FakeSlices(self.systemd.groups)
        self.announced = Announced()
        self.config = Config(exemptions=Exemptions(users=frozenset({"carol"})))
        self.problems: list[Problem] = []
        self.views = Views(self.config.paths)
        self.views.follow(self.announced)
        self.admission = Admission(self.config.exemptions)
        self.presence = Presence(
            cast("Logind", self.logind),
            cast("Systemd", self.systemd),
            cast("Slices", self.slices),
            self.admission,
        )
        self.daemon = Daemon(
            self.config,
            lambda: (self.config, self.problems),
            cast("Executor", self.executor),
            self.presence,
            self.admission,
            self.views,
        )
        self.questions = Questions(self.views, self.daemon.kept, lambda _: 0)

    def state(self, uid: int = 1000) -> State | None:
        view = self.views.get(uid)
        return view.state if view else None

    def login(self, uid: int = 1000) -> "asyncio.Task[Descriptor]":
        return asyncio.ensure_future(self._acquire(uid))

    async def _acquire(self, uid: int) -> Descriptor:
        return await self.daemon.acquire(uid, await self.daemon.admit(uid))

    async def active(self, user: User = ALICE, session: str = "1") -> None:
        """Log the user in and wait until their instance is active."""
        self.presence.session_new(Session(session, user))
        await eventually(lambda: self.executor.waits("prepare"))
        self.executor.answer("prepare")
        await eventually(lambda: self.state(user.uid) is State.ACTIVE)

    async def drained(self) -> None:
        await self.active()
        self.presence.session_removed("1")
        assert self.state() is State.DRAINING

    async def removing(self) -> None:
        await self.drained()
        self.daemon.namespace_ended(1000)
        assert self.state() is State.REMOVING
        await eventually(lambda: self.executor.waits("remove 1"))

    async def settle(self) -> None:
        """Let everything that has begun run as far as it can."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def handed_over(self, *logins: "asyncio.Task[Descriptor]") -> None:
        """Each login got a separate descriptor."""
        fds = [await asyncio.wait_for(login, 5) for login in logins]
        assert len({int(fd) for fd in fds}) == len(fds)
        for fd in fds:
            fd.close()

    async def stop(self) -> None:
        self.questions.close()
        await self.daemon.stop()

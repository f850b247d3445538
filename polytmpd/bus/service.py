# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service org.polytmp1: translates between the bus and the daemon, and asks who is calling.

Not here: decisions about instances (the daemon behind Backend), the mechanics of objects (server.py).
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol, TypeVar

from polytmpd import __version__
from polytmpd.bus.connection import BusError, Connection
from polytmpd.bus.contract import (
    INSTANCE,
    MANAGER,
    PATH,
    REMOVE_PERSISTENT,
    SERVICE,
)
from polytmpd.bus.polkit import Polkit, PolkitAction
from polytmpd.bus.server import Call, Interface, Method, Property, Server, Signal
from polytmpd.bus.turns import Questions, Turns
from polytmpd.core.model import View
from polytmpd.core.names import object_owner, object_path
from polytmpd.errors import (
    AccessDeniedError,
    BusyError,
    InvalidArgsError,
    NoSuchInstanceError,
    PolytmpError,
)

T = TypeVar("T")

ANSWER_TIMEOUT: Final = 20.0
"""Seconds that an answer may take to find; below the 25 that callers wait by default."""
_COUNTS_AT_ONCE: Final = 2
_LISTS_AT_ONCE: Final = 2
_LOOK_UPS_AT_ONCE: Final = 1
QUESTIONS_AT_ONCE: Final = 2 * (_COUNTS_AT_ONCE + _LISTS_AT_ONCE + _LOOK_UPS_AT_ONCE)
"""Answers of the backend's that are being found at once, root's and others': no more than that."""
_TO_POLKIT_AT_MOST: Final = 64
"""Questions to polkit that are open, for as long as people think. Of a connection that waits for 128 answers
(max_replies_per_connection) the bus takes no question any more, to logind neither."""
_NAMED_AT_MOST: Final = 5
"""Processes that an error names."""

_USER: Final = (("uid", "u"),)


class Backend(Protocol):
    """What the daemon does for callers. Each method raises PolytmpError."""

    async def acquire(self, uid: int, caller: int) -> int:
        """A namespace descriptor, the caller's to close. caller: the pid that asks."""
        ...

    async def reload(self) -> None: ...

    async def remove(self, uid: int, *, persistent: bool = False) -> None:
        """persistent: what outlives an instance is removed too."""
        ...

    def removed_entries(self, uid: int) -> int:
        """How far the removal that runs for the user is; 0 where none does."""
        ...

    async def processes(self, uid: int) -> list[tuple[int, str]]:
        """(pid, command). This, holders() and usage(): cancelled, the search ends."""
        ...

    async def holders(self, uid: int) -> list[tuple[int, str, str, str]]:
        """(pid, command, cgroup, how) of each process that keeps the instance."""
        ...

    async def usage(self, uid: int) -> list[tuple[str, int, int]]:
        """Also where there is no instance, of what was kept."""
        ...

    def views(self) -> list[View]: ...

    def view(self, uid: int) -> View | None: ...

    async def uid_of_process(self, pid: int) -> int: ...

    async def resolve(self, uid: int, path: str) -> str:
        """Also where there is no instance, of what was kept."""
        ...

    def directories(self) -> list[str]: ...


class Service:
    """Shows the daemon's instances on the bus."""

    def __init__(self, connection: Connection, backend: Backend) -> None:
        self._connection = connection
        self._backend = backend
        self._polkit = Polkit(connection)
        self._counts = Turns(_COUNTS_AT_ONCE)
        self._lists = Turns(_LISTS_AT_ONCE)
        self._look_ups = Turns(_LOOK_UPS_AT_ONCE)
        self._to_polkit = Questions(_TO_POLKIT_AT_MOST)
        self._server = Server(connection, PATH, self._may_list, self._require_read)
        self._server.add(PATH, self._manager())

    async def publish(self) -> None:
        """Own the name. Raises BusError."""
        await self._connection.own_name(SERVICE)

    # What the daemon tells

    def instance_new(self, uid: int) -> None:
        path = object_path(uid)
        self._server.add(path, self._instance(uid))
        self._server.emit(PATH, MANAGER, "InstanceNew", "uo", [uid, path])

    def instance_removed(self, uid: int) -> None:
        path = object_path(uid)
        self._server.remove(path)
        self._server.emit(PATH, MANAGER, "InstanceRemoved", "uo", [uid, path])

    def instance_changed(self, uid: int, names: Sequence[str]) -> None:
        self._server.changed(object_path(uid), INSTANCE, names)

    # Who is calling

    async def _caller(self, call: Call) -> int:
        """The UID."""
        return await self._told_by_bus(self._connection.uid_of(call.sender))

    async def _process(self, call: Call) -> int:
        """The caller's."""
        return await self._told_by_bus(self._connection.pid_of(call.sender))

    async def _told_by_bus(self, question: Awaitable[int]) -> int:
        try:
            return await question
        except BusError as error:
            raise AccessDeniedError(f"the bus does not tell who is calling: {error}") from None

    async def _require_root(self, call: Call, what: str) -> None:
        if await self._caller(call) != 0:
            raise AccessDeniedError(f"{what} is for root only")

    async def _require(self, call: Call, action: PolkitAction, what: str, uid: int | None = None) -> None:
        """Root may; others where polkit says so. Raises PolytmpError."""
        caller = await self._caller(call)
        if caller == 0:
            return
        details = {} if uid is None else {"uid": str(uid), "user": self._name(uid)}
        with self._to_polkit.asked(caller):
            await self._while_there(
                call, self._polkit.require(call.sender, action, what, details, interactive=call.interactive)
            )

    async def _require_owner(self, call: Call, uid: int, what: str) -> int:
        caller = await self._caller(call)
        if caller in {0, uid}:
            return caller
        user = self._name(uid)
        with self._to_polkit.asked(caller):
            await self._while_there(
                call,
                self._polkit.require_inspect(
                    call.sender, uid, f"{what} of {user}", user, interactive=call.interactive
                ),
            )
        return caller

    async def _require_read(self, call: Call) -> None:
        uid = object_owner(call.path)
        if uid is not None:
            await self._require_owner(call, uid, "the instance")

    async def _may_list(self, sender: str, path: str) -> bool:
        """Another user's paths and processes are not everybody's, and a list is no reason to ask polkit."""
        uid = object_owner(path)
        if uid is None:
            return True
        try:
            return await self._connection.uid_of(sender) in {0, uid}
        except BusError:
            return False

    def _name(self, uid: int) -> str:
        view = self._backend.view(uid)
        return view.user if view else f"UID {uid}"

    async def _while_there(self, call: Call, work: Awaitable[T]) -> T:
        """What work gives; it is cancelled when the caller leaves the bus, who then needs no answer."""
        task = asyncio.ensure_future(work)
        try:
            async with self._connection.departure(call.sender) as gone:
                await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
                if task.done():
                    return task.result()
        except BusError as error:
            raise PolytmpError(f"the bus does not say whether the caller is still there: {error}") from None
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))
        raise PolytmpError("the caller is gone")

    async def _ask(
        self,
        call: Call,
        caller: int,
        turns: Turns,
        question: Callable[[], Awaitable[T]],
        advice: str = "",
    ) -> T:
        """What question() gives, whose answer takes as long to find as some user likes: few at once, not for
        long, for nobody who has left.
        """

        async def answer() -> T:
            async with turns.turn(caller):
                return await question()

        with turns.asked(caller):  # refused before the bus has to watch for the caller
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT):
                    return await self._while_there(call, answer())
            except TimeoutError:
                text = f"the answer was not found within {ANSWER_TIMEOUT:.0f} s"
                raise PolytmpError(f"{text}; {advice}" if advice else text) from None

    # The manager

    def _manager(self) -> Interface:
        return Interface(
            MANAGER,
            methods=(
                Method("AcquireNamespace", self._acquire_namespace, _USER, (("namespace", "h"),)),
                Method("GetInstance", self._get_instance, _USER, (("instance", "o"),)),
                Method("GetInstanceByPID", self._get_instance_by_pid, (("pid", "u"),), (("instance", "o"),)),
                Method("ListInstances", self._list_instances, (), (("instances", "a(uso)"),)),
                Method("ResolvePath", self._resolve_path, (*_USER, ("path", "s")), (("host_path", "s"),)),
                Method("RemoveInstance", self._remove_instance, _USER),
                Method("RemoveInstanceWithFlags", self._remove_instance, (*_USER, ("flags", "t"))),
                Method("GetUserUsage", self._get_user_usage, _USER, (("usage", "a(stt)"),)),
                Method("GetRemovalProgress", self._get_removal_progress, _USER, (("entries", "t"),)),
                Method("Reload", self._reload),
            ),
            properties=(
                Property("Version", "s", lambda: __version__, "const"),
                Property("Directories", "as", self._backend.directories),
            ),
            signals=(
                Signal("InstanceNew", (*_USER, ("instance", "o"))),
                Signal("InstanceRemoved", (*_USER, ("instance", "o"))),
            ),
        )

    async def _acquire_namespace(self, call: Call) -> Sequence[Any]:
        await self._require_root(call, "AcquireNamespace")
        return [await self._backend.acquire(call.arguments[0], await self._process(call))]

    async def _get_instance(self, call: Call) -> Sequence[Any]:
        return [object_path(self._view(call.arguments[0]).uid)]

    async def _get_instance_by_pid(self, call: Call) -> Sequence[Any]:
        caller = await self._caller(call)
        pid = call.arguments[0] or await self._process(call)
        uid = await self._ask(call, caller, self._look_ups, lambda: self._backend.uid_of_process(pid))
        await self._require_owner(call, uid, "a process")
        return [object_path(uid)]

    async def _list_instances(self, _: Call) -> Sequence[Any]:
        return [[[view.uid, view.user, object_path(view.uid)] for view in self._backend.views()]]

    async def _resolve_path(self, call: Call) -> Sequence[Any]:
        uid, path = call.arguments
        await self._require_owner(call, uid, "a path")
        return [await self._backend.resolve(uid, path)]

    async def _remove_instance(self, call: Call) -> Sequence[Any]:
        uid, flags = call.arguments[0], call.arguments[1] if len(call.arguments) > 1 else 0
        if flags & ~REMOVE_PERSISTENT:
            raise InvalidArgsError(
                f"flags {flags:#x} are unknown; {REMOVE_PERSISTENT} stands for what persists"
            )
        caller = await self._caller(call)
        action = PolkitAction.REMOVE_OWN if caller == uid else PolkitAction.REMOVE
        await self._require(call, action, f"removing the instance of {self._name(uid)}", uid)
        try:
            await self._backend.remove(uid, persistent=bool(flags & REMOVE_PERSISTENT))
        except BusyError as error:
            raise BusyError(f"{error}{await self._who_lives_there(call, caller, uid)}") from None
        return []

    async def _who_lives_there(self, call: Call, caller: int, uid: int) -> str:
        """For the end of an error's text; empty where nobody does, or it cannot be told now."""
        try:
            living = await self._ask(call, caller, self._lists, lambda: self._backend.processes(uid))
        except PolytmpError:
            return ""
        names = ", ".join(
            f"{command.split(' ')[0].rstrip(':').rpartition('/')[2]} ({pid})"
            for pid, command in living[:_NAMED_AT_MOST]
        )
        more = f" and {len(living) - _NAMED_AT_MOST} more" if len(living) > _NAMED_AT_MOST else ""
        return f", processes live in it: {names}{more}" if living else ""

    async def _get_user_usage(self, call: Call) -> Sequence[Any]:
        uid = call.arguments[0]
        return [await self._count(call, await self._require_owner(call, uid, "the disk usage"), uid)]

    async def _get_removal_progress(self, call: Call) -> Sequence[Any]:
        uid = call.arguments[0]
        await self._require_owner(call, uid, "the disk usage")
        return [self._backend.removed_entries(uid)]

    async def _reload(self, call: Call) -> Sequence[Any]:
        await self._require(call, PolkitAction.RELOAD, "reloading the configuration")
        await self._backend.reload()
        return []

    def manager_changed(self, names: Sequence[str]) -> None:
        self._server.changed(PATH, MANAGER, names)

    # The instances

    def _view(self, uid: int) -> View:
        view = self._backend.view(uid)
        if view is None:
            raise NoSuchInstanceError(f"UID {uid} has no instance now")
        return view

    def _instance(self, uid: int) -> Interface:
        def shown() -> View:
            return self._view(uid)

        return Interface(
            INSTANCE,
            methods=(
                Method("ListProcesses", self._list_processes, (), (("processes", "a(us)"),)),
                Method("ListHolders", self._list_holders, (), (("holders", "a(usss)"),)),
                Method("GetUsage", self._get_usage, (), (("usage", "a(stt)"),)),
            ),
            properties=(
                Property("UID", "u", lambda: shown().uid, "const"),
                Property("User", "s", lambda: shown().user, "const"),
                Property("State", "s", lambda: shown().state.value),
                Property("CreatedUSec", "t", lambda: shown().created_usec),
                Property("CreatedUSecMonotonic", "t", lambda: shown().created_monotonic_usec),
                Property("ControlGroup", "s", lambda: shown().control_group),
                Property("NamespaceID", "t", lambda: shown().namespace),
                Property(
                    "Directories", "a(sss)", lambda: _directories(shown()), "invalidates", private=True
                ),
                Property("SharedPaths", "as", lambda: _shared_paths(shown())),
            ),
        )

    async def _list_processes(self, call: Call) -> Sequence[Any]:
        uid = self._uid(call)
        caller = await self._require_owner(call, uid, "the process list")
        found = await self._ask(call, caller, self._lists, lambda: self._backend.processes(uid))
        return [[[pid, command] for pid, command in found]]

    async def _list_holders(self, call: Call) -> Sequence[Any]:
        uid = self._uid(call)
        caller = await self._require_owner(call, uid, "the process list")
        found = await self._ask(call, caller, self._lists, lambda: self._backend.holders(uid))
        return [[list(entry) for entry in found]]

    async def _get_usage(self, call: Call) -> Sequence[Any]:
        uid = self._uid(call)
        return [await self._count(call, await self._require_owner(call, uid, "the disk usage"), uid)]

    async def _count(self, call: Call, caller: int, uid: int) -> list[list[Any]]:
        advice = "du -x on the host's path takes the time it takes"
        found = await self._ask(call, caller, self._counts, lambda: self._backend.usage(uid), advice)
        return [list(entry) for entry in found]

    def _uid(self, call: Call) -> int:
        uid = object_owner(call.path)
        if uid is None:
            raise NoSuchInstanceError(f"{call.path} is no instance")
        return uid


def _directories(view: View) -> list[list[str]]:
    return [
        [entry.directory.path, entry.host_path, entry.directory.lifetime.value] for entry in view.directories
    ]


def _shared_paths(view: View) -> list[str]:
    return [
        f"{entry.directory.path}/{name}" for entry in view.directories for name in entry.directory.shared
    ]

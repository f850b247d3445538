# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service org.polytmp1: translates between the bus and the daemon.

Not here: who may call (callers), decisions about instances (the daemon behind Backend), finding answers
(Answers), and how objects work (server).
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from polytmpd import __version__
from polytmpd.bus.callers import Callers
from polytmpd.bus.connection import Connection
from polytmpd.bus.contract import (
    INSTANCE,
    MANAGER,
    PATH,
    REMOVE_PERSISTENT,
    SERVICE,
    InstanceMethod,
    InstanceProperty,
    ManagerMethod,
    ManagerProperty,
    ManagerSignal,
)
from polytmpd.bus.polkit import PolkitAction
from polytmpd.bus.server import Call, Emits, Interface, Method, Property, Server, Signal
from polytmpd.bus.turns import COUNTS_AT_ONCE, LISTS_AT_ONCE, LOOK_UPS_AT_ONCE, Turns
from polytmpd.core.model import View
from polytmpd.core.names import object_owner, object_path
from polytmpd.core.views import Views
from polytmpd.errors import (
    BusyError,
    InvalidArgsError,
    NoSuchInstanceError,
    PolytmpError,
)
from polytmpd.kernel.descriptor import Descriptor

T = TypeVar("T")

_NAMED_AT_MOST: Final = 5
"""How many processes an error names."""

_USER: Final = (("uid", "u"),)


class Backend(Protocol):
    """What the daemon does for callers. Each method raises PolytmpError."""

    async def reload(self) -> None: ...

    async def remove(self, uid: int, *, persistent: bool = False) -> None:
        """Remove what is left of a failed instance; with persistent, also what is kept between logins."""
        ...


class Answers(Protocol):
    """What can be asked about instances. Each method raises PolytmpError.

    A search ends if its caller is cancelled.
    """

    async def processes(self, uid: int) -> list[tuple[int, str]]:
        """(pid, command)."""
        ...

    async def holders(self, uid: int) -> list[tuple[int, str, str, str]]:
        """(pid, command, cgroup, how) of each process that keeps the instance."""
        ...

    async def usage(self, uid: int) -> list[tuple[str, int, int]]:
        """(directory, bytes, inodes), also of files kept without an instance."""
        ...

    def removed_entries(self, uid: int) -> int:
        """How many entries the user's running removal has deleted so far; 0 if none runs."""
        ...

    async def uid_of_process(self, pid: int) -> int: ...

    async def resolve(self, uid: int, path: str) -> str:
        """The host's path, also for files kept without an instance."""
        ...


class Service:
    """Shows the daemon's instances on the bus.

    namespace(uid, pid) answers AcquireNamespace: a descriptor, which the server closes.
    """

    def __init__(
        self,
        connection: Connection,
        views: Views,
        backend: Backend,
        answers: Answers,
        namespace: Callable[[int, int], Awaitable[Descriptor]],
    ) -> None:
        self._connection = connection
        self._views = views
        self._backend = backend
        self._answers = answers
        self._namespace = namespace
        self._callers = Callers(connection, views)
        self._counts = Turns(COUNTS_AT_ONCE)
        self._lists = Turns(LISTS_AT_ONCE)
        self._look_ups = Turns(LOOK_UPS_AT_ONCE)
        self._server = Server(connection, PATH, self._callers.may_list, self._callers.require_read)
        self._server.show(PATH, (self._manager(),))
        self._of_instance = (self._instance(),)

    async def publish(self) -> None:
        """Show what there is, own the name, and signal changes from then on. Raises BusError.

        Nobody listens before: a signal for each of ten thousand instances would cost a second and more.
        """
        for view in self._views:
            self._server.show(object_path(view.uid), self._of_instance)
        self._views.follow(self)
        await self._connection.own_name(SERVICE)

    # What is shown

    def instance_new(self, view: View) -> None:
        path = object_path(view.uid)
        self._server.add(path, self._of_instance)
        self._server.emit(PATH, MANAGER, ManagerSignal.INSTANCE_NEW, "uo", [view.uid, path])

    def instance_changed(self, before: View, view: View) -> None:
        changed = [entry.name for entry in _SHOWN if entry.value(before) != entry.value(view)]
        self._server.changed(object_path(view.uid), INSTANCE, changed)

    def instance_removed(self, uid: int) -> None:
        path = object_path(uid)
        self._server.remove(path)
        self._server.emit(PATH, MANAGER, ManagerSignal.INSTANCE_REMOVED, "uo", [uid, path])

    def directories_changed(self) -> None:
        self._server.changed(PATH, MANAGER, [ManagerProperty.DIRECTORIES])

    # The manager

    def _manager(self) -> Interface:
        return Interface(
            MANAGER,
            methods=(
                Method(
                    ManagerMethod.ACQUIRE_NAMESPACE, self._acquire_namespace, _USER, (("namespace", "h"),)
                ),
                Method(ManagerMethod.GET_INSTANCE, self._get_instance, _USER, (("instance", "o"),)),
                Method(
                    ManagerMethod.GET_INSTANCE_BY_PID,
                    self._get_instance_by_pid,
                    (("pid", "u"),),
                    (("instance", "o"),),
                ),
                Method(ManagerMethod.LIST_INSTANCES, self._list_instances, (), (("instances", "a(uso)"),)),
                Method(
                    ManagerMethod.LIST_INSTANCES_EX,
                    self._list_instances_ex,
                    (),
                    (("instances", "a(usost)"),),
                ),
                Method(
                    ManagerMethod.RESOLVE_PATH,
                    self._resolve_path,
                    (*_USER, ("path", "s")),
                    (("host_path", "s"),),
                ),
                Method(ManagerMethod.REMOVE_INSTANCE, self._remove_instance, _USER),
                Method(
                    ManagerMethod.REMOVE_INSTANCE_WITH_FLAGS, self._remove_instance, (*_USER, ("flags", "t"))
                ),
                Method(ManagerMethod.GET_USER_USAGE, self._get_user_usage, _USER, (("usage", "a(stt)"),)),
                Method(
                    ManagerMethod.GET_REMOVAL_PROGRESS,
                    self._get_removal_progress,
                    _USER,
                    (("entries", "t"),),
                ),
                Method(ManagerMethod.RELOAD, self._reload),
            ),
            properties=(
                Property(ManagerProperty.VERSION, "s", lambda _: __version__, "const"),
                Property(ManagerProperty.DIRECTORIES, "as", lambda _: list(self._views.directories)),
            ),
            signals=(
                Signal(ManagerSignal.INSTANCE_NEW, (*_USER, ("instance", "o"))),
                Signal(ManagerSignal.INSTANCE_REMOVED, (*_USER, ("instance", "o"))),
            ),
        )

    async def _acquire_namespace(self, call: Call) -> Sequence[Any]:
        await self._callers.require_root(call, "AcquireNamespace")
        return [await self._namespace(call.arguments[0], await self._callers.pid(call))]

    async def _get_instance(self, call: Call) -> Sequence[Any]:
        return [object_path(self._view(call.arguments[0]).uid)]

    async def _get_instance_by_pid(self, call: Call) -> Sequence[Any]:
        caller = await self._callers.uid(call)
        pid = call.arguments[0] or await self._callers.pid(call)
        uid = await self._callers.ask(
            call, caller, self._look_ups, lambda: self._answers.uid_of_process(pid)
        )
        await self._callers.require_owner(call, uid, "a process")
        return [object_path(uid)]

    async def _list_instances(self, _: Call) -> Sequence[Any]:
        return [[[view.uid, view.user, object_path(view.uid)] for view in self._views]]

    async def _list_instances_ex(self, call: Call) -> Sequence[Any]:
        may_list = await self._callers.may_list(call.sender)
        rows: list[list[Any]] = []
        for view in self._views:
            path = object_path(view.uid)
            shown = [view.state.value, view.created_usec] if may_list(path) else ["", 0]
            rows.append([view.uid, view.user, path, *shown])
        return [rows]

    async def _resolve_path(self, call: Call) -> Sequence[Any]:
        uid, path = call.arguments
        await self._callers.require_owner(call, uid, "a path")
        return [await self._answers.resolve(uid, path)]

    async def _remove_instance(self, call: Call) -> Sequence[Any]:
        uid, flags = call.arguments[0], call.arguments[1] if len(call.arguments) > 1 else 0
        if flags & ~REMOVE_PERSISTENT:
            raise InvalidArgsError(
                f"unknown flags {flags:#x}; the only flag is {REMOVE_PERSISTENT}, for what persists"
            )
        caller = await self._callers.uid(call)
        action = PolkitAction.REMOVE_OWN if caller == uid else PolkitAction.REMOVE
        await self._callers.require(call, action, f"removing the instance of {self._callers.name(uid)}", uid)
        try:
            await self._backend.remove(uid, persistent=bool(flags & REMOVE_PERSISTENT))
        except BusyError as error:
            raise BusyError(f"{error}{await self._who_lives_there(call, caller, uid)}") from None
        return []

    async def _who_lives_there(self, call: Call, caller: int, uid: int) -> str:
        """The end of an error's text; empty if no process does, or if this cannot be determined now."""
        try:
            living = await self._callers.ask(call, caller, self._lists, lambda: self._answers.processes(uid))
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
        return [await self._count(call, await self._callers.require_owner(call, uid, "the disk usage"), uid)]

    async def _get_removal_progress(self, call: Call) -> Sequence[Any]:
        uid = call.arguments[0]
        await self._callers.require_owner(call, uid, "the disk usage")
        return [self._answers.removed_entries(uid)]

    async def _reload(self, call: Call) -> Sequence[Any]:
        await self._callers.require(call, PolkitAction.RELOAD, "reloading the configuration")
        await self._backend.reload()
        return []

    # The instances

    def _view(self, uid: int) -> View:
        view = self._views.get(uid)
        if view is None:
            raise NoSuchInstanceError.of(uid)
        return view

    def _instance(self) -> Interface:
        """That of every instance."""

        def getter(value: Callable[[View], Any]) -> Callable[[str], Any]:
            return lambda path: value(self._view(_owner(path)))

        return Interface(
            INSTANCE,
            methods=(
                Method(InstanceMethod.LIST_PROCESSES, self._list_processes, (), (("processes", "a(us)"),)),
                Method(InstanceMethod.LIST_HOLDERS, self._list_holders, (), (("holders", "a(usss)"),)),
                Method(InstanceMethod.GET_USAGE, self._get_usage, (), (("usage", "a(stt)"),)),
            ),
            properties=tuple(
                Property(entry.name, entry.signature, getter(entry.value), entry.emits, entry.private)
                for entry in _SHOWN
            ),
        )

    async def _list_processes(self, call: Call) -> Sequence[Any]:
        uid = _owner(call.path)
        caller = await self._callers.require_owner(call, uid, "the process list")
        found = await self._callers.ask(call, caller, self._lists, lambda: self._answers.processes(uid))
        return [[[pid, command] for pid, command in found]]

    async def _list_holders(self, call: Call) -> Sequence[Any]:
        uid = _owner(call.path)
        caller = await self._callers.require_owner(call, uid, "the process list")
        found = await self._callers.ask(call, caller, self._lists, lambda: self._answers.holders(uid))
        return [[list(entry) for entry in found]]

    async def _get_usage(self, call: Call) -> Sequence[Any]:
        uid = _owner(call.path)
        return [await self._count(call, await self._callers.require_owner(call, uid, "the disk usage"), uid)]

    async def _count(self, call: Call, caller: int, uid: int) -> list[list[Any]]:
        advice = "du -x on the host's path has no time limit"
        found = await self._callers.ask(call, caller, self._counts, lambda: self._answers.usage(uid), advice)
        return [list(entry) for entry in found]


def _owner(path: str) -> int:
    """The user whose instance has the object."""
    uid = object_owner(path)
    if uid is None:
        raise NoSuchInstanceError(f"{path} is not an instance")
    return uid


def _directories(view: View) -> list[list[str]]:
    return [
        [entry.directory.path, entry.host_path, entry.directory.lifetime.value] for entry in view.directories
    ]


def _shared_paths(view: View) -> list[str]:
    return [
        f"{entry.directory.path}/{name}" for entry in view.directories for name in entry.directory.shared
    ]


class _Shown(NamedTuple):
    """A property of an instance, like server.Property; value takes it from a view."""

    name: str
    signature: str
    value: Callable[[View], Any]
    emits: Emits = "true"
    private: bool = False


_SHOWN: Final = (
    _Shown(InstanceProperty.UID, "u", lambda view: view.uid, "const"),
    _Shown(InstanceProperty.USER, "s", lambda view: view.user, "const"),
    _Shown(InstanceProperty.STATE, "s", lambda view: view.state.value),
    _Shown(InstanceProperty.CREATED_USEC, "t", lambda view: view.created_usec),
    _Shown(InstanceProperty.CREATED_USEC_MONOTONIC, "t", lambda view: view.created_monotonic_usec),
    _Shown(InstanceProperty.CONTROL_GROUP, "s", lambda view: view.control_group),
    _Shown(InstanceProperty.NAMESPACE_ID, "t", lambda view: view.namespace),
    _Shown(InstanceProperty.DIRECTORIES, "a(sss)", _directories, "invalidates", private=True),
    _Shown(InstanceProperty.SHARED_PATHS, "as", _shared_paths),
)

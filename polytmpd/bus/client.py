# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of org.polytmp1: what polytmpctl asks the daemon.

Not here: how anything is shown; what polytmpctl asks others (logind.py, systemd1.py, machine1.py).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

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
from polytmpd.bus.protocol import DBUS, OBJECT_MANAGER, PROPERTIES, TIMEOUT, Asker, BusError, plain
from polytmpd.core.names import object_owner, object_path

if TYPE_CHECKING:
    from polytmpd.bus.connection import Connection


class Listed(NamedTuple):
    """One row of ListInstances."""

    uid: int
    user: str
    path: str


class Shown(NamedTuple):
    """One row of ListInstancesEx. state is empty if the caller may not read it."""

    uid: int
    user: str
    path: str
    state: str
    created_usec: int


class Holder(NamedTuple):
    """One row of ListHolders."""

    pid: int
    command: str
    control_group: str
    how: str


class Polytmp:
    """Talks to polytmpd over a connection that the caller owns. Every method raises BusError."""

    def __init__(self, connection: Asker, *, interactive: bool = False, service: str = SERVICE) -> None:
        """interactive: polkit may ask the person at the terminal for a password. service: a unique name
        instead of the well-known one never starts the daemon.
        """
        self._connection = connection
        self._service = service
        self._interactive = interactive

    async def _manager(
        self, member: ManagerMethod, signature: str = "", *body: Any, quiet: bool = False, **more: Any
    ) -> list[Any]:
        interactive = self._interactive and not quiet
        return await self._connection.ask(
            self._service, PATH, MANAGER, member.value, signature, body, interactive=interactive, **more
        )

    async def _instance(self, uid: int, member: InstanceMethod) -> list[Any]:
        timeout = None if self._interactive else TIMEOUT  # a person may take long to type a password
        return await self._connection.ask(
            self._service,
            object_path(uid),
            INSTANCE,
            member.value,
            interactive=self._interactive,
            timeout=timeout,
        )

    async def instances(self) -> list[Listed]:
        (rows,) = await self._manager(ManagerMethod.LIST_INSTANCES)
        return [Listed(*row) for row in rows]

    async def instances_in_full(self) -> list[Shown]:
        """What is shown of all instances, in a single call."""
        (rows,) = await self._manager(ManagerMethod.LIST_INSTANCES_EX)
        return [Shown(*row) for row in rows]

    async def all_properties(self) -> dict[int, dict[str, Any]]:
        """The properties of all instances that the caller may see, in a single call."""
        (objects,) = await self._connection.ask(self._service, PATH, OBJECT_MANAGER, "GetManagedObjects")
        return {
            uid: plain(interfaces[INSTANCE])
            for path, interfaces in objects.items()
            if INSTANCE in interfaces and (uid := object_owner(path)) is not None
        }

    async def properties(self, uid: int, *, quiet: bool = False) -> dict[str, Any]:
        """The properties of an instance, as plain values. quiet: never ask for a password."""
        interactive = self._interactive and not quiet
        return await self._connection.get_properties(
            self._service,
            object_path(uid),
            INSTANCE,
            interactive=interactive,
            timeout=None if interactive else TIMEOUT,
        )

    async def holders(self, uid: int) -> list[Holder]:
        (rows,) = await self._instance(uid, InstanceMethod.LIST_HOLDERS)
        return [Holder(*row) for row in rows]

    async def usage(
        self,
        uid: int,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
        quiet: bool = False,
    ) -> list[tuple[str, int, int]]:
        """(directory, bytes, inodes), also of the files kept for a user without an instance.

        timeout: in seconds. quiet: never ask for a password, for callers that do not wait for one to be
        typed.
        """
        (rows,) = await self._manager(ManagerMethod.GET_USER_USAGE, "u", uid, timeout=timeout, quiet=quiet)
        return [(directory, size, inodes) for directory, size, inodes in rows]

    async def resolve(self, uid: int, path: str) -> str:
        (found,) = await self._manager(ManagerMethod.RESOLVE_PATH, "us", uid, path, timeout=None)
        return str(found)

    async def acquire(self, uid: int) -> int:
        """A descriptor of the namespace. The caller closes it."""
        fds = await self._manager(ManagerMethod.ACQUIRE_NAMESPACE, "u", uid, keep_fds=True)
        if len(fds) != 1:
            raise BusError(f"{DBUS}.Error.Failed", "polytmpd did not pass a namespace")
        return int(fds[0])

    async def remove(self, uid: int, *, persistent: bool) -> None:
        """Delete the user's files. Returns when all are deleted, however long that takes."""
        flags = REMOVE_PERSISTENT if persistent else 0
        await self._manager(ManagerMethod.REMOVE_INSTANCE_WITH_FLAGS, "ut", uid, flags, timeout=None)

    async def removed_entries(self, uid: int) -> int:
        """How many files and directories the user's running removal has deleted so far.

        Never asks for a password.
        """
        (entries,) = await self._manager(ManagerMethod.GET_REMOVAL_PROGRESS, "u", uid, quiet=True)
        return int(entries)

    async def directories(self) -> list[str]:
        """The directories that are private in new instances."""
        found = await self._connection.get_property(
            self._service, PATH, MANAGER, ManagerProperty.DIRECTORIES.value
        )
        return [str(directory) for directory in found]

    async def version(self) -> str:
        return str(
            await self._connection.get_property(self._service, PATH, MANAGER, ManagerProperty.VERSION.value)
        )

    async def follow(
        self,
        connection: "Connection",
        new: Callable[[int, str], None],
        removed: Callable[[int], None],
        changed: Callable[[int, dict[str, Any], list[str]], None],
        owner: Callable[[bool], None],
    ) -> None:
        """Report changes from now on: new(uid, state), removed(uid), changed(uid, values, invalidated), and
        owner(whether polytmpd is on the bus). connection: the same one, which hears signals.
        """

        def on_added(_: str, body: list[Any]) -> None:
            uid = object_owner(body[0])
            if uid is not None and INSTANCE in body[1]:
                new(uid, str(plain(body[1][INSTANCE]).get(InstanceProperty.STATE, "")))

        def on_removed(_: str, body: list[Any]) -> None:
            removed(body[0])

        def on_changed(path: str, body: list[Any]) -> None:
            uid = object_owner(path)
            if uid is not None and body[0] == INSTANCE:
                changed(uid, plain(body[1]), list(body[2]))

        await connection.subscribe(SERVICE, OBJECT_MANAGER, "InterfacesAdded", on_added)
        await connection.subscribe(SERVICE, MANAGER, ManagerSignal.INSTANCE_REMOVED.value, on_removed)
        await connection.subscribe(SERVICE, PROPERTIES, "PropertiesChanged", on_changed)
        await connection.follow_owner(SERVICE, lambda name: owner(name is not None))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of the service manager, org.freedesktop.systemd1(5): cgroups of users' slices, changes of session
scopes, properties of units, processes of services.

Not here: reading the cgroups.

Hard facts
- The bus lets a connection wait for 128 answers on Debian (max_replies_per_connection of
  dbus-daemon-1(1)), and refuses further calls with LimitsExceeded. A host may have thousands of slices.
- The name of a slice is its place in the tree (systemd.slice(5)): the cgroup of user-UID.slice is always a
  child of user.slice's.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from polytmpd.bus.connection import BusError, Connection
from polytmpd.bus.protocol import PROPERTIES, Asker
from polytmpd.tasks import Tasks

log = logging.getLogger(__name__)

SERVICE: Final = "org.freedesktop.systemd1"
PATH: Final = "/org/freedesktop/systemd1"
MANAGER: Final = "org.freedesktop.systemd1.Manager"
_ASKED_AT_ONCE: Final = 16
_SLICE_NAME: Final = re.compile(r"user-(\d+)\.slice", re.ASCII)
_STATES: Final = ["activating", "active", "reloading", "refreshing", "deactivating"]
_WITHOUT_PROCESS: Final = frozenset({"exited", "auto-restart", "auto-restart-queued", "dead"})
_SLICE: Final = re.compile(rf"{PATH}/unit/user_2d(\d+)_2eslice", re.ASCII)
_SCOPE: Final = re.compile(rf"{PATH}/unit/session_2d([0-9A-Za-z]+)_2escope")


@dataclass(frozen=True, slots=True)
class Service:
    """A service and its processes; 0 if there is none."""

    name: str
    main: int
    control: int


async def unit_properties(connection: Asker, name: str, wanted: Collection[str]) -> dict[str, Any]:
    """Read the wanted properties of a unit; those it lacks are left out.

    Loads the unit if necessary. Raises BusError.
    """
    (path,) = await connection.ask(SERVICE, PATH, MANAGER, "LoadUnit", "s", (name,))
    found: dict[str, Any] = {}
    for interface in ("Unit", *(["Service"] if name.endswith(".service") else [])):
        values = await connection.get_properties(SERVICE, path, f"{SERVICE}.{interface}")
        found |= {key: value for key, value in values.items() if key in wanted}
    return found


async def services(connection: Asker) -> AsyncIterator[Service]:
    """The services that have processes. Each one takes two calls. Raises BusError."""
    (units,) = await connection.ask(
        SERVICE, PATH, MANAGER, "ListUnitsByPatterns", "asas", (_STATES, ["*.service"])
    )
    for name, _, _, _, state, _, path, *_ in units:
        if state in _WITHOUT_PROCESS:
            continue
        interface = f"{SERVICE}.Service"
        try:
            main = await connection.get_property(SERVICE, path, interface, "MainPID")
            control = await connection.get_property(SERVICE, path, interface, "ControlPID")
        except BusError as error:
            if error.name.endswith(".UnknownObject"):  # it has ended
                continue
            raise
        yield Service(str(name), int(main), int(control))


async def with_pam(connection: Asker) -> AsyncIterator[str]:
    """The loaded services that have PAMName=. Each loaded service takes one call. Raises BusError."""
    (units,) = await connection.ask(
        SERVICE, PATH, MANAGER, "ListUnitsByPatterns", "asas", ([], ["*.service"])
    )
    for name, _, load_state, _, _, _, path, *_ in units:
        if load_state == "loaded" and await connection.get_property(
            SERVICE, path, f"{SERVICE}.Service", "PAMName"
        ):
            yield str(name)


async def version(connection: Asker) -> str:
    """The version of PID 1, as systemctl --version prints it. Raises BusError."""
    return str(await connection.get_property(SERVICE, PATH, MANAGER, "Version"))


class Listener(Protocol):
    """Hears what systemd signals."""

    def slice_changed(self, uid: int) -> None:
        """A user's slice started or stopped."""
        ...

    def scope_changed(self, session_id: str) -> None:
        """A session's scope started or stopped, or was abandoned.

        logind abandons the scope of a closing session, and signals nothing itself while processes are left
        in it.
        """
        ...

    def systemd_changed(self) -> None:
        """PID 1 is on the bus again, after daemon-reexec or a restart of the bus. Signals may be lost."""
        ...


class Systemd:
    """Talks to PID 1 over a connection that the caller owns."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._tasks = Tasks()
        self._asking = asyncio.Semaphore(_ASKED_AT_ONCE)

    async def subscribe(self, listener: Listener) -> None:
        """Report changes from now on. Raises BusError."""
        # No match rule can express `user-UID.slice`: the bus filters only on arg0 and the path's namespace.
        # The handlers drop the rest.
        for kind, handler in (("Slice", self._on_slice), ("Scope", self._on_scope)):
            rule = f"arg0='{SERVICE}.{kind}'"
            await self._connection.subscribe(
                SERVICE, PROPERTIES, "PropertiesChanged", partial(handler, listener), rule
            )
        await self._connection.follow_owner(SERVICE, partial(self._on_owner, listener))
        await self._subscribe()

    async def _subscribe(self) -> None:
        """PID 1 sends signals only while a client subscribes, and forgets clients when it leaves the bus."""
        try:
            await self._connection.ask(self._connection.owner(SERVICE), PATH, MANAGER, "Subscribe")
        except BusError as error:
            log.warning("The service manager does not answer, waiting for it: %s", error)

    def _on_owner(self, listener: Listener, owner: str | None) -> None:
        if owner is not None:
            self._tasks.start(self._subscribe())
            listener.systemd_changed()

    async def control_group(self, uid: int) -> str:
        """The cgroup of user-UID.slice relative to the cgroup root; empty if the slice has none.

        Raises BusError.
        """
        async with self._asking:
            return await self._control_group(f"user-{uid}.slice")

    async def control_groups(self) -> dict[int, str]:
        """The cgroups of all users' slices, by UID, however many there are. Raises BusError."""
        async with self._asking:
            owner = self._connection.owner(SERVICE)
            (units,) = await self._connection.ask(
                owner, PATH, MANAGER, "ListUnitsByPatterns", "asas", (["active"], ["user-*.slice"])
            )
            parent = await self._control_group("user.slice") if units else ""
        found = [match for name, *_ in units if (match := _SLICE_NAME.fullmatch(name))]
        return {int(match[1]): f"{parent}/{match[0]}" for match in found} if parent else {}

    async def _control_group(self, unit: str) -> str:
        try:
            owner = self._connection.owner(SERVICE)
            (path,) = await self._connection.ask(owner, PATH, MANAGER, "GetUnit", "s", (unit,))
            group = await self._connection.get_property(owner, path, f"{SERVICE}.Slice", "ControlGroup")
        except BusError as error:
            if error.name.endswith((".NoSuchUnit", ".UnknownObject")):
                return ""
            raise
        return str(group)

    def _on_slice(self, listener: Listener, path: str, body: list[Any]) -> None:
        if body[0] == f"{SERVICE}.Slice" and (match := _SLICE.fullmatch(path)):
            listener.slice_changed(int(match[1]))

    def _on_scope(self, listener: Listener, path: str, body: list[Any]) -> None:
        if body[0] == f"{SERVICE}.Scope" and (match := _SCOPE.fullmatch(path)):
            listener.scope_changed(match[1])

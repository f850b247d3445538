# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of the service manager, org.freedesktop.systemd1(5): cgroups of users' slices, changes of session
scopes, properties of units.

Not here: reading the cgroups.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Collection
from typing import Any, Final

from polytmpd.bus.connection import PROPERTIES, BusError, Connection

log = logging.getLogger(__name__)

SERVICE: Final = "org.freedesktop.systemd1"
PATH: Final = "/org/freedesktop/systemd1"
MANAGER: Final = "org.freedesktop.systemd1.Manager"
_SLICE: Final = re.compile(rf"{PATH}/unit/user_2d(\d+)_2eslice", re.ASCII)
_SCOPE: Final = re.compile(rf"{PATH}/unit/session_2d([0-9A-Za-z]+)_2escope")


async def unit_properties(connection: Connection, name: str, wanted: Collection[str]) -> dict[str, Any]:
    """Read the wanted properties of a service; those it lacks are left out.

    Loads the unit if necessary. Raises BusError.
    """
    (path,) = await connection.ask(SERVICE, PATH, MANAGER, "LoadUnit", "s", (name,))
    found: dict[str, Any] = {}
    for interface in ("Unit", "Service"):
        values = await connection.get_properties(SERVICE, path, f"{SERVICE}.{interface}")
        found |= {key: value for key, value in values.items() if key in wanted}
    return found


async def version(connection: Connection) -> str:
    """The version of PID 1, as systemctl --version prints it. Raises BusError."""
    return str(await connection.get_property(SERVICE, PATH, MANAGER, "Version"))


class Systemd:
    """Talks to PID 1 over a connection that the caller owns."""

    def __init__(
        self,
        connection: Connection,
        slice_changed: Callable[[int], None],
        scope_changed: Callable[[str], None],
        came_back: Callable[[], None],
    ) -> None:
        """slice_changed(uid) is called when a user's slice started or stopped.

        scope_changed(session) when the scope of a session did, or was abandoned: logind does that to one
        that is closing, and signals nothing by itself while processes are left.

        came_back() when PID 1 is on the bus again, after a restart of the bus or daemon-reexec: what
        happened meanwhile was not heard.
        """
        self._connection = connection
        self._slice_changed = slice_changed
        self._scope_changed = scope_changed
        self._came_back = came_back
        self._subscribing: asyncio.Task[None] | None = None

    async def subscribe(self) -> None:
        """Hear of slices that start and stop, and of scopes. Raises BusError."""
        # Only slices' own changes: user.slice's children are `user-UID.slice`, and no rule can say that.
        # arg0 and the path's namespace are what the bus can filter on; the rest is dropped below.
        for kind, handler in (("Slice", self._on_slice), ("Scope", self._on_scope)):
            rule = f"arg0='{SERVICE}.{kind}'"
            await self._connection.subscribe(SERVICE, PROPERTIES, "PropertiesChanged", handler, rule)
        await self._connection.follow_owner(SERVICE, self._on_owner)
        await self._subscribe()

    async def _subscribe(self) -> None:
        """PID 1 sends signals only while somebody wants them; it forgets that when it leaves the bus."""
        try:
            await self._connection.ask(self._connection.owner(SERVICE), PATH, MANAGER, "Subscribe")
        except BusError as error:
            log.warning("The service manager does not answer, waiting for it: %s", error)

    def _on_owner(self, owner: str | None) -> None:
        if owner is not None:
            self._subscribing = asyncio.get_running_loop().create_task(self._subscribe())
            self._came_back()

    async def control_group(self, uid: int) -> str:
        """The cgroup of user-UID.slice relative to the cgroup root; empty if the slice has none.

        Raises BusError.
        """
        try:
            owner = self._connection.owner(SERVICE)
            (path,) = await self._connection.ask(
                owner, PATH, MANAGER, "GetUnit", "s", (f"user-{uid}.slice",)
            )
            group = await self._connection.get_property(owner, path, f"{SERVICE}.Slice", "ControlGroup")
        except BusError as error:
            if error.name.endswith((".NoSuchUnit", ".UnknownObject")):
                return ""
            raise
        return str(group)

    def _on_slice(self, path: str, body: list[Any]) -> None:
        if body[0] == f"{SERVICE}.Slice" and (match := _SLICE.fullmatch(path)):
            self._slice_changed(int(match[1]))

    def _on_scope(self, path: str, body: list[Any]) -> None:
        if body[0] == f"{SERVICE}.Scope" and (match := _SCOPE.fullmatch(path)):
            self._scope_changed(match[1])

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of the service manager, org.freedesktop.systemd1(5): where a user's slice has its cgroup.

Not here: reading the cgroup.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from polytmpd.bus.connection import BusError, Connection

log = logging.getLogger(__name__)

SERVICE: Final = "org.freedesktop.systemd1"
PATH: Final = "/org/freedesktop/systemd1"
MANAGER: Final = "org.freedesktop.systemd1.Manager"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"
_UNIT_PREFIX: Final = f"{PATH}/unit/user_2d"
_UNIT_SUFFIX: Final = "_2eslice"


class Systemd:
    """Speaks to PID 1 on a connection that others own."""

    def __init__(
        self, connection: Connection, slice_changed: Callable[[int], None], came_back: Callable[[], None]
    ) -> None:
        """slice_changed(uid) is called when a user's slice started or stopped.

        came_back() when PID 1 is on the bus again, after a restart of the bus or daemon-reexec: what
        happened meanwhile was not heard.
        """
        self._connection = connection
        self._slice_changed = slice_changed
        self._came_back = came_back
        self._subscribing: asyncio.Task[None] | None = None

    async def subscribe(self) -> None:
        """Hear of slices that start and stop. Raises BusError."""
        # Only slices' own changes: user.slice's children are `user-UID.slice`, and no rule can say that.
        # arg0 and the path's namespace are what the bus can filter on; the rest is dropped below.
        await self._connection.subscribe(
            SERVICE, PROPERTIES, "PropertiesChanged", self._on_changed, f"arg0='{SERVICE}.Slice'"
        )
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
        """The cgroup of user-UID.slice relative to the cgroup root; empty where the slice has none.

        Raises BusError.
        """
        try:
            owner = self._connection.owner(SERVICE)
            (path,) = await self._connection.ask(
                owner, PATH, MANAGER, "GetUnit", "s", (f"user-{uid}.slice",)
            )
            (value,) = await self._connection.ask(
                owner, path, PROPERTIES, "Get", "ss", (f"{SERVICE}.Slice", "ControlGroup")
            )
        except BusError as error:
            if error.name.endswith((".NoSuchUnit", ".UnknownObject")):
                return ""
            raise
        return str(value.value)

    def _on_changed(self, path: str, body: list[Any]) -> None:
        if path.startswith(_UNIT_PREFIX) and path.endswith(_UNIT_SUFFIX) and body[0] == f"{SERVICE}.Slice":
            uid = path[len(_UNIT_PREFIX) : -len(_UNIT_SUFFIX)]
            if uid.isdecimal():
                self._slice_changed(int(uid))

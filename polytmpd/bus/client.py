# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of org.polytmp1, for polytmpctl.

Not here: how anything is shown.
"""

from dataclasses import dataclass
from typing import Any

from polytmpd.bus.connection import Connection
from polytmpd.bus.contract import INSTANCE, MANAGER, PATH, SERVICE
from polytmpd.bus.server import PROPERTIES


@dataclass(frozen=True, slots=True)
class Listed:
    """One row of ListInstances."""

    uid: int
    user: str
    path: str


class Polytmp:
    """Speaks to polytmpd on a connection that others own. Every method raises BusError."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def instances(self) -> list[Listed]:
        (rows,) = await self._connection.ask(SERVICE, PATH, MANAGER, "ListInstances")
        return [Listed(*row) for row in rows]

    async def instance(self, uid: int) -> str:
        (path,) = await self._connection.ask(SERVICE, PATH, MANAGER, "GetInstance", "u", (uid,))
        return str(path)

    async def properties(self, path: str) -> dict[str, Any]:
        """The properties of an instance, as plain values."""
        (found,) = await self._connection.ask(SERVICE, path, PROPERTIES, "GetAll", "s", (INSTANCE,))
        return {name: value.value for name, value in found.items()}

    async def processes(self, path: str) -> list[tuple[int, str]]:
        (rows,) = await self._connection.ask(SERVICE, path, INSTANCE, "ListProcesses")
        return [(pid, command) for pid, command in rows]

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of the service manager, org.freedesktop.systemd1(5): the cgroup of user.slice, properties of
units, processes of services.

Not here: reading the cgroups.

Hard facts
- The name of a slice is its place in the tree (systemd.slice(5)): the cgroup of user-UID.slice is always a
  child of user.slice's, which is a child of the service manager's own root.
- Each unit that changes sends PropertiesChanged, several times, and no match rule can express
  `user-UID.slice`. To hear them took more of the daemon's CPU time than anything else. So it subscribes to
  nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, Final, NamedTuple

from polytmpd.bus.connection import BusError, Connection
from polytmpd.bus.protocol import Asker

SERVICE: Final = "org.freedesktop.systemd1"
PATH: Final = "/org/freedesktop/systemd1"
MANAGER: Final = "org.freedesktop.systemd1.Manager"
_STATES: Final = ["activating", "active", "reloading", "refreshing", "deactivating"]
_WITHOUT_PROCESS: Final = frozenset({"exited", "auto-restart", "auto-restart-queued", "dead"})


class Service(NamedTuple):
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


class Systemd:
    """Talks to PID 1 over a connection that the caller owns."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._root: str | None = None
        self._question: asyncio.Future[str | BusError] | None = None

    async def follow(self, returned: Callable[[], None]) -> None:
        """Call returned() when PID 1 is on the bus again, after daemon-reexec or a restart of the bus.

        Raises BusError.
        """

        def on_owner(owner: str | None) -> None:
            self._root = None
            if owner is not None:
                returned()

        await self._connection.follow_owner(SERVICE, on_owner)

    async def user_slice(self) -> str:
        """The cgroup of user.slice, relative to the cgroup root, whether it exists or not.

        Asks once. Raises BusError.
        """
        if self._root is None:
            if self._question is None or self._question.done():
                self._question = asyncio.ensure_future(self._ask_root())
            answer = await asyncio.shield(self._question)  # of all who wait
            if isinstance(answer, BusError):
                raise answer
            self._root = answer
        return f"{self._root}/user.slice"

    async def _ask_root(self) -> str | BusError:
        try:
            owner = self._connection.owner(SERVICE)
            root = await self._connection.get_property(owner, PATH, MANAGER, "ControlGroup")
        except BusError as error:
            return error
        return str(root).rstrip("/")

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What both kinds of connection have in common: the names and errors of the bus, and calls made of ask().

polytmpctl imports it: nothing here may take long to import.
Not here: sending and receiving (connection.py, sdbus.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

DBUS: Final = "org.freedesktop.DBus"
DBUS_PATH: Final = "/org/freedesktop/DBus"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"
OBJECT_MANAGER: Final = "org.freedesktop.DBus.ObjectManager"
TIMEOUT: Final = 25.0
"""Seconds to wait for an answer; sd-bus has the same default."""


class BusError(Exception):
    """A call failed or was not answered. name: the D-Bus error name."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


class Asker:
    """A connection that calls methods."""

    async def ask(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        timeout: float | None = TIMEOUT,  # noqa: ASYNC109
        interactive: bool = False,
        keep_fds: bool = False,
    ) -> list[Any]:
        """Call a method and return the body of the answer. Raises BusError.

        timeout: in seconds; None waits forever. interactive: polkit may ask the user for a password
        (ALLOW_INTERACTIVE_AUTHORIZATION). keep_fds: return the answer's descriptors instead of its body; the
        caller closes them. Without it they are closed here.
        """
        raise NotImplementedError

    async def get_property(self, destination: str, path: str, interface: str, name: str) -> Any:
        """The value of one property. Raises BusError."""
        (value,) = await self.ask(destination, path, PROPERTIES, "Get", "ss", (interface, name))
        return value.value

    async def get_properties(
        self,
        destination: str,
        path: str,
        interface: str,
        *,
        timeout: float | None = TIMEOUT,  # noqa: ASYNC109
        interactive: bool = False,
    ) -> dict[str, Any]:
        """The values of all properties of an interface. Parameters are those of ask(). Raises BusError."""
        (values,) = await self.ask(
            destination,
            path,
            PROPERTIES,
            "GetAll",
            "s",
            (interface,),
            timeout=timeout,
            interactive=interactive,
        )
        return plain(values)

    async def ask_bus(self, member: str, signature: str = "", *body: Any) -> list[Any]:
        """Call a method of the bus itself."""
        return await self.ask(DBUS, DBUS_PATH, DBUS, member, signature, body)

    async def has_owner(self, name: str) -> bool:
        """Whether a process owns the name now. Starts nothing. Raises BusError."""
        return bool((await self.ask_bus("NameHasOwner", "s", name))[0])


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Property values, unwrapped from their variants."""
    return {name: value.value for name, value in values.items()}

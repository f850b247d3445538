# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of polkit, org.freedesktop.PolicyKit1(8): may this caller do that?

Not here: which method needs which action (service.py).

Hard facts
- The subject is the caller's unique name, never a pid: pids are used again between question and answer.
- polkitd answers when the person has typed a password, or never. So each question is a task of its own, has
  an end in time, and is withdrawn when the caller leaves the bus.
- A host without polkit says ServiceUnknown (no file for activation), or what systemd says of a masked unit.
  Then root decides alone: nobody else is allowed anything.
- Details may be sent by root and by the action's owner only; rules read them with action.lookup().
"""

import asyncio
import itertools
import logging
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from polytmpd.bus.connection import BusError, Connection
from polytmpd.bus.library import Variant
from polytmpd.errors import AccessDeniedError, InteractiveAuthorizationError

log = logging.getLogger(__name__)

SERVICE: Final = "org.freedesktop.PolicyKit1"
PATH: Final = "/org/freedesktop/PolicyKit1/Authority"
AUTHORITY: Final = "org.freedesktop.PolicyKit1.Authority"
_ALLOW_USER_INTERACTION: Final = 1

QUIET_TIMEOUT: Final = 20.0
"""Seconds for an answer that needs nobody; below the 25 that callers wait by default."""
INTERACTIVE_TIMEOUT: Final = 300.0
"""Seconds that a person may take to type a password."""

_ABSENT: Final = (
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.NameHasNoOwner",
    "org.freedesktop.DBus.Error.Spawn.",
    "org.freedesktop.systemd1.",
)


class PolkitAction(StrEnum):
    """The actions in org.polytmp1.policy."""

    REMOVE = "org.polytmp1.remove-instance"
    REMOVE_OWN = "org.polytmp1.remove-own-instance"
    INSPECT = "org.polytmp1.inspect"
    RELOAD = "org.polytmp1.reload"


class Polkit:
    """Asks polkit on a connection that others own."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._ids = itertools.count(1)

    async def require(
        self, sender: str, action: PolkitAction, what: str, details: Mapping[str, str], *, interactive: bool
    ) -> None:
        """Return where the caller may. Raises AccessDeniedError or InteractiveAuthorizationError.

        interactive: the caller allows that a person is asked for a password. Cancelled, the question is
        withdrawn and the dialogue closed.
        """
        cancellation = f"polytmpd-{next(self._ids)}" if interactive else ""
        try:
            (answer,) = await self._connection.ask(
                SERVICE,
                PATH,
                AUTHORITY,
                "CheckAuthorization",
                "(sa{sv})sa{ss}us",
                (
                    ["system-bus-name", {"name": Variant("s", sender)}],
                    action.value,
                    dict(details),
                    _ALLOW_USER_INTERACTION if interactive else 0,
                    cancellation,
                ),
                timeout=INTERACTIVE_TIMEOUT if interactive else QUIET_TIMEOUT,
            )
        except BusError as error:
            if cancellation and error.name.endswith(".Timeout"):
                await self._withdraw(cancellation)
            if error.name.startswith(_ABSENT):
                raise AccessDeniedError(
                    f"{what} is for root: there is no polkit that could allow it"
                ) from None
            log.warning("polkit does not say whether %s may %s: %s", sender, action, error)
            raise AccessDeniedError(f"{what} is for root: polkit gives no answer ({error})") from None
        except asyncio.CancelledError:
            if cancellation:
                await self._withdraw(cancellation)
            raise
        authorized, challenge, _ = answer
        if authorized:
            return
        if challenge and not interactive:
            raise InteractiveAuthorizationError(f"{what} needs authentication")
        raise AccessDeniedError(f"{what} was not allowed by polkit ({action})")

    async def _withdraw(self, cancellation: str) -> None:
        try:
            await self._connection.ask(
                SERVICE, PATH, AUTHORITY, "CancelCheckAuthorization", "s", (cancellation,), timeout=5
            )
        except BusError as error:
            log.debug("Question %s to polkit is not withdrawn: %s", cancellation, error)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of polkit, org.freedesktop.PolicyKit1(8): may this caller do that?

Not here: which method needs which action (service.py).

Hard facts
- The subject is the caller's unique name, never a PID: a PID may be reused between question and answer.
- polkitd answers when the person has typed a password, or never. So each question is its own task, has a
  timeout, and is withdrawn when the caller leaves the bus.
- On a host without polkit the call fails with ServiceUnknown (no activation file), or with systemd's error
  for a masked unit. Then only root is allowed anything.
- Only root and the action's owner may send details. Rules read them with action.lookup().
- An authorization by password (auth_admin) holds for one question: polkit does not remember it.
- The bus never reuses a unique name while it runs.
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
"""Seconds to wait for an answer that needs no password; less than the 25 that callers wait by default."""
INTERACTIVE_TIMEOUT: Final = 300.0
"""Seconds a person has to type a password."""
_GRANTED_AT_MOST: Final = 128
"""Answers to remember; each new caller costs a match rule on the bus. Beyond that, every call asks again."""

_ABSENT: Final = (
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.NameHasNoOwner",
    "org.freedesktop.DBus.Error.Spawn.",
    "org.freedesktop.systemd1.",
)


class PolkitAction(StrEnum):
    """The actions that org.polytmp1.policy defines."""

    REMOVE = "org.polytmp1.remove-instance"
    REMOVE_OWN = "org.polytmp1.remove-own-instance"
    INSPECT = "org.polytmp1.inspect"
    RELOAD = "org.polytmp1.reload"


class Polkit:
    """Asks polkit over a connection that the caller owns.

    A caller whom polkit has allowed to inspect a user's instance may do so until it leaves the bus: one
    command makes several calls, and should ask for one password. Calls that change something ask every
    time. A refusal is never remembered.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._ids = itertools.count(1)
        self._granted: dict[str, set[int]] = {}
        self._watches: set[asyncio.Task[None]] = set()

    async def require_inspect(
        self, sender: str, uid: int, what: str, user: str, *, interactive: bool
    ) -> None:
        """Return if the caller may inspect the user's instance. Raises as require() does.

        sender: the caller's unique name, as the bus wrote it.
        """
        if uid in self._granted.get(sender, ()):
            return
        details = {"uid": str(uid), "user": user}
        await self.require(sender, PolkitAction.INSPECT, what, details, interactive=interactive)
        if interactive:  # else a rule allowed it without a password, and may decide otherwise next time
            self._remember(sender, uid)

    def _remember(self, sender: str, uid: int) -> None:
        if sum(map(len, self._granted.values())) >= _GRANTED_AT_MOST:
            return
        if sender not in self._granted:
            self._granted[sender] = set()
            watch = asyncio.get_running_loop().create_task(self._forget(sender))
            self._watches.add(watch)
            watch.add_done_callback(self._watches.discard)
        self._granted[sender].add(uid)

    async def _forget(self, sender: str) -> None:
        """Forget when the sender leaves the bus, or when our connection ends: a new bus reuses names."""
        closed = asyncio.ensure_future(self._connection.wait_closed())
        try:
            async with self._connection.departure(sender) as gone:
                await asyncio.wait((gone, closed), return_when=asyncio.FIRST_COMPLETED)
        except BusError as error:
            log.debug("Not remembering what %s was allowed: %s", sender, error)
        finally:
            del self._granted[sender]
            closed.cancel()

    async def require(
        self, sender: str, action: PolkitAction, what: str, details: Mapping[str, str], *, interactive: bool
    ) -> None:
        """Return if the caller is authorized. Raises AccessDeniedError or InteractiveAuthorizationError.

        interactive: the caller permits polkit to ask a person for a password. Cancelling this withdraws the
        question and closes the dialogue.
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
                raise AccessDeniedError(f"{what} requires root: polkit is not available") from None
            log.warning(
                "Failed to ask polkit whether %s is authorized for %s, refusing: %s", sender, action, error
            )
            raise AccessDeniedError(f"{what} requires root: polkit does not answer ({error})") from None
        except asyncio.CancelledError:
            if cancellation:
                await self._withdraw(cancellation)
            raise
        authorized, challenge, _ = answer
        if authorized:
            return
        if challenge and not interactive:
            raise InteractiveAuthorizationError(f"{what} needs authentication")
        raise AccessDeniedError(f"polkit does not allow {what} ({action})")

    async def _withdraw(self, cancellation: str) -> None:
        try:
            await self._connection.ask(
                SERVICE, PATH, AUTHORITY, "CancelCheckAuthorization", "s", (cancellation,), timeout=5
            )
        except BusError as error:
            log.debug("Failed to withdraw question %s from polkit, ignoring: %s", cancellation, error)

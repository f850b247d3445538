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
- An answer that a password gave (auth_admin) holds for that one question: polkit keeps nothing of it.
- The bus never gives a unique name twice, as long as it runs.
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
_GRANTED_AT_MOST: Final = 128
"""Answers that are remembered, each with a match rule on the bus; beyond, it is asked every time."""

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
    """Asks polkit on a connection that others own.

    A caller who was allowed to look at a user's instance after a question may go on looking until he leaves
    the bus: one command of his is several calls, and nobody types his password for each. What changes
    something is asked about every time, and a no is never remembered: the next call asks again.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._ids = itertools.count(1)
        self._granted: dict[str, set[int]] = {}
        self._watches: set[asyncio.Task[None]] = set()

    async def require_inspect(
        self, sender: str, uid: int, what: str, user: str, *, interactive: bool
    ) -> None:
        """Return where the caller may see what is of the user's. Raises as require() does.

        sender: the unique name, as the bus wrote it.
        """
        if uid in self._granted.get(sender, ()):
            return
        details = {"uid": str(uid), "user": user}
        await self.require(sender, PolkitAction.INSPECT, what, details, interactive=interactive)
        if interactive:  # else a rule of the administrator's said yes, which may say no the next time
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
        """Until the sender leaves the bus, or the bus leaves us: another bus begins to count anew."""
        closed = asyncio.ensure_future(self._connection.wait_closed())
        try:
            async with self._connection.departure(sender) as gone:
                await asyncio.wait((gone, closed), return_when=asyncio.FIRST_COMPLETED)
        except BusError as error:
            log.debug("What %s was allowed is forgotten at once: %s", sender, error)
        finally:
            del self._granted[sender]
            closed.cancel()

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

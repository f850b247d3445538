# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who calls org.polytmp1, what they may do, and how long they are worked for.

Root may do everything, users may read their own instance, and polkit decides about the rest. Work for a
caller ends when they leave the bus.
Not here: the methods themselves (service), and the protocol of polkit (polkit).
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from polytmpd.bus.connection import BusError, Connection
from polytmpd.bus.polkit import Polkit, PolkitAction
from polytmpd.bus.server import Call
from polytmpd.bus.turns import Questions, Turns
from polytmpd.core.names import object_owner
from polytmpd.core.views import Views
from polytmpd.errors import AccessDeniedError, PolytmpError

T = TypeVar("T")

ANSWER_TIMEOUT: Final = 20.0
"""Seconds that an answer may take to find; below the 25 that callers wait by default."""
_TO_POLKIT_AT_MOST: Final = 64
"""Open questions to polkit, for as long as people think. The bus takes no other question from a connection
that waits for 128 answers (max_replies_per_connection), not even one to logind.
"""


class Callers:
    """Those who call the methods of a server."""

    def __init__(self, connection: Connection, views: Views) -> None:
        self._connection = connection
        self._views = views
        self._polkit = Polkit(connection)
        self._to_polkit = Questions(_TO_POLKIT_AT_MOST)

    async def uid(self, call: Call) -> int:
        """The caller's UID. Raises AccessDeniedError if the bus does not know."""
        return await self._told_by_bus(self._connection.uid_of(call.sender))

    async def pid(self, call: Call) -> int:
        """The caller's pid. Raises AccessDeniedError if the bus does not know."""
        return await self._told_by_bus(self._connection.pid_of(call.sender))

    async def _told_by_bus(self, question: Awaitable[int]) -> int:
        try:
            return await question
        except BusError as error:
            raise AccessDeniedError(f"the bus does not tell who is calling: {error}") from None

    async def require_root(self, call: Call, what: str) -> None:
        if await self.uid(call) != 0:
            raise AccessDeniedError(f"{what} is for root only")

    async def require(self, call: Call, action: PolkitAction, what: str, uid: int | None = None) -> None:
        """Root may; others where polkit says so. Raises PolytmpError."""
        caller = await self.uid(call)
        if caller == 0:
            return
        details = {} if uid is None else {"uid": str(uid), "user": self.name(uid)}
        with self._to_polkit.asked(caller):
            await self._while_there(
                call, self._polkit.require(call.sender, action, what, details, interactive=call.interactive)
            )

    async def require_owner(self, call: Call, uid: int, what: str) -> int:
        caller = await self.uid(call)
        if caller in {0, uid}:
            return caller
        user = self.name(uid)
        with self._to_polkit.asked(caller):
            await self._while_there(
                call,
                self._polkit.require_inspect(
                    call.sender, uid, f"{what} of {user}", user, interactive=call.interactive
                ),
            )
        return caller

    async def require_read(self, call: Call) -> None:
        uid = object_owner(call.path)
        if uid is not None:
            await self.require_owner(call, uid, "the instance")

    async def may_list(self, sender: str, path: str) -> bool:
        """Another user's paths and processes are not everybody's, and a list is no reason to ask polkit."""
        uid = object_owner(path)
        if uid is None:
            return True
        try:
            return await self._connection.uid_of(sender) in {0, uid}
        except BusError:
            return False

    def name(self, uid: int) -> str:
        view = self._views.get(uid)
        return view.user if view else f"UID {uid}"

    async def _while_there(self, call: Call, work: Awaitable[T]) -> T:
        """What work gives; it is cancelled when the caller leaves the bus, who then needs no answer."""
        task = asyncio.ensure_future(work)
        try:
            async with self._connection.departure(call.sender) as gone:
                await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
                if task.done():
                    return task.result()
        except BusError as error:
            raise PolytmpError(f"the bus does not say whether the caller is still there: {error}") from None
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))
        raise PolytmpError("the caller is gone")

    async def ask(
        self,
        call: Call,
        caller: int,
        turns: Turns,
        question: Callable[[], Awaitable[T]],
        advice: str = "",
    ) -> T:
        """What question() gives, whose answer takes as long to find as some user likes: few at once, not for
        long, for nobody who has left.
        """

        async def answer() -> T:
            async with turns.turn(caller):
                return await question()

        with turns.asked(caller):  # refused before the bus has to watch for the caller
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT):
                    return await self._while_there(call, answer())
            except TimeoutError:
                text = f"the answer was not found within {ANSWER_TIMEOUT:.0f} s"
                raise PolytmpError(f"{text}; {advice}" if advice else text) from None

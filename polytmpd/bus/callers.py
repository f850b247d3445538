# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who calls org.polytmp1, what they may do, and for how long polytmpd works for them.

Root may do everything, users may read their own instance, and polkit decides the rest. Work for a caller
ends when they leave the bus.
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
"""How many seconds it may take to find an answer; less than the 25 that callers wait by default."""
_TO_POLKIT_AT_MOST: Final = 64
"""How many questions to polkit may be open; a person may take long to answer. The bus accepts no other call
from a connection that waits for 128 answers (max_replies_per_connection), not even one to logind.
"""


class Callers:
    """The callers of a server's methods."""

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
            raise AccessDeniedError(f"failed to determine the caller: {error}") from None

    async def require_root(self, call: Call, what: str) -> None:
        if await self.uid(call) != 0:
            raise AccessDeniedError(f"only root may call {what}")

    async def require(self, call: Call, action: PolkitAction, what: str, uid: int | None = None) -> None:
        """Allow root, and others if polkit allows them. Raises PolytmpError."""
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

    async def may_list(self, sender: str) -> Callable[[str], bool]:
        """A function that says whether a list shows an instance, by its path: only to its user and to root.

        It is not worth asking polkit.
        """
        try:
            caller = await self._connection.uid_of(sender)
        except BusError:
            return lambda path: object_owner(path) is None
        return (lambda _: True) if caller == 0 else (lambda path: object_owner(path) in {None, caller})

    def name(self, uid: int) -> str:
        view = self._views.get(uid)
        return view.user if view else f"UID {uid}"

    async def _while_there(self, call: Call, work: Awaitable[T]) -> T:
        """What work returns. It is cancelled when the caller leaves the bus and so needs no answer."""
        task = asyncio.ensure_future(work)
        try:
            async with self._connection.departure(call.sender) as gone:
                await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
                if task.done():
                    return task.result()
        except BusError as error:
            raise PolytmpError(f"failed to check whether the caller is still on the bus: {error}") from None
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))
        raise PolytmpError("the caller has left the bus")

    async def ask(
        self,
        call: Call,
        caller: int,
        turns: Turns,
        question: Callable[[], Awaitable[T]],
        advice: str = "",
    ) -> T:
        """What question() returns, which takes as long as users like.

        So only a few run at once, not for long, and only while the caller is on the bus.
        """

        async def answer() -> T:
            async with turns.turn(caller):
                return await question()

        with turns.asked(caller):  # refused before the bus has to watch for the caller
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT):
                    return await self._while_there(call, answer())
            except TimeoutError:
                text = f"found no answer within {ANSWER_TIMEOUT:.0f} s"
                raise PolytmpError(f"{text}; {advice}" if advice else text) from None

# SPDX-License-Identifier: LGPL-2.1-or-later
"""How many questions there may be, and whose is next, of those that take as long as some user likes.

Not here: what is asked and how it is found out, nor for how long.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Final

from polytmpd.errors import PolytmpError

ASKED_AT_MOST: Final = 16
"""Questions of one user and of one kind that may wait or be answered; one more is refused."""


class Questions:
    """Those of one kind that wait or are answered: so many of each user, and perhaps so many in all."""

    def __init__(self, in_all: int | None = None) -> None:
        self._in_all = in_all
        self._asked: dict[int, int] = {}

    @contextlib.contextmanager
    def asked(self, uid: int) -> Iterator[None]:
        """A question is there, while the context lasts. Raises PolytmpError where there are too many."""
        if self._asked.get(uid, 0) >= ASKED_AT_MOST:
            raise PolytmpError("too many questions of this user wait for an answer already; try again later")
        if self._in_all is not None and sum(self._asked.values()) >= self._in_all:
            raise PolytmpError("too many questions wait for an answer already; try again later")
        self._asked[uid] = self._asked.get(uid, 0) + 1
        try:
            yield
        finally:
            self._asked[uid] -= 1
            if not self._asked[uid]:
                del self._asked[uid]


class Turns(Questions):
    """So many of root's are answered at once, as many of all others', and one of each.

    So nobody waits for one user alone, and root for nobody else.
    """

    def __init__(self, at_once: int) -> None:
        super().__init__()
        self._of_root = asyncio.Semaphore(at_once)
        self._of_others = asyncio.Semaphore(at_once)
        self._own: dict[int, asyncio.Lock] = {}

    @contextlib.contextmanager
    def asked(self, uid: int) -> Iterator[None]:
        try:
            with super().asked(uid):
                yield
        finally:
            if uid not in self._asked:
                self._own.pop(uid, None)

    @contextlib.asynccontextmanager
    async def turn(self, uid: int) -> AsyncIterator[None]:
        """Wait until it may be answered, within asked()."""
        if uid == 0:
            async with self._of_root:
                yield
            return
        # His own first: who waits for himself is in nobody's way.
        async with self._own.setdefault(uid, asyncio.Lock()), self._of_others:
            yield

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits for questions whose answers take as long as a user likes: how many may wait, and which is next.

Not here: the questions themselves, how the answers are found, and timeouts.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Final

from polytmpd.errors import PolytmpError

ASKED_AT_MOST: Final = 16
"""Questions of one kind that one user may have open. Further ones are refused."""
COUNTS_AT_ONCE: Final = 2
LISTS_AT_ONCE: Final = 2
LOOK_UPS_AT_ONCE: Final = 1
QUESTIONS_AT_ONCE: Final = 2 * (COUNTS_AT_ONCE + LISTS_AT_ONCE + LOOK_UPS_AT_ONCE)
"""Answers that are being found at a time: root's, and all other users'."""


class Questions:
    """The open questions of one kind, limited for each user and optionally in total."""

    def __init__(self, in_all: int | None = None) -> None:
        self._in_all = in_all
        self._asked: dict[int, int] = {}

    @contextlib.contextmanager
    def asked(self, uid: int) -> Iterator[None]:
        """Count a question while the context lasts. Raises PolytmpError if there are too many."""
        if self._asked.get(uid, 0) >= ASKED_AT_MOST:
            raise PolytmpError("this user has too many requests pending, try again later")
        if self._in_all is not None and sum(self._asked.values()) >= self._in_all:
            raise PolytmpError("too many requests are pending, try again later")
        self._asked[uid] = self._asked.get(uid, 0) + 1
        try:
            yield
        finally:
            self._asked[uid] -= 1
            if not self._asked[uid]:
                del self._asked[uid]


class Turns(Questions):
    """Answers a limited number at once: as many for root as for all other users, and one for each of these.

    So no user can keep all others waiting, and root waits for no other user.
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
        """Wait for the user's turn. To be used within asked()."""
        if uid == 0:
            async with self._of_root:
                yield
            return
        # The user's own lock first: a user who waits for themselves does not block others.
        async with self._own.setdefault(uid, asyncio.Lock()), self._of_others:
            yield

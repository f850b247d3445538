# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose requests are answered and whose wait while answers are slow."""

import asyncio

import pytest

from polytmpd.bus.turns import ASKED_AT_MOST, Questions, Turns
from polytmpd.errors import PolytmpError

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]

ROOT, ALICE, BOB, CAROL = 0, 1000, 1001, 1002


class Crowd:
    """Users who ask. Records whose answers are being worked on."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.answered: list[int] = []
        self.tasks: list[tuple[int, asyncio.Task[None]]] = []

    async def _ask(self, uid: int) -> None:
        with self.turns.asked(uid):
            async with self.turns.turn(uid):
                self.answered.append(uid)
                try:
                    await asyncio.Event().wait()
                finally:
                    self.answered.remove(uid)

    async def ask(self, uid: int, times: int = 1) -> None:
        self.tasks += [(uid, asyncio.ensure_future(self._ask(uid))) for _ in range(times)]
        await self.settle()

    async def settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def leave(self, uid: int) -> None:
        """Cancel all requests of the user."""
        for task in (task for owner, task in self.tasks if owner == uid):
            task.cancel()
        await self.settle()

    def refused(self) -> list[int]:
        return [
            uid
            for uid, task in self.tasks
            if task.done() and not task.cancelled() and isinstance(task.exception(), PolytmpError)
        ]


async def test_each_user_gets_one_answer_at_a_time() -> None:
    crowd = Crowd(Turns(2))
    await crowd.ask(ALICE, 5)
    assert crowd.answered == [ALICE]
    await crowd.ask(BOB, 2)
    await crowd.ask(CAROL)
    assert crowd.answered == [ALICE, BOB]
    await crowd.leave(BOB)
    assert crowd.answered == [ALICE, CAROL], "alice's other questions do not come before carol's"
    await crowd.leave(CAROL)
    assert crowd.answered == [ALICE]
    await crowd.leave(ALICE)


async def test_root_does_not_wait_for_other_users() -> None:
    crowd = Crowd(Turns(2))
    for uid in (ALICE, BOB, CAROL):
        await crowd.ask(uid, ASKED_AT_MOST)
    await crowd.ask(ROOT, 3)
    assert crowd.answered == [ALICE, BOB, ROOT, ROOT]
    for uid in (ALICE, BOB, CAROL, ROOT):
        await crowd.leave(uid)
    assert crowd.answered == []


async def test_only_the_user_with_too_many_requests_is_refused() -> None:
    crowd = Crowd(Turns(2))
    await crowd.ask(ALICE, ASKED_AT_MOST + 3)
    await crowd.ask(BOB)
    assert crowd.refused() == [ALICE] * 3
    assert crowd.answered == [ALICE, BOB]
    await crowd.leave(ALICE)
    await crowd.leave(BOB)
    await crowd.ask(ALICE)
    assert crowd.answered == [ALICE]
    await crowd.leave(ALICE)
    assert not crowd.turns._asked
    assert not crowd.turns._own


async def test_the_total_number_of_requests_is_limited() -> None:
    questions = Questions(3)
    with questions.asked(ALICE), questions.asked(ALICE):
        with questions.asked(BOB), pytest.raises(PolytmpError), questions.asked(CAROL):
            pass
        with questions.asked(CAROL):
            pass
    assert not questions._asked

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Slow answers: who waits for them, how many run at once, and what ends them."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from polytmpd.bus import callers
from polytmpd.bus.contract import INSTANCE, MANAGER, PATH
from polytmpd.bus.service import Service
from polytmpd.core.names import object_path
from polytmpd.errors import NotPolyinstantiatedError
from tests.bus.polkit_world import Stranger
from tests.bus.world import STRANGER, Backend, Client, view
from tests.unit.settled import eventually

pytestmark = [pytest.mark.bus, pytest.mark.usefixtures("root")]


@pytest.mark.parametrize("pid", [0, 1])
async def test_slow_lookups_by_pid(
    service: Service, backend: Backend, stranger: Stranger, client: Client, pid: int
) -> None:
    """One lookup at a time for each user; root does not wait for others."""
    asked = 0

    async def uid_of_process(_: int) -> int:
        nonlocal asked
        asked += 1
        await gate.wait()
        raise NotPolyinstantiatedError("nobody's")

    gate = asyncio.Event()
    backend.uid_of_process = uid_of_process  # type: ignore[method-assign, assignment]  # a monkeypatch
    for _ in range(3):
        await stranger.start(PATH, f"{MANAGER}.GetInstanceByPID", "u", str(pid))
    await eventually(lambda: service._look_ups._asked.get(STRANGER) == 3)
    assert asked == 1
    call = asyncio.ensure_future(client.error("GetInstanceByPID", "u", [pid]))
    await eventually(lambda: asked == 2)
    for process in stranger.processes:
        process.kill()
    await eventually(lambda: STRANGER not in service._look_ups._asked)
    gate.set()
    assert await call == ("org.polytmp1.Error.NotPolyinstantiated", "nobody's")


class Counting:
    """Counts that run until the test opens the gate."""

    def __init__(self, backend: Backend) -> None:
        self.gate = asyncio.Event()
        self.running = 0
        self.most = 0
        self.cancelled = 0
        backend.usage = self.usage  # type: ignore[method-assign]  # what a monkeypatch does
        backend.processes = self._wait  # type: ignore[method-assign, assignment]  # as above
        backend.holders = self._wait  # type: ignore[method-assign, assignment]  # as above

    async def usage(self, uid: int) -> list[tuple[str, int, int]]:
        await self._wait(uid)
        return [("/tmp", 1, 2)]

    async def _wait(self, _: int) -> list[Any]:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return []


QUESTIONS = ["GetUsage", "ListProcesses", "ListHolders"]


@pytest.mark.parametrize("member", QUESTIONS)
async def test_counting_ends_when_the_caller_leaves(
    service: Service, backend: Backend, new_client: Callable[[], Any], member: str
) -> None:
    counting = Counting(backend)
    backend.views.show(view(1002))
    leaving = await new_client()
    asked = asyncio.ensure_future(leaving.call(member, path=object_path(1002), interface=INSTANCE))
    await eventually(lambda: counting.running == 1)
    leaving.bus.disconnect()
    await eventually(lambda: counting.cancelled == 1)
    asked.cancel()
    await asyncio.wait((asked,))


@pytest.mark.parametrize("member", QUESTIONS)
async def test_few_counts_run_at_once(
    service: Service, backend: Backend, client: Client, member: str
) -> None:
    counting = Counting(backend)
    backend.views.show(view(1002))
    path = object_path(1002)
    calls = [asyncio.ensure_future(client.call(member, path=path, interface=INSTANCE)) for _ in range(20)]
    await eventually(lambda: sum(call.done() for call in calls) == 4)
    assert {call.result().error_name for call in calls if call.done()} == {"org.polytmp1.Error.Failed"}
    assert counting.running == 2
    counting.gate.set()
    await asyncio.wait(calls)
    assert counting.most == 2
    assert await client.result("GetUserUsage", "u", [1002]) == [["/tmp", 1, 2]]


@pytest.mark.parametrize("member", QUESTIONS)
async def test_root_does_not_wait_for_others(
    service: Service, backend: Backend, stranger: Stranger, client: Client, member: str
) -> None:
    counting = Counting(backend)
    backend.views.show(view(STRANGER))
    for _ in range(3):
        await stranger.start(object_path(STRANGER), f"{INSTANCE}.{member}")
    turns = service._counts if member == "GetUsage" else service._lists
    await eventually(lambda: turns._asked.get(STRANGER) == 3)
    asked = asyncio.ensure_future(client.call(member, path=object_path(STRANGER), interface=INSTANCE))
    await eventually(lambda: counting.running == 2)
    counting.gate.set()
    await asyncio.wait_for(asked, 10)
    await eventually(lambda: not counting.running)
    assert counting.most == 2, "one for root and one for the stranger"


@pytest.mark.parametrize("member", QUESTIONS)
async def test_counting_times_out(
    service: Service, backend: Backend, client: Client, monkeypatch: pytest.MonkeyPatch, member: str
) -> None:
    monkeypatch.setattr(callers, "ANSWER_TIMEOUT", 0.2)
    counting = Counting(backend)
    backend.views.show(view(1002))
    name, text = await client.error(member, path=object_path(1002), interface=INSTANCE)
    assert (name, "found no answer within" in text) == ("org.polytmp1.Error.Failed", True)
    assert counting.cancelled == 1

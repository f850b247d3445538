# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fails tests that leave descriptors or tasks behind, and waits for conditions with a bound.

Not here: fakes of the world.
"""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest


def descriptors() -> dict[int, str]:
    """This process's open descriptors, and what is behind each."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            found[int(link.name)] = str(link.readlink())
        except OSError:  # the descriptor that reads the directory
            continue
    return found


async def eventually(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Return once the condition holds. Fail if it does not hold within the bound."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not condition():
        assert loop.time() < end, "the condition did not hold in time"
        await asyncio.sleep(0.002)  # between two checks of the condition


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    """A test that leaves a descriptor open has failed."""
    before = descriptors()
    yield
    after = descriptors()
    if len(after) > len(before):  # an unreferenced object is no leak; collecting is slow, so only if needed
        gc.collect()
        after = descriptors()
    # pytest and asyncio may have replaced some
    assert len(after) <= len(before), {fd: to for fd, to in after.items() if before.get(fd) != to}


@pytest.fixture
async def no_task_leaks() -> AsyncIterator[None]:
    """A test that leaves a task behind has failed. For tests that run in the loop."""
    yield
    own = asyncio.current_task()
    for _ in range(200):
        left = [task for task in asyncio.all_tasks() if task is not own]
        if not left:
            return
        await asyncio.sleep(0.005)  # between two checks; the loop has a bound
    pytest.fail(f"tasks are left: {left}")

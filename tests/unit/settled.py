# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a test must leave behind: nothing. And how to wait for something without hoping.

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
        except OSError:  # the one that reads the directory
            continue
    return found


async def eventually(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Return once the condition holds; fail when it does not within the bound."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not condition():
        assert loop.time() < end, "did not come about in time"
        await asyncio.sleep(0.002)  # between two looks at the condition


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    """A test that leaves a descriptor open has failed."""
    before = descriptors()
    yield
    after = descriptors()
    if len(after) > len(before):  # what nobody refers to any more is no leak; collecting takes long
        gc.collect()
        after = descriptors()
    # pytest and asyncio may have put others in their place
    assert len(after) <= len(before), {fd: to for fd, to in after.items() if before.get(fd) != to}


@pytest.fixture
async def no_task_leaks() -> AsyncIterator[None]:
    """A test that leaves a task behind has failed. To be requested by what runs in the loop."""
    yield
    own = asyncio.current_task()
    for _ in range(200):
        left = [task for task in asyncio.all_tasks() if task is not own]
        if not left:
            return
        await asyncio.sleep(0.005)  # between two looks; the loop has a bound
    pytest.fail(f"tasks are left: {left}")

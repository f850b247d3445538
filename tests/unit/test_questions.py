# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers to questions about instances."""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from polytmpd.core.model import State
from polytmpd.errors import (
    InvalidArgsError,
    NoSuchInstanceError,
    NotPolyinstantiatedError,
    PolytmpError,
)
from polytmpd.questions import Questions
from tests.unit.settled import eventually
from tests.unit.world import ALICE, BOB, OWN_NAMESPACE, World

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("no_task_leaks")]


@pytest.mark.parametrize(
    ("path", "host"),
    [
        ("/tmp/x", "/tmp/polytmp-1000-1/tmp/x"),
        ("/tmp", "/tmp/polytmp-1000-1/tmp"),
        ("/tmp/", "/tmp/polytmp-1000-1/tmp"),
        ("/tmp/../tmp/x", "/tmp/polytmp-1000-1/tmp/x"),
        ("/var/tmp/a/b", "/var/tmp/polytmp-1000-1/tmp/a/b"),
        ("/tmp/.X11-unix/X0", "/tmp/.X11-unix/X0"),
        ("/tmp/.X11-unixx", "/tmp/polytmp-1000-1/tmp/.X11-unixx"),
        ("//tmp/x", "/tmp/polytmp-1000-1/tmp/x"),
    ],
)
async def test_resolve(world: World, path: str, host: str) -> None:
    await world.active()
    assert await world.questions.resolve(1000, path) == host


async def test_only_kept_directories_resolve_after_the_instance_was_set_aside(world: World) -> None:
    async def kept(path: str) -> str | None:
        try:
            return await world.questions.resolve(1000, path)
        except NoSuchInstanceError:
            return None

    await world.removing()
    for state in (State.REMOVING, State.FAILED):
        await eventually(lambda state=state: world.state() is state)  # type: ignore[misc]  # its default
        assert [await kept(path) for path in ("/tmp/x", "/etc", "/var/tmp/x")] == [
            None,
            None,
            "/var/tmp/polytmp-1000-1/tmp/x",
        ]
        if state is State.REMOVING:
            world.executor.answer("remove 1", OSError(1, "Operation not permitted"))
    assert await world.questions.resolve(1001, "/var/tmp/x") == "/var/tmp/polytmp-1001/tmp/x", "logged out"
    with pytest.raises(NoSuchInstanceError):
        await world.questions.resolve(1001, "/tmp/x")


async def test_paths_that_cannot_be_resolved(world: World) -> None:
    await world.active()
    with pytest.raises(InvalidArgsError, match="not an absolute path"):
        await world.questions.resolve(1000, "tmp/x")
    for path in ("/etc/passwd", "/tmpfoo", "/tmp/../etc", "/"):
        with pytest.raises(NotPolyinstantiatedError):
            await world.questions.resolve(1000, path)


async def test_processes(world: World) -> None:
    await world.active()
    assert await world.questions.processes(1000) == [], "the fake namespace has no processes"
    with pytest.raises(NotPolyinstantiatedError):
        await world.questions.uid_of_process(os.getpid())
    with pytest.raises(NoSuchInstanceError):
        await world.questions.processes(1001)


@pytest.mark.parametrize("namespace", [OWN_NAMESPACE, 0])
async def test_which_user_a_process_belongs_to(
    world: World, namespace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads are examined once, for all instances together, and not in the event loop."""
    looked: list[tuple[int, int]] = []

    def stat(path: str) -> int | None:
        looked.append((threading.get_ident(), len(path)))
        return OWN_NAMESPACE

    monkeypatch.setattr("polytmpd.kernel.processes._inode", stat)
    await world.active(ALICE, "1")
    await world.active(BOB, "2")
    looked.clear()
    shown = world.views.get(BOB.uid)
    assert shown
    world.views.show(replace(shown, namespace=namespace))
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208  # as the code does
    if namespace:
        assert await world.questions.uid_of_process(os.getpid()) == BOB.uid
    else:
        with pytest.raises(NotPolyinstantiatedError):
            await world.questions.uid_of_process(os.getpid())
    assert 1 <= len(looked) <= threads + 1
    assert threading.get_ident() not in {thread for thread, _ in looked}


async def test_a_reused_namespace_number_belongs_to_the_newest_owner(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """alice's namespace has ended but is shown until her instance is deleted. bob's reuses its inode."""
    monkeypatch.setattr("polytmpd.kernel.processes._inode", lambda _: 1)
    await world.active(ALICE, "1")
    world.presence.session_removed("1")
    world.daemon.namespace_ended(ALICE.uid)
    await eventually(lambda: world.executor.waits("remove 1"))
    world.executor.made = 0
    await world.active(BOB, "2")
    assert await world.questions.uid_of_process(os.getpid()) == BOB.uid
    views = {view.user: (view.state, view.namespace) for view in world.views}
    assert views == {"alice": (State.REMOVING, 0), "bob": (State.ACTIVE, 1)}
    assert ("changed", (ALICE.uid, ("namespace",))) in world.announced


@dataclass
class Search:
    """A search of /proc that runs until it is cancelled."""

    began: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, *arguments: Any) -> list[Any]:
        cancelled = arguments[-1]
        self.began.set()
        while not cancelled():
            assert not self.ended.wait(0.001)
        self.ended.set()
        return []


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Search:
    made = Search()
    monkeypatch.setattr("polytmpd.kernel.processes.living_in", made)
    monkeypatch.setattr("polytmpd.kernel.holders.find", made)
    return made


ASKED: list[Callable[[Questions], Coroutine[Any, Any, Any]]] = [
    lambda questions: questions.processes(1000),
    lambda questions: questions.holders(1000),
]


@pytest.mark.parametrize("question", ASKED, ids=["processes", "holders"])
async def test_a_search_ends_when_all_callers_have_left(
    world: World, search: Search, question: Callable[[Questions], Coroutine[Any, Any, Any]]
) -> None:
    await world.active()
    asked = asyncio.ensure_future(question(world.questions))
    await eventually(search.began.is_set)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asked, 5)
    assert search.ended.is_set(), "whose turn it is next does not find the thread at work"


@pytest.mark.parametrize("question", ASKED, ids=["processes", "holders"])
async def test_a_search_ends_when_the_daemon_stops(
    world: World, search: Search, question: Callable[[Questions], Coroutine[Any, Any, Any]]
) -> None:
    await world.active()
    asked = asyncio.ensure_future(question(world.questions))
    await eventually(search.began.is_set)
    world.questions.close()
    with pytest.raises(PolytmpError, match="polytmpd is stopping"):  # half an answer is none
        await asyncio.wait_for(asked, 5)
    assert search.ended.is_set()
    with pytest.raises(PolytmpError, match="polytmpd is stopping"):
        await question(world.questions)


async def test_usage_of_a_removed_instance(world: World) -> None:
    await world.active()
    with pytest.raises(PolytmpError, match="failed to count"):
        await world.questions.usage(1000)

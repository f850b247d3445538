# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers questions about instances: processes, holders, usage, paths, and whose instance a process is in.

Users decide how long some answers take to find, so these have their own threads.
Not here: who may ask, and how many at once (bus/service).
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from polytmpd.blocking import usage
from polytmpd.bus.turns import QUESTIONS_AT_ONCE
from polytmpd.core.model import InstanceDirectory, Lifetime, State, View
from polytmpd.core.resolve import resolve
from polytmpd.core.views import Views
from polytmpd.errors import InvalidArgsError, NoSuchInstanceError, NotPolyinstantiatedError, PolytmpError
from polytmpd.kernel import holders, host, processes
from polytmpd.kernel.host import in_words
from polytmpd.slices import CGROUP_ROOTS

T = TypeVar("T")

Cancelled = Callable[[], bool]
"""Whether the answer is no longer wanted."""
_STOPPING: Final = "polytmpd is stopping"
_SET_ASIDE: Final = frozenset({State.REMOVING, State.FAILED})


class Questions:
    """Finds answers, or raises PolytmpError. A search ends if its caller is cancelled."""

    def __init__(
        self,
        views: Views,
        kept: Callable[[int], Awaitable[tuple[InstanceDirectory, ...]]],
        removed_entries: Callable[[int], int],
    ) -> None:
        """kept(uid) finds what is kept for a user without an instance.

        removed_entries(uid) is how many entries the user's running removal has deleted.
        """
        self._views = views
        self._kept = kept
        self._removed_entries = removed_entries
        # As many threads as there may be questions, so that none waits for another.
        self._threads = ThreadPoolExecutor(QUESTIONS_AT_ONCE, "questions")
        self._stopping = threading.Event()

    def close(self) -> None:
        """End the searches, and answer nothing more."""
        self._stopping.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def processes(self, uid: int) -> list[tuple[int, str]]:
        """(pid, command) of each process in the user's namespace or slice."""
        view = self._view(uid)

        def look(cancelled: Cancelled) -> list[processes.Process]:
            living = processes.living_in(view.namespace, cancelled) if view.namespace else []
            found = {process.pid: process for process in living}
            for group in _cgroups(view):
                found.update((process.pid, process) for process in processes.in_cgroup(group, cancelled))
            return [found[pid] for pid in sorted(found)]

        return [(process.pid, process.command) for process in await self._find_out(look)]

    async def holders(self, uid: int) -> list[tuple[int, str, str, str]]:
        """(pid, command, cgroup, how) of each process that keeps the user's instance."""
        view = self._view(uid)

        def look(cancelled: Cancelled) -> list[holders.Holder]:
            barriers = {entry.barrier for entry in view.directories}
            return holders.find(view.namespace, barriers, _cgroups(view), cancelled)

        found = await self._find_out(look)
        return [(entry.pid, entry.command, entry.control_group, entry.how.value) for entry in found]

    async def usage(self, uid: int) -> list[tuple[str, int, int]]:
        """(directory, bytes, inodes), also of what is kept for a user without an instance."""
        directories = await self._directories(uid)
        if not directories:
            self._view(uid)

        def count(cancelled: Cancelled) -> list[tuple[str, int, int]]:
            result = []
            for entry in directories:
                try:
                    directory = host.open_directory(entry.host_path)
                except FileNotFoundError:  # set aside, and being deleted
                    continue
                with directory:
                    used = usage.count(directory, cancelled)
                result.append((entry.directory.path, used.bytes, used.inodes))
            return result

        try:
            return await self._find_out(count)
        except OSError as error:
            raise PolytmpError(f"failed to count the usage: {in_words(error)}") from error

    def removed_entries(self, uid: int) -> int:
        """How many entries the user's running removal has deleted so far; 0 if none runs."""
        return self._removed_entries(uid)

    async def uid_of_process(self, pid: int) -> int:
        """The UID of the user whose instance the process lives in."""
        found = await self._find_out(lambda _: processes.namespaces(pid))
        for view in self._views:
            if view.namespace and view.namespace in found:
                return view.uid
        raise NotPolyinstantiatedError(f"process {pid} lives in no instance")

    async def resolve(self, uid: int, path: str) -> str:
        """The host's path of what the user calls path, also for files kept without an instance."""
        view = self._views.get(uid)
        gone = view is not None and view.state in _SET_ASIDE
        directories = await self._directories(uid)
        if not path.startswith("/"):
            raise InvalidArgsError(f"{path!r} is not an absolute path")
        if gone:  # once set aside, a directory has a name without a UID
            directories = tuple(
                entry for entry in directories if entry.directory.lifetime is not Lifetime.INSTANCE
            )
        found = resolve(directories, path)
        if found is not None:
            return found
        if view is None or not view.directories or gone:
            raise NoSuchInstanceError.of(uid)
        raise NotPolyinstantiatedError(f"{path} is in no private directory; it is the same on the host")

    def _view(self, uid: int) -> View:
        view = self._views.get(uid)
        if view is None:
            raise NoSuchInstanceError.of(uid)
        return view

    async def _directories(self, uid: int) -> tuple[InstanceDirectory, ...]:
        view = self._views.get(uid)
        return view.directories if view is not None and view.directories else await self._kept(uid)

    async def _find_out(self, look: Callable[[Cancelled], T]) -> T:
        """Run look(cancelled) in a thread, and return what it returns.

        Ends when the thread does, even if cancelled: there are never more threads at work than questions.
        """
        wanted = True

        def cancelled() -> bool:
            return not wanted or self._stopping.is_set()

        if self._stopping.is_set():
            raise PolytmpError(_STOPPING)
        work = asyncio.get_running_loop().run_in_executor(self._threads, look, cancelled)
        try:
            found = await asyncio.shield(work)
        finally:
            wanted = False
            await asyncio.wait((work,))
        if self._stopping.is_set():  # the search may have ended half-way
            raise PolytmpError(_STOPPING)
        return found


def _cgroups(view: View) -> list[str]:
    return [root + view.control_group for root in CGROUP_ROOTS] if view.control_group else []

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Notices that a directory of the host that all instances share, for example /tmp/.X11-unix, was removed.

Not here: what is shared (config), and binding the new one (kernel/inside).

Hard facts
- A directory that is removed sends nothing while a bind mount of it exists. A watch on the host's /tmp would
  report everything that happens there. But rm -r, systemd-tmpfiles and find open and close a directory
  before they remove it, which is IN_CLOSE_NOWRITE. rmdir(1) does not: then displays/ notices it later.
- Any user who lists the directory causes that event, too. So after an event none is read for _REST seconds,
  and then only _READS times.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from polytmpd.blocking import shared
from polytmpd.core.model import Instance
from polytmpd.kernel.host import in_words
from polytmpd.kernel.inotify import IN_CLOSE_NOWRITE, IN_MOVE_SELF, IN_ONLYDIR, Inotify

log = logging.getLogger(__name__)

_REST: Final = 0.2
"""Seconds from an event to the check: what closed the directory is about to remove it."""
_READS: Final = 8


class Shares:
    """The watches on the host's shared directories. Owns an inotify instance."""

    def __init__(self, changed: Callable[[str], Awaitable[None]]) -> None:
        """changed(path) is called if a shared directory in path was replaced. Raises OSError."""
        self._changed = changed
        self._inotify = Inotify()
        self._watches: dict[str, dict[str, int]] = {}
        """Path → name → watch; -1 if there is none."""
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Call changed() from now on."""
        self._task = asyncio.get_running_loop().create_task(self._work())
        self._listen()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        asyncio.get_running_loop().remove_reader(self._inotify.fd)
        self._inotify.close()

    def add(self, instance: Instance) -> None:
        """Watch the directories that the instance shares."""
        for entry in instance.directories:
            known = self._watches.setdefault(entry.directory.path, {})
            for name in entry.directory.shared:
                if name not in known:
                    known[name] = -1
                    self._due.set()

    # Within

    def _listen(self) -> None:
        asyncio.get_running_loop().add_reader(self._inotify.fd, self._on_readable)

    def _on_readable(self) -> None:
        asyncio.get_running_loop().remove_reader(self._inotify.fd)  # until the check is over
        self._due.set()

    async def _work(self) -> None:
        while True:
            await self._due.wait()
            await asyncio.sleep(_REST)
            self._due.clear()
            for _ in range(_READS):
                if not self._inotify.read():
                    break
            for path in list(self._watches):
                try:
                    if await asyncio.to_thread(self._check, path):
                        await self._changed(path)
                except Exception as error:  # also "can't start new thread"
                    log.warning(
                        "Failed to check the shared directories in %s, ignoring: %s", path, in_words(error)
                    )
            self._listen()

    def _check(self, path: str) -> bool:
        """Watch what is there now. Whether something else was there before."""
        changed = False
        for name, former in list(self._watches[path].items()):
            watch = shared.watch(path, name, self._add)
            if watch != former and former != -1:
                changed = True
                with contextlib.suppress(OSError):  # the kernel has removed it already
                    self._inotify.remove_watch(former)
            if watch != -1:
                self._watches[path][name] = watch
        return changed

    def _add(self, path: str) -> int:
        return self._inotify.add_watch(path, IN_CLOSE_NOWRITE | IN_MOVE_SELF | IN_ONLYDIR)

# SPDX-License-Identifier: LGPL-2.1-or-later
# ruff: noqa: PTH110, PTH120, PTH123
"""Watches which users' slices there are and whether they have processes: inotify on their parent directory
and on cgroup.events (cgroups(7), "populated").

Nothing is polled, except a slice that the kernel does not let us watch or read. Until it does, the slice
counts as populated.
Paths are strings: at start there are those of ten thousand users, and pathlib takes five times as long.
Not here: where the slice's cgroup is (bus/systemd1), and what follows (presence).

Hard facts
- The kernel sends at most one IN_MODIFY in 10 ms for a cgroup.events (CGROUP_FILE_NOTIFY_MIN_INTV in
  kernel/cgroup). It drops a pending one when the cgroup is removed, and the removal itself sends nothing to
  the file's watch. So `populated 0` may never arrive. The parent directory always sends IN_DELETE when the
  slice's cgroup is removed, and IN_CREATE when systemd makes it.
"""

import asyncio
import contextlib
import errno
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from polytmpd.journal import fields
from polytmpd.kernel.host import in_words
from polytmpd.kernel.inotify import (
    IN_CREATE,
    IN_DELETE,
    IN_IGNORED,
    IN_MODIFY,
    IN_ONLYDIR,
    IN_Q_OVERFLOW,
    Inotify,
)

log = logging.getLogger(__name__)

CGROUP_ROOTS: Final = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
"""cgroup v2 alone, or beside v1 (the "hybrid" hierarchy of systemd)."""

_PARENT: Final = IN_CREATE | IN_DELETE | IN_ONLYDIR
"""What is watched in a directory with slices. A second mask for the same inode would replace it."""
_SLICE: Final = re.compile(r"user-(\d+)\.slice", re.ASCII)
_LOOK_AGAIN: Final = 10.0
"""Seconds after which a slice that could not be watched or read is tried again."""
_GONE: Final = (errno.ENOENT, errno.ENODEV)
"""What reading cgroup.events raises once the cgroup is removed."""


def parse_populated(text: str) -> bool:
    """The value of `populated` in cgroup.events; False if there is none."""
    return any(line.split() == ["populated", "1"] for line in text.splitlines())


def _text(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


Report = Callable[[int, bool], None]
"""report(uid, populated), called in the event loop."""


class _Watched(NamedTuple):
    """path: its cgroup.events."""

    uid: int
    control_group: str
    path: str
    report: Report


class Slices:
    """Watches the cgroups of users' slices. Owns one inotify instance."""

    def __init__(self) -> None:
        """Needs a running event loop. Raises OSError (EMFILE)."""
        self._inotify = Inotify()
        self._watched: dict[int, _Watched] = {}
        """Watch → slice."""
        self._watches: dict[int, int] = {}
        """UID → watch."""
        self._parent: Path | None = None
        self._parents: set[str] = set()
        """The directories that are watched."""
        self._made: Callable[[int], None] = lambda _: None
        self._guessed: dict[int, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._inotify.fd, self._on_readable)

    def follow(self, control_group: str, made: Callable[[int], None]) -> None:
        """Call made(uid) in the event loop for each user's slice that systemd makes in user.slice.

        control_group: that of user.slice. May be called again.
        """
        roots = [Path(root) for root in CGROUP_ROOTS]
        # Not resolved by what is there now: user.slice may come later.
        root = next((root for root in roots if (root / "cgroup.controllers").exists()), roots[0])
        self._parent, self._made = root / control_group.lstrip("/"), made
        with contextlib.suppress(OSError):  # watch() tries again, and complains
            self._watch_parents()

    def exists(self, control_group: str) -> bool:
        """Whether there is such a cgroup."""
        return self._events_file(control_group) is not None

    def watch(self, uid: int, control_group: str, report: Report) -> None:
        """Watch the cgroup from now on: report what it says now, and each change.

        A cgroup that does not exist is not populated.
        """
        known = self._watched.get(self._watches.get(uid, -1))
        if known is not None and known.control_group == control_group:
            self._read(uid, known.path, report)  # the kernel reports all else
            return
        path = self._events_file(control_group) if control_group else None
        if path is None:
            self._tell(uid, False, report)
            return
        try:
            self._watch_parents()
            self._watch_parent(os.path.dirname(os.path.dirname(path)))
            watch = self._inotify.add_watch(path, IN_MODIFY)
        except FileNotFoundError:
            self._tell(uid, False, report)
            return
        except OSError as error:
            self._unwatch(uid)
            self._guess(uid, error, report, lambda: self.watch(uid, control_group, report))
            return
        if self._watches.get(uid) != watch:
            self._unwatch(uid)
        self._watches[uid], self._watched[watch] = watch, _Watched(uid, control_group, path, report)
        self._read(uid, path, report)

    def close(self) -> None:
        for timer in self._guessed.values():
            timer.cancel()
        self._loop.remove_reader(self._inotify.fd)
        self._inotify.close()

    def _watch_parents(self) -> None:
        """Watch where slices are made: user.slice, and its parent, since user.slice may be made again."""
        if self._parent is None:
            return
        for directory in (self._parent.parent, self._parent):
            with contextlib.suppress(FileNotFoundError):
                self._watch_parent(str(directory))

    def _watch_parent(self, directory: str) -> None:
        """Raises OSError."""
        if directory not in self._parents:
            self._inotify.add_watch(directory, _PARENT)
            self._parents.add(directory)

    def _unwatch(self, uid: int) -> _Watched | None:
        return self._watched.pop(self._watches.pop(uid, -1), None)

    def _events_file(self, control_group: str) -> str | None:
        for root in CGROUP_ROOTS:
            path = f"{root}{control_group}/cgroup.events"
            if os.path.exists(path):
                return path
        return None

    def _read(self, uid: int, path: str, report: Report) -> None:
        try:
            populated = parse_populated(_text(path))
        except OSError as error:
            if error.errno not in _GONE:  # EMFILE, for example
                self._guess(uid, error, report, lambda: self._read(uid, path, report))
                return
            populated = False
        self._tell(uid, populated, report)

    def _tell(self, uid: int, populated: bool, report: Report) -> None:
        if (timer := self._guessed.pop(uid, None)) is not None:
            timer.cancel()
            log.info("Can determine again whether UID %d has processes", uid, extra=fields(uid=uid))
        report(uid, populated)

    def _guess(self, uid: int, error: OSError, report: Report, again: Callable[[], None]) -> None:
        """Assume that the slice has processes: nothing is released while it may have some."""
        if (timer := self._guessed.get(uid)) is not None:
            timer.cancel()
        else:
            log.warning(
                "Cannot determine whether UID %d has processes, assuming so and retrying: %s",
                uid,
                in_words(error),
                extra=fields(uid=uid),
            )
        self._guessed[uid] = self._loop.call_later(_LOOK_AGAIN, again)
        report(uid, True)

    def _on_readable(self) -> None:
        for event in self._inotify.read():
            if event.mask & IN_Q_OVERFLOW:
                self._examine_all()
            elif event.mask & IN_IGNORED and event.watch not in self._watched:
                self._parents.clear()  # one of them is gone
            elif not event.name:
                self._examine(event.watch)
            elif self._parent is not None and event.name == self._parent.name:
                self._examine_all()
            elif match := _SLICE.fullmatch(event.name):
                uid = int(match[1])
                if event.mask & IN_CREATE:
                    self._watch_again(uid)
                    self._made(uid)
                else:
                    self._examine(self._watches.get(uid, -1))

    def _watch_again(self, uid: int) -> None:
        """The slice may be another one than that which is watched, with the same name."""
        if (known := self._unwatch(uid)) is not None:
            self.watch(uid, known.control_group, known.report)

    def _examine(self, watch: int) -> None:
        if (found := self._watched.get(watch)) is not None:
            self._read(found.uid, found.path, found.report)
            if not os.path.exists(found.path) and self._watched.pop(watch, None) is not None:
                self._watches.pop(found.uid, None)

    def _examine_all(self) -> None:
        """Anything may have happened: events were lost, or user.slice is another directory."""
        self._parents.clear()
        for uid in list(self._watches):
            self._watch_again(uid)
        if self._parent is not None:
            with contextlib.suppress(OSError):
                self._watch_parents()
                for entry in self._parent.iterdir():
                    if match := _SLICE.fullmatch(entry.name):
                        self._made(int(match[1]))

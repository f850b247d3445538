# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watches whether a user's slice has processes: inotify on cgroup.events (cgroups(7), "populated").

Nothing is polled, except a slice that the kernel does not let us watch or read. Until it does, the slice
counts as populated.
Not here: where the slice's cgroup is (bus/systemd1), and what follows (presence).

Hard facts
- The kernel sends at most one IN_MODIFY in 10 ms for a cgroup.events (CGROUP_FILE_NOTIFY_MIN_INTV in
  kernel/cgroup). It drops a pending one when the cgroup is removed, and the removal itself sends nothing to
  the file's watch. So `populated 0` may never arrive. The parent directory always sends IN_DELETE when the
  slice's cgroup is removed.
"""

import asyncio
import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from polytmpd.journal import fields
from polytmpd.kernel.host import in_words
from polytmpd.kernel.inotify import IN_DELETE, IN_MODIFY, IN_ONLYDIR, IN_Q_OVERFLOW, Inotify

log = logging.getLogger(__name__)

CGROUP_ROOTS: Final = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
"""cgroup v2 alone, or beside v1 (the "hybrid" hierarchy of systemd)."""

_LOOK_AGAIN: Final = 10.0
"""Seconds after which a slice that could not be watched or read is tried again."""
_GONE: Final = (errno.ENOENT, errno.ENODEV)
"""What reading cgroup.events raises once the cgroup is removed."""


def parse_populated(text: str) -> bool:
    """The value of `populated` in cgroup.events; False if there is none."""
    return any(line.split() == ["populated", "1"] for line in text.splitlines())


Report = Callable[[int, bool], None]
"""report(uid, populated), called in the event loop."""


class Slices:
    """Watches the cgroups of users' slices. Owns one inotify instance."""

    def __init__(self) -> None:
        """Needs a running event loop. Raises OSError (EMFILE)."""
        self._inotify = Inotify()
        self._watched: dict[int, tuple[int, Path, Report]] = {}
        self._guessed: dict[int, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._inotify.fd, self._on_readable)

    def watch(self, uid: int, control_group: str, report: Report) -> None:
        """Watch the cgroup from now on: report what it says now, and each change.

        An empty control_group is not populated.
        """
        path = self._events_file(control_group) if control_group else None
        if path is None:
            self._tell(uid, False, report)
            return
        try:
            self._inotify.add_watch(str(path.parent.parent), IN_DELETE | IN_ONLYDIR)
            watch = self._inotify.add_watch(str(path), IN_MODIFY)
        except FileNotFoundError:
            self._tell(uid, False, report)
            return
        except OSError as error:
            self._watched = {w: entry for w, entry in self._watched.items() if entry[0] != uid}
            self._guess(uid, error, report, lambda: self.watch(uid, control_group, report))
            return
        self._watched = {w: entry for w, entry in self._watched.items() if entry[0] != uid or w == watch}
        self._watched[watch] = (uid, path, report)
        self._read(uid, path, report)

    def close(self) -> None:
        for timer in self._guessed.values():
            timer.cancel()
        self._loop.remove_reader(self._inotify.fd)
        self._inotify.close()

    def _events_file(self, control_group: str) -> Path | None:
        for root in CGROUP_ROOTS:
            path = Path(root + control_group, "cgroup.events")
            if path.exists():
                return path
        return None

    def _read(self, uid: int, path: Path, report: Report) -> None:
        try:
            populated = parse_populated(path.read_text())
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
            for watch, (uid, path, report) in list(self._watched.items()):
                if watch == event.watch or event.mask & IN_Q_OVERFLOW or event.name == path.parent.name:
                    self._read(uid, path, report)
                    if not path.exists():
                        self._watched.pop(watch, None)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a user's slice has processes, by inotify on cgroup.events (cgroups(7), "populated").

No polling, but for what the kernel does not let us watch or read: that counts as populated until it does.
Not here: where the slice's cgroup is (bus/systemd1), and what follows.

Hard facts
- The kernel sends at most one IN_MODIFY in 10 ms for a cgroup.events (CGROUP_FILE_NOTIFY_MIN_INTV in
  kernel/cgroup); one that is due later is dropped where the cgroup is removed before, and the removal itself
  sends nothing to the file's watch. So `populated 0` may never be heard. The directory above sends IN_DELETE
  when the slice's is removed; that is always heard.
"""

import asyncio
import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from polytmpd.journal import fields
from polytmpd.kernel.inotify import IN_DELETE, IN_MODIFY, IN_ONLYDIR, IN_Q_OVERFLOW, Inotify

log = logging.getLogger(__name__)

CGROUP_ROOTS: Final = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
"""cgroup v2 alone, or beside v1 ("hybrid", see file-hierarchy in systemd's documentation of cgroups)."""

_LOOK_AGAIN: Final = 10.0
"""Seconds after which a slice that could not be watched, or read, is tried again."""
_GONE: Final = (errno.ENOENT, errno.ENODEV)  # so is the cgroup


def parse_populated(text: str) -> bool:
    """The value of `populated` in cgroup.events; False where there is none."""
    return any(line.split() == ["populated", "1"] for line in text.splitlines())


class Slices:
    """Watches the slices that it is told of; owns one inotify instance."""

    def __init__(self, populated: Callable[[int, bool], None]) -> None:
        """populated(uid, whether) is called in the event loop, at watch() and at each change.

        Raises OSError (EMFILE).
        """
        self._populated = populated
        self._inotify = Inotify()
        self._files: dict[int, tuple[int, Path]] = {}
        self._guessed: dict[int, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._inotify.fd, self._on_readable)

    def watch(self, uid: int, control_group: str) -> None:
        """Watch the cgroup from now on, and report what it says now. An empty one is not populated."""
        path = self._events_file(control_group) if control_group else None
        if path is None:
            self._tell(uid, False)
            return
        try:
            self._inotify.add_watch(str(path.parent.parent), IN_DELETE | IN_ONLYDIR)
            watch = self._inotify.add_watch(str(path), IN_MODIFY)
        except FileNotFoundError:
            self._tell(uid, False)
            return
        except OSError as error:
            self._files = {w: entry for w, entry in self._files.items() if entry[0] != uid}
            self._guess(uid, error, lambda: self.watch(uid, control_group))
            return
        self._files = {w: entry for w, entry in self._files.items() if entry[0] != uid or w == watch}
        self._files[watch] = (uid, path)
        self._report(uid, path)

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

    def _report(self, uid: int, path: Path) -> None:
        try:
            populated = parse_populated(path.read_text())
        except OSError as error:
            if error.errno not in _GONE:  # EMFILE, say
                self._guess(uid, error, lambda: self._report(uid, path))
                return
            populated = False
        self._tell(uid, populated)

    def _tell(self, uid: int, populated: bool) -> None:
        if (timer := self._guessed.pop(uid, None)) is not None:
            timer.cancel()
            log.info("Whether UID %d has processes is known again", uid, extra=fields(uid=uid))
        self._populated(uid, populated)

    def _guess(self, uid: int, error: OSError, again: Callable[[], None]) -> None:
        """Go on as if the slice had processes: nothing is let go while it may have some."""
        if (timer := self._guessed.get(uid)) is not None:
            timer.cancel()
        else:
            log.warning(
                "Whether UID %d has processes cannot be told, going on as if it had some: %s",
                uid,
                error,
                extra=fields(uid=uid),
            )
        self._guessed[uid] = self._loop.call_later(_LOOK_AGAIN, again)
        self._populated(uid, True)

    def _on_readable(self) -> None:
        for event in self._inotify.read():
            for watch, (uid, path) in list(self._files.items()):
                if watch == event.watch or event.mask & IN_Q_OVERFLOW or event.name == path.parent.name:
                    self._report(uid, path)
                    if not path.exists():
                        self._files.pop(watch, None)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's socket directory, /tmp/.X11-unix: which displays may have changed.

Runs in the worker's thread. Owns one inotify instance; the event loop waits for its descriptor to become
readable, and does nothing else with it.
Not here: what becomes of a display (registry).

Hard facts
- X servers are found by their sockets. Watching for locks would mean watching every user's /tmp, where
  compilers work.
- A directory that is removed sends nothing, not even IN_DELETE_SELF, while a bind mount of it exists. Its
  parent sends IN_DELETE, or IN_MOVED_TO if another one replaces it, but the parent is the host's /tmp, where
  that happens all the time. So its watch is IN_ONESHOT: the first event ends it, and the check that follows,
  at most every CHECK_INTERVAL seconds, sets it again.
- A file system that is mounted over the parent sends nothing. It is noticed when the next instance is made:
  poll(2) of the mount table would wake us for every mount of the host.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from polytmpd.blocking import shared
from polytmpd.displays import lockfiles
from polytmpd.displays.complaints import Complaints
from polytmpd.displays.lockfiles import SOCKETS
from polytmpd.displays.places import Place
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.host import in_words
from polytmpd.kernel.inotify import (
    IN_CREATE,
    IN_DELETE,
    IN_DELETE_SELF,
    IN_IGNORED,
    IN_MOVE_SELF,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    IN_ONESHOT,
    IN_ONLYDIR,
    IN_Q_OVERFLOW,
    Inotify,
)

CHECK_INTERVAL: Final = 10.0
"""Seconds until a new socket directory is noticed at the latest; a login notices it at once. Also until a
directory that cannot be watched is tried again.
"""

_MOVED_DELAY: Final = 1.0
_EVENTS: Final = (
    IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR
)
_PARENT: Final = IN_DELETE | IN_MOVED_TO | IN_ONESHOT | IN_ONLYDIR
_SELF: Final = IN_DELETE_SELF | IN_MOVE_SELF | IN_IGNORED
_PATH: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


class SocketDirectory:
    """The directory that has this name now. It may be removed and made again at any time."""

    def __init__(self, host: Place, complaints: Complaints, stopping: Callable[[], bool]) -> None:
        self._host = host
        self._complaints = complaints
        self._stopping = stopping
        self._inotify: Inotify | None = None
        self._watch = -1
        self._parent = -1
        self._checked = -math.inf
        self._identity: tuple[int, int] | None = None
        self._changed: dict[int, None] = {}
        self._listing: os._ScandirIterator[str] | None = None
        self._overflowed = False  # during the listing, so it has to be listed once more
        self.check_due = 0.0
        """When refresh() checks the directory next, in seconds of the monotonic clock; inf for never."""
        self.generation = 0
        """Counts the directories found so far: a new one may have the inode number of the one before."""

    @property
    def inotify(self) -> int | None:
        """The inotify descriptor, to wait for only; None until a directory is found."""
        return None if self._inotify is None else int(self._inotify.fd)

    @property
    def has_work(self) -> bool:
        """Whether there are displays to compare, or entries to list."""
        return bool(self._changed) or self._listing is not None

    def open(self) -> Descriptor:
        """An O_PATH descriptor of the directory, the caller's to close. Raises OSError."""
        with self._host.open() as base:
            return Descriptor.open(SOCKETS, _PATH, dir_fd=base)

    def close(self) -> None:
        self._end_listing()
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    def check_soon(self, seconds: float = 0.0) -> None:
        """Have refresh() check the directory after so many seconds."""
        self.check_due = time.monotonic() + seconds

    def refresh(self, shown: Iterable[int]) -> None:
        """Read the events, and check the directory if that is due.

        If it is another directory, everything may have changed: its sockets, and the displays shown now.
        """
        self._read_events()
        now = time.monotonic()
        if now >= self.check_due:
            self._checked, self.check_due = now, math.inf
            self._check(shown)
        if self._identity is None:
            self._end_listing()
            self._changed.clear()  # once there is a directory, all of it is listed

    def list_until(self, end: float) -> None:
        """Continue the listing until a moment of the monotonic clock, however large the directory is.

        Raises OSError.
        """
        for entry in self._listing or ():
            if (display := lockfiles.display_of_socket(entry.name)) is not None:
                self._changed[display] = None
            if time.monotonic() >= end or self._stopping():
                return
        if self._overflowed:
            self._identity = None
            self.check_soon()
        self._end_listing()

    def changed_until(self, end: float) -> Iterator[int]:
        """Take displays that may have changed, one by one, until a moment of the monotonic clock."""
        while self._changed and time.monotonic() < end and not self._stopping():
            display = next(iter(self._changed))
            del self._changed[display]
            yield display

    def vanished(self) -> None:
        """Note that the directory can no longer be opened: check again after a moment."""
        self._identity = None
        self.check_soon(_MOVED_DELAY)

    def _read_events(self) -> None:
        for event in self._inotify.read() if self._inotify is not None else ():
            if event.mask & IN_Q_OVERFLOW:
                self._identity = None  # as if it were another directory: list all of it
                self.check_soon()
            elif event.watch == self._parent:
                self.check_due = min(
                    self.check_due, max(time.monotonic() + _MOVED_DELAY, self._checked + CHECK_INTERVAL)
                )
            elif event.watch != self._watch:
                continue
            elif event.mask & _SELF:
                # not at once: whatever moved it away is about to make the new one
                self.check_due = min(self.check_due, time.monotonic() + _MOVED_DELAY)
                if event.mask & IN_IGNORED:
                    self._identity, self._watch = None, -1
            elif (display := lockfiles.display_of_socket(event.name)) is not None:
                self._changed[display] = None

    def _check(self, shown: Iterable[int]) -> None:
        """Find the directory as it is now. If it is another one, watch it and begin to list it."""
        try:
            with self._host.open() as base:
                self._watch_parent(base)
                shared.ensure(base, SOCKETS)
            with self.open() as sockets:
                found = os.fstat(sockets)
                if (found.st_dev, found.st_ino) == self._identity:
                    return
                is_new = self._move_watch(sockets)
                self._begin_listing(sockets, is_new=is_new)
                self._identity = (found.st_dev, found.st_ino)
        except OSError as error:
            self._identity = None
            self.check_soon(CHECK_INTERVAL)
            message = "Failed to watch %s/%s, not showing X display locks to other users: %s"
            self._complaints.warn(SOCKETS, message, self._host.path, SOCKETS, in_words(error))
            return
        self._complaints.settle(SOCKETS)
        self._changed.update(dict.fromkeys(shown))

    def _get_inotify(self) -> Inotify:
        if self._inotify is None:
            self._inotify = Inotify()
        return self._inotify

    def _watch_parent(self, base: int) -> None:
        """Be woken when something is removed from the base directory, once. Raises OSError."""
        self._parent = self._get_inotify().add_watch(f"/proc/self/fd/{base}", _PARENT)

    def _move_watch(self, sockets: int) -> bool:
        """Watch this directory instead. Returns whether it is new: no instance has a new one yet."""
        inotify = self._get_inotify()
        former, self._watch = self._watch, -1
        self._watch = inotify.add_watch(f"/proc/self/fd/{sockets}", _EVENTS)
        if self._watch == former:
            return False
        self.generation += 1
        if former != -1:
            with contextlib.suppress(OSError):  # the kernel has already removed it
                inotify.remove_watch(former)
        return True

    def _begin_listing(self, sockets: int, *, is_new: bool) -> None:
        """Begin to list the directory.

        A listing of the same directory continues, and is repeated later. Otherwise a user who keeps the
        queue overflowing would make it begin again and again, and never end.
        """
        if self._listing is not None and not is_new:
            self._overflowed = True
            return
        self._end_listing()
        with Descriptor.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=sockets) as fd:
            self._listing = os.scandir(fd)

    def _end_listing(self) -> None:
        if self._listing is not None:
            self._listing.close()
        self._listing, self._overflowed = None, False

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's socket directory, /tmp/.X11-unix: watches and lists it, and names the displays that may have
changed.

Runs in the worker's thread. Owns one inotify instance. The event loop waits for its descriptor to become
readable, and does nothing else with it.
Not here: what becomes of a display (registry).

Hard facts
- X servers are looked for by their sockets: users' own /tmp are not watched, compilers live there.
- A directory that is removed sends nothing, no IN_DELETE_SELF, while a bind mount of it exists: it is looked
  at every CHECK_INTERVAL seconds.
"""

import contextlib
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
from polytmpd.kernel.inotify import (
    IN_CREATE,
    IN_DELETE,
    IN_DELETE_SELF,
    IN_IGNORED,
    IN_MOVE_SELF,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    IN_ONLYDIR,
    IN_Q_OVERFLOW,
    Inotify,
)

CHECK_INTERVAL: Final = 10.0
"""Seconds in which a socket directory that was made again is noticed; a login notices it at once."""

_MOVED_DELAY: Final = 1.0
_EVENTS: Final = (
    IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR
)
_SELF: Final = IN_DELETE_SELF | IN_MOVE_SELF | IN_IGNORED
_PATH: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


class SocketDirectory:
    """The directory that has this name now; it may be removed and made again at any time."""

    def __init__(self, host: Place, complaints: Complaints, stopping: Callable[[], bool]) -> None:
        self._host = host
        self._complaints = complaints
        self._stopping = stopping
        self._inotify: Inotify | None = None
        self._watch = -1
        self._identity: tuple[int, int] | None = None
        self._changed: dict[int, None] = {}
        self._listing: os._ScandirIterator[str] | None = None
        self._lost = False  # events, while it is listed: it is listed once more then
        self.check_due = 0.0
        """When refresh() checks the directory next, by the monotonic clock."""
        self.generation = 0
        """How many directories were found so far: a new one may have its predecessor's inode number."""

    @property
    def inotify(self) -> int | None:
        """The inotify descriptor; None before a directory was found. It stays this object's."""
        return None if self._inotify is None else int(self._inotify.fd)

    @property
    def has_work(self) -> bool:
        """Whether displays are left that may have changed, or may be found."""
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
        """Have refresh() check the directory in so many seconds."""
        self.check_due = time.monotonic() + seconds

    def refresh(self, shown: Iterable[int]) -> None:
        """Read the events, and check the directory if that is due. If it is another one, all its sockets and
        all displays that are shown may have changed.
        """
        self._read_events()
        now = time.monotonic()
        if now >= self.check_due:
            self.check_due = now + CHECK_INTERVAL
            self._check(shown)
        if self._identity is None:
            self._end_listing()
            self._changed.clear()  # there is nothing to look at, and all is looked at when there is

    def list_until(self, end: float) -> None:
        """Go on with the listing, as long as the directory may be. Raises OSError."""
        for entry in self._listing or ():
            if (display := lockfiles.display_of_socket(entry.name)) is not None:
                self._changed[display] = None
            if time.monotonic() >= end or self._stopping():
                return
        if self._lost:
            self._identity = None
            self.check_soon()
        self._end_listing()

    def changed_until(self, end: float) -> Iterator[int]:
        """Take the displays that may have changed, one by one, for as long as there is time."""
        while self._changed and time.monotonic() < end and not self._stopping():
            display = next(iter(self._changed))
            del self._changed[display]
            yield display

    def vanished(self) -> None:
        """The directory could not be opened any more."""
        self._identity = None
        self.check_soon(_MOVED_DELAY)

    def _read_events(self) -> None:
        for event in self._inotify.read() if self._inotify is not None else ():
            if event.mask & IN_Q_OVERFLOW:
                self._identity = None  # as if it were another directory: all sockets are looked at
                self.check_soon()
            elif event.watch != self._watch:
                continue
            elif event.mask & _SELF:
                # not at once: who moves it away is about to make the new one
                self.check_due = min(self.check_due, time.monotonic() + _MOVED_DELAY)
                if event.mask & IN_IGNORED:
                    self._identity, self._watch = None, -1
            elif (display := lockfiles.display_of_socket(event.name)) is not None:
                self._changed[display] = None

    def _check(self, shown: Iterable[int]) -> None:
        """Watch the host's socket directory as it is now; where it is another one, look at all sockets."""
        try:
            with self._host.open() as base:
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
            self._complaints.warn(SOCKETS, "X displays are not shown across users: %s", error)
            return
        self._complaints.settle(SOCKETS)
        self._changed.update(dict.fromkeys(shown))

    def _move_watch(self, sockets: int) -> bool:
        """Watch this directory; whether it is another one than was watched, which no instance has yet."""
        if self._inotify is None:
            self._inotify = Inotify()
        former, self._watch = self._watch, -1
        self._watch = self._inotify.add_watch(f"/proc/self/fd/{sockets}", _EVENTS)
        if self._watch == former:
            return False
        self.generation += 1
        if former != -1:
            with contextlib.suppress(OSError):  # the kernel removed it already
                self._inotify.remove_watch(former)
        return True

    def _begin_listing(self, sockets: int, *, is_new: bool) -> None:
        """One that is under way goes on to its end: who has events lost without end would have it begin
        without end.
        """
        if self._listing is not None and not is_new:
            self._lost = True
            return
        self._end_listing()
        with Descriptor.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=sockets) as fd:
            self._listing = os.scandir(fd)

    def _end_listing(self) -> None:
        if self._listing is not None:
            self._listing.close()
        self._listing, self._lost = None, False

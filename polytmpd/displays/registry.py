# SPDX-License-Identifier: LGPL-2.1-or-later
"""The registry: which X displays there are, and in which places their locks are shown.

Runs in the worker's thread, so that whatever is asked first is done first. It knows of no event loop.
Not here: when it is updated (displaylocks), and what a lock is (lockfiles).
"""

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from polytmpd.displays import lockfiles
from polytmpd.displays.complaints import Complaints
from polytmpd.displays.places import Place
from polytmpd.displays.socketdir import SocketDirectory

log = logging.getLogger(__name__)

HOST: Final = -1
"""Stands for the host where a place is named by the UID of its instance."""
PER_OWNER: Final = 64
"""Displays of one user that are shown to the others."""


@dataclass(frozen=True, slots=True)
class Status:
    """What the event loop has to know of the registry.

    base: the host's directory in which the sockets' is. generation: which socket directory it is, counted
    from 1. inotify: the descriptor to wait for. check_due: when to update at the latest, by the monotonic
    clock. has_work: whether to update soon.
    """

    base: str = ""
    generation: int = 0
    inotify: int | None = None
    check_due: float | None = None
    has_work: bool = False


@dataclass(frozen=True, slots=True)
class _Display:
    """A display that is shown: whose the socket is, in whose place the lock is, and the PID in it."""

    owner: int
    source: int
    pid: int


class Registry:
    """Idle until it has a place."""

    def __init__(self, complaints: Complaints, stopping: Callable[[], bool]) -> None:
        """stopping(): whether to leave the rest of the work undone."""
        self._complaints = complaints
        self._stopping = stopping
        self._directory: SocketDirectory | None = None
        self._places: dict[int, Place] = {}
        self._displays: dict[int, _Display] = {}
        self._counts: Counter[int] = Counter()

    def start(self, base: str, places: Mapping[int, Place]) -> None:
        """Begin with these places, by the UIDs of their instances; base: the host's own."""
        self._add_host(os.path.realpath(base))
        self._places |= places

    def add_place(self, uid: int, place: Place) -> None:
        """Show the displays that exist in the place of an instance. It may have been added before."""
        directory = self._directory or self._add_host(place.base)
        self._places[uid] = place
        directory.check_soon()
        for display, known in self._displays.items():
            if known.source != uid:
                self._publish(display, known.pid, [uid])

    def remove_place(self, uid: int) -> None:
        """An instance ended: its displays are no more, and it is shown no others."""
        place = self._places.pop(uid, None)
        for display, known in list(self._displays.items()):
            if uid in {known.source, known.owner}:
                self._forget(display)
            elif place is not None:
                self._withdraw_from(place, display)
        self._complaints.settle(f"owner {uid}")
        self._complaints.settle(f"place {uid}")

    def place(self, uid: int) -> Place | None:
        return self._places.get(uid)

    def remove_strays(self, uid: int, place: Place, found: Sequence[int]) -> None:
        """Remove the copies in a place that are not to be there. found: the displays whose copies it has."""
        if self._directory is None or self._places.get(uid) != place:
            return
        for display in found:
            with contextlib.suppress(OSError), self._directory.open() as sockets:
                self._compare(sockets, display)
            known = self._displays.get(display)
            if known is None or known.source == uid:
                self._withdraw_from(place, display)

    def update(self, seconds: float) -> None:
        """Look at what has changed, no longer than so many seconds; the rest is left for the next time."""
        if self._directory is None:
            return
        begun = time.monotonic()
        self._directory.refresh(self._displays)
        if not self._directory.has_work:
            return
        try:
            self._directory.list_until(begun + seconds / 2)
            with self._directory.open() as sockets:
                for display in self._directory.changed_until(begun + seconds):
                    self._compare(sockets, display)
        except FileNotFoundError:  # the directory, a moment ago
            self._directory.vanished()

    def status(self) -> Status:
        if self._directory is None:
            return Status()
        return Status(
            base=self._places[HOST].base,
            generation=self._directory.generation,
            inotify=self._directory.inotify,
            check_due=self._directory.check_due if len(self._places) > 1 else None,
            has_work=self._directory.has_work,
        )

    def close(self) -> None:
        """Release the descriptors; the copies stay."""
        if self._directory is not None:
            self._directory.close()

    def _add_host(self, base: str) -> SocketDirectory:
        host = self._places[HOST] = Place(base)
        self._directory = SocketDirectory(host, self._complaints, self._stopping)
        return self._directory

    def _compare(self, sockets: int, display: int) -> None:
        """Compare one display with what is known of it."""
        known = self._displays.get(display)
        owner = lockfiles.socket_owner(sockets, display)
        if known is not None and known.owner != owner:
            self._forget(display)
            known = None
        if owner is None:
            return
        if known is None and self._counts[owner] >= PER_OWNER:
            message = "UID %d has more than %d X displays, the others' locks are not shown to other users"
            self._complaints.warn(f"owner {owner}", message, owner, PER_OWNER, uid=owner)
            return
        found = self._find_lock(display, owner)
        if found is None:
            self._forget(display)
            return
        source, pid = found
        if known is None:
            self._counts[owner] += 1
        self._displays[display] = _Display(owner, source, pid)
        self._publish(display, pid, [uid for uid in self._places if uid != source])

    def _find_lock(self, display: int, owner: int) -> tuple[int, int] | None:
        """Where a display's lock is, and the PID in it.

        It is in its owner's /tmp, as a rule. Root's Xorg of a user's session, and `sudo -u bob`, have it in
        the /tmp of the user who started them.
        """
        first = [uid for uid in (owner, HOST) if uid in self._places]
        for uid in (*first, *(uid for uid in self._places if uid not in first)):
            with contextlib.suppress(OSError), self._places[uid].open() as directory:
                pid = lockfiles.read_lock(directory, display, owner)
                if pid is not None:
                    return uid, pid
        return None

    def _forget(self, display: int) -> None:
        """Forget a display, and remove its copies."""
        known = self._displays.pop(display, None)
        if known is None:
            return
        self._counts[known.owner] -= 1
        if not self._counts[known.owner]:
            del self._counts[known.owner]
        for place in self._places.values():
            self._withdraw_from(place, display)

    def _publish(self, display: int, pid: int, uids: Iterable[int]) -> None:
        """One file for all: a link in each place costs no inode."""
        try:
            with self._places[HOST].open() as base:
                copy = lockfiles.make_copy(base, pid)
        except OSError as error:
            message = "X display locks are not shown across users: %s"
            self._complaints.warn(f"place {HOST}", message, error)
            return
        with copy:
            for uid in uids:
                self._publish_in(uid, copy, display)

    def _publish_in(self, uid: int, copy: int, display: int) -> None:
        place = self._places[uid]
        try:
            with place.open() as directory:
                shown = lockfiles.publish(copy, directory, display)
        except FileNotFoundError:  # on its way out
            return
        except OSError as error:
            message = "X display locks are not shown in %s/%s: %s"
            self._complaints.warn(f"place {uid}", message, place.base, place.inner, error)
            return
        if not shown:
            log.debug("%s/%s has a lock of display %d of its own", place.base, place.inner, display)

    def _withdraw_from(self, place: Place, display: int) -> None:
        try:
            with place.open() as directory:
                lockfiles.withdraw(directory, display)
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("The lock of display %d stays in %s/%s: %s", display, place.base, place.inner, error)

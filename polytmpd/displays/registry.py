# SPDX-License-Identifier: LGPL-2.1-or-later
"""The registry: which X displays there are, and in which places their locks are shown.

Runs in the worker's thread and knows nothing of the event loop.
Not here: when it is updated (displaylocks), and what a lock is (lockfiles).
"""

import contextlib
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from polytmpd.displays import lockfiles
from polytmpd.displays.complaints import Complaints
from polytmpd.displays.places import Place
from polytmpd.displays.socketdir import SocketDirectory
from polytmpd.kernel.host import in_words

log = logging.getLogger(__name__)

HOST: Final = -1
"""The host's place. Those of the instances have their UIDs."""
PER_OWNER: Final = 64
"""How many displays of one user are shown to the others."""


class Status(NamedTuple):
    """What the event loop needs to know.

    base: the directory of the host that contains the socket directory. generation: which socket directory it
    is, 0 if there has been none. inotify: the descriptor to wait for. check_due: when to update at the
    latest, in seconds of the monotonic clock; None for never. has_work: whether the last update left work.
    """

    base: str = ""
    generation: int = 0
    inotify: int | None = None
    check_due: float | None = None
    has_work: bool = False


class _Display(NamedTuple):
    """A display that is shown.

    owner: the UID that the socket belongs to. source: the place of the original lock. pid: the PID in it.
    """

    owner: int
    source: int
    pid: int


class Registry:
    """The displays and the places of one daemon. It does nothing until it has a place."""

    def __init__(self, complaints: Complaints, stopping: Callable[[], bool]) -> None:
        """If stopping() is true, updates end early."""
        self._complaints = complaints
        self._stopping = stopping
        self._directory: SocketDirectory | None = None
        self._places: dict[int, Place] = {}
        self._displays: dict[int, _Display] = {}
        self._counts: Counter[int] = Counter()

    def start(self, base: str, places: Mapping[int, Place]) -> None:
        """Take these places, by UID. base: the host's directory. Call it once, before the other methods."""
        self._add_host(os.path.realpath(base))
        self._places |= places

    def add_place(self, uid: int, place: Place) -> None:
        """Show all displays in the place of an instance, new or known."""
        directory = self._directory or self._add_host(place.base)
        self._places[uid] = place
        directory.check_soon()
        for display, known in self._displays.items():
            if known.source != uid:
                self._publish(display, known.pid, [uid])

    def remove_place(self, uid: int) -> None:
        """Forget an instance that has ended, and its displays. Removes the other copies from its place."""
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
        """Remove the copies that do not belong in a place. found: the displays of which it has copies."""
        if self._directory is None or self._places.get(uid) != place:
            return
        for display in found:
            with contextlib.suppress(OSError), self._directory.open() as sockets:
                self._compare(sockets, display)
            known = self._displays.get(display)
            if known is None or known.source == uid:
                self._withdraw_from(place, display)

    def update(self, seconds: float) -> None:
        """Show what has changed. Whatever takes longer than so many seconds is left to the next update."""
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
        except FileNotFoundError:  # the directory has just been removed
            self._directory.vanished()

    def status(self) -> Status:
        if self._directory is None:
            return Status()
        due = self._directory.check_due
        return Status(
            base=self._places[HOST].base,
            generation=self._directory.generation,
            inotify=self._directory.inotify,
            check_due=due if len(self._places) > 1 and due != math.inf else None,
            has_work=self._directory.has_work,
        )

    def close(self) -> None:
        """Close all descriptors. The copies stay."""
        if self._directory is not None:
            self._directory.close()

    def _add_host(self, base: str) -> SocketDirectory:
        host = self._places[HOST] = Place(base)
        self._directory = SocketDirectory(host, self._complaints, self._stopping)
        return self._directory

    def _compare(self, sockets: int, display: int) -> None:
        """Compare a display on disk with what is known of it, and show the difference."""
        known = self._displays.get(display)
        owner = lockfiles.socket_owner(sockets, display)
        if known is not None and known.owner != owner:
            self._forget(display)
            known = None
        if owner is None:
            return
        if known is None and self._counts[owner] >= PER_OWNER:
            message = "UID %d has more than %d X displays, not showing the locks of the rest to other users"
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
        """The place of a display's lock, and the PID in it.

        The lock is usually in the place of its owner. An Xorg that runs as root in a user's session, or one
        started by `sudo -u bob`, has it in the place of the user who started it.
        """
        first = [uid for uid in (owner, HOST) if uid in self._places]
        for uid in (*first, *(uid for uid in self._places if uid not in first)):
            with contextlib.suppress(OSError), self._places[uid].open() as directory:
                pid = lockfiles.read_lock(directory, display, owner)
                if pid is not None:
                    return uid, pid
        return None

    def _forget(self, display: int) -> None:
        """Forget a display, and remove all copies of its lock."""
        known = self._displays.pop(display, None)
        if known is None:
            return
        self._counts[known.owner] -= 1
        if not self._counts[known.owner]:
            del self._counts[known.owner]
        for place in self._places.values():
            self._withdraw_from(place, display)

    def _publish(self, display: int, pid: int, uids: Iterable[int]) -> None:
        """Show a lock in these places: one file, and a hard link in each, so that it costs one inode."""
        try:
            with self._places[HOST].open() as base:
                copy = lockfiles.make_copy(base, pid)
        except OSError as error:
            message = "Failed to copy an X display lock in %s, not showing it to other users: %s"
            self._complaints.warn(f"place {HOST}", message, self._places[HOST].path, in_words(error))
            return
        with copy:
            for uid in uids:
                self._publish_in(uid, copy, display)

    def _publish_in(self, uid: int, copy: int, display: int) -> None:
        place = self._places[uid]
        try:
            with place.open() as directory:
                shown = lockfiles.publish(copy, directory, display)
        except FileNotFoundError:  # the instance is being removed
            return
        except OSError as error:
            message = "Failed to show X display locks in %s, ignoring: %s"
            self._complaints.warn(f"place {uid}", message, place.path, in_words(error))
            return
        if not shown:
            log.debug("%s has its own lock of display %d, keeping it", place.path, display)

    def _withdraw_from(self, place: Place, display: int) -> None:
        try:
            with place.open() as directory:
                lockfiles.withdraw(directory, display)
        except FileNotFoundError:
            return
        except OSError as error:
            name = lockfiles.lock_name(display)
            log.warning("Failed to remove %s/%s, ignoring: %s", place.path, name, in_words(error))

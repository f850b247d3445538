# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shows each X display's lock, /tmp/.X<n>-lock, in the /tmp of everybody whom the display concerns: the host
and all living instances.

Owns one inotify instance, on the host's /tmp/.X11-unix, and one thread in which all files are touched. What
fails is logged: a login never fails for a display.
Not here: the socket directory's bind mounts (kernel/mountns, executor), and when instances come and go
(daemon).

Hard facts
- An X server, Xwayland and mutter make the lock first ("%10d\\n", the server's PID, 0444), then the socket
  X<n>. At exit both go. Killed, both stay, and in a sticky directory only the owner can remove them; so with
  copies. With -displayfd and no display named there is no lock at all.
- Who finds a lock asks kill(PID, 0); ESRCH makes him remove it. Nothing but a positive PID may be in a copy:
  kill(-1) reaches everybody.
- X servers are looked for by their sockets: users' own /tmp are not watched, compilers live there.
- A directory that is removed sends nothing, no IN_DELETE_SELF, while a bind mount of it exists: it is looked
  at every CHECK_INTERVAL seconds.
- A lock in a user's /tmp is whatever he likes: a FIFO, a link, a file with a lease (fcntl(2)). The daemon's
  path to it, through the host's /tmp, crosses none of his mounts.
- Copies are root's, in a sticky directory: what was recognised by a descriptor is there still when its name
  is unlinked. Only root sets and sees a trusted.* attribute (xattr(7)).
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from polytmpd.blocking import shared
from polytmpd.core.model import Directory, Instance
from polytmpd.displays.lockfiles import (
    SOCKETS,
    display_of,
    make_copy,
    publish,
    read_lock,
    socket_owner,
    withdraw,
)
from polytmpd.displays.places import Place, find_copies_in, place_of
from polytmpd.journal import fields
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

log = logging.getLogger(__name__)

PER_OWNER: Final = 64
"""Displays of one user that are shown to the others."""
CHECK_INTERVAL: Final = 10.0
"""Seconds in which a socket directory that was made again is noticed; a login notices it at once."""

_ON_HOST: Final = -1
# A pass works so long at most, and rests at least so long, and ten times as long as it worked: whoever makes
# and removes sockets without end gets a tenth of a processor, and logins come in between.
_PASS: Final = 0.02
_REST: Final = 0.05
_REST_FACTOR: Final = 10
_MOVED_DELAY: Final = 1.0
_EVENTS: Final = (
    IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR
)
_SELF: Final = IN_DELETE_SELF | IN_MOVE_SELF | IN_IGNORED
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class _Display:
    """A display that is shown: whose the socket is, in whose place the lock is, and the PID in it."""

    owner: int
    source: int
    pid: int


class DisplayLocks:
    """One for a daemon; its methods are called in the event loop.

    Everything below "In the thread" runs there, and only there is that state read and changed: what is asked
    first is done first.
    """

    def __init__(self, share_again: Callable[[str], Awaitable[None]]) -> None:
        """share_again(base) gives the host's socket directories in base, made again, to the instances."""
        self._share_again = share_again
        self._thread = ThreadPoolExecutor(1, "displaylocks")
        self._wake = asyncio.Event()
        self._stopping = threading.Event()
        self._worker: asyncio.Task[None] | None = None
        self._sweeps: set[asyncio.Task[None]] = set()
        self._complained: set[str] = set()  # the thread's, too
        self._shared = 0  # what _armed was when the instances were last given the directory
        # the thread's own from here on
        self._inotify: Inotify | None = None
        self._identity: tuple[int, int] | None = None
        self._watch = -1
        self._armed = 0  # how often: a new directory may have its predecessor's inode number
        self._places: dict[int, Place] = {}
        self._displays: dict[int, _Display] = {}
        self._counts: Counter[int] = Counter()
        self._dirty: dict[int, None] = {}
        self._listing: os._ScandirIterator[str] | None = None
        self._lost = False  # events, while it is listed: it is listed once more then
        self._check_due = 0.0

    async def start(self, directories: Sequence[Directory], instances: Iterable[Instance]) -> None:
        """Look at everything anew.

        instances: all that are there; also those that have ended and are removed next, since files of theirs
        may persist. Without SOCKETS in directories the room is idle until an instance comes that shares it.
        """
        attended = [(instance.uid, *found) for instance in instances if (found := place_of(instance))]
        bases = [place.base for _uid, place, _persistent in attended]
        bases += [entry.path for entry in directories if SOCKETS in entry.shared]
        if not bases:
            return
        places = {uid: place for uid, place, _persistent in attended}
        await self._do(lambda: self._begin(bases[0], places))
        self._go()
        for uid in (_ON_HOST, *(uid for uid, _place, _persistent in attended)):
            self._sweep(uid)

    async def instance_came(self, instance: Instance) -> None:
        """Show the displays that exist to an instance before its user comes in. Instances that have come
        already may come again.
        """
        if (found := place_of(instance)) is None:
            return
        place, persistent = found
        await self._do(lambda: self._attend(instance.uid, place))
        self._go()
        if persistent:
            self._sweep(instance.uid)

    def instance_gone(self, uid: int) -> None:
        """An instance ended: its displays are no more, and it is shown no others."""
        if self._worker is not None:
            self._submit(lambda: self._leave(uid))

    async def close(self) -> None:
        """Stop; copies stay, the next start judges them."""
        self._stopping.set()
        tasks = [task for task in (self._worker, *self._sweeps) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._worker = None
        if self._inotify is not None:
            asyncio.get_running_loop().remove_reader(self._inotify.fd)
        await self._do(self._end)
        self._thread.shutdown(wait=False)

    # In the event loop

    def _submit(self, work: Callable[[], None]) -> "Future[None]":
        def run() -> None:
            try:
                work()
            except Exception as error:
                self._complain_of(error)

        try:
            return self._thread.submit(run)
        except RuntimeError as error:  # can't start new thread: run() is in the queue, for when one can be
            self._complain_of(error)
            later: Future[None] = Future()
            later.set_result(None)
            return later

    async def _do(self, work: Callable[[], None]) -> None:
        await asyncio.wrap_future(self._submit(work))

    def _go(self) -> None:
        """Begin to hear events, at the latest when there is something to hear of."""
        self._wake.set()
        if self._worker is None and not self._stopping.is_set():
            self._worker = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._next_due()):
                    await self._wake.wait()
            self._wake.clear()
            begun = loop.time()
            await self._do(self._pass)
            armed = self._armed
            if armed != self._shared:
                try:
                    await self._share_again(self._places[_ON_HOST].base)
                except Exception as error:  # nobody else would go on showing displays
                    self._complain(
                        "share", "Instances may have a former %s: %r, trying again", SOCKETS, error
                    )
                else:
                    self._shared = armed
                    self._complained.discard("share")
            await asyncio.sleep(max(_REST, (loop.time() - begun) * _REST_FACTOR))
            if self._dirty or self._listing is not None:
                self._wake.set()
            if self._inotify is not None:
                loop.add_reader(self._inotify.fd, self._on_readable, self._inotify.fd)

    def _on_readable(self, fd: int) -> None:
        asyncio.get_running_loop().remove_reader(fd)  # until the pass that it starts has rested
        self._wake.set()

    def _next_due(self) -> float | None:
        # loop.time() is time.monotonic()
        return self._check_due if len(self._places) > 1 else None

    def _sweep(self, uid: int) -> None:
        """Remove copies that a former daemon left in a place, without keeping anybody waiting."""
        task = asyncio.get_running_loop().create_task(self._remove_strays(uid))
        self._sweeps.add(task)
        task.add_done_callback(self._sweeps.discard)

    async def _remove_strays(self, uid: int) -> None:
        place = self._places.get(uid)
        if place is None:
            return
        with contextlib.suppress(OSError):
            found = await asyncio.to_thread(find_copies_in, place, self._stopping.is_set)
            await self._do(lambda: self._judge(uid, place, found))

    # In the thread

    def _begin(self, base: str, places: dict[int, Place]) -> None:
        self._places = {_ON_HOST: Place(os.path.realpath(base)), **places}

    def _end(self) -> None:
        self._end_listing()
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    def _attend(self, uid: int, place: Place) -> None:
        self._places.setdefault(_ON_HOST, Place(place.base))
        self._places[uid] = place
        self._check_due = 0.0
        for display, known in self._displays.items():
            if known.source != uid:
                self._publish(display, known.pid, [uid])

    def _leave(self, uid: int) -> None:
        place = self._places.pop(uid, None)
        for display, known in list(self._displays.items()):
            if uid in {known.source, known.owner}:
                self._drop(display)
            elif place is not None:
                self._withdraw_in(place, display)
        self._complained.discard(f"owner {uid}")
        self._complained.discard(f"place {uid}")

    def _judge(self, uid: int, place: Place, found: Sequence[int]) -> None:
        """Remove the copies in a place that are not to be there."""
        if self._places.get(uid) != place:
            return
        for display in found:
            with contextlib.suppress(OSError), self._opened_sockets() as sockets:
                self._look(sockets, display)
            known = self._displays.get(display)
            if known is None or known.source == uid:
                self._withdraw_in(place, display)

    def _pass(self) -> None:
        """Look at what has changed, as long as _PASS allows; the rest stays dirty."""
        if not self._places:
            return
        end = time.monotonic() + _PASS
        self._read_events()
        now = time.monotonic()
        if now >= self._check_due:
            self._check_due = now + CHECK_INTERVAL
            self._look_at_directory()
        if self._identity is None:
            self._end_listing()
            self._dirty.clear()  # there is nothing to look at, and all is looked at when there is
        if self._listing is None and not self._dirty:
            return
        try:
            self._list(now + (end - now) / 2)
            with self._opened_sockets() as sockets:
                while self._dirty and time.monotonic() < end and not self._stopping.is_set():
                    display = next(iter(self._dirty))
                    del self._dirty[display]
                    self._look(sockets, display)
        except FileNotFoundError:  # the directory, a moment ago
            self._identity = None
            self._check_due = now + _MOVED_DELAY

    @contextlib.contextmanager
    def _opened_sockets(self) -> Iterator[int]:
        with (
            self._places[_ON_HOST].open() as base,
            Descriptor.open(SOCKETS, _DIRECTORY, dir_fd=base) as sockets,
        ):
            yield sockets

    def _read_events(self) -> None:
        for event in self._inotify.read() if self._inotify is not None else ():
            if event.mask & IN_Q_OVERFLOW:
                self._identity = None  # as if it were another directory: all sockets are looked at
                self._check_due = 0.0
            elif event.watch == self._watch and event.mask & _SELF:
                # not at once: who moves it away is about to make the new one
                self._check_due = min(self._check_due, time.monotonic() + _MOVED_DELAY)
                if event.mask & IN_IGNORED:
                    self._identity, self._watch = None, -1
            elif event.watch == self._watch and (display := display_of(event.name)) is not None:
                self._dirty[display] = None

    def _look_at_directory(self) -> None:
        """Watch the host's socket directory as it is now; where it is another one, look at all sockets."""
        try:
            with self._places[_ON_HOST].open() as base:
                shared.ensure(base, SOCKETS)
            with self._opened_sockets() as sockets:
                found = os.fstat(sockets)
                if (found.st_dev, found.st_ino) == self._identity:
                    return
                is_new = self._arm(sockets)
                self._begin_listing(sockets, is_new=is_new)
                self._identity = (found.st_dev, found.st_ino)
        except OSError as error:
            self._identity = None
            self._complain(SOCKETS, "X displays are not shown across users: %s", error)
            return
        self._complained.discard(SOCKETS)
        self._dirty.update(dict.fromkeys(self._displays))

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

    def _list(self, until: float) -> None:
        """Go on with the listing, as long as the directory may be. Raises OSError."""
        for entry in self._listing or ():
            if (display := display_of(entry.name)) is not None:
                self._dirty[display] = None
            if time.monotonic() >= until or self._stopping.is_set():
                return
        if self._lost:
            self._identity, self._check_due = None, 0.0
        self._end_listing()

    def _end_listing(self) -> None:
        if self._listing is not None:
            self._listing.close()
        self._listing, self._lost = None, False

    def _arm(self, sockets: int) -> bool:
        """Watch the directory; whether it is another one than was watched, which no instance has yet."""
        if self._inotify is None:
            self._inotify = Inotify()
        former, self._watch = self._watch, -1
        self._watch = self._inotify.add_watch(f"/proc/self/fd/{sockets}", _EVENTS)
        if self._watch == former:
            return False
        self._armed += 1
        if former != -1:
            with contextlib.suppress(OSError):  # the kernel removed it already
                self._inotify.remove_watch(former)
        return True

    def _look(self, sockets: int, display: int) -> None:
        """Compare one display with what is known of it."""
        known = self._displays.get(display)
        owner = socket_owner(sockets, display)
        if known is not None and known.owner != owner:
            self._drop(display)
            known = None
        if owner is None:
            return
        if known is None and self._counts[owner] >= PER_OWNER:
            message = "UID %d has more than %d X displays, the others' locks are not shown to other users"
            self._complain(f"owner {owner}", message, owner, PER_OWNER, uid=owner)
            return
        found = self._find(display, owner)
        if found is None:
            self._drop(display)
            return
        source, pid = found
        if known is None:
            self._counts[owner] += 1
        self._displays[display] = _Display(owner, source, pid)
        self._publish(display, pid, [uid for uid in self._places if uid != source])

    def _find(self, display: int, owner: int) -> tuple[int, int] | None:
        """Where a display's lock is, and the PID in it.

        It is in its owner's /tmp, as a rule. Root's Xorg of a user's session, and `sudo -u bob`, have it in
        the /tmp of the user who started them.
        """
        first = [uid for uid in (owner, _ON_HOST) if uid in self._places]
        for uid in (*first, *(uid for uid in self._places if uid not in first)):
            with contextlib.suppress(OSError), self._places[uid].open() as directory:
                pid = read_lock(directory, display, owner)
                if pid is not None:
                    return uid, pid
        return None

    def _drop(self, display: int) -> None:
        """Forget a display, and remove its copies."""
        known = self._displays.pop(display, None)
        if known is None:
            return
        self._counts[known.owner] -= 1
        if not self._counts[known.owner]:
            del self._counts[known.owner]
        for place in self._places.values():
            self._withdraw_in(place, display)

    def _publish(self, display: int, pid: int, uids: Iterable[int]) -> None:
        """One file for all: a link in each place costs no inode."""
        try:
            with self._places[_ON_HOST].open() as base:
                copy = make_copy(base, pid)
        except OSError as error:
            self._complain(f"place {_ON_HOST}", "X display locks are not shown across users: %s", error)
            return
        with copy:
            for uid in uids:
                self._publish_in(uid, copy, display)

    def _publish_in(self, uid: int, copy: int, display: int) -> None:
        place = self._places[uid]
        try:
            with place.open() as directory:
                shown = publish(copy, directory, display)
        except FileNotFoundError:  # on its way out
            return
        except OSError as error:
            message = "X display locks are not shown in %s/%s: %s"
            self._complain(f"place {uid}", message, place.base, place.inner, error)
            return
        if not shown:
            log.debug("%s/%s has a lock of display %d of its own", place.base, place.inner, display)

    def _withdraw_in(self, place: Place, display: int) -> None:
        try:
            with place.open() as directory:
                withdraw(directory, display)
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("The lock of display %d stays in %s/%s: %s", display, place.base, place.inner, error)

    def _complain_of(self, error: Exception) -> None:
        """Once for each kind: a pass may meet it again and again."""
        about = f"internal {type(error).__name__}"
        if about not in self._complained:
            self._complained.add(about)
            log.error("Display locks are not shown everywhere: %r", error, exc_info=error)

    def _complain(self, about: str, message: str, *args: object, uid: int | None = None) -> None:
        """A warning, once."""
        if about not in self._complained:
            self._complained.add(about)
            log.warning(message, *args, extra=fields(uid=uid))

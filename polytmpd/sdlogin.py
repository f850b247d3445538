# SPDX-License-Identifier: LGPL-2.1-or-later
"""What logind's files say of sessions, sd-login(3), and when they change.

It takes microseconds and no message; a question on the bus returns some forty properties.
Not here: logind's signals, and what follows from a change (bus/logind).

Hard facts
- logind saves a session before it sends SessionNew, and when it begins to close. A closing session sends no
  signal while processes are left in it.
- The files are private, libsystemd's functions are not. sd_login_monitor(3) is an inotify instance that
  watches for IN_MOVED_TO in this directory: each file is made elsewhere, then renamed.
- sd_session_get_username() came with systemd 254.
"""

import asyncio
import ctypes
import logging
from collections.abc import Callable
from typing import Final, NamedTuple

from polytmpd import libsystemd
from polytmpd.kernel.host import in_words
from polytmpd.kernel.inotify import IN_MOVED_TO, IN_ONLYDIR, IN_Q_OVERFLOW, Inotify

log = logging.getLogger(__name__)

SESSIONS: Final = "/run/systemd/sessions"
_SETTLE: Final = 0.2
"""Seconds from the first change until the files are read: logind writes the file of a session several times
when it opens and closes. Only sessions that close without an end are noticed by their files.
"""


class SessionFile(NamedTuple):
    """uid: its user's. kind: its class, see sd_session_get_class(3)."""

    uid: int
    kind: str
    is_closing: bool


class SessionFiles:
    """The files of all sessions. Owns an inotify instance."""

    def __init__(self) -> None:
        """Needs a running event loop. Raises OSError: EMFILE, or no libsystemd."""
        self._library = libsystemd.load()
        self._inotify = Inotify()
        self._changed: Callable[[str | None], None] = lambda _: None
        self._failure = ""
        self._settling: asyncio.TimerHandle | None = None
        self._listen()

    def follow(self, changed: Callable[[str | None], None]) -> None:
        """Call changed(session) in the event loop for each change; None means that any may have changed."""
        self._changed = changed
        self._watch()

    def read(self, session: str) -> SessionFile | None:
        """What is known of a session; None if that is not all, or if there is no such session."""
        if self._failure:
            self._watch()
        uid = ctypes.c_uint()
        name = session.encode(errors="replace")
        if self._library.sd_session_get_uid(name, ctypes.byref(uid)) < 0:
            return None
        kind, state = self._text("sd_session_get_class", name), self._text("sd_session_get_state", name)
        return SessionFile(uid.value, kind, state == "closing") if kind and state else None

    def is_closing(self, session: str) -> bool:
        """Whether a session is known to close: a third of what read() takes."""
        return self._text("sd_session_get_state", session.encode(errors="replace")) == "closing"

    def close(self) -> None:
        """Report nothing more."""
        if self._settling is not None:
            self._settling.cancel()
        asyncio.get_running_loop().remove_reader(self._inotify.fd)
        self._inotify.close()

    def _text(self, function: str, session: bytes) -> str:
        found = ctypes.c_char_p()
        if getattr(self._library, function)(session, ctypes.byref(found)) < 0:
            return ""
        try:
            return (found.value or b"").decode(errors="replace")
        finally:
            _free(found)

    def _watch(self) -> None:
        try:
            self._inotify.add_watch(SESSIONS, IN_MOVED_TO | IN_ONLYDIR)
        except OSError as error:
            if not self._failure:
                log.warning(
                    "Failed to watch %s, not noticing that sessions close until they are gone: %s",
                    SESSIONS,
                    in_words(error),
                )
            self._failure = in_words(error)
        else:
            self._failure = ""

    def _listen(self) -> None:
        asyncio.get_running_loop().add_reader(self._inotify.fd, self._on_readable)

    def _on_readable(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._inotify.fd)
        self._settling = loop.call_later(_SETTLE, self._read)

    def _read(self) -> None:
        self._settling = None
        self._listen()
        for name in dict.fromkeys(
            None if event.mask & IN_Q_OVERFLOW else event.name for event in self._inotify.read()
        ):
            if name != "":
                self._changed(name)


_free = ctypes.CDLL(None).free
_free.argtypes = (ctypes.c_void_p,)
_free.restype = None

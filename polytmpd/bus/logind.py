# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of systemd-logind, org.freedesktop.login1(5): which users are logged in, and what changes.

Not here: what the daemon does about it.

Hard facts
- The bus lets a connection wait for 128 answers on Debian (max_replies_per_connection of
  dbus-daemon-1(1)), and refuses further calls with LimitsExceeded. A host may have thousands of sessions.
- A session has some forty properties, and their types come with them: they are slow to parse in Python. So
  what logind's files say is read there.
"""

import asyncio
import logging
from functools import partial
from typing import Any, Final, Protocol

from polytmpd.bus.connection import BusError, Connection
from polytmpd.bus.sessions import MANAGER, NO_LOGINS, PATH, SERVICE
from polytmpd.bus.sessions import Session as Session
from polytmpd.bus.sessions import User as User
from polytmpd.sdlogin import SessionFiles
from polytmpd.tasks import Tasks

log = logging.getLogger(__name__)

_ASKED_AT_ONCE: Final = 16
_GONE: Final = ("org.freedesktop.login1.NoSuchSession", "org.freedesktop.DBus.Error.UnknownObject")


class Listener(Protocol):
    """Hears what logind signals, and of sessions that are closing as if they were removed.

    Their processes may live on, but their user is no longer logged in. A session may be removed twice.
    logind_changed: logind is on the bus (again), or changes were lost, so list everything again.
    """

    def user_new(self, user: User) -> None: ...
    def user_removed(self, uid: int) -> None: ...
    def session_new(self, session: Session) -> None: ...
    def session_removed(self, session_id: str) -> None: ...
    def logind_changed(self) -> None: ...


class Logind:
    """Talks to logind over a connection that the caller owns."""

    def __init__(self, connection: Connection, files: SessionFiles | None = None) -> None:
        """files: belong to this object from now on.

        Without them, everything is asked on the bus, and nothing says that a session is closing.
        """
        self._connection = connection
        self._files = files
        self._names: dict[int, str] = {}
        """Of the users that logind has."""
        self._tasks = Tasks()
        self._asking = asyncio.Semaphore(_ASKED_AT_ONCE)
        self._removed: set[str | int] = set()
        """Sessions and users that went away while their properties were being read."""

    async def subscribe(self, listener: Listener) -> None:
        """Report changes from now on. List only afterwards, so that nothing is missed in between.

        Raises BusError.
        """
        handlers = {
            "UserNew": self._on_user_new,
            "UserRemoved": self._on_user_removed,
            "SessionNew": self._on_session_new,
            "SessionRemoved": self._on_session_removed,
        }
        await asyncio.gather(
            self._connection.follow_owner(SERVICE, partial(self._on_owner, listener)),
            *(
                self._connection.subscribe(SERVICE, MANAGER, member, partial(handler, listener))
                for member, handler in handlers.items()
            ),
        )
        if self._files is not None:
            self._files.follow(partial(self._on_file, listener))

    def close(self) -> None:
        """Report no more closing sessions."""
        if self._files is not None:
            self._files.close()

    async def users(self) -> list[User]:
        """Raises BusError."""
        (users,) = await self._ask("ListUsers")
        self._names = {uid: name for uid, name, _ in users}
        return [User(uid, name) for uid, name in self._names.items()]

    async def sessions(self) -> list[Session]:
        """All sessions that are not closing. Raises BusError."""
        (sessions,) = await self._ask("ListSessions")
        found = [await self._session(session, path) for session, *_, path in sessions]
        return [session for session in found if session is not None]

    async def _ask(self, member: str, signature: str = "", *body: Any) -> list[Any]:
        async with self._asking:
            owner = self._connection.owner(SERVICE)
            return await self._connection.ask(owner, PATH, MANAGER, member, signature, body)

    async def _session(self, session: str, path: str) -> Session | None:
        """None if the session is closing or gone."""
        found = None if self._files is None else self._files.read(session)
        if found is not None and found.is_closing:
            return None
        if found is not None and found.uid in self._names:
            user = User(found.uid, self._names[found.uid])
            return Session(session, user, not found.kind.startswith(NO_LOGINS))
        try:
            async with self._asking:
                owner = self._connection.owner(SERVICE)
                values = await self._connection.get_properties(owner, path, f"{SERVICE}.Session")
        except BusError as error:
            if error.name in _GONE:
                return None
            raise
        if values["State"] == "closing":
            return None
        is_login = not str(values["Class"]).startswith(NO_LOGINS)
        return Session(session, User(values["User"][0], values["Name"]), is_login)

    def _on_owner(self, listener: Listener, owner: str | None) -> None:
        self._names.clear()
        if owner is None:
            log.info("systemd-logind left the bus, waiting for it to return")
        else:
            listener.logind_changed()

    def _on_user_new(self, listener: Listener, _: str, body: list[Any]) -> None:
        uid, path = body
        self._removed.discard(uid)
        self._tasks.start(self._tell_user(listener, uid, path))

    async def _tell_user(self, listener: Listener, uid: int, path: str) -> None:
        try:
            async with self._asking:
                owner = self._connection.owner(SERVICE)
                name = await self._connection.get_property(owner, path, f"{SERVICE}.User", "Name")
        except BusError as error:
            log.debug("User %d is already gone: %s", uid, error)
            return
        if uid not in self._removed:
            self._names[uid] = name
            listener.user_new(User(uid, name))

    def _on_user_removed(self, listener: Listener, _: str, body: list[Any]) -> None:
        self._note_removed(body[0])
        self._names.pop(body[0], None)
        listener.user_removed(body[0])

    def _on_session_new(self, listener: Listener, _: str, body: list[Any]) -> None:
        session, path = body
        self._removed.discard(session)
        self._tasks.start(self._tell_session(listener, session, path))

    async def _tell_session(self, listener: Listener, session: str, path: str) -> None:
        try:
            told = await self._session(session, path)
        except BusError as error:
            log.debug("Session %s is already gone: %s", session, error)
            return
        if told is not None and session not in self._removed:
            listener.session_new(told)

    def _on_session_removed(self, listener: Listener, _: str, body: list[Any]) -> None:
        self._note_removed(body[0])
        listener.session_removed(body[0])

    def _on_file(self, listener: Listener, session: str | None) -> None:
        if session is None:
            listener.logind_changed()
        elif self._files is not None and self._files.is_closing(session):
            self._note_removed(session)
            listener.session_removed(session)

    def _note_removed(self, gone: str | int) -> None:
        if self._tasks:
            self._removed.add(gone)
        else:
            self._removed.clear()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sessions of users, as systemd-logind lists them once.

polytmpctl imports it: nothing here may take long to import.
Not here: hearing of sessions (logind.py).
"""

from typing import Final, NamedTuple

from polytmpd.bus.protocol import Asker, BusError

SERVICE: Final = "org.freedesktop.login1"
PATH: Final = "/org/freedesktop/login1"
MANAGER: Final = "org.freedesktop.login1.Manager"
NO_LOGINS: Final = ("manager", "background")
"""Prefixes of the classes of sessions that are not logins, see sd_session_get_class(3)."""


class User(NamedTuple):
    uid: int
    name: str


class Session(NamedTuple):
    """is_login: a user is logged in through it. False for service managers (systemd >= 256) and jobs."""

    id: str
    user: User
    is_login: bool = True


class SessionDetails(NamedTuple):
    """A session as an administrator wants to see it. What logind does not know is empty."""

    session: Session
    service: str = ""
    tty: str = ""
    remote_host: str = ""
    state: str = ""


async def list_sessions(connection: Asker, uid: int | None = None) -> list[SessionDetails]:
    """The sessions of one user or of all users, including closing ones, but not those of service managers.

    Starts logind if it is not running. Raises BusError.
    """
    (rows,) = await connection.ask(SERVICE, PATH, MANAGER, "ListSessions")
    found = []
    for name, owner, user, _, path in rows:
        if uid is not None and owner != uid:
            continue
        try:
            values = await connection.get_properties(SERVICE, path, f"{SERVICE}.Session")
        except BusError:  # the session has just ended
            continue
        kind = str(values.get("Class", "user"))
        if kind.startswith("manager"):  # user@.service has one since systemd 256
            continue
        found.append(
            SessionDetails(
                Session(name, User(owner, user), is_login=not kind.startswith(NO_LOGINS)),
                str(values.get("Service", "")),
                str(values.get("TTY", "")),
                str(values.get("RemoteHost", "")),
                str(values.get("State", "")),
            )
        )
    return found

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check finds in units whose sessions do not get their users' directories, because they stay where they
are: units of users that need the host's directories, and services with directories of their own.

Not here: services whose sessions are refused (check.py), and the rule (core/sandbox, placement).
"""

import os
import pwd
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Final

from polytmpd.bus import systemd1
from polytmpd.bus.protocol import Asker, BusError
from polytmpd.core import sandbox
from polytmpd.ctl.host import Result

_PROPERTIES: Final = ("User", "PAMName", *sandbox.SETTINGS)


async def judge(
    connection: Asker, directories: Collection[str], exempt: Callable[[int, str], str | None]
) -> AsyncIterator[Result]:
    """The loaded units with User= and PAMName= that stay.

    exempt(uid, name) returns why a user is exempt, or None.
    """
    try:
        units = [unit async for unit in systemd1.with_pam(connection) if not sandbox.is_user_manager(unit)]
        for unit in units:
            found = await systemd1.unit_properties(connection, unit, _PROPERTIES)
            user = str(found.get("User", ""))
            why = sandbox.conflicts(found, directories)
            if why and not _is_exempt(user, exempt):
                yield _result(unit, user, why)
    except BusError as error:
        yield Result("services", "PAMName=", "skip", f"systemd does not answer: {error}")


def _is_exempt(user: str, exempt: Callable[[int, str], str | None]) -> bool:
    """What is not known is regular."""
    if not user:  # root
        return True
    try:
        found = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except (KeyError, OverflowError):
        return False
    return exempt(found.pw_uid, found.pw_name) is not None


def _result(unit: str, user: str, why: list[str]) -> Result:
    settings = ", ".join(why)
    if sandbox.PRIVATE in why:
        text = f"runs as {user} with directories of its own, not the user's ({settings})"
        return Result("services", unit, "pass", text)
    remedy = f"if this is not intended, remove it with: systemctl edit --full {unit}"
    return Result(
        "services", unit, "warn", f"runs as {user} in the shared /tmp, because of {settings}", remedy
    )


def keeps_sessions(unit: str, pid: int, directories: Collection[str]) -> bool:
    """Whether sessions that a service with this main process opens stay in its own mount namespace.

    False if they are refused, and if that cannot be determined. Only root can.
    """
    if sandbox.is_login_service(unit) or not directories:
        return False
    try:
        own, hosts = (
            [Path(f"/proc/{process}/root{directory}").stat() for directory in directories]
            for process in (pid, 1)
        )
        return Path(f"/proc/{pid}").stat().st_uid == 0 and not any(map(os.path.samestat, own, hosts))
    except OSError:
        return False

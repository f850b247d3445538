# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which users a command is about: names and UIDs as typed, and the caller.

Not here: which users have an instance.
"""

import os
import pwd
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from polytmpd.bus.client import Listed
from polytmpd.ctl.output import Failure

if TYPE_CHECKING:
    from polytmpd.core.policy import Exemptions

_UID_LAST: Final = 2**32 - 2
SEE_LIST: Final = "See: polytmpctl list"
PATIENCE: Final = 10.0
"""Seconds to wait for the user database."""

T = TypeVar("T")


def uid_of(user: str, listed: Sequence[Listed] = ()) -> int:
    """The UID of a user given by name or UID. Raises Failure if there is no such user.

    Users with an instance are found in listed, without NSS.
    """
    for entry in listed:
        if entry.user == user:
            return entry.uid
    if user.isdecimal() and user.isascii():
        if len(user) <= 10 and int(user) <= _UID_LAST:
            return int(user)
        raise Failure(f"Invalid UID '{user}'", f"The largest is {_UID_LAST}")
    try:
        return pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):
        text = f"Failed to look up user '{user}': No such user"
        raise Failure(text, SEE_LIST) from None


def name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)


def exempt_reason(exemptions: "Exemptions", uid: int, name: str | None = None) -> str | None:
    """Why a user is exempt, as polytmpd decides it; None if they are not."""
    from polytmpd import userdb
    from polytmpd.core.policy import Need

    if exemptions.need(uid) is Need.NOTHING and (reason := exemptions.reason(uid)):
        return reason
    name = name or name_of(uid)
    need = exemptions.need(uid, name)
    if need is Need.NOTHING:
        return exemptions.reason(uid, name)
    if name == str(uid):  # nobody knows them
        return exemptions.reason(uid)
    groups = exemptions.groups if Need.GROUPS in need else ()
    found = userdb.facts(uid, name, groups, record=Need.RECORD in need)
    reason = exemptions.reason(uid, name, found)
    if exemptions.is_unknown(uid, found):
        return f"{reason}, but logins are refused, as a service of user records did not answer"
    return reason


def in_time(work: Callable[[], T]) -> T:
    """The result of work(), which asks the user database. Raises TimeoutError if it does not answer.

    The thread ends with the process.
    """
    import threading
    from concurrent.futures import Future

    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found.result(PATIENCE)


def caller(environment: Mapping[str, str]) -> int:
    """The UID of the person at the keyboard: under sudo, pkexec or doas, of the user who ran it."""
    if os.geteuid() != 0:
        return os.geteuid()
    for name in ("SUDO_UID", "PKEXEC_UID"):
        if (value := environment.get(name, "")).isdecimal():
            return int(value)
    if user := environment.get("DOAS_USER"):
        try:
            return pwd.getpwnam(user).pw_uid
        except KeyError:
            return 0
    return 0


def chosen(
    words: Sequence[str], listed: Sequence[Listed], *, must_have_one: bool = True
) -> list[tuple[int, str]]:
    """(UID, name) of the users in words; without words, of all with an instance (root) or of the caller.

    must_have_one: raise Failure if one of them has no instance.
    """
    names = {entry.uid: entry.user for entry in listed}
    if words:
        uids = list(dict.fromkeys(uid_of(word, listed) for word in words))
    elif os.geteuid() == 0:
        uids = list(names)
    else:
        uids = [os.geteuid()]
    for uid in uids if must_have_one else ():
        if uid not in names:
            raise no_instance(uid, name_of(uid))
    return [(uid, names.get(uid) or name_of(uid)) for uid in uids]


def no_instance(uid: int, user: str) -> Failure:
    """A failure that says why, if the user is exempt: they will have none after the next login either."""
    from polytmpd import config

    exempt = exempt_reason(config.load()[0].exemptions, uid)
    text = f"{user} has no instance: {exempt}" if exempt else f"{user} has no instance"
    return Failure(text, SEE_LIST)

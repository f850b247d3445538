# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who gets an instance: asks what the decision needs, off the event loop, and reports who is let through.

Not here: the rule (core/policy), and what the user database says (userdb).
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from polytmpd import userdb
from polytmpd.blocking import accounts
from polytmpd.core.policy import NOTHING_ASKED, Exemptions, Facts, Need
from polytmpd.errors import PolytmpError
from polytmpd.journal import MessageId, fields
from polytmpd.tasks import Tasks

log = logging.getLogger(__name__)

LOOKUP_TIMEOUT: Final = 10.0
"""Seconds that a login waits for the user database."""
_LOOKUPS_AT_ONCE: Final = 4
_NAMES_AT_ONCE: Final = 16
"""Lookups of names, for users whom logind has not reported, for example for a cron job."""
_NAMED_AT_MOST: Final = 5

T = TypeVar("T")


class Admission:
    """The settings in force, and who was let through under them."""

    def __init__(self, exemptions: Exemptions) -> None:
        self._exemptions = exemptions
        self._reported: set[int] = set()
        self._tasks = Tasks()
        self._lookups = asyncio.Semaphore(_LOOKUPS_AT_ONCE)
        self._names = asyncio.Semaphore(_NAMES_AT_ONCE)

    def replace(self, exemptions: Exemptions) -> None:
        """Decide by these settings from now on; report each exempt user again, and names not found."""
        self._exemptions = exemptions
        self._reported.clear()
        self._tasks.start(self._report_unmatched(exemptions))

    async def close(self) -> None:
        """Begin nothing new. A lookup that hangs does not keep the process alive."""
        await self._tasks.close()

    async def find_name(self, uid: int) -> str | None:
        """The user's name; None if the user database does not know the UID.

        Raises PolytmpError if it does not answer in time.
        """
        if (name := accounts.find_local_name(uid)) is not None:
            return name  # however many lookups of others hang
        complaint = f"failed to look up the name of UID {uid}"
        return await self._look_up(lambda: accounts.find_name(uid), complaint, self._names)

    async def is_former(self, name: str, uid: int, present: str) -> bool:
        """Whether a name belongs to a former user of the UID, not to its present user.

        Raises PolytmpError if the user database does not answer in time.
        """
        if name == present:
            return False
        complaint = f"failed to look up user {name}, who may have had UID {uid} before"
        return await self._look_up(lambda: accounts.is_former(name, uid, present), complaint, self._names)

    def must_ask(self, uid: int, name: str | None = None) -> bool:
        """Whether the decision needs the user database: then only reason() can make it."""
        return self._exemptions.need(uid, name) is not Need.NOTHING

    def reason_at_once(self, uid: int, name: str | None = None) -> str | None:
        """Like reason(), for a user about whom nothing has to be asked. name: None if not known yet."""
        return self._decide(self._exemptions, uid, name, NOTHING_ASKED)

    async def reason(self, uid: int, name: str) -> str | None:
        """Why the user keeps the host's directories, which is logged; None if they do not.

        Raises PolytmpError if the user database does not answer in time.
        """
        exemptions = self._exemptions
        need = exemptions.need(uid, name)
        if need is Need.NOTHING:
            return self.reason_at_once(uid, name)
        groups = exemptions.groups if Need.GROUPS in need else ()
        found = await self._look_up(
            lambda: userdb.facts(uid, name, groups, record=Need.RECORD in need),
            f"the user database did not answer for user {name}",
        )
        if exemptions.is_unknown(uid, found):
            raise PolytmpError(f"a service of user records did not answer for user {name} (UID {uid})")
        if found.unknown:
            names = ", ".join(sorted(found.unknown)[:_NAMED_AT_MOST])
            log.warning("Failed to find group %s, giving user %s private directories", names, name)
        return self._decide(exemptions, uid, name, found)

    def _decide(self, exemptions: Exemptions, uid: int, name: str | None, found: Facts) -> str | None:
        reason = exemptions.reason(uid, name, found)
        if reason and uid != 0 and uid not in self._reported:
            self._reported.add(uid)
            self._tasks.start(self._report(uid, name, reason))
        return reason

    async def _report(self, uid: int, name: str | None, reason: str) -> None:
        if name is None:
            with contextlib.suppress(PolytmpError):
                name = await self.find_name(uid)
        who = f"User {name} (UID {uid})" if name else f"UID {uid}"
        extra = {**fields(MessageId.EXEMPT, uid, name), **({"USER_ID": name} if name else {})}
        log.info("%s keeps the host's directories: %s", who, reason, extra=extra)

    async def _report_unmatched(self, exemptions: Exemptions) -> None:
        try:
            problems = await self._look_up(
                lambda: _unmatched(exemptions), "the user database does not answer"
            )
        except PolytmpError as error:
            log.warning("Cannot determine whether the settings match anyone: %s", error)
            return
        for problem in problems:
            log.warning("%s", problem)

    async def _look_up(
        self, work: Callable[[], T], complaint: str, slots: asyncio.Semaphore | None = None
    ) -> T:
        """What work() returns, in a thread that the process does not wait for when it ends."""
        try:
            return await asyncio.wait_for(self._in_thread(work, slots or self._lookups), LOOKUP_TIMEOUT)
        except TimeoutError:
            raise PolytmpError(f"{complaint} within {LOOKUP_TIMEOUT:.0f} s") from None
        except (OSError, RuntimeError) as error:
            raise PolytmpError(f"{complaint}: {error}") from error

    async def _in_thread(self, work: Callable[[], T], slots: asyncio.Semaphore) -> T:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def deliver(result: T | None, error: BaseException | None) -> None:
            slots.release()  # not before the thread is over: a hung one still counts
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)  # type: ignore[arg-type]  # T may be None

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except Exception as raised:
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(deliver, result, error)

        await slots.acquire()
        try:
            threading.Thread(target=run, name="user-database", daemon=True).start()
        except RuntimeError:
            slots.release()
            raise
        return await answer


def _unmatched(exemptions: Exemptions) -> list[str]:
    """The settings that match no one at present, as problems. Blocks."""
    found = []
    for setting, what, missing in userdb.unmatched(exemptions):
        names = ", ".join(missing[:_NAMED_AT_MOST])
        more = f" and {len(missing) - _NAMED_AT_MOST} more" if len(missing) > _NAMED_AT_MOST else ""
        found.append(f"{setting}=: No such {what}: {names}{more}; correct or remove it")
    if exemptions.regular and not any(map(exemptions.lists, userdb.local_users())):
        found.append(
            "RegularUIDs=: No user in /etc/passwd has one of these UIDs; ignore this if directory users do"
        )
    return found

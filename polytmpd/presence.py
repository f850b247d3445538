# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is here: combines what logind, systemd and the cgroups report into each user's claims.

Not here: what follows from a claim (daemon), and reading a cgroup (slices).
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from polytmpd.admission import Admission
from polytmpd.bus.connection import BusError
from polytmpd.bus.logind import Logind, Session, User
from polytmpd.bus.systemd1 import Systemd
from polytmpd.core.policy import Claims
from polytmpd.errors import PolytmpError
from polytmpd.slices import Slices
from polytmpd.tasks import Tasks

log = logging.getLogger(__name__)

_LOOK_TIMEOUT: Final = 1.0
"""How many seconds a login waits at most for systemd to report the user's slice."""
_USUAL: Final = "/user.slice"
"""See systemd.special(7)."""
_LIST_AGAIN: Final = 30.0
"""Seconds after which logind is asked again if it did not answer."""


class Follower(Protocol):
    """Hears of every change. user: the name by which logind knows the UID."""

    def claims_changed(self, uid: int, user: str, claims: Claims) -> None: ...
    def control_group_changed(self, uid: int, control_group: str) -> None: ...


@dataclass(slots=True)
class _Person:
    """What is known of one user.

    followed: whether the followers hear of it. Not before it is known that the user gets an instance.
    """

    user: str
    followed: bool = True
    claims: Claims = field(default_factory=Claims)
    control_group: str = ""


class Presence:
    """The claims and the control group of every regular user, kept up to date from logind and systemd."""

    def __init__(self, logind: Logind, systemd: Systemd, slices: Slices, admission: Admission) -> None:
        """logind, systemd and slices belong to this object from now on."""
        self.logind_answered = False
        """Whether logind has said who is logged in. Until then, nothing says that a user has left."""
        self._logind = logind
        self._systemd = systemd
        self._slices = slices
        self._admission = admission
        self._followers: list[Follower] = []
        self._people: dict[int, _Person] = {}
        self._tasks = Tasks()
        self._listing = asyncio.Lock()
        self._asks_again = False
        self._ended_meanwhile: set[str] = set()
        """Sessions that ended while logind was listing them."""

    def follow(self, follower: Follower) -> None:
        """Tell the follower of every change from now on."""
        self._followers.append(follower)

    async def start(self) -> None:
        """Follow logind and systemd, and report who is here now. Raises BusError."""
        await asyncio.gather(self._logind.subscribe(self), self._systemd.follow(self.systemd_changed))
        # Before logind is asked: processes in the slice claim what is held.
        await self._look_at_slices()
        # If logind does not answer, what is held stays held: there may be sessions that we do not hear of.
        await self._list_logind()

    async def close(self) -> None:
        """Report nothing more."""
        await self._tasks.close()
        self._logind.close()
        self._slices.close()

    def watch(self, uid: int, user: str) -> None:
        """Follow a user who gets an instance, whether logind has reported them or not."""
        person = self._people.setdefault(uid, _Person(user))
        if not person.followed:
            person.followed = True
            self._change(uid, person.claims)

    def forget(self, uid: int) -> None:
        """Stop following the user, until logind reports them again."""
        self._people.pop(uid, None)

    def look(self, uid: int) -> "asyncio.Future[None]":
        """Examine the user's slice and report what is new. The future is done then, or after a second.

        A slice with processes is watched: the kernel reports what is new there.
        """
        person = self._people.get(uid)
        if person is not None and person.claims.populated:
            seen: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            seen.set_result(None)
            return seen

        async def look_for_a_while() -> None:
            await asyncio.wait((self._tasks.start(self._look_at_slice(uid)),), timeout=_LOOK_TIMEOUT)

        return self._tasks.start(look_for_a_while())

    def acquired(self, uid: int) -> Claims:
        """The user's claims, now that a login got their namespace. Followers do not hear of it."""
        person = self._people[uid]
        person.claims = person.claims.with_acquisition()
        return person.claims

    # What logind reports

    def user_new(self, user: User) -> None:
        self._claim(user, lambda claims: claims.with_user())

    def user_removed(self, uid: int) -> None:
        if uid in self._people:
            self._change(uid, self._people[uid].claims.without_user())
            self._tasks.start(self._look_at_slice(uid))

    def session_new(self, session: Session) -> None:
        self._claim(session.user, lambda claims: claims.with_session(session.id, login=session.is_login))

    def session_removed(self, session_id: str) -> None:
        if self._listing.locked():
            self._ended_meanwhile.add(session_id)
        for uid, person in list(self._people.items()):
            if session_id in person.claims.sessions:
                self._change(uid, person.claims.without_session(session_id))

    def logind_changed(self) -> None:
        self._tasks.start(self._list_logind())

    # What systemd and the slices report

    def slice_made(self, uid: int) -> None:
        """The slice starts: it has another cgroup now."""
        if uid in self._people:
            self._tasks.start(self._look_at_slice(uid))

    def systemd_changed(self) -> None:
        self._tasks.start(self._look_at_slices())

    def slice_populated(self, uid: int, populated: bool) -> None:
        person = self._people.get(uid)
        if person is not None and person.claims.populated != populated:
            self._change(uid, person.claims.with_slice(populated=populated))

    # Within

    def _claim(self, user: User, change: Callable[[Claims], Claims]) -> None:
        if self._admission.must_ask(user.uid, user.name):
            # Keep the claims until the answer arrives: sessions may end before it does.
            person = self._people.setdefault(user.uid, _Person(user.name, followed=False))
            if not person.followed:
                self._tasks.start(self._follow_if_regular(user))
        elif self._admission.reason_at_once(user.uid, user.name) is not None:
            return
        else:
            self.watch(user.uid, user.name)
        self._change(user.uid, change(self._people[user.uid].claims))

    async def _follow_if_regular(self, user: User) -> None:
        try:
            reason = await self._admission.reason(user.uid, user.name)
        except PolytmpError as error:
            # Their login asks again, and is refused if there is no answer then.
            log.warning("Cannot yet determine whether user %s is exempt: %s", user.name, error)
            return
        person = self._people.get(user.uid)
        if person is None or person.followed:
            return
        if reason is None:
            self.watch(user.uid, user.name)
        else:
            del self._people[user.uid]

    def _change(self, uid: int, claims: Claims) -> None:
        person = self._people[uid]
        person.claims = claims
        if not person.followed:
            if not claims.claimed:
                del self._people[uid]
            return
        for follower in self._followers:
            follower.claims_changed(uid, person.user, claims)

    async def _list_logind(self) -> None:
        """Compare with what logind says now: at start, and when it is back."""
        async with self._listing:
            answered = await self._compare_with_logind()
        if not answered:
            self._list_later()

    def _list_later(self) -> None:
        """A slow logind never leaves the bus, so nothing signals that it answers again."""
        if not self._asks_again:
            self._asks_again = True
            self._tasks.start(self._list_until_answered())

    async def _list_until_answered(self) -> None:
        answered = False
        try:
            while not answered:
                await asyncio.sleep(_LIST_AGAIN)
                async with self._listing:
                    answered = await self._compare_with_logind()
        finally:
            self._asks_again = False

    async def _compare_with_logind(self) -> bool:
        """Compare, and return whether logind answered.

        A signal that arrives meanwhile is newer than the answer. So a user or session that appears meanwhile
        is left alone, and a session that ends meanwhile does not come back.
        """
        before = {uid: person.claims.sessions for uid, person in self._people.items()}
        self._ended_meanwhile.clear()
        try:
            users, sessions = await self._logind.users(), await self._logind.sessions()
        except BusError as error:
            level = logging.DEBUG if self._asks_again else logging.WARNING
            log.log(level, "systemd-logind does not answer, continuing without it and retrying: %s", error)
            return False
        self.logind_answered = True
        # A user without a session lingers: their manager asks for itself, and the slice claims what is held.
        for session in sessions:
            if session.id not in self._ended_meanwhile:
                self.session_new(session)
        listed = {session.id for session in sessions}
        for known in before.values():
            for gone in known - listed:
                self.session_removed(gone)
        for uid in set(before) - {user.uid for user in users}:
            if uid in self._people and self._people[uid].claims.sessions <= before[uid]:
                self.user_removed(uid)
        for uid, person in list(self._people.items()):
            self._change(uid, person.claims)
        return True

    async def _look_at_slice(self, uid: int) -> None:
        self._group_is(uid, f"{await self._user_slice()}/user-{uid}.slice")

    async def _look_at_slices(self) -> None:
        """_look_at_slice() of everyone, and of those who come."""
        parent = await self._user_slice()
        self._slices.follow(parent, self.slice_made)
        for uid in list(self._people):
            self._group_is(uid, f"{parent}/user-{uid}.slice")

    async def _user_slice(self) -> str:
        try:
            return await self._systemd.user_slice()
        except BusError as error:
            log.warning("Failed to query the control group of user.slice, assuming %s: %s", _USUAL, error)
            return _USUAL  # systemd is asked again later

    def _group_is(self, uid: int, group: str) -> None:
        person = self._people.get(uid)
        if person is None or not person.followed:
            return
        if group != person.control_group and self._slices.exists(group):
            person.control_group = group
            for follower in self._followers:
                follower.control_group_changed(uid, group)
        self._slices.watch(uid, group, self.slice_populated)

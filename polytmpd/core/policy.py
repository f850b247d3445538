# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who gets an instance, and what says that a user is here.

Not here: where the facts come from (login.defs, logind, cgroup.events).
"""

from dataclasses import dataclass, field, replace
from typing import Final

UID_MIN_DEFAULT: Final = 1000
UID_MAX_DEFAULT: Final = 60000
"""What login.defs(5) documents as the range of regular users."""


@dataclass(frozen=True, slots=True)
class Exemptions:
    """Who gets no instance: UIDs outside UID_MIN..UID_MAX, see login.defs(5), and users that are named."""

    uid_min: int = UID_MIN_DEFAULT
    uid_max: int = UID_MAX_DEFAULT
    users: frozenset[str] = field(default_factory=frozenset)

    def reason(self, uid: int, name: str | None = None) -> str | None:
        """Why the user is exempt; None if they get an instance. Root is exempt whatever the range."""
        if uid == 0:
            return "root is never moved"
        if not self.uid_min <= uid <= self.uid_max:
            return f"UID {uid} is not in {self.uid_min}..{self.uid_max}, the UIDs of regular users"
        if name is not None and name in self.users:
            return f"user {name} is named in ExemptUsers="
        if str(uid) in self.users:
            return f"UID {uid} is named in ExemptUsers="
        return None


@dataclass(frozen=True, slots=True)
class Claims:
    """What says that a user is here. An empty one claims nothing.

    sessions: those that are not closing. systemd keeps closing ones while processes are left in them, which
    the slice shows too.
    logins: the sessions through which the user is logged in, not those of a service manager or a job.
    starting: logind announced the user, but no session of theirs was seen yet, and their service manager has
    not asked for the namespace. Linger starts like this; processes come and go in the slice before the
    manager.
    """

    sessions: frozenset[str] = frozenset()
    logins: frozenset[str] = frozenset()
    populated: bool = False
    starting: bool = False

    @property
    def claimed(self) -> bool:
        """Whether an instance that is held stays held, for new sessions to join."""
        return self.calls or self.populated

    @property
    def calls(self) -> bool:
        """Whether an instance is wanted if none is held.

        Processes in the slice are not enough: the last thing that systemd runs there is the removal of
        /run/user/UID, when everything is over. A login without a session asks for itself.
        """
        return bool(self.sessions) or self.starting

    @property
    def present(self) -> bool:
        """Whether the user is logged in, or about to be. If not, an instance drains, whatever holds it."""
        return bool(self.logins) or self.starting

    def with_user(self) -> "Claims":
        return self if self.claimed else replace(self, starting=True)

    def without_user(self) -> "Claims":
        """logind forgot the user and all their sessions. Processes may still be left in the slice."""
        return Claims(populated=self.populated)

    def with_session(self, session: str, *, login: bool = True) -> "Claims":
        logins = self.logins | {session} if login else self.logins
        return replace(self, sessions=self.sessions | {session}, logins=logins, starting=False)

    def without_session(self, session: str) -> "Claims":
        return replace(self, sessions=self.sessions - {session}, logins=self.logins - {session})

    def with_slice(self, *, populated: bool) -> "Claims":
        return replace(self, populated=populated)

    def with_acquisition(self) -> "Claims":
        """A login got the namespace. If it was the user's manager, the slice shows it from now on."""
        return replace(self, starting=self.starting and not self.populated)

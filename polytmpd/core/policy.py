# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who gets an instance, and what says that a user is here.

Not here: where the facts come from (login.defs, logind, cgroup.events).
"""

from dataclasses import dataclass, field
from typing import Final

UID_MIN_DEFAULT: Final = 1000
UID_MAX_DEFAULT: Final = 60000
"""What login.defs(5) documents as the range of regular users."""


@dataclass(frozen=True, slots=True)
class Exemptions:
    """Regular users are those of UID_MIN..UID_MAX, see login.defs(5), without the ones an administrator
    names.
    """

    uid_min: int = UID_MIN_DEFAULT
    uid_max: int = UID_MAX_DEFAULT
    users: frozenset[str] = field(default_factory=frozenset)

    def reason(self, uid: int, name: str | None = None) -> str | None:
        """Why the user is exempt, or None: he gets an instance. Root is exempt whatever the range says."""
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

    starting: logind announced the user, but neither a session nor a process of his was seen yet. Linger
    starts so.
    """

    sessions: frozenset[str] = frozenset()
    populated: bool = False
    starting: bool = False

    @property
    def claimed(self) -> bool:
        """Whether an instance that is held goes on being held, for new sessions to join."""
        return self.calls or self.populated

    @property
    def calls(self) -> bool:
        """Whether an instance is wanted where none is held.

        Processes in the slice are not enough: the last thing that systemd runs there is the removal of
        /run/user/UID, when everything is over. A login that comes without a session asks by itself.
        """
        return bool(self.sessions) or self.starting

    def with_user(self) -> "Claims":
        return self if self.claimed else Claims(self.sessions, self.populated, starting=True)

    def without_user(self) -> "Claims":
        """logind forgot the user, and with him all sessions; processes may be left in the slice all the
        same.
        """
        return Claims(frozenset(), self.populated, starting=False)

    def with_session(self, session: str) -> "Claims":
        return Claims(self.sessions | {session}, self.populated, self.starting)

    def without_session(self, session: str) -> "Claims":
        return Claims(self.sessions - {session}, self.populated, self.starting)

    def with_slice(self, *, populated: bool) -> "Claims":
        # Once processes were seen, the slice speaks for itself.
        return Claims(self.sessions, populated, self.starting and not populated)

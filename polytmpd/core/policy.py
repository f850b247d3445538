# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who gets an instance, and what says that a user is here.

Not here: where the facts come from (login.defs, the user database, logind, cgroup.events).
"""

from dataclasses import dataclass, field, replace
from enum import Flag, auto
from typing import Final, NamedTuple

UID_MIN_DEFAULT: Final = 1000
UID_MAX_DEFAULT: Final = 60000
"""What login.defs(5) documents as the range of useradd(8)."""
UID_LAST: Final = 4294967294
REGULAR_LAST: Final = 60000
"""Up to here the number decides, and no user record is asked for. pam/regular.c has the same."""
NOT_REGULAR: Final = (
    (60578, 60705, "a display manager's greeter"),
    (61184, 65519, "a dynamic or system user"),
    (65534, 65535, "nobody"),
    (2147352576, 2147418111, "a foreign user of disk images"),
    (2147483647, 4294967295, "reserved"),
)
"""Ranges that are no regular user's, by systemd's table: https://systemd.io/UIDS-GIDS/. In the second one,
Debian also has static system users (slurm 64030, libvirt-qemu 64055).
"""
NOBODY: Final = (65534, 65535, 4294967295)
"""The nobody user, and -1 in 16 and 32 bits."""
BEYOND: Final = 2147352576
"""UIDs from here on are meant neither for people nor for system users: a user with one is a mistake."""
CONTAINERS: Final = (524288, 1879048191)
"""Ranges of containers' UIDs. SSSD, IPA and winbind use them for people, who have a record then."""


class Need(Flag):
    """What a decision about a user needs."""

    NOTHING = 0
    RECORD = auto()
    GROUPS = auto()


class Facts(NamedTuple):
    """What the user database says about a user. The defaults mean: not asked, or no answer.

    disposition: as the JSON user record declares it, see https://systemd.io/USER_RECORD/.
    silent: there may be a record that declares one, but its service does not answer.
    dynamic: systemd has allocated the UID for a unit with DynamicUser=.
    member_of, unknown: of the groups that the settings name, those that the user is in, and those that the
    user database does not know now.
    """

    disposition: str | None = None
    dynamic: bool = False
    member_of: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()
    silent: bool = False


NOTHING_ASKED: Final = Facts()


@dataclass(frozen=True, slots=True)
class Exemptions:
    """Who is a regular user, and which of them an administrator exempts.

    regular: ranges of UIDs that replace the rule. users: names and UIDs. exempt_groups, only_groups: names
    and GIDs; if only_groups is not empty, it exempts those who are in none of them.
    """

    uid_min: int = UID_MIN_DEFAULT
    users: frozenset[str] = field(default_factory=frozenset)
    regular: tuple[tuple[int, int], ...] = ()
    exempt_groups: frozenset[str] = field(default_factory=frozenset)
    only_groups: frozenset[str] = field(default_factory=frozenset)

    @property
    def groups(self) -> frozenset[str]:
        """The groups whose members matter."""
        return self.exempt_groups | self.only_groups

    def need(self, uid: int, name: str | None = None) -> Need:
        """What reason() needs. NOTHING for an ordinary login, unless a setting names a group."""
        by_record = not self.regular and uid > REGULAR_LAST and uid not in NOBODY
        by_number = not by_record and self._by_number(uid, known=True)
        if by_number or self._by_name(uid, name):
            return Need.NOTHING
        return (Need.RECORD if by_record else Need.NOTHING) | (Need.GROUPS if self.groups else Need.NOTHING)

    def reason(self, uid: int, name: str | None = None, facts: Facts = NOTHING_ASKED) -> str | None:
        """Why the user is exempt, or None: they get an instance. Root is exempt whatever the settings say.

        name: None if the user database does not know the UID, or was not asked.
        facts: what need() names. A group that is not known exempts nobody.
        """
        if because := self._by_name(uid, name):
            return because
        if facts.disposition is not None and not self.regular and uid not in NOBODY:
            if facts.disposition != "regular":
                return f"the user record of UID {uid} has the disposition {facts.disposition}"
        elif because := self._by_number(uid, known=name is not None):
            return because
        elif facts.dynamic and not self.regular:
            return f"UID {uid} belongs to a dynamic user"
        if found := sorted(facts.member_of & self.exempt_groups):
            return f"group {found[0]} is exempt"
        if self.only_groups and not (facts.member_of | facts.unknown) & self.only_groups:
            return "the user is in no group of OnlyGroups="
        return None

    def is_unknown(self, uid: int, facts: Facts) -> bool:
        """Whether only the number exempts the user, and a record that may overrule it is out of reach."""
        overruled = not self.regular and uid > REGULAR_LAST and uid not in NOBODY
        return overruled and facts.silent and not facts.dynamic and bool(self._by_number(uid, known=True))

    def lists(self, uid: int) -> bool:
        """Whether RegularUIDs= lists the UID."""
        return any(first <= uid <= last for first, last in self.regular)

    def is_system(self, uid: int) -> bool:
        """Whether the UID is of the range of system users, and the settings do not say otherwise."""
        return uid < self.uid_min and not self.lists(uid)

    def names(self, uid: int, name: str | None) -> bool:
        """Whether ExemptUsers= names the user."""
        return name in self.users or str(uid) in self.users

    def _by_name(self, uid: int, name: str | None) -> str | None:
        if uid == 0:
            return "root is never moved"
        if name is not None and name in self.users:
            return f"user {name} is named in ExemptUsers="
        if str(uid) in self.users:
            return f"UID {uid} is named in ExemptUsers="
        return None

    def _by_number(self, uid: int, *, known: bool) -> str | None:
        if uid in NOBODY:
            return f"UID {uid} stands for nobody"
        if self.regular:
            return None if self.lists(uid) else f"UID {uid} is not in RegularUIDs="
        if uid < self.uid_min:
            return f"UID {uid} is below UID_MIN {self.uid_min}: a system user"
        for first, last, whose in NOT_REGULAR:
            if first <= uid <= last:
                return f"UID {uid} is in {first}..{last} ({whose})"
        if not known and CONTAINERS[0] <= uid <= CONTAINERS[1]:
            return f"UID {uid} belongs to a container: the user database has no such user"
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
        sessions = self.sessions | {session}
        logins = self.logins | {session} if login else self.logins
        if logins == sessions:
            logins = sessions  # one set for both: there may be thousands
        return replace(self, sessions=sessions, logins=logins, starting=False)

    def without_session(self, session: str) -> "Claims":
        return replace(self, sessions=self.sessions - {session}, logins=self.logins - {session})

    def with_slice(self, *, populated: bool) -> "Claims":
        return replace(self, populated=populated)

    def with_acquisition(self) -> "Claims":
        """A login got the namespace. If it was the user's manager, the slice shows it from now on."""
        return replace(self, starting=self.starting and not self.populated)

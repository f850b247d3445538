# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one grammar of the names that polytmp gives to directories, mounts and bus objects.

    /tmp/polytmp-BOOTID-UID-RANDOM/tmp    an instance that is removed with its last process
    /var/tmp/polytmp-UID/tmp              an instance that is kept between logins
    /tmp/polytmp-removing-RANDOM          in quarantine: set aside, being deleted
    /var/tmp/polytmp-former-UID-RANDOM    in quarantine: left by a former user of the UID, for root to find
    /org/polytmp1/instance/_UID           an instance on the bus

BOOTID is 32 lowercase hexadecimal digits, RANDOM is 16. The directory polytmp-… is the *barrier*, which
belongs to root and has mode 0700. Nothing here touches the disk.
Not here: which directories exist, and whose they are.
"""

import re
from typing import Final

PREFIX: Final = "polytmp-"
INNER: Final = "tmp"
"""The directory in the barrier that replaces the original."""
SENTINEL: Final = "polytmp-sentinel"
"""The source of the tmpfs that ends with a namespace, as mountinfo shows it."""
CLEANER_PATTERN: Final = f"{PREFIX}?*"
"""Matches every barrier, in the syntax of glob(7) that tmpfiles.d(5) uses."""
REMOVING_PATTERN: Final = f"{PREFIX}removing-*"
"""What is set aside, as a pattern for people to read."""
RANDOM_BYTES: Final = 8

_RANDOM: Final = "[0-9a-f]{16}"
_UID: Final = r"(0|[1-9]\d{0,9})"
_ENDING: Final = f"{PREFIX}[0-9a-f]{{32}}-{_UID}-{_RANDOM}"
_KEPT: Final = f"{PREFIX}{_UID}"
_BARRIER: Final = re.compile(f"{_ENDING}|{_KEPT}", re.ASCII)
_KEPT_BARRIER: Final = re.compile(_KEPT, re.ASCII)
_LEFTOVER: Final = re.compile(f"{PREFIX}removing-{_RANDOM}|{_ENDING}", re.ASCII)
_OBJECT: Final = re.compile(f"/org/polytmp1/instance/_{_UID}", re.ASCII)


def barrier(boot_id: str, uid: int, random: str) -> str:
    """The barrier of an instance that is removed with its last process. random must not be guessable."""
    return f"{PREFIX}{boot_id}-{uid}-{random}"


def with_random(barrier_name: str, random: str) -> str:
    """The same barrier() under another name."""
    return f"{barrier_name.rpartition('-')[0]}-{random}"


def kept_barrier(uid: int) -> str:
    """The barrier of an instance that is kept between logins."""
    return f"{PREFIX}{uid}"


def owner(barrier_name: str) -> int | None:
    """The UID in a barrier's name; None for any other name."""
    match = _BARRIER.fullmatch(barrier_name)
    return int(match[1] or match[2]) if match else None


def kept_owner(barrier_name: str) -> int | None:
    """The UID in the name of a barrier that is kept between logins; None for any other name."""
    match = _KEPT_BARRIER.fullmatch(barrier_name)
    return int(match[1]) if match else None


def removing(random: str) -> str:
    """The name of a barrier that is set aside to be deleted."""
    return f"{PREFIX}removing-{random}"


def former(uid: int, random: str) -> str:
    """The name under which root finds what a former user of the UID left."""
    return f"{PREFIX}former-{uid}-{random}"


def is_leftover(name: str) -> bool:
    """Whether a barrier of this name is a leftover at start, unless a process lives in it."""
    return _LEFTOVER.fullmatch(name) is not None


def object_path(uid: int) -> str:
    """The object path of a user's instance."""
    return f"/org/polytmp1/instance/_{uid}"


def object_owner(path: str) -> int | None:
    """The UID in the object path of an instance; None for any other path."""
    match = _OBJECT.fullmatch(path)
    return int(match[1]) if match else None

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who has a UID now, and who had it before.

Not here: what becomes of a former user's files (executor).

Hard facts
- userdel and useradd give a UID to somebody else, usermod -l gives its owner another name. Afterwards the
  user database looks the same: the old name is gone, the UID has a new one. Nothing tells the two apart.
- getpwnam(3) finds nobody as well where a directory service does not answer.
- Every function blocks, for as long as NSS takes.
"""

import pwd


def find_name(uid: int) -> str | None:
    """The user's name; None if the user database does not know the UID."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def name_of(uid: int, told: str) -> str:
    """The user's present name; told if the user database does not know the UID."""
    return find_name(uid) or told


def is_former(name: str, uid: int, present: str) -> bool:
    """Whether a name is that of a user who had the UID before, not of him who has it now.

    Two names may be one user's. After usermod -l the old one is a former user's.
    """
    if name in {present, str(uid)}:  # the UID for a name: when it was written nobody knew one
        return False
    try:
        return pwd.getpwnam(name).pw_uid != uid
    except KeyError:
        return True

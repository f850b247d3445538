# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who has a UID now, and who had it before.

Not here: what becomes of a former user's files (instances).

Hard facts
- After userdel, useradd may give the UID to another user. usermod -l gives its user another name. Either way
  the old name is gone and the UID has a new one: the user database does not show which of the two happened.
- getpwnam(3) also finds no user if a directory service does not answer.
- Every function blocks for as long as NSS takes.
"""

import pwd


def find_name(uid: int) -> str | None:
    """The user's name; None if the user database does not know the UID."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def name_of(uid: int, told: str) -> str:
    """The user's current name; told if the user database does not know the UID."""
    return find_name(uid) or told


def is_former(name: str, uid: int, present: str) -> bool:
    """Whether a name belongs to a former user of the UID, not to its present user.

    One user may have two names. After usermod -l, the old name counts as a former user's.
    """
    if name in {present, str(uid)}:  # recorded while the name was unknown
        return False
    try:
        return pwd.getpwnam(name).pw_uid != uid
    except KeyError:
        return True

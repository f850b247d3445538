# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who has a UID now, and who had it before.

Not here: what becomes of a former user's files (instances).

Hard facts
- After userdel, useradd may give the UID to another user. usermod -l gives its user another name. Either way
  the old name is gone and the UID has a new one: the user database does not show which of the two happened.
- getpwnam(3) also finds no user if a directory service does not answer.
- Every function but find_local_name() blocks for as long as NSS takes.
- glibc ignores a line of /etc/passwd that lacks a field or begins with "#", and takes the first of several
  for a UID. "+" and "-" at the beginning mean something else (compat in nsswitch.conf(5)).
"""

import os
import pwd
from typing import Final

LOCAL: Final = "/etc/passwd"
_LOCAL_AT_MOST: Final = 1 << 20
"""Bytes, 15,000 users: to read them takes less than a millisecond."""
_NO_USER: Final = b"+-# \t"


def find_local_name(uid: int) -> str | None:
    """The name of a user in /etc/passwd; None if it is not there, or not to be had at once."""
    try:
        with open(LOCAL, "rb") as file:  # noqa: PTH123  (for each login)
            data = file.read(_LOCAL_AT_MOST + 1)
    except OSError:
        return None
    number, at = b"%d" % uid, -1
    while len(data) <= _LOCAL_AT_MOST and (at := data.find(b":%s:" % number, at + 1)) >= 0:
        line, _, _ = data[data.rfind(b"\n", 0, at) + 1 :].partition(b"\n")
        fields = line.split(b":")
        is_whole = len(fields) == 7 and fields[2] == number and fields[3].isdigit()
        if is_whole and fields[0] and line[0] not in _NO_USER:
            return os.fsdecode(fields[0])
    return None


def find_name(uid: int) -> str | None:
    """The user's name; None if the user database does not know the UID."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


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

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check makes of login.defs(5): who is a regular user, and who is none for his UID alone.

Not here: mistakes in polytmpd.conf(5), which the daemon tells the journal.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from polytmpd.ctl.host import Result
from polytmpd.ctl.output import clean, count

_DEFAULT: Final = {"UID_MIN": 1000, "UID_MAX": 60000}
_UID_LAST: Final = 2**32 - 2
_NOBODY: Final = 65534
_NAMED_AT_MOST: Final = 5


def regular_uids(root: Path) -> range:
    """As the daemon reads them, polytmpd.conf(5): the last line counts that makes sense."""
    found = dict(_DEFAULT)
    try:
        text = (root / "etc/login.defs").read_text(errors="replace")
    except OSError:
        text = ""
    for name, word in re.findall(r"(?m)^[ \t]*(UID_M(?:IN|AX))[ \t]+(\S+)", text):
        try:
            value = int(word, 0)
        except ValueError:
            continue
        if 0 < value <= _UID_LAST:
            found[name] = value
    if found["UID_MIN"] > found["UID_MAX"]:
        found = _DEFAULT
    return range(found["UID_MIN"], found["UID_MAX"] + 1)


def users_above(root: Path, regular: range, others: dict[int, str], listed: Collection[int]) -> Result:
    """others: who is here now, of a directory service too. listed: who has an instance all the same."""
    users = {**_passwd(root), **others}
    above = sorted(uid for uid in users if uid >= regular.stop and uid != _NOBODY and uid not in listed)
    last = regular.stop - 1
    if not above:
        text = f"regular users are those of UID {regular.start} to {last}"
        return Result("users", "login.defs", "pass", text)
    names = ", ".join(f"{clean(users[uid])} ({uid})" for uid in above[:_NAMED_AT_MOST])
    more = f" and {len(above) - _NAMED_AT_MOST} more" if len(above) > _NAMED_AT_MOST else ""
    return Result(
        "users",
        "login.defs",
        "warn",
        f"above UID_MAX {last}, {count(len(above), 'user')} without private directories: {names}{more}",
        f"if that is not meant: UID_MAX {above[-1]} in /etc/login.defs; systemctl reload polytmpd.service",
    )


def _passwd(root: Path) -> dict[int, str]:
    """Of the file alone: to list a directory service may take minutes, and most forbid it."""
    found: dict[int, str] = {}
    try:
        text = (root / "etc/passwd").read_text(errors="replace")
    except OSError:
        return found
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) == 7 and fields[2].isdecimal() and fields[2].isascii():
            found[int(fields[2])] = fields[0]
    return found

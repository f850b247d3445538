# SPDX-License-Identifier: LGPL-2.1-or-later
"""UID_MIN of login.defs(5), read as shadow's tools do. pam/regular.c has the same rule.

Not here: what follows from it (policy).
"""

import re
from collections.abc import Callable
from typing import Final

from polytmpd.core.policy import UID_LAST, UID_MAX_DEFAULT, UID_MIN_DEFAULT

INSTEAD: Final = f"using UID_MIN {UID_MIN_DEFAULT}"


def uid_min(text: str, complain: Callable[[int, str, str], None]) -> int:
    """UID_MIN in the text of the file, or its default if it is missing, invalid or above UID_MAX.

    complain(line, what, instead) is called for each mistake: what is wrong, and what is done instead. Line 0
    stands for the whole file. Of several lines for a key, the last counts. UID_MAX decides nothing else: no
    directory service keeps to it.
    """
    default = {"UID_MIN": UID_MIN_DEFAULT, "UID_MAX": UID_MAX_DEFAULT}
    found = dict(default)
    for number, line in enumerate(text.split("\n"), 1):
        match = re.match(
            r'[ \t]*(\w+)[ \t][ \t"]*([^"]*)', line.partition("\0")[0].rstrip(" \t\v\f\r"), re.ASCII
        )
        if not match or match[1] not in found:
            continue
        found[match[1]] = value = _c_number(match[2]) or default[match[1]]
        if value != _c_number(match[2]):
            complain(number, f"{match[1]} {match[2]!r} is not a valid UID", f"using {value}")
    if found["UID_MIN"] > found["UID_MAX"]:
        complain(0, "UID_MIN is greater than UID_MAX", INSTEAD)
        return UID_MIN_DEFAULT
    return found["UID_MIN"]


def _c_number(word: str) -> int:
    """A UID as strtoul(3) reads it, which shadow and pam_polytmp use; 0 for anything else."""
    for pattern, base in (("0[xX]([0-9a-fA-F]+)", 16), ("(0[0-7]*)", 8), ("([1-9][0-9]*)", 10)):
        match = re.fullmatch(pattern, word, re.ASCII)
        digits = match[1].lstrip("0") if match else ""
        if digits:
            return int(digits, base) if len(digits) <= 11 and int(digits, base) <= UID_LAST else 0
    return 0

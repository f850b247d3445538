# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which users of /etc/passwd log in, and which of them get private directories.

Directory services are not asked: most forbid to list their users.
Not here: what makes a user exempt (core/policy.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from polytmpd.config import Config
from polytmpd.core.policy import NOBODY, Exemptions
from polytmpd.ctl import users

_FIRST: Final = 1000
"""Where people start, whatever login.defs says: one who is not regular for that reason is worth a word."""
_NO_SHELLS: Final = ("nologin", "false", "sync", "shutdown", "halt")


@dataclass(frozen=True, slots=True)
class Person:
    """A user with a login shell. exempt: why they get no private directories; empty if they do."""

    uid: int
    name: str
    exempt: str = ""


def people(root: Path, config: Config) -> list[Person]:
    """The users who may log in, by UID: those from 1000 or UID_MIN on, or in RegularUIDs=, that have a login
    shell.

    Asks the user database about groups and records if the settings need them.
    """
    exemptions = config.exemptions
    names = dict(_passwd(root, exemptions))
    return [
        Person(uid, name, users.exempt_reason(exemptions, uid, name) or "")
        for uid, name in sorted(names.items())
    ]


def _passwd(root: Path, exemptions: Exemptions) -> Iterator[tuple[int, str]]:
    first = min(_FIRST, exemptions.uid_min)
    try:
        text = (root / "etc/passwd").read_text(errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) != 7 or not fields[2].isdecimal() or not fields[2].isascii():
            continue
        uid, shell = int(fields[2]), fields[6].rpartition("/")[2]
        may_be_regular = uid >= first or (uid > 0 and exemptions.lists(uid))
        if may_be_regular and uid not in NOBODY and shell not in _NO_SHELLS:
            yield uid, fields[0]

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check finds in polytmpd.conf(5) and login.defs(5): ignored settings, and users who are not regular.

It reads them as the daemon does, so it works while the daemon is down.
Not here: whether the directories are fit to be private (host.py).
"""

import pwd
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from polytmpd.config import Config
from polytmpd.ctl.host import Result
from polytmpd.ctl.output import clean, count

_CONFIGURATION: Final = "polytmpd.conf"
_RELOAD: Final = "systemctl reload polytmpd.service"
_NOBODY: Final = 65534
_NAMED_AT_MOST: Final = 5


def judge(
    root: Path, config: Config, problems: Sequence[str], in_force: Collection[str] | None
) -> Iterator[Result]:
    """problems: as returned by config.load(). in_force: the directories that the daemon makes private; None
    if it does not answer.
    """
    wanted = [directory.path for directory in config.directories]
    for problem in problems:
        place, _, what = problem.partition(": ")
        name = f"/{Path(place).relative_to(root)}"
        yield Result("settings", name, "warn", clean(what), f"correct it, then: {_RELOAD}")
    unknown = sorted(clean(name) for name in config.exemptions.users if not _is_user(name))
    if unknown:
        text = f"ExemptUsers= names unknown users: {', '.join(unknown)}"
        yield Result(
            "settings", _CONFIGURATION, "warn", text, f"correct or remove the names, then: {_RELOAD}"
        )
    if in_force is not None and set(in_force) != set(wanted):
        text = f"not in force: polytmpd uses Directories={' '.join(sorted(in_force))}"
        missing = [path for path in wanted if not (root / path.lstrip("/")).is_dir()]
        remedy = f"create {', '.join(missing)}, which a reload requires, then: {_RELOAD}"
        yield Result("settings", _CONFIGURATION, "warn", text, remedy if missing else _RELOAD)
    elif not problems and not unknown:
        yield Result("settings", _CONFIGURATION, "pass", f"private to each user: {' '.join(wanted)}")


def users_above(root: Path, config: Config, others: dict[int, str], listed: Collection[int]) -> Result:
    """others: users logged in now, also from a directory service. listed: the UIDs that have an instance."""
    exempt = config.exemptions
    meant = {str(_NOBODY), *exempt.users}
    users = {
        uid: name
        for uid, name in {**_passwd(root), **others}.items()
        if uid > exempt.uid_max and uid not in listed and meant.isdisjoint({name, str(uid)})
    }
    if not users:
        text = f"regular users have UIDs {exempt.uid_min} to {exempt.uid_max}"
        return Result("settings", "login.defs", "pass", text)
    above = sorted(users)
    names = ", ".join(f"{clean(users[uid])} ({uid})" for uid in above[:_NAMED_AT_MOST])
    more = f" and {len(above) - _NAMED_AT_MOST} more" if len(above) > _NAMED_AT_MOST else ""
    return Result(
        "settings",
        "login.defs",
        "warn",
        f"{count(len(above), 'user')} above UID_MAX {exempt.uid_max} without private directories: "
        f"{names}{more}",
        f"unless this is intended, set UID_MAX {above[-1]} in /etc/login.defs, then: {_RELOAD}",
    )


def _is_user(name: str) -> bool:
    if name.isdecimal():
        return True
    try:
        pwd.getpwnam(name)
    except (KeyError, ValueError):
        return False
    return True


def _passwd(root: Path) -> dict[int, str]:
    """The users in the file alone: listing a directory service may take minutes, and most forbid it."""
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

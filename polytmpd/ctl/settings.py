# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check finds in polytmpd.conf(5): ignored settings, and who keeps the host's directories.

It reads them as the daemon does, so it works while the daemon is down.
Not here: whether the directories are fit to be private (host.py).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from polytmpd import userdb
from polytmpd.config import Config, unfit
from polytmpd.core import policy
from polytmpd.ctl import users
from polytmpd.ctl.host import Result
from polytmpd.ctl.output import clean, count

_CONFIGURATION: Final = "polytmpd.conf"
_RELOAD: Final = "systemctl reload polytmpd.service"
_EXEMPT: Final = "exempt users"
_NAMED_AT_MOST: Final = 20


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
    faults = list(_in_time(lambda: _faults(root, config), _CONFIGURATION))
    yield from faults
    if in_force is not None and set(in_force) != set(wanted):
        text = f"not in force: polytmpd uses Directories={' '.join(sorted(in_force))}"
        missing = [path for path in wanted if not (root / path.lstrip("/")).is_dir()]
        remedy = f"create {', '.join(missing)}, which a reload requires, then: {_RELOAD}"
        yield Result("settings", _CONFIGURATION, "warn", text, remedy if missing else _RELOAD)
    elif not problems and not faults:
        yield Result("settings", _CONFIGURATION, "pass", f"private to each user: {' '.join(wanted)}")


def _faults(root: Path, config: Config) -> Iterator[Result]:
    for setting, what, words in userdb.unmatched(config.exemptions):
        text = f"{setting}= names unknown {what}s: {', '.join(map(clean, words))}"
        remedy = f"correct or remove the names, then: {_RELOAD}"
        yield Result("settings", _CONFIGURATION, "warn", text, remedy)
    there = [entry for entry in config.directories if (root / entry.path[1:]).is_dir()]
    for problem in unfit(there, root):
        what, _, remedy = problem.partition("; ")
        yield Result("settings", _CONFIGURATION, "fail", f"logins are refused: {clean(what)}", remedy)


def exempt_users(root: Path, config: Config, others: dict[int, str], listed: Collection[int]) -> Result:
    """Who keeps the host's directories, and why.

    others: users logged in now, also from a directory service. listed: the UIDs that have an instance.
    A directory service cannot list all its users, but it knows those whom the settings name.
    """
    return _in_time(lambda: [_exempt_users(root, config, others, listed)], _EXEMPT)[0]


def _exempt_users(root: Path, config: Config, others: dict[int, str], listed: Collection[int]) -> Result:
    exemptions = config.exemptions
    found: dict[int, str] = {}
    unmeant: list[int] = []
    named, unread = userdb.named_users(exemptions)
    names = {**named, **userdb.local_users(root), **others}
    for uid, name in sorted(names.items()):
        if exemptions.is_system(uid) or uid in policy.NOBODY or uid in listed:
            continue
        if reason := users.exempt_reason(exemptions, uid, name):
            found[uid] = reason
            if uid >= policy.BEYOND and not exemptions.regular and not exemptions.names(uid, name):
                unmeant.append(uid)
    system = sum((uid > 0 and exemptions.is_system(uid)) or uid in policy.NOBODY for uid in names)
    rest = f"root and {count(system, 'system user')}"
    unknown = f"; and up to {unread} more whom the settings name" if unread else ""
    if not found:
        return Result("settings", _EXEMPT, "pass", f"{rest} keep the host's directories{unknown}")
    shown = [f"{clean(names[uid])} ({uid}): {clean(reason)}" for uid, reason in found.items()]
    more = f"; and {len(shown) - _NAMED_AT_MOST} more" if len(shown) > _NAMED_AT_MOST else ""
    more += unknown
    text = f"{count(len(found), 'user')} beside {rest}: {'; '.join(shown[:_NAMED_AT_MOST])}{more}"
    if unmeant:
        remedy = f"if these are people, add their UIDs to RegularUIDs=, then: {_RELOAD}"
        return Result("settings", _EXEMPT, "warn", text, remedy)
    return Result("settings", _EXEMPT, "pass", text)


def _in_time(work: Callable[[], Iterable[Result]], name: str) -> list[Result]:
    """What work() finds, or that the user database hangs."""
    try:
        return users.in_time(lambda: list(work()))
    except TimeoutError:
        text = f"the user database does not answer within {users.PATIENCE:.0f} s"
        return [Result("settings", name, "skip", text, "getent passwd; getent group")]

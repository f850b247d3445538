# SPDX-License-Identifier: LGPL-2.1-or-later
"""status: prints a page about each instance, like systemctl status and loginctl user-status.

Not here: drawing the process tree (tree.py).
"""

import contextlib
import time
from typing import Any, Final

from polytmpd.bus import sessions
from polytmpd.bus.client import Holder
from polytmpd.bus.contract import InstanceProperty
from polytmpd.bus.protocol import BusError
from polytmpd.core import names
from polytmpd.core.states import Lifetime, State
from polytmpd.ctl import output, tree, users
from polytmpd.ctl.commands import Answer, Context, list_instances

_LABEL: Final = 12
_PAGES_AT_MOST: Final = 16
"""Unless the users are named. A page takes a search for processes: a thousand of them would take minutes."""
_PATIENCE: Final = 3.0
"""Seconds that the page waits for sizes; usage waits longer."""
_TABLE_AT_MOST: Final = 4 << 20
"""Characters of a mount table. fs.mount-max and PATH_MAX let a user fill theirs with 400 MB."""
_MOUNTS_SHOWN: Final = 64
_LIFETIMES: Final = {
    Lifetime.INSTANCE: "removed with the instance",
    Lifetime.PERSISTENT: "kept between logins",
}
_GOING: Final = {
    State.REMOVING: "being deleted",
    State.FAILED: "what is left of it could not be deleted",
}


async def status(context: Context) -> Answer:
    wanted = users.chosen(context.options.words, await context.client.instances())
    if len(wanted) > _PAGES_AT_MOST and not context.options.words and context.options.json == "off":
        listed = await list_instances(context)
        hint = "\n\nTo see one of them in full: polytmpctl status USER" if context.options.legend else ""
        return listed._replace(text=listed.text + hint)
    found = [await _gather(context, uid) for uid, _ in wanted]
    if not found:
        return Answer([], "No instances." if context.options.legend else "")
    value = found[0] if len(context.options.words) == 1 else found
    return Answer(value, "\n\n".join(_page(context, page) for page in found))


async def _gather(context: Context, uid: int) -> dict[str, Any]:
    values = await context.client.properties(uid)
    holders = await context.client.holders(uid)
    usage: dict[str, tuple[str, int, int]] = {}
    with contextlib.suppress(BusError):  # a page without sizes is better than none
        counted_in = await context.client.usage(
            uid, timeout=_PATIENCE, quiet=True
        )  # nor may a prompt be cut off
        usage = {row[0]: row for row in counted_in}
    opened: list[sessions.SessionDetails] = []
    with contextlib.suppress(BusError):
        opened = await sessions.list_sessions(context.connection, uid)
    private = [directory for directory, *_ in values[InstanceProperty.DIRECTORIES]]
    directories = []
    for directory, host, lifetime in values[InstanceProperty.DIRECTORIES]:
        size = usage.get(directory)
        directories.append(
            {
                "directory": directory,
                "path": host if not _is_set_aside(values[InstanceProperty.STATE], lifetime) else None,
                "lifetime": lifetime,
                "bytes": size[1] if size else None,
                "inodes": size[2] if size else None,
            }
        )
    return {
        "uid": values[InstanceProperty.UID],
        "user": values[InstanceProperty.USER],
        "state": values[InstanceProperty.STATE],
        "since": values[InstanceProperty.CREATED_USEC],
        "removed": await _removed(context, uid, values[InstanceProperty.STATE]),
        "control_group": values[InstanceProperty.CONTROL_GROUP],
        "namespace": values[InstanceProperty.NAMESPACE_ID],
        "directories": directories,
        "shared": values[InstanceProperty.SHARED_PATHS],
        "sessions": [_session(session) for session in opened],
        "mounts": _mounts(holders, private, values[InstanceProperty.SHARED_PATHS]),
        "processes": [
            {
                "pid": holder.pid,
                "command": holder.command,
                "how": holder.how,
                "control_group": holder.control_group,
            }
            for holder in holders
        ],
        "journal": _journal(uid, context.options.lines),
    }


def _is_set_aside(state: str, lifetime: str) -> bool:
    return state in _GOING and lifetime == Lifetime.INSTANCE


async def _removed(context: Context, uid: int, state: str) -> int | None:
    """How many files a running removal has deleted; None if there is none."""
    if state not in _GOING:
        return None
    try:
        return await context.client.removed_entries(uid)
    except BusError:
        return None


def _session(details: sessions.SessionDetails) -> dict[str, str]:
    return {
        "session": details.session.id,
        "service": details.service,
        "tty": details.tty,
        "remote_host": details.remote_host,
        "state": details.state,
    }


def _mounts(holders: list[Holder], directories: list[str], shared: list[str]) -> list[dict[str, str]]:
    """What is mounted in the private directories, read from a process inside that we may inspect."""
    for holder in holders:
        if holder.how != "namespace":
            continue
        try:
            with open(f"/proc/{holder.pid}/mountinfo", errors="surrogateescape") as file:  # noqa: PTH123  (pathlib takes 3 ms)
                table = file.read(_TABLE_AT_MOST)
        except OSError:
            continue
        if len(table) == _TABLE_AT_MOST:
            table = table[: table.rfind("\n") + 1]
        return mounts_below(table, directories, shared)
    return []


def mounts_below(table: str, directories: list[str], shared: list[str]) -> list[dict[str, str]]:
    """The mounts below the directories in a table of proc_pid_mountinfo(5), except polytmpd's own."""
    found = []
    for line in table.splitlines():
        fields = line.split(" ")
        try:
            dash = fields.index("-", 6)
            point, fstype, source = _unescape(fields[4]), fields[dash + 1], _unescape(fields[dash + 2])
        except (ValueError, IndexError):
            continue
        below = any(point.startswith(f"{directory}/") for directory in directories)
        if below and point not in shared and source != names.SENTINEL:
            found.append({"mount": point, "type": fstype, "source": source})
    return found


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _journal(uid: int, lines: int) -> list[str]:
    """The daemon's last journal lines on the user; of this unit, since any process may set POLYTMP_UID=."""
    if not lines:
        return []
    import json
    import subprocess

    try:
        done = subprocess.run(
            (
                *("journalctl", "--quiet", "--no-pager", "--boot", f"--lines={lines}", "--output=json"),
                *("_SYSTEMD_UNIT=polytmpd.service", f"POLYTMP_UID={uid}"),
            ),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in done.stdout.splitlines():
        try:
            entry = json.loads(line)
            seconds = int(entry["__REALTIME_TIMESTAMP"]) / output.USEC
            when = time.strftime("%b %d %H:%M:%S", time.localtime(seconds))
            host, pid = entry.get("_HOSTNAME", ""), entry.get("_PID", "?")
            found.append(f"{when} {host} polytmpd[{pid}]: {entry['MESSAGE']}")
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _page(context: Context, found: dict[str, Any]) -> str:
    style, columns = context.style, output.terminal_columns()
    if context.options.full:
        columns = 1_000_000
    state = found["state"]
    dot = {State.FAILED: "\N{MULTIPLICATION SIGN}", State.ACTIVE: "●"}.get(state, "○")
    lines = [f"{style.state(state, dot)} {output.clean(found['user'])} ({found['uid']})"]
    indent = " " * (_LABEL + 2)

    def line(name: str, value: str) -> None:
        lines.append(f"{name:>{_LABEL}}{':' if name else ' '} {value}")

    since = ""
    if found["since"]:
        ago = output.age(found["since"], time.time_ns() // 1000)
        since = f" since {output.moment(found['since'])}; {ago}"
    line("State", style.state(state) + since)
    if found["removed"]:
        line("Removed", f"{found['removed']} files and directories so far")
    texts = [_session_text(session) for session in found["sessions"]]
    if texts:
        line("Sessions", ", ".join(texts))
    if found["namespace"]:
        line("Namespace", f"mnt:[{found['namespace']}]")
    for entry in found["directories"]:
        line(entry["directory"], entry["path"] or f"{entry['directory']}/{names.REMOVING_PATTERN}")
        details = [_LIFETIMES.get(entry["lifetime"], entry["lifetime"])]
        if _is_set_aside(state, entry["lifetime"]):
            details = [_GOING[state]]
        if entry["bytes"] is not None:
            details.insert(0, f"{output.size(entry['bytes'])} in {output.count(entry['inodes'], 'inode')}")
        lines.append(indent + style.faint("; ".join(details)))
    if found["shared"]:
        line("Shared", " ".join(found["shared"]))
    for number, text in enumerate(_mount_texts(found["mounts"])):
        line("" if number else "Mounts", output.shorten(text, columns - _LABEL - 2))
    holders = [Holder(p["pid"], p["command"], p["control_group"], p["how"]) for p in found["processes"]]
    drawn = tree.draw(holders, style, columns - _LABEL - 2) if holders else []
    if drawn:
        line("CGroup", drawn[0])
        lines += [indent + text for text in drawn[1:]]
    else:
        line("Processes", "none")
    if found["journal"]:
        lines += ["", *(output.shorten(output.clean(text), columns) for text in found["journal"])]
    return "\n".join(lines)


def _mount_texts(mounts: list[dict[str, str]]) -> list[str]:
    texts = [
        output.clean(f"{mount['mount']} ({mount['type']}, {mount['source']})")
        for mount in mounts[:_MOUNTS_SHOWN]
    ]
    if (more := len(mounts) - _MOUNTS_SHOWN) > 0:
        texts.append(f"and {more} more")
    return texts


def _session_text(session: dict[str, str]) -> str:
    place = session["tty"] or session["remote_host"]
    closing = "closing" if session["state"] == "closing" else ""  # its user has logged out
    details = ", ".join(text for text in (session["service"], place, closing) if text)
    return output.clean(f"{session['session']} ({details})" if details else session["session"])

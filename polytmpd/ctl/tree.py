# SPDX-License-Identifier: LGPL-2.1-or-later
"""Draws the control groups and processes of an instance as a tree, like systemctl status.

Not here: finding the processes.
"""

import re
from collections.abc import Sequence
from typing import Final

from polytmpd.bus.client import Holder
from polytmpd.ctl.output import Style, clean, shorten

NOTES: Final = {
    "derived": "in a namespace made from it",
    "descriptor": "holds it open",
    "outside": "not in it",
}
_SESSION: Final = re.compile(r"^session-(.+)\.scope$")
_USER_SLICE: Final = re.compile(r"^user-(\d+)\.slice$")


class _Node:
    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.processes: list[Holder] = []


def draw(holders: Sequence[Holder], style: Style, columns: int = 1_000_000) -> list[str]:
    """One line for each control group and process. A group whose only child is a group shares its line."""
    root = _Node()
    for holder in holders:
        node = root
        for part in [part for part in holder.control_group.split("/") if part]:
            node = node.children.setdefault(part, _Node())
        node.processes.append(holder)
    name, node = _shared("", root)
    lines = [clean(name) or "/"]
    lines += _branches(
        node, "", max((len(str(holder.pid)) for holder in holders), default=0), style, columns
    )
    return lines


def _shared(name: str, node: _Node) -> tuple[str, _Node]:
    """Descend while the only child is a group, and join the names."""
    while not node.processes and len(node.children) == 1:
        ((part, node),) = node.children.items()
        name = f"{name}/{part}"
    return name, node


def _branches(node: _Node, indent: str, digits: int, style: Style, columns: int) -> list[str]:
    lines = []
    entries: list[Holder | tuple[str, _Node]] = [*node.processes, *sorted(node.children.items())]
    for number, entry in enumerate(entries):
        last = number == len(entries) - 1
        branch, below = ("└─", "  ") if last else ("├─", "│ ")
        if isinstance(entry, Holder):
            note = NOTES.get(entry.how)
            text = f"{entry.pid:>{digits}} {clean(entry.command)}"
            tail = f"  ({note})" if note else ""
            text = shorten(text, columns - len(indent) - 2 - len(tail))
            lines.append(style.faint(f"{indent}{branch}") + style.faint(text) + style.warning(tail))
        else:
            name, child = _shared(entry[0], entry[1])
            lines.append(style.faint(f"{indent}{branch}") + clean(name))
            lines += _branches(child, indent + below, digits, style, columns)
    return lines


def why(holder: Holder, uid: int) -> str:
    """What a process belongs to, in one phrase: an administrator has to stop this to end it."""
    parts = [part for part in holder.control_group.split("/") if part]
    owner = next((match[1] for part in parts if (match := _USER_SLICE.match(part))), None)
    unit = next((part for part in reversed(parts) if "." in part and not part.endswith(".slice")), None)
    session = next((match[1] for part in parts if (match := _SESSION.match(part))), None)
    whose = "" if owner in {None, str(uid)} else f" of UID {owner}"
    if session is not None:
        return f"session {session}{whose}"
    if owner is not None:
        manager = f"user@{owner}.service"
        if unit == "init.scope" or unit == manager:
            return f"user manager{whose}"
        return f"user unit {unit}{whose}" if manager in parts and unit else f"user slice{whose}"
    return f"unit {unit}" if unit else f"cgroup {holder.control_group or '?'}"

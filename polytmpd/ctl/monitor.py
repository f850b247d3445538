# SPDX-License-Identifier: LGPL-2.1-or-later
"""monitor: prints a line for each instance that comes, changes or goes, until interrupted.

Not here: any state but the one last printed for each user.
"""

import sys
import time
from typing import Any

from polytmpd.bus.connection import Connection
from polytmpd.bus.contract import InstanceProperty
from polytmpd.ctl import output, users
from polytmpd.ctl.commands import Context
from polytmpd.ctl.output import Failure


class Monitor:
    """Prints events as they happen."""

    def __init__(self, context: Context) -> None:
        if context.options.json == "pretty":
            raise Failure("monitor prints one JSON object per line", "Try: polytmpctl monitor --json=short")
        self._context = context
        self._names: dict[int, str] = {}
        self._states: dict[int, str] = {}

    async def run(self, connection: Connection) -> None:
        """Print until the connection to the bus is lost."""
        await self._context.client.follow(connection, self._new, self._removed, self._changed, self._owner)
        for entry in await self._context.client.instances():
            self._names[entry.uid] = entry.user
        for uid, values in (await self._context.client.all_properties()).items():
            self._states[uid] = values[InstanceProperty.STATE]
        if self._context.options.legend and self._context.options.json == "off":
            sys.stderr.write(f"Monitoring instances, {len(self._names)} now. Press ^C to stop.\n")
        await connection.wait_closed()

    def _new(self, uid: int, state: str) -> None:
        self._names.setdefault(uid, users.name_of(uid))
        self._states[uid] = state
        self._tell("new", uid, state=state)

    def _removed(self, uid: int) -> None:
        self._tell("removed", uid)
        self._states.pop(uid, None)
        self._names.pop(uid, None)

    def _changed(self, uid: int, values: dict[str, Any], invalidated: list[str]) -> None:
        state = values.get(InstanceProperty.STATE)
        before = self._states.get(uid, "")
        if state is not None and state != before:
            self._states[uid] = state
            self._tell("state", uid, state=state, before=before)
        others = sorted({*values, *invalidated} - {InstanceProperty.STATE})
        if others:
            self._tell("changed", uid, properties=others)

    def _owner(self, is_there: bool) -> None:
        self._tell("started" if is_there else "stopped", None)

    def _tell(self, event: str, uid: int | None, **more: Any) -> None:
        now = time.time()
        user = None if uid is None else self._names.get(uid) or users.name_of(uid)
        if self._context.options.json != "off":
            value = {"time": int(now * output.USEC), "event": event, "uid": uid, "user": user, **more}
            line = output.to_json(value, "short")
        else:
            line = self._line(now, event, user, uid, more)
        output.write(f"{line}\n")

    def _line(self, now: float, event: str, user: str | None, uid: int | None, more: dict[str, Any]) -> str:
        style = self._context.style
        when = style.faint(
            time.strftime("%b %d %H:%M:%S", time.localtime(now)) + f".{int(now % 1 * 1000):03}"
        )
        if uid is None:
            return f"{when} {style.bold('polytmpd')} {event}"
        who = f"{style.bold(output.clean(user or str(uid)))} ({uid})"
        match event:
            case "new":
                return f"{when} {who} new instance, {style.state(more['state'])}"
            case "state":
                before = f"{more['before']} → " if more["before"] else ""
                return f"{when} {who} {before}{style.state(more['state'])}"
            case "changed":
                return f"{when} {who} {style.faint('changed: ' + ', '.join(more['properties']))}"
        return f"{when} {who} instance removed"

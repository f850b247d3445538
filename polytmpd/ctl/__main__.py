# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of polytmpctl: arguments in, text and an exit status out."""

import argparse
import asyncio
import json
import os
import pwd
import sys
import time
from collections.abc import Sequence
from typing import Any

from polytmpd import __version__
from polytmpd.bus.client import Polytmp
from polytmpd.bus.connection import BusError, Connection
from polytmpd.bus.contract import instance_path

_USEC = 1_000_000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polytmpctl", description="Show the private /tmp and /var/tmp of this host's users."
    )
    parser.add_argument("--version", action="version", version=f"polytmp {__version__}")
    parser.add_argument("--json", choices=("pretty", "short", "off"), default="off", help="print JSON")
    parser.add_argument("--no-legend", action="store_true", help="no headings and no counts")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("list", help="list the instances (the default)")
    status = commands.add_parser("status", help="show one instance in full")
    status.add_argument("user", nargs="?", metavar="USER", help="name or UID; the caller by default")
    return parser


def _uid(user: str | None) -> int:
    if user is None:
        return os.getuid()
    if user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise SystemExit(
            f"polytmpctl: no user is called {user!r} here; polytmpctl list shows who has an instance"
        ) from None


async def _list(client: Polytmp) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for entry in await client.instances():
        row: dict[str, Any] = {"uid": entry.uid, "user": entry.user}
        try:
            found = await client.properties(entry.path)
        except BusError as error:
            if not error.name.endswith((".AccessDenied", ".UnknownObject")):
                raise
            row |= {"state": None, "since": None}
        else:
            row |= {"state": found["State"], "since": found["CreatedUSec"]}
        rows.append(row)
    return rows


def _since(usec: int | None) -> str:
    if not usec:
        return "-"
    return time.strftime("%a %Y-%m-%d %H:%M:%S %Z", time.localtime(usec / _USEC))


def _table(rows: Sequence[dict[str, Any]], legend: bool) -> str:
    cells = [("UID", "USER", "STATE", "SINCE")] if legend else []
    cells += [(str(row["uid"]), row["user"], row["state"] or "-", _since(row["since"])) for row in rows]
    widths = [max((len(line[column]) for line in cells), default=0) for column in range(4)]
    lines = [
        f"{line[0]:>{widths[0]}} {line[1]:<{widths[1]}} {line[2]:<{widths[2]}} {line[3]}".rstrip()
        for line in cells
    ]
    if legend:
        lines += ["", f"{len(rows)} instance{'' if len(rows) == 1 else 's'} listed."]
    return "\n".join(lines)


async def _status(client: Polytmp, uid: int) -> dict[str, Any]:
    path = instance_path(await _checked(client, uid))
    found = await client.properties(path)
    return {
        "uid": found["UID"],
        "user": found["User"],
        "state": found["State"],
        "since": found["CreatedUSec"],
        "control_group": found["ControlGroup"],
        "namespace": found["NamespaceID"],
        "directories": [
            {"directory": directory, "path": host, "lifetime": lifetime}
            for directory, host, lifetime in found["Directories"]
        ],
        "shared": found["SharedPaths"],
        "processes": [{"pid": pid, "command": command} for pid, command in await client.processes(path)],
    }


async def _checked(client: Polytmp, uid: int) -> int:
    await client.instance(uid)  # NoSuchInstance, with its text, before anything else
    return uid


def _page(found: dict[str, Any]) -> str:
    lines = [f"{found['user']} ({found['uid']})"]

    def line(name: str, value: object) -> None:
        lines.append(f"{name:>12}: {value}")

    line("State", found["state"])
    line("Since", _since(found["since"]))
    line("CGroup", found["control_group"] or "-")
    line("Namespace", f"mnt:[{found['namespace']}]")
    for entry in found["directories"]:
        line(entry["directory"], f"{entry['path']} ({entry['lifetime']})")
    line("Shared", " ".join(found["shared"]) or "-")
    line("Processes", len(found["processes"]))
    lines += [f"{'':14}{entry['pid']:>7} {entry['command']}" for entry in found["processes"]]
    return "\n".join(lines)


async def _run(options: argparse.Namespace) -> str:
    connection = await Connection.open()
    client = Polytmp(connection)
    try:
        result: Any
        if options.command == "status":
            result = await _status(client, _uid(options.user))
            text = _page(result)
        else:
            result = await _list(client)
            text = _table(result, not options.no_legend)
    finally:
        connection.close()
    if options.json != "off":
        return json.dumps(result, indent="\t" if options.json == "pretty" else None)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit statuses as systemd's tools have them: 0, or 1 with the reason on standard error."""
    options = _parser().parse_args(arguments)
    try:
        print(asyncio.run(_run(options)))  # noqa: T201
    except BusError as error:
        hint = ""
        if error.name.endswith((".ServiceUnknown", ".Disconnected", ".NameHasNoOwner")):
            hint = "\nIs polytmpd running? See: systemctl status polytmpd"
        print(f"polytmpctl: {error}{hint}", file=sys.stderr)  # noqa: T201
        return 1
    except (OSError, BrokenPipeError) as error:
        print(f"polytmpctl: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

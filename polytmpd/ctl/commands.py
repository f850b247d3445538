# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands list, ps, usage and path.

Each returns the value that --json= prints, and the text for people.
Not here: how these reach the terminal (output.py).
"""

import contextlib
import os
import time
from typing import Any, Final, NamedTuple

from polytmpd.bus.client import Polytmp
from polytmpd.bus.contract import InstanceProperty
from polytmpd.bus.protocol import Asker, BusError
from polytmpd.core import names
from polytmpd.ctl import output, users
from polytmpd.ctl.arguments import Options
from polytmpd.ctl.output import Failure, Style

_DENIED: Final = (".AccessDenied", ".InteractiveAuthorizationRequired")


class Context(NamedTuple):
    """What every command gets.

    connection: for questions to other services, such as logind.
    """

    client: Polytmp
    connection: Asker
    options: Options
    style: Style


class Answer(NamedTuple):
    """json: plain values. text: empty if there is nothing to print."""

    json: Any
    text: str
    status: int = 0


async def list_instances(context: Context) -> Answer:
    rows: list[dict[str, Any]] = [
        {
            "uid": entry.uid,
            "user": entry.user,
            "state": entry.state or None,
            "since": entry.created_usec if entry.state else None,
        }
        for entry in await context.client.instances_in_full()
    ]
    if not rows:
        return Answer(rows, "No instances." if context.options.legend else "")
    style, now = context.style, time.time_ns() // 1000
    cells = [
        (
            str(row["uid"]),
            output.clean(row["user"]),
            style.state(row["state"] or "-"),
            output.moment(row["since"] or 0),
            output.age(row["since"] or 0, now),
        )
        for row in rows
    ]
    text = output.table(
        ("UID>", "USER", "STATE", "SINCE", "AGE"),
        cells,
        style,
        legend=context.options.legend,
        noun="instance",
    )
    return Answer(rows, text)


async def ps(context: Context) -> Answer:
    from polytmpd.ctl import tree

    users_chosen = users.chosen(context.options.words, await context.client.instances())
    several = len(users_chosen) != 1
    rows: list[dict[str, Any]] = []
    cells: list[tuple[str, ...]] = []
    for uid, user in users_chosen:
        for holder in await context.client.holders(uid):
            why = tree.why(holder, uid)
            rows.append(
                {
                    "uid": uid,
                    "user": user,
                    "pid": holder.pid,
                    "how": holder.how,
                    "where": why,
                    "control_group": holder.control_group,
                    "command": holder.command,
                }
            )
            how = context.style.warning(holder.how) if holder.how != "namespace" else holder.how
            cell = (str(holder.pid), how, output.clean(why), output.clean(holder.command))
            cells.append((output.clean(user), *cell) if several else cell)
    if not rows:
        return Answer(rows, "No processes." if context.options.legend else "")
    columns: tuple[str, ...] = ("PID>", "HOW", "WHERE", "COMMAND")
    if several:
        columns = ("USER", *columns)
    if not context.options.full:
        cells = _fitted(cells)
    legend = context.options.legend
    text = output.table(columns, cells, context.style, legend=legend, noun="processe")
    return Answer(rows, text.replace("1 processe listed", "1 process listed"))


def _fitted(cells: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Shorten the last column to the width that the terminal has left."""
    widths = [max(output.width(row[column]) for row in cells) for column in range(len(cells[0]) - 1)]
    left = max(output.terminal_columns() - sum(widths) - len(widths) - 1, 20)
    return [(*row[:-1], output.shorten(row[-1], left)) for row in cells]


async def usage(context: Context) -> Answer:
    rows: list[dict[str, Any]] = []
    listed = await context.client.instances()
    wanted = users.chosen(context.options.words, listed, must_have_one=False)
    if not context.options.words and os.geteuid() == 0:
        with_instance = {entry.uid for entry in listed}
        wanted += [(uid, users.name_of(uid)) for uid in await _kept(context) if uid not in with_instance]
    for uid, user in wanted:
        try:
            counted = await context.client.usage(uid)
        except BusError as error:
            if error.name.endswith(".NoSuchInstance") and not context.options.words and os.geteuid() == 0:
                continue  # it has just been removed
            if error.name.endswith(".NoSuchInstance"):
                raise users.no_instance(uid, user) from None
            raise
        rows += [
            {"uid": uid, "user": user, "directory": directory, "bytes": size, "inodes": inodes}
            for directory, size, inodes in counted
        ]
    rows.sort(key=lambda row: (row["uid"], row["directory"]))
    if not rows:
        return Answer(rows, "No instances." if context.options.legend else "")
    cells = [
        (output.clean(row["user"]), row["directory"], output.size(row["bytes"]), str(row["inodes"]))
        for row in rows
    ]
    legend = context.options.legend
    text = output.table(("USER", "DIRECTORY", "SIZE>", "INODES>"), cells, context.style, legend=legend)
    if legend and len(rows) > 1:
        total, inodes = sum(row["bytes"] for row in rows), sum(row["inodes"] for row in rows)
        text += f"\n\n{output.size(total)} in {output.count(inodes, 'inode')}."
    return Answer(rows, text)


async def _kept(context: Context) -> list[int]:
    """The UIDs of the users whose files are kept between logins, by the names of the directories."""
    found: set[int] = set()
    for directory in await context.client.directories():
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                uid = names.kept_owner(entry.name)
                if uid is not None and entry.stat(follow_symlinks=False).st_uid == 0:  # not a user's own
                    found.add(uid)
    return sorted(found)


async def path(context: Context) -> Answer:
    """FILE in a user's instance → its path on the host; a path on the host in an instance → user:path."""
    if context.options.user is not None:
        uid = users.uid_of(context.options.user, await context.client.instances())
    else:
        uid = users.caller(os.environ)
    rows, lines = [], []
    for word in context.options.words:
        file = _absolute(word, own=uid == os.geteuid())
        if (owner := await _owner(context, file)) is not None:
            whose, user, inside = owner
            rows.append({"uid": whose, "user": user, "path": inside, "host_path": file})
            lines.append(f"{user}:{inside}")
            continue
        if os.geteuid() == 0 and (found := await _kept_as(context, file)) is not None:
            whose, inside = found
            user = users.name_of(whose)
            rows.append({"uid": whose, "user": user, "path": inside, "host_path": file})
            lines.append(f"{user}:{inside}")
            continue
        host = await _on_host(context, uid, file)
        rows.append({"uid": uid, "user": users.name_of(uid), "path": file, "host_path": host})
        lines.append(host)
    return Answer(rows, "\n".join(lines))


def _absolute(word: str, *, own: bool) -> str:
    """The absolute path without '..'. Links are followed only in the caller's own view."""
    if not word:
        raise Failure("The path is empty")
    found = os.path.realpath(word) if own else os.path.abspath(word)  # noqa: PTH100  (it need not exist)
    return "/" + found.lstrip("/")


async def _owner(context: Context, file: str) -> tuple[int, str, str] | None:
    """UID, user and the user's name for a path on the host that is in an instance.

    Only the instances are asked that the names of the barriers in the path belong to.
    """
    named = (names.owner(part) for part in file.split("/"))
    for uid in dict.fromkeys(uid for uid in named if uid is not None):
        try:
            found = await context.client.properties(uid, quiet=True)
        except BusError as error:
            if error.name.endswith((".UnknownObject", *_DENIED)):
                continue
            raise
        for directory, host, _ in found[InstanceProperty.DIRECTORIES]:
            if file == host or file.startswith(f"{host}/"):
                return uid, found[InstanceProperty.USER], directory + file[len(host) :]
    return None


async def _kept_as(context: Context, file: str) -> tuple[int, str] | None:
    """The user and their name for a path on the host, if it is kept for a user without an instance."""
    for directory in await context.client.directories():
        if not file.startswith(f"{directory}/"):
            continue
        barrier, _, private = file.removeprefix(f"{directory}/").partition("/")
        uid = names.kept_owner(barrier)
        if uid is None or not f"{private}/".startswith(f"{names.INNER}/"):
            continue
        inside = directory + private.removeprefix(names.INNER)
        with contextlib.suppress(BusError):
            head, rest = _split_unicode(inside)
            if (await context.client.resolve(uid, head)).rstrip("/") + rest == file:
                return uid, inside
    return None


def _split_unicode(file: str) -> tuple[str, str]:
    """Split a path before the first name that is not Unicode: the bus carries nothing else."""
    names = file.split("/")
    for number, name in enumerate(names):
        try:
            name.encode()
        except UnicodeEncodeError:
            return "/".join(names[:number]) or "/", "/".join(["", *names[number:]])
    return file, ""


async def _on_host(context: Context, uid: int, file: str) -> str:
    head, rest = _split_unicode(file)  # the rest is below the head on the host too
    try:
        return (await context.client.resolve(uid, head)).rstrip("/") + rest
    except BusError as error:
        if error.name.endswith(".NotPolyinstantiated"):
            return file
        if not error.name.endswith(".NoSuchInstance"):
            raise
    # The user has no instance. A path outside the private directories is the same for everyone.
    directories = await context.client.directories()
    if not any(file == directory or file.startswith(f"{directory}/") for directory in directories):
        return file
    user = users.name_of(uid)
    if uid == 0:
        raise Failure(
            f"root has no private directories: {file} is the host's own",
            "Try: polytmpctl path FILE --user=USER",
        )
    raise Failure(f"{user} has no instance, and so no private {file}", users.SEE_LIST)

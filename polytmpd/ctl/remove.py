# SPDX-License-Identifier: LGPL-2.1-or-later
"""remove: deletes a user's remaining files, after showing what they are.

Not here: ending the user's processes. While one lives, the instance is not removed.
"""

import asyncio
import contextlib
import sys
import time
from typing import Any, Final

from polytmpd.bus.contract import InstanceProperty
from polytmpd.bus.protocol import BusError
from polytmpd.core.states import Lifetime, State
from polytmpd.ctl import output, users
from polytmpd.ctl.commands import Answer, Context
from polytmpd.ctl.output import Failure

_QUICK: Final = 1.0
"""Seconds after which a person wants to see progress."""


async def remove(context: Context) -> Answer:
    instances = await context.client.instances()
    for word in context.options.words:
        await _remove_one(context, users.uid_of(word, instances), word)
    return Answer(None, "")


async def _remove_one(context: Context, uid: int, user: str) -> None:
    if uid == 0:
        raise users.no_instance(uid, "root")
    failed = await _failed_instance(context, uid, user)
    # Directories that are removed with the instance. Without an instance, only persistent ones are left.
    going = {
        path for path, _, lifetime in failed if lifetime == Lifetime.INSTANCE or context.options.persistent
    }
    rows = [row for row in await _usage(context, uid, user) if not failed or row[0] in going]
    if not context.options.yes:
        _ask(user, rows, going - {row[0] for row in rows})
    work = asyncio.ensure_future(context.client.remove(uid, persistent=context.options.persistent))
    begin = time.monotonic()
    try:
        while not work.done():
            await asyncio.wait((work,), timeout=_QUICK)
            if not work.done() and sys.stderr.isatty():
                done = await _progress(context, uid, sum(row[2] for row in rows))
                seconds = time.monotonic() - begin
                sys.stderr.write(f"\r\x1b[KRemoving the files of {user}: {done}{seconds:.0f}s")
                sys.stderr.flush()
    finally:
        if sys.stderr.isatty() and time.monotonic() - begin >= _QUICK:
            sys.stderr.write("\r\x1b[K")
    try:
        await work
    except BusError as error:
        if error.name.endswith(".Failed"):
            text = str(error)
            hint = f"See: findmnt\nThen try: polytmpctl remove {user}"
            raise Failure(text[:1].upper() + text[1:], hint) from None
        raise


async def _progress(context: Context, uid: int, files: int) -> str:
    """Progress for the terminal. files: how many there were; 0 if they were not counted."""
    with contextlib.suppress(BusError):  # a caller who may not count may still remove
        removed = await context.client.removed_entries(uid)
        return f"{removed} of {files}, " if files else f"{removed} so far, "
    return ""


async def _failed_instance(context: Context, uid: int, user: str) -> list[list[str]]:
    """The directories of a failed instance; none without one. Raises Failure if the instance is in use."""
    try:
        found = await context.client.properties(uid)
    except BusError as error:
        if error.name.endswith((".UnknownObject", ".NoSuchInstance")):
            if not context.options.persistent:
                await _usage(context, uid, user)  # raises if nothing is kept: then no hint helps
                raise Failure(
                    f"{user} has no instance",
                    f"To remove what is kept in /var/tmp, try: polytmpctl remove --persistent {user}",
                ) from None
            return []
        if error.name.endswith((".AccessDenied", ".InteractiveAuthorizationRequired")):
            return []  # removing needs another authorization
        raise
    state = found[InstanceProperty.STATE]
    if state == State.FAILED:
        return list(found[InstanceProperty.DIRECTORIES])
    holders = await context.client.holders(uid)
    names = ", ".join(f"{_short(holder.command)} ({holder.pid})" for holder in holders[:5])
    more = f" and {len(holders) - 5} more" if len(holders) > 5 else ""
    raise Failure(
        f"The instance of {user} is {state}" + (f", in use by {names}{more}" if holders else ""),
        f"It is removed when its last process ends. See: polytmpctl ps {user}\n"
        f"To end the processes, try: loginctl terminate-user {user}",
    )


def _short(command: str) -> str:
    """sshd-session: alice → sshd-session, /usr/bin/tmux → tmux."""
    return output.clean(command.split(" ")[0].rstrip(":").rpartition("/")[2] or command)


async def _usage(context: Context, uid: int, user: str) -> list[tuple[str, int, int]]:
    try:
        return await context.client.usage(uid)
    except BusError as error:
        # Too large to count in time, or already set aside; or this caller may not count, but may remove.
        if error.name.endswith((".Failed", ".AccessDenied", ".InteractiveAuthorizationRequired")):
            return []
        if error.name.endswith(".NoSuchInstance"):
            raise Failure(f"{user} has no instance, and no files are kept for them") from None
        raise


def _ask(user: str, rows: list[tuple[str, int, int]], uncounted: set[str]) -> None:
    what = [
        f"  {directory}: {output.size(size)} in {output.count(inodes, 'inode')}"
        for directory, size, inodes in rows
    ]
    what += [f"  {directory}: not counted" for directory in sorted(uncounted)]
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise Failure(f"Refusing to remove the files of {user} without confirmation", "Try again with --yes")
    lines = [f"This permanently removes the files of {user} in:", *(what or ["  (not counted)"])]
    sys.stderr.write("\n".join(lines) + f"\nRemove the files of {user}? [y/N] ")
    sys.stderr.flush()
    answer: Any = sys.stdin.readline()
    if answer.strip().lower() not in {"y", "yes"}:
        raise Failure("Nothing was removed")

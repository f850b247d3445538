# SPDX-License-Identifier: LGPL-2.1-or-later
"""check --probe: opens a real session of a user through a PAM service, and compares where it is.

Each session is opened in a transient service, as a login service would: outside the caller's session, cgroup
and namespace. It is a login like any other, so modules may record it, or start what they start at a login.
Not here: opening the session (libpam.py).
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from polytmpd.bus.client import Polytmp
from polytmpd.bus.contract import InstanceProperty
from polytmpd.bus.protocol import Asker, BusError
from polytmpd.ctl.host import Result
from polytmpd.ctl.libpam import SESSION_SECONDS
from polytmpd.ctl.output import clean
from polytmpd.ctl.regular import Person

_SEE: Final = "journalctl -b -g pam_polytmp"


async def probe(connection: Asker, user: Person, service: str, directories: Collection[str]) -> Result:
    """Open a session of the user through a service, compare, and close it."""
    argv = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect"]
    argv += [f"--property=RuntimeMaxSec={SESSION_SECONDS + 10}", "--"]
    argv += [sys.executable, "-I", "-m", "polytmpd.ctl.libpam", "session", service, user.name]
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, stderr=pipe)
    except OSError as error:
        return Result(
            "probe", service, "fail", f"failed to execute systemd-run: {error.strerror}", "install it"
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(SESSION_SECONDS + 15):
            answer = _answer(await process.stdout.readline())
            result = await _judge(connection, user, service, directories, answer)
            with contextlib.suppress(ConnectionError):
                process.stdin.write(b"\n")
                process.stdin.close()
                await process.stdin.wait_closed()
            _, complaint = await process.communicate()
    except TimeoutError:
        text = f"a session of {user.name} did not open within {SESSION_SECONDS} s"
        return Result("probe", service, "fail", text, _SEE)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if not answer and complaint:
        lines = complaint.decode(errors="replace").strip().splitlines() or ["no reason given"]
        text = f"a session of {user.name} could not be opened: {clean(lines[-1])}"
        return Result("probe", service, "fail", text, _SEE)
    return result


def _answer(line: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return found


async def _judge(
    connection: Asker, user: Person, service: str, directories: Collection[str], answer: dict[str, Any]
) -> Result:
    whose = f"a session of {user.name}"
    if not answer.get("opened"):
        said = [clean(line) for line in answer.get("said", []) if "polytmp" in line]
        why = said[-1] if said else f"{answer.get('function', 'PAM')}: {answer.get('why', 'it crashed')}"
        return Result("probe", service, "fail", f"{whose} is refused: {clean(why)}", _SEE)
    try:
        shared = _shared(answer, directories)
    except OSError as error:
        return Result("probe", service, "fail", f"{whose} cannot be examined: {error.strerror}", _SEE)
    if shared:
        text = f"{whose} gets the shared {' and '.join(shared)}"
        if user.exempt:
            return Result("probe", service, "warn", f"{text}: {user.exempt}", "name another USER")
        return Result(
            "probe", service, "fail", text, "see the results for PAM and settings; then probe again"
        )
    inode = int(answer["namespace"][1])
    if inode != await _instance(connection, user.uid):
        text = f"{whose} is in mnt:[{inode}], which is not the namespace of the user's instance"
        return Result("probe", service, "fail", text, "see the results for PAM; then probe again")
    return Result("probe", service, "pass", f"{whose} is private, in mnt:[{inode}]")


def _shared(answer: dict[str, Any], directories: Collection[str]) -> list[str]:
    """The directories that the session shares with the host. Raises OSError."""
    inside, host = Path("/proc", str(answer["pid"]), "root"), Path("/proc/1/root")
    namespace = Path("/proc/1/ns/mnt").stat()
    if tuple(answer["namespace"]) == (namespace.st_dev, namespace.st_ino):
        return list(directories)
    return [each for each in directories if (inside / each[1:]).samefile(host / each[1:])]


async def _instance(connection: Asker, uid: int) -> int | None:
    """The inode of the namespace that the daemon has for the user; None if it has none."""
    try:
        found = await Polytmp(connection).properties(uid)
    except BusError:
        return None
    return int(found[InstanceProperty.NAMESPACE_ID])

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running a command, and what it returned.

Not here: how a command gets into a machine (container.py, session.py).
"""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from . import nspawn


@dataclass(frozen=True, slots=True)
class Result:
    command: str
    returncode: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        parts = [f"{self.command}: exit status {self.returncode}"]
        parts += [f"--- {name}\n{text.rstrip()}" for name, text in self._streams() if text.strip()]
        return "\n".join(parts)

    def _streams(self) -> list[tuple[str, str]]:
        return [("stdout", self.stdout), ("stderr", self.stderr)]


class CommandError(Exception):
    """A command failed; the message shows its output."""

    def __init__(self, result: Result) -> None:
        super().__init__(str(result))
        self.result = result


class CommandTimeout(CommandError):
    """A command did not end in time. It was killed; the processes it started were not."""


def execute(
    shown: str, argv: Sequence[str], check: bool, data: str | bytes | None, timeout: float
) -> tuple[int, bytes, bytes]:
    """Run argv with data as its stdin and return (exit status, stdout, stderr).

    shown is the command as errors name it, timeout is in seconds. Raises CommandTimeout and, if check is
    set, CommandError.
    """
    stdin = data.encode() if isinstance(data, str) else data or b""
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            capture_output=True,
            timeout=timeout,
            env=nspawn.ENVIRONMENT,
            cwd="/",
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        shown = f"{shown}: no end within {timeout:g} s"
        raise CommandTimeout(Result(shown, -1, decode(error.stdout), decode(error.stderr))) from None
    if check and done.returncode:
        raise CommandError(Result(shown, done.returncode, decode(done.stdout), decode(done.stderr)))
    return done.returncode, done.stdout, done.stderr


def run(shown: str, argv: Sequence[str], check: bool, data: str | bytes | None, timeout: float) -> Result:
    """Run argv as execute() does; the output is decoded."""
    returncode, stdout, stderr = execute(shown, argv, check, data, timeout)
    return Result(shown, returncode, decode(stdout), decode(stderr))


def decode(data: bytes | None) -> str:
    return (data or b"").decode(errors="surrogateescape")

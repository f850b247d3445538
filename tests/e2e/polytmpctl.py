# SPDX-License-Identifier: LGPL-2.1-or-later
"""polytmpctl as an administrator runs it in a machine."""

import json
from typing import Any

from tests.bed import Machine, Result


def ctl(machine: Machine, *words: str, check: bool = True, timeout: float = 20) -> Result:
    return machine.run("polytmpctl", *words, check=check, timeout=timeout)


def values(machine: Machine, *words: str) -> Any:
    return json.loads(ctl(machine, "--json=short", *words).stdout)


def refused(result: Result, *texts: str) -> None:
    """Exit status 1, nothing on stdout; stderr says what failed, and contains the texts."""
    assert result.returncode == 1, result
    assert result.stdout == "", result
    lines = result.stderr.splitlines()
    assert lines[0].startswith("polytmpctl: "), result
    assert "Traceback" not in result.stderr
    for text in texts:
        assert text in result.stderr, result


def terminal(machine: Machine, command: str, typed: str) -> str:
    """Run it on root's terminal, answer its question with the line, and return what is shown."""
    return machine.ssh("root", command, tty=True, input=f"{typed}\n", check=False).stdout


def check(machine: Machine, *words: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status of polytmpctl check, and its results."""
    done = machine.run("polytmpctl", "check", "--json=short", *words, check=False, timeout=120)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)["results"]

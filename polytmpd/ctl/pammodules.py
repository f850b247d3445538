# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether libpam can load the modules that stacks name.

Not here: what a stack does about a module that it cannot load (pamdispatch.py); loading (libpam.py).
"""

import json
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

OURS: Final = "pam_polytmp.so"
_MARK: Final = b"polytmpd"
"""What is in our module, and in no other."""
_TIMEOUT: Final = 60.0
FUNCTIONS: Final = {"session": "pam_sm_open_session", "account": "pam_sm_acct_mgmt"}


@dataclass(frozen=True, slots=True)
class Module:
    """file: where libpam looks for it. problem: why it cannot be loaded; empty if it can."""

    file: str
    problem: str = ""
    symbols: tuple[str, ...] = tuple(FUNCTIONS.values())


Load = Callable[[Collection[str]], Mapping[str, Module]]
"""Examines modules, given as stacks write them."""


class LoadError(Exception):
    """The modules could not be examined."""


def load(paths: Collection[str]) -> dict[str, Module]:
    """Load each module in its own process. Raises LoadError."""
    argv = [sys.executable, "-I", "-m", "polytmpd.ctl.libpam", "load"]
    try:
        done = subprocess.run(
            argv,
            input=json.dumps(sorted(paths)),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        found: dict[str, dict[str, Any]] = answer["modules"]
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"libpam could not be asked: {error}") from error
    return {
        path: _judged(path, Module(entry["file"], entry["problem"], tuple(entry["symbols"])))
        for path, entry in found.items()
    }


def _judged(path: str, module: Module) -> Module:
    """A file of our name has to be our module: another one may open sessions without a word."""
    if module.problem or path.rpartition("/")[2] != OURS:
        return module
    try:
        if _MARK in Path(module.file).read_bytes():
            return module
    except OSError as error:
        return Module(module.file, f"failed to read: {error.strerror}", ())
    return Module(module.file, "the file is another module", module.symbols)

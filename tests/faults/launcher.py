# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs polytmpd with faults: at its k-th step the daemon dies or stops, or the step fails.

The daemon itself has no hooks for this. In a test machine, this file runs instead of /usr/libexec/polytmpd.
Files in DIRECTORY control it:
  plan   one fault, see Plan; removed when it strikes, unless it is lasting
  fired  the name of the step that the fault struck
  trace  the names of the steps since the plan was written
  store  [[name, path], …]: at the next start, put these into the FD store and die

Not here: what must hold afterwards (tests/e2e/test_faults*.py, tests/kernel/test_create_faults.py).
"""

import errno
import functools
import json
import os
import pathlib
import signal
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from polytmpd import sdnotify
from polytmpd.blocking import barriers, deletion, instances, restoration, shared, storage, sweep
from polytmpd.blocking.state import StateDirectory
from polytmpd.executor.actions import Executor
from polytmpd.executor.sentinels import Sentinels
from polytmpd.kernel import descriptor, host, inside, mountinfo, mountns, processes

DIRECTORY: Final = Path("/run/polytmp-faults")

CHANGES: Final[tuple[tuple[object, str, tuple[str, ...]], ...]] = (
    (mountns, "", ("mount", "unshare", "open_tree", "move_mount", "set_propagation", "build")),
    (
        inside,
        "",
        ("umount2", "unshare", "setns", "open_tree", "move_mount", "set_propagation", "fsmount"),
    ),
    (storage, "os", ("mkdir", "rmdir", "symlink", "fchown", "fchmod", "setxattr", "removexattr")),
    (storage, "syscalls", ("renameat2",)),
    (shared, "os", ("mkdir", "fchown", "fchmod")),
    (deletion, "os", ("unlink", "rmdir", "fchown", "fchmod")),
    (sweep, "os", ("unlink", "rmdir", "fchown", "fchmod")),
    (sdnotify, "", ("store", "remove")),
    (StateDirectory, "", ("save", "forget")),
    (Sentinels, "", ("watch",)),
    (Executor, "", ("hand_over", "let_go")),
)
"""The steps that change something: (where, the module that it uses, functions)."""

READS: Final[tuple[tuple[object, str, tuple[str, ...]], ...]] = (
    (descriptor, "os", ("open", "dup")),
    (mountns, "os", ("fstat",)),
    (inside, "os", ("fstat",)),
    (mountinfo, "", ("read", "mount_id_of")),
    (barriers, "os", ("fstat",)),
    (barriers, "syscalls", ("openat2",)),
    (storage, "os", ("fstat", "getxattr", "readlink")),
    (shared, "os", ("fstat",)),
    (restoration, "os", ("fstat",)),
    (instances, "os", ("fstat",)),
    (processes, "os", ("fstat",)),
)
"""The steps that only read, and can fail too."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A fault.

    at: the number of the step, from 1; if name is set, only the steps of that name count.
    how: kill (after the step), kill-before, stop (after the step), or the name of an error such as ENOSPC.
    lasting: the fault strikes at that step and at all that follow.
    """

    at: int = 0
    how: str = ""
    name: str = ""
    lasting: bool = False


class Faults:
    """Counts the steps, and strikes at the step that the plan names."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.names: list[str] = []
        self.fired = ""
        self._count = 0

    def set(self, plan: Plan | None) -> None:
        self.plan = plan
        self.names = []
        self.fired = ""
        self._count = 0

    def look(self) -> Plan | None:
        return self.plan

    def note(self, name: str) -> None:
        self.names.append(name)

    def strike(self, name: str, plan: Plan) -> None:
        self.fired = self.fired or name
        if not plan.lasting:
            self.plan = None

    def step(self, name: str, call: Callable[[], Any]) -> Any:
        plan = self.look()
        if plan is None:
            return call()
        self.note(name)
        if plan.name in {"", name}:
            self._count += 1
        if plan.name not in {"", name} or not (
            self._count == plan.at or (plan.lasting and self._count > plan.at > 0)
        ):
            return call()
        self.strike(name, plan)
        match plan.how:
            case "kill-before":
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill" | "stop":
                try:
                    return call()
                finally:
                    os.kill(os.getpid(), signal.SIGKILL if plan.how == "kill" else signal.SIGSTOP)
            case error:
                number: int = getattr(errno, error)
                raise OSError(number, f"{os.strerror(number)} (injected)", name)
        return None


class FileFaults(Faults):
    """Faults that the files in DIRECTORY control."""

    def __init__(self) -> None:
        super().__init__()
        self._text = ""

    def look(self) -> Plan | None:
        try:
            text = (DIRECTORY / "plan").read_text()
        except OSError:
            self._text = ""
            return None
        if text != self._text:
            self._text = text
            self.set(Plan(**json.loads(text)))
            _write("trace", "")
        return self.plan

    def note(self, name: str) -> None:
        with (DIRECTORY / "trace").open("a") as file:
            file.write(f"{name}\n")

    def strike(self, name: str, plan: Plan) -> None:
        super().strike(name, plan)
        if not plan.lasting:
            (DIRECTORY / "plan").unlink()
        _write("fired", name)


def _write(name: str, text: str) -> None:
    with (DIRECTORY / name).open("w") as file:  # not write_text(), which is a step
        file.write(text)


def install(faults: Faults, *, reads: bool = False) -> None:
    """Make all steps go through faults.step()."""
    for where, inner, names in CHANGES + (READS if reads else ()):
        label = where.__name__.rpartition(".")[2] if isinstance(where, types.ModuleType | type) else ""
        target = _own_copy(where, inner) if inner else where
        for name in names:
            _wrap(target, name, ".".join(filter(None, (label, inner, name))), faults)
    for name in ("write_text", "replace"):  # the state file's two steps
        _wrap(pathlib.Path, name, f"state.{name}", faults)


def _own_copy(where: object, name: str) -> object:
    """Give a module its own copy of a module that others import too."""
    module = getattr(where, name)
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update(module.__dict__)
    setattr(where, name, copy)
    return copy


def _wrap(target: object, attribute: str, name: str, faults: Faults) -> None:
    original = getattr(target, attribute)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        step = _of_caller(name) if name.startswith("descriptor.") else name
        return faults.step(step, lambda: original(*args, **kwargs))

    setattr(target, attribute, wrapped)


def _of_caller(name: str) -> str:
    """Name a step after the caller of kernel.descriptor: descriptor.os.open → shared.os.open."""
    frame: types.FrameType | None = sys._getframe()
    own = (__name__, descriptor.__name__, host.__name__)
    while frame is not None and frame.f_globals["__name__"] in own:
        frame = frame.f_back
    caller = frame.f_globals["__name__"] if frame is not None else "?"
    return f"{caller.rpartition('.')[2]}.{name.partition('.')[2]}"


def _put_into_store() -> None:
    path = DIRECTORY / "store"
    try:
        entries = json.loads(path.read_text())
    except OSError:
        return
    path.unlink()
    for name, source in entries:
        sdnotify.store(name, os.open(source, os.O_RDONLY | os.O_CLOEXEC))
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    with suppress(OSError):
        DIRECTORY.mkdir()
    _put_into_store()
    install(FileFaults())
    from polytmpd.__main__ import main as polytmpd  # only now: the steps must be wrapped before

    return polytmpd()


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Trees to be deleted, and what deletion must leave alone.

Not here: attackers (tests/kernel/children).
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from polytmpd.blocking import deletion, storage
from polytmpd.kernel import syscalls
from tests.kernel.places import opened

ATTACKER = 12345
SLOW = bool(os.environ.get("POLYTMP_SLOW"))
NAME = "polytmp-removing-0123456789abcdef"


def say(text: str) -> None:
    """Timings, for `pytest -s`."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def make(base: Path) -> Path:
    """An instance whose inner directory the attacker may fill."""
    with opened(base) as base_fd:
        os.close(storage.make(base_fd, NAME, [".X11-unix"]))
    return base / NAME / "tmp"


def remove(base: Path, **callbacks: Callable[..., object]) -> deletion.Removed:
    with opened(base) as base_fd:
        return deletion.remove_tree(base_fd, NAME, **callbacks)  # type: ignore[arg-type]  # as given


def deep(directory: Path, depth: int, name: str = "d") -> None:
    fd = os.open(directory, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


def snapshot(root: Path) -> dict[str, object]:
    """Everything about a tree that deletion must leave alone."""
    seen: dict[str, object] = {}
    for path in sorted([root, *root.rglob("*")]):
        at = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        seen[str(path)] = (at.st_ino, at.st_mode, at.st_uid, at.st_gid, at.st_nlink, at.st_mtime_ns, content)
        if not path.is_symlink():
            seen[f"{path} changed"] = at.st_ctime_ns
    return seen


def bind(source: Path, target: Path) -> None:
    syscalls.mount(str(source), str(target), None, 0x1000)

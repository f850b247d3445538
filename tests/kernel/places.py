# SPDX-License-Identifier: LGPL-2.1-or-later
"""The directories of instances, and what an attacker puts in their place."""

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polytmpd.blocking import storage

USER = 12345
NAME = "polytmp-1000"
SOCKETS = [".X11-unix", ".ICE-unix"]


@contextmanager
def opened(path: Path, flags: int = os.O_PATH | os.O_DIRECTORY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def make(base: Path) -> None:
    with opened(base) as fd:
        os.close(storage.make(fd, NAME, SOCKETS))


def keep(base: Path) -> None:
    """Makes a barrier of which the instance has ended."""
    make(base)
    release(base)


def release(base: Path) -> None:
    with opened(base) as fd:
        storage.release(fd, NAME, SOCKETS)


def adopt(base: Path) -> None:
    with opened(base) as fd:
        os.close(storage.adopt(fd, NAME, SOCKETS))


def facts(path: Path) -> tuple[int, int, int, bool]:
    at = path.lstat()
    return at.st_uid, at.st_gid, stat.S_IMODE(at.st_mode), stat.S_ISDIR(at.st_mode)


def assert_as_made(base: Path) -> None:
    assert facts(base / NAME) == (0, 0, 0o700, True)
    assert facts(base / NAME / "tmp") == facts(base)
    for name in SOCKETS:
        assert facts(base / NAME / "tmp" / name) == (0, 0, 0o1777, True)


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def squat(path: Path, kind: str) -> None:
    if kind == "file":
        path.touch()
    elif kind == "symlink":
        target = path.parent / "target"
        target.mkdir(0o700)
        path.symlink_to(target)
    elif kind == "dangling":
        path.symlink_to("/nowhere")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    else:
        path.mkdir(0o700)
        if kind == "owner":
            os.chown(path, USER, USER)
        elif kind == "group":
            os.chown(path, 0, USER)
        elif kind == "mode":
            path.chmod(0o755)


SQUATTERS = ["file", "symlink", "dangling", "fifo", "device", "owner", "group", "mode"]

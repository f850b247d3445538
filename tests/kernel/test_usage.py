# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counting the disk usage of an instance, on real file systems."""

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from polytmpd.blocking import usage
from polytmpd.kernel import syscalls
from tests.kernel.children import attackers, in_namespace
from tests.kernel.places import NAME, SOCKETS, USER, make, opened

pytestmark = pytest.mark.kernel


def count(path: Path, cancelled: Callable[[], bool] | None = None) -> usage.Usage:
    with opened(path) as fd:
        return usage.count(fd, cancelled)


def test_usage_agrees_with_du(base: Path) -> None:
    make(base)
    inner = base / NAME / "tmp"
    at = inner
    for level in range(60):
        at = at / f"{level}"
        at.mkdir()
        (at / "file").write_bytes(b"x" * 10_000 * (level % 3))
        (at / "beside" / "below").mkdir(parents=True)
        (at / "link").symlink_to("/var")
    os.link(at / "file", inner / "hard")
    os.mkfifo(inner / "fifo")
    with open(inner / "sparse", "wb") as sparse:
        sparse.truncate(1 << 30)
    os.sync()
    said = subprocess.run(["du", "-s", "-B1", inner], capture_output=True, text=True, check=True).stdout
    counted = subprocess.run(
        ["du", "-s", "--inodes", inner], capture_output=True, text=True, check=True
    ).stdout
    found = count(inner)
    assert found == usage.Usage(int(said.split()[0]), int(counted.split()[0]), complete=True)
    assert count(inner, lambda: True).complete is False


def test_usage_does_not_enter_mounts(base: Path) -> None:
    make(base)
    inner = base / NAME / "tmp"
    other = base / "other"
    other.mkdir()
    for number in range(10):
        (other / str(number)).touch()
    for name in ("bind", "tmpfs"):
        (inner / name).mkdir()
    (inner / "file").touch()

    def work() -> None:
        syscalls.mount(str(other), str(inner / "bind"), None, 0x1000)
        syscalls.mount("tmpfs", str(inner / "tmpfs"), "tmpfs", 0)
        syscalls.mount(str(other / "1"), str(inner / "file"), None, 0x1000)
        (inner / "tmpfs" / "x").touch()
        assert count(inner).inodes == 1 + len(SOCKETS)

    in_namespace(work)


def test_usage_while_it_is_moved_away(base: Path) -> None:
    """The parent directories are gone when the count returns to them; it never leaves the tree."""
    make(base)
    inner = base / NAME / "tmp"
    at = inner
    for level in range(100):
        for name in "abc":  # listed before or after the way down, in whatever order
            (at / name).mkdir(parents=True)
        (at / f"{level}").mkdir()
        for name in "def":
            (at / name).mkdir()
        at = at / f"{level}"
    for name in "abcdef":
        (base / name).mkdir()
        for number in range(1000):
            (base / name / f"{number}").touch()
    calls = 0

    def move() -> bool:
        nonlocal calls
        calls += 1
        if calls == 600:
            inner.joinpath(*(str(level) for level in range(40))).rename(base / "elsewhere")
        return False

    found = count(inner, move)
    assert not found.complete
    assert 100 < found.inodes <= 1 + len(SOCKETS) + 700


def test_usage_while_others_change_it(base: Path) -> None:
    make(base)
    inner = base / NAME / "tmp"
    fd = os.open(inner, os.O_RDONLY)

    def shuffle(number: int) -> None:
        os.fchdir(fd)
        with suppress(FileExistsError):
            os.mkdir("0")
        os.mkdir(f"0/{number % 50}")
        os.symlink("/usr", f"0/{number % 50}/link")
        os.rename(f"0/{(number * 7) % 50}", f"0/{(number * 3) % 50}/x")
        os.rename(f"0/{(number * 3) % 50}/x/x", f"0/{(number * 11) % 50}")
        os.symlink("/usr", f"0/{(number * 13) % 50}")
        os.unlink(f"0/{(number * 17) % 50}")

    with attackers(USER, shuffle) as attack:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            assert count(inner).inodes < 100_000
        assert attack.rounds[0] > 1000
    os.close(fd)

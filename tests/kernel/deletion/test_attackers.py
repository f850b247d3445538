# SPDX-License-Identifier: LGPL-2.1-or-later
"""remove_tree against processes of the user that change the tree at the same time."""

import errno
import os
import random
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from polytmpd.kernel import syscalls
from tests.bed import eventually
from tests.kernel.children import attackers, become, in_child
from tests.kernel.deletion.trees import ATTACKER, SLOW, make, remove
from tests.kernel.places import opened

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.kernel

RENAME_EXCHANGE = 2


@pytest.mark.parametrize("acl", [False, True])
def test_taking_ownership_shuts_out_open_descriptors(base: Path, acl: bool) -> None:
    inner = make(base)
    held = inner / "held"
    held.mkdir()
    os.chown(held, ATTACKER, ATTACKER)
    held.chmod(0o777)
    entries = [(tag, 7, ATTACKER if tag == 2 else 0xFFFFFFFF) for tag in (0x01, 0x02, 0x04, 0x10, 0x20)]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    if acl:
        for kind in ("access", "default"):
            os.setxattr(held, f"system.posix_acl_{kind}", value)
    for number in range(200):
        (held / str(number)).touch()
    (held / "below").mkdir()
    with opened(held, os.O_RDONLY) as fd:
        remove(base, cancelled=lambda: len(os.listdir(fd)) < 100)
        at = os.fstat(fd)
        assert (at.st_uid, at.st_gid, stat.S_IMODE(at.st_mode)) == (0, 0, 0o700)

        def work() -> None:
            become(ATTACKER)
            attempts: list[Callable[[], object]] = [
                lambda: os.mkdir("new", dir_fd=fd),
                lambda: os.close(os.open("new", os.O_CREAT, dir_fd=fd)),
                lambda: os.symlink("/", "new", dir_fd=fd),
                lambda: os.rename("below", "new", src_dir_fd=fd, dst_dir_fd=fd),
                lambda: os.fchmod(fd, 0o777),
                lambda: os.setxattr(fd, "system.posix_acl_access", value),
                lambda: os.close(os.open("..", os.O_RDONLY, dir_fd=fd)),
            ]
            for attempt in attempts:
                with pytest.raises(OSError, match=r"permitted|denied|support"):
                    attempt()

        in_child(work)
        assert remove(base).complete


def build_battlefield(inner: Path) -> list[int]:
    """Make directories of the attacker, some of them deep; returns a descriptor for each."""
    paths = []
    for number in range(8):
        path = inner / str(number)
        for level in range(1 + 2 * number):
            path = path / f"level{level}"
        path.mkdir(parents=True)
        paths.append(path)
        for extra in range(150):
            (path / f"file{extra}").touch()
        for extra in range(10):
            (path / f"dir{extra}" / "x").mkdir(parents=True)
    for path in inner.rglob("*"):
        if path.name != ".X11-unix":  # immutable
            os.chown(path, ATTACKER, ATTACKER)
    return [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in paths]


@pytest.mark.parametrize("seed", range(20 if SLOW else 3))
def test_attackers_at_work(base: Path, sentinel: Path, seed: int) -> None:
    inner = make(base)
    fds = build_battlefield(inner)
    outside = base / "outside"  # the attacker may move things here
    outside.mkdir()
    os.chown(outside, ATTACKER, ATTACKER)
    fds_and_outside = [*fds, os.open(outside, os.O_RDONLY)]
    dice = random.Random(seed)

    # Few names, so that the tree stays small however long they run.
    def disturb(_number: int) -> None:
        there, other = dice.choice(fds), dice.choice(fds_and_outside)
        name, new = f"dir{dice.randrange(12)}", f"dir{dice.randrange(12)}"
        action = dice.randrange(8)
        if action == 0:
            os.mkdir(name, dir_fd=there)
        elif action == 1:
            os.close(os.open(f"new{dice.randrange(100)}", os.O_CREAT, dir_fd=there))
        elif action == 2:
            os.symlink(sentinel, f"link{dice.randrange(10)}", dir_fd=there)
        elif action == 3:
            syscalls.renameat2(there, name, there, f"link{dice.randrange(10)}", RENAME_EXCHANGE)
        elif action == 4:
            syscalls.renameat2(there, name, other, new, RENAME_EXCHANGE)
        elif action == 5:
            os.rename(name, new, src_dir_fd=there, dst_dir_fd=other)
        elif action == 6:
            os.mkdir(f"{name}/y{dice.randrange(30)}", dir_fd=there)
        else:
            os.fchdir(there)
            os.chmod(".", 0o777)
            os.rename(name, new)

    def exchange(number: int) -> None:
        """Exchange directories with a symbolic link, as fast as possible."""
        there = fds[(number >> 6) % len(fds)]
        with suppress(OSError):
            os.symlink(sentinel / "sub", "link", dir_fd=there)
        for name in range(10):
            syscalls.renameat2(there, f"dir{name}", there, "link", RENAME_EXCHANGE)

    with attackers(ATTACKER, disturb, exchange, disturb) as attack:
        eventually(lambda: sum(attack.rounds) > 100, 10, "the attackers have begun")
        assert remove(base).complete
        assert sum(attack.rounds) > 1000
    assert sorted(path.name for path in base.iterdir()) == ["outside", "sentinel"]
    for fd in fds_and_outside:
        os.close(fd)


def test_attackers_who_only_create(base: Path) -> None:
    """Only taking ownership ends this race before the attackers stop."""
    inner = make(base)
    held = inner / "held"
    held.mkdir()
    os.chown(held, ATTACKER, ATTACKER)
    for number in range(2000):
        (held / f"file{number}").touch()
    fd = os.open(held, os.O_RDONLY)

    def create(number: int) -> None:
        os.mkdir(f"{os.getpid()}-{number % 20_000}", dir_fd=fd)

    with attackers(ATTACKER, create, create) as attack:
        eventually(lambda: sum(attack.rounds) > 100, 10, "the attackers have begun")
        assert remove(base).complete
    os.close(fd)


def test_an_entry_that_always_comes_back(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root could do this. Deletion fails instead of running forever."""
    inner = make(base)
    (inner / "dir").mkdir()
    (inner / "dir" / "file").touch()
    real = os.rmdir

    def rmdir(name: str, *, dir_fd: int) -> None:
        if name == "dir":
            (inner / "dir" / "again").touch()
        real(name, dir_fd=dir_fd)

    def work() -> None:
        monkeypatch.setattr(os, "rmdir", rmdir)
        with pytest.raises(OSError, match=r".") as caught:
            remove(base)
        assert caught.value.errno == errno.ENOTEMPTY
        assert caught.value.filename == str(inner / "dir")

    in_child(work)


def test_a_directory_that_fills_again_is_possessed(
    base: Path, swept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has so few entries that the first pass does not possess it. The second one shuts its owner out."""
    inner = make(base)
    held = inner / "held"
    held.mkdir()
    os.chown(held, ATTACKER, ATTACKER)
    for number in range(5):
        (held / str(number)).touch()
    real = os.rmdir
    created: list[bool] = []

    def create() -> None:
        become(ATTACKER)
        with suppress(PermissionError):
            os.mkdir("again", dir_fd=fd)

    def rmdir(name: str, *, dir_fd: int) -> None:
        if name == "held" and not os.listdir(fd):
            in_child(create)
            created.append(bool(os.listdir(fd)))
        real(name, dir_fd=dir_fd)

    with opened(held, os.O_RDONLY) as fd:
        monkeypatch.setattr(os, "rmdir", rmdir)
        assert remove(base).complete
        monkeypatch.undo()
    assert created == ([True, False] if swept else [False])


@pytest.mark.parametrize("outside", [False, True])
def test_moved_away_while_it_is_emptied(
    base: Path, sentinel: Path, outside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on, each directory is possessed before anything in it is removed."""
    inner = make(base)
    held = inner / "a" / "held"
    held.mkdir(parents=True)
    for number in range(5):
        (held / str(number)).touch()
    above, identity = inner.stat().st_ino, held.stat().st_ino
    target = sentinel.parent / "moved" if outside else inner / "moved"
    real, fchown = os.unlink, os.fchown
    moved = False
    possessed: list[int] = []

    def unlink(name: str, *, dir_fd: int) -> None:
        nonlocal moved
        real(name, dir_fd=dir_fd)
        if not moved and os.fstat(dir_fd).st_ino == identity:
            moved = True
            held.rename(target)

    def possess(fd: int, uid: int, gid: int) -> None:
        possessed.append(os.fstat(fd).st_ino)
        fchown(fd, uid, gid)

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(os, "fchown", possess)
    assert remove(base).complete
    monkeypatch.undo()
    assert moved
    assert above in possessed
    left = ["moved", "sentinel"] if outside else ["sentinel"]
    assert sorted(path.name for path in base.iterdir()) == left

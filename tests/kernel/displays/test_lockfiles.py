# SPDX-License-Identifier: LGPL-2.1-or-later
"""Display locks on real files: what is read, and what is replaced."""

import fcntl
import os
import signal
import socket
from pathlib import Path

import pytest

from polytmpd.displays.lockfiles import MARK, SOCKETS, find_copies, make_copy, publish, socket_owner
from polytmpd.kernel import syscalls
from tests.kernel import children
from tests.kernel.displays.host import (
    ALICE,
    BOB,
    make_lock,
    make_socket,
    opened,
    put_copy,
    read,
    take_away,
)

pytestmark = pytest.mark.kernel
MS_BIND = 4096


# Reading


def test_a_lock_is_read(base: Path) -> None:
    make_lock(base, 7, ALICE)
    assert read(base, 7, ALICE) == 4711


def test_a_lock_of_another_owner_is_not_read(base: Path) -> None:
    make_lock(base, 7, BOB)
    assert read(base, 7, ALICE) is None
    assert read(base, 8, ALICE) is None


@pytest.mark.parametrize(
    "kind", ["link", "broken link", "fifo", "directory", "socket", "huge", "long", "text"]
)
def test_anything_else_is_neither_read_nor_replaced_and_nothing_blocks(base: Path, kind: str) -> None:
    path = base / ".X7-lock"
    match kind:
        case "link":
            path.symlink_to(make_lock(base, 8, ALICE))
        case "broken link":
            path.symlink_to("nowhere")
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        case "huge":
            path.touch()
            os.truncate(path, 1 << 40)
        case "long":
            path.write_text(f"{1:16}\n")
        case _:
            path.write_text("first\n")
    os.chown(path, ALICE, ALICE, follow_symlinks=False)
    assert read(base, 7, ALICE) is None
    assert not put_copy(base, 7)
    assert not take_away(base, 7)
    assert os.path.lexists(path)


def test_what_is_mounted_on_a_socket_or_a_lock_is_not_touched(base: Path) -> None:
    """It may be a FUSE that never answers."""
    (base / SOCKETS).mkdir()
    lock, other = make_lock(base, 7, ALICE), make_lock(base, 8, ALICE)
    make_socket(base, 7, ALICE)
    make_socket(base, 8, BOB)

    def mounted() -> None:
        with opened(base / SOCKETS) as sockets:
            assert socket_owner(sockets, 7) == ALICE
            syscalls.mount(f"{base}/{SOCKETS}/X8", f"{base}/{SOCKETS}/X7", None, MS_BIND)
            assert socket_owner(sockets, 7) is None
        assert read(base, 7, ALICE) == 4711
        syscalls.mount(str(other), str(lock), None, MS_BIND)
        assert read(base, 7, ALICE) is None
        assert not put_copy(base, 7)
        assert not take_away(base, 7)

    children.in_namespace(mounted)


def test_a_file_with_a_lease_does_not_block(base: Path) -> None:
    former = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the signal to the lease holder
    path = make_lock(base, 7, 0)
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        assert read(base, 7, 0) is None
        assert not put_copy(base, 7)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, former)


def test_a_copy_is_not_read_as_a_lock(base: Path) -> None:
    assert put_copy(base, 7)
    assert read(base, 7, 0) is None


# Writing


def test_a_copy_belongs_to_root_is_readable_by_all_and_marked(base: Path) -> None:
    os.umask(os.umask(0o077))
    assert put_copy(base, 7)
    path = base / ".X7-lock"
    found = path.stat()
    assert (found.st_uid, found.st_mode, path.read_text()) == (0, 0o100444, "      4711\n")
    assert MARK in os.listxattr(path)
    assert [entry.name for entry in base.iterdir()] == [".X7-lock"], "no other file is left behind"
    assert take_away(base, 7)
    assert not take_away(base, 7)
    assert list(base.iterdir()) == []


def test_an_older_copy_is_replaced_and_an_identical_one_stays(base: Path) -> None:
    put_copy(base, 7)
    first = (base / ".X7-lock").stat().st_ino
    assert put_copy(base, 7)
    assert (base / ".X7-lock").stat().st_ino == first
    assert put_copy(base, 7, 4712)
    assert (base / ".X7-lock").read_text() == "      4712\n"


@pytest.mark.parametrize("owner", [0, BOB])
def test_a_lock_that_is_not_ours_stays(base: Path, owner: int) -> None:
    path = make_lock(base, 7, owner, "theirs")
    before = path.stat()
    assert not put_copy(base, 7)
    assert not take_away(base, 7)
    assert (path.stat().st_ino, path.read_text()) == (before.st_ino, "theirs")


def test_a_user_cannot_forge_the_mark(base: Path) -> None:
    path = make_lock(base, 7, BOB)
    os.setxattr(path, MARK, b"1")  # by root, but the file still belongs to a user
    assert not take_away(base, 7)
    with opened(base) as fd:
        assert find_copies(fd) == []


def test_copies_are_found_among_other_files(base: Path) -> None:
    for display in (0, 7, 65535):
        put_copy(base, display)
    make_lock(base, 8, 0)
    os.mkfifo(base / ".X9-lock")
    (base / ".X10-lock").symlink_to(".X7-lock")
    (base / ".X007-lock").hardlink_to(base / ".X7-lock")
    with opened(base) as fd:
        assert sorted(find_copies(fd)) == [0, 7, 65535]
        assert find_copies(fd, lambda: True) == []


def test_one_file_serves_all_directories(base: Path) -> None:
    (base / "a").mkdir()
    with opened(base) as fd, opened(base / "a") as other, make_copy(fd, 1) as copy:
        assert publish(copy, fd, 7)
        assert publish(copy, other, 7)
    assert (base / ".X7-lock").stat().st_ino == (base / "a/.X7-lock").stat().st_ino

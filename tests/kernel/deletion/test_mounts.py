# SPDX-License-Identifier: LGPL-2.1-or-later
"""remove_tree and mounts, which it neither enters nor removes."""

import errno
import os
import socket
from pathlib import Path

import pytest

from polytmpd.kernel import syscalls
from tests.kernel.children import alone, in_namespace, start
from tests.kernel.deletion.trees import bind, make, remove

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("kind", ["bind", "tmpfs", "file"])
@pytest.mark.parametrize("depth", [0, 3, 20])
def test_a_mount_blocks_deletion(base: Path, sentinel: Path, kind: str, depth: int) -> None:
    inner = make(base)

    def work() -> None:
        place = inner.joinpath(*(str(level) for level in range(depth)))
        place.mkdir(parents=True, exist_ok=True)
        (place / "beside").touch()
        target = place / "mounted"
        if kind == "file":
            target.touch()
            bind(sentinel / "file", target)
        else:
            target.mkdir()
            (target / "hidden").touch()
            if kind == "bind":
                bind(sentinel, target)
            else:
                syscalls.mount("tmpfs", str(target), "tmpfs", 0)
                (target / "kept").touch()
        with pytest.raises(OSError, match=r".") as caught:
            remove(base)
        assert caught.value.errno == errno.EBUSY
        at = Path(caught.value.filename)
        assert at.name == "mounted"
        assert at.exists()
        if kind == "tmpfs":
            assert (at / "kept").exists()
        assert not list(base.rglob("beside"))
        syscalls.umount2(str(at), 0)
        assert remove(base).complete

    in_namespace(work)
    assert [path.name for path in base.iterdir()] == ["sentinel"]


def test_a_mount_in_another_namespace_does_not_block_deletion(base: Path, sentinel: Path) -> None:
    inner = make(base)
    (inner / "mounted").mkdir()
    (inner / "mounted" / "below").touch()

    def work() -> None:
        alone()
        bind(sentinel, inner / "mounted")
        ready_w.send(b"x")
        done_r.recv(1)

    ready_r, ready_w = socket.socketpair()
    done_r, done_w = socket.socketpair()
    child = start(work)
    ready_r.recv(1)
    assert remove(base).complete
    done_w.send(b"x")
    os.waitpid(child, 0)
    for end in (ready_r, ready_w, done_r, done_w):
        end.close()


def test_the_barrier_itself_is_a_mount(base: Path, sentinel: Path) -> None:
    inner = make(base)
    other = base / "other"
    other.mkdir(0o700)
    (other / "file").touch()

    def work() -> None:
        bind(other, inner.parent)
        with pytest.raises(FileExistsError, match="not made by polytmpd"):
            remove(base)
        assert (other / "file").exists()

    in_namespace(work)


@pytest.mark.parametrize("swept", [False], indirect=True)
@pytest.mark.parametrize("swap", ["symlink", "bind", "tmpfs", "file"])
def test_exchanged_between_check_and_use(
    base: Path, sentinel: Path, swap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst case, which taking ownership prevents: the entry is exchanged before it is opened."""
    inner = make(base)
    victim = inner / "victim"
    victim.mkdir()
    (victim / "file").touch()
    real = os.rmdir
    swapped = False

    def rmdir(name: str, *, dir_fd: int) -> None:
        nonlocal swapped
        try:
            real(name, dir_fd=dir_fd)
        except OSError:
            if name == "victim" and not swapped:
                swapped = True
                if swap in ("symlink", "file"):
                    victim.rename(inner / "aside")
                if swap == "symlink":
                    victim.symlink_to(
                        "../../sentinel"
                    )  # an absolute one might fail because it crosses mounts
                elif swap == "file":
                    victim.touch()
                elif swap == "bind":
                    bind(sentinel, victim)
                else:
                    syscalls.mount("tmpfs", str(victim), "tmpfs", 0)
                    (victim / "kept").touch()
            raise

    def work() -> None:
        monkeypatch.setattr(os, "rmdir", rmdir)
        if swap in ("bind", "tmpfs"):
            with pytest.raises(OSError, match=r".") as caught:
                remove(base)
            assert caught.value.errno == errno.EBUSY
            assert caught.value.filename == str(victim)
            assert swap == "bind" or (victim / "kept").exists()
        else:
            assert remove(base).complete

    in_namespace(work)


@pytest.mark.parametrize("swap", ["symlink", "tmpfs", "file"])
def test_exchanged_among_directories(
    base: Path, sentinel: Path, swap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among directories that are not empty, an entry is opened first. It is exchanged just before."""
    inner = make(base)
    for number in range(50):
        (inner / str(number)).mkdir()
        (inner / str(number) / "file").touch()
    real = syscalls.openat2
    swapped: list[str] = []

    def openat2(dirfd: int, path: str, flags: int, resolve: int) -> object:
        if path.isdigit() and int(path) % 2 and path not in swapped:
            swapped.append(path)
            victim = inner / path
            if swap == "tmpfs":
                if len(swapped) == 1:
                    syscalls.mount("tmpfs", str(victim), "tmpfs", 0)
                    (victim / "kept").touch()
            else:
                victim.rename(inner / f"aside-{path}")
                if swap == "symlink":
                    victim.symlink_to("../../sentinel")
                else:
                    victim.touch()
        return real(dirfd, path, flags, resolve)

    def work() -> None:
        monkeypatch.setattr(syscalls, "openat2", openat2)
        if swap == "tmpfs":
            with pytest.raises(OSError, match=r".") as caught:
                remove(base)
            assert caught.value.errno == errno.EBUSY
            assert (inner / swapped[0] / "kept").exists()
        else:
            assert remove(base).complete
        assert len(swapped) == 25

    in_namespace(work)

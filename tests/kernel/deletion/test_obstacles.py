# SPDX-License-Identifier: LGPL-2.1-or-later
"""remove_tree and its obstacles: inode flags, a full disk, and leases."""

import errno
import fcntl
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from polytmpd.kernel import syscalls
from tests.kernel.children import in_namespace
from tests.kernel.deletion.trees import ATTACKER, deep, make, remove

pytestmark = pytest.mark.kernel


# Flags


@pytest.mark.parametrize("flag", ["+i", "+a"])
def test_protected_files_and_directories(base: Path, flag: str) -> None:
    inner = make(base)
    for directory in ("user", "root", "deep/1/2/3/4/5/6/7/8/9"):
        path = inner / directory
        path.mkdir(parents=True)
        (path / "file").touch()
        (path / "empty").mkdir()
        (path / "full").mkdir()
        (path / "full" / "file").touch()
    os.chown(inner / "user", ATTACKER, ATTACKER)
    (inner / "root").chmod(0o700)
    subprocess.run(["chattr", "-R", "-f", "-i", inner.parent], check=False)  # else +a is refused
    done = subprocess.run(["chattr", "-R", flag, inner], capture_output=True, text=True, check=False)
    if done.returncode != 0 and "not supported" in done.stderr + done.stdout:
        pytest.skip(f"no inode flags on {base}: {done.stderr}")
    subprocess.run(["chattr", flag, inner.parent], check=True)
    assert remove(base).complete
    assert list(base.iterdir()) == []


def test_an_immutable_file_with_another_name_is_left(base: Path) -> None:
    """The file outside has the same flag: clearing it would remove the administrator's protection."""
    inner = make(base)
    outside = base / "outside"
    outside.write_text("protected")
    os.link(outside, inner / "hard")
    (inner / "other").touch()
    if subprocess.run(["chattr", "+i", outside], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"no inode flags on {base}")
    before = outside.stat()
    with pytest.raises(PermissionError) as caught:
        remove(base)
    assert caught.value.filename == str(inner / "hard")
    assert outside.stat() == before
    assert [path.name for path in inner.iterdir()] == ["hard"]
    subprocess.run(["chattr", "-i", outside], check=True)
    assert remove(base).complete
    assert outside.read_text() == "protected"


# A full disk


def test_renaming_up_fails(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = make(base)
    deep(inner, 40)
    deep(inner, 40, "e")

    def renameat2(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(syscalls, "renameat2", renameat2)
    assert remove(base).complete
    inner = make(base)
    deep(inner, 200)
    for number in range(100):
        (inner / str(number)).touch()
    with pytest.raises(OSError, match="no space") as caught:
        remove(base)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(inner) + "/d" * 64
    assert len(list(inner.iterdir())) == 1
    monkeypatch.undo()
    assert remove(base).complete


def test_renaming_up_fails_until_there_is_room(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = make(base)
    deep(inner, 200)
    for number in range(100):
        (inner / f"z{number}").touch()
    real = syscalls.renameat2

    def renameat2(*arguments: object) -> None:
        if list(inner.glob("z*")):
            raise OSError(errno.ENOSPC, "no space")
        real(*arguments)  # type: ignore[arg-type]  # as given

    monkeypatch.setattr(syscalls, "renameat2", renameat2)
    assert remove(base).complete


@pytest.mark.parametrize("full", ["blocks", "inodes"])
@pytest.mark.parametrize("kind", ["ext4", "ext4-no-dir-nlink", "tmpfs"])
def test_full_disk(base: Path, kind: str, full: str) -> None:
    place = base / "mnt"
    place.mkdir()

    def work() -> None:
        if kind == "tmpfs":
            syscalls.mount("tmpfs", str(place), "tmpfs", 0, "size=4m,nr_inodes=3000")
        else:
            image = base / "image"
            image.write_bytes(b"")
            os.truncate(image, 8 << 20)
            options = ["-O", "^dir_nlink"] if "no" in kind else []
            inodes = ["-N", "3000"] if full == "inodes" else ["-N", "20000"]
            subprocess.run(
                ["mkfs.ext4", "-q", "-b", "1024", "-m", "0", *inodes, *options, image], check=True
            )
            if subprocess.run(["mount", "-o", "loop", image, place], check=False).returncode != 0:
                raise RuntimeError("no loop device")
        place.chmod(0o1777)
        inner = make(place)
        deep(inner, 300)
        at = inner
        for _ in range(7):
            at = at / "e"
            at.mkdir()
        # Long names fill the directories' blocks, then files take what is left.
        with suppress(OSError):
            for number in range(100_000):
                (at / f"{number:0200}").mkdir()
                (at / f"{number:0200}" / "x").mkdir()
        with suppress(OSError):
            for number in range(100_000):
                (at / f"f{number:0100}").write_bytes(b"x" if full == "blocks" else b"")
        with suppress(OSError), open(inner / "big", "wb", buffering=0) as big:
            while True:
                big.write(b"x" * (1 << 16))
        with suppress(OSError), open(inner / "big2", "wb", buffering=0) as big:
            while True:
                big.write(b"x")
        free = os.statvfs(place)
        assert free.f_bavail == 0 or free.f_favail == 0
        assert remove(place).complete

    in_namespace(work)


# Leases


def test_a_lease_does_not_block_removal(base: Path) -> None:
    """An immutable file with a lease on it: opening it would take 45 seconds."""
    inner = make(base)
    path = inner / "leased"
    path.write_text("x")
    fd = os.open(path, os.O_WRONLY)
    if subprocess.run(["chattr", "+i", path], capture_output=True, check=False).returncode != 0:
        os.close(fd)
        pytest.skip(f"no inode flags on {base}")
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    started = time.monotonic()
    with pytest.raises(PermissionError):
        remove(base)
    assert time.monotonic() - started < 30
    os.close(fd)
    assert remove(base).complete

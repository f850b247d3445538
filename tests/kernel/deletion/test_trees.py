# SPDX-License-Identifier: LGPL-2.1-or-later
"""remove_tree on trees of every shape, size and depth, on a disk and on a tmpfs."""

import os
import random
import resource
import socket
import stat
import threading
import time
from pathlib import Path

import pytest

from polytmpd.blocking import deletion, usage
from tests.kernel.children import in_child
from tests.kernel.deletion.trees import ATTACKER, NAME, SLOW, deep, make, remove, say
from tests.kernel.places import opened

pytestmark = pytest.mark.kernel


def test_an_empty_tree(base: Path) -> None:
    make(base)
    assert remove(base) == deletion.Removed(3, complete=True)
    assert list(base.iterdir()) == []


def test_a_missing_tree(base: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        remove(base)
    assert caught.value.filename == str(base / NAME)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/"])
def test_not_a_name(base: Path, name: str) -> None:
    with opened(base) as fd, pytest.raises(OSError, match="not the name"):
        deletion.remove_tree(fd, name)


@pytest.mark.parametrize("kind", ["file", "symlink", "fifo", "foreign", "open"])
def test_foreign_entries_are_refused(base: Path, kind: str) -> None:
    path = base / NAME
    if kind == "file":
        path.write_text("x")
    elif kind == "symlink":
        target = base / "target"
        target.mkdir(0o700)
        path.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir(0o700)
        (path / "x").mkdir()
        if kind == "foreign":
            os.chown(path, ATTACKER, 0)
        else:
            path.chmod(0o711)
    with pytest.raises(FileExistsError, match="not made by polytmpd"):
        remove(base)
    assert os.path.lexists(path)


def test_every_kind_and_every_name(base: Path, sentinel: Path) -> None:
    inner = make(base)
    os.mkfifo(inner / "fifo")
    os.mknod(inner / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(inner / "block", stat.S_IFBLK | 0o666, os.makedev(7, 200))
    listener = socket.socket(socket.AF_UNIX)
    with opened(inner) as fd:
        listener.bind(f"/proc/self/fd/{fd}/socket")
    listener.close()
    (inner / "link").symlink_to(sentinel)
    (inner / "dangling").symlink_to("/nowhere")
    (inner / "loop").symlink_to("loop")
    outside = base / "outside"
    outside.write_text("precious")
    os.link(outside, inner / "hard")
    before = outside.stat()
    names = [b"\n", b"a\nb", b" ", b"-rf", b"*", b"\xff\xfe", b"x" * 255, b"\xff" * 255, b"\\", b"..."]
    for name in names:
        directory = os.fsencode(inner / "names") + b"/" + name
        os.makedirs(directory)
        for below in names:
            os.mkdir(directory + b"/" + below)
            os.close(os.open(directory + b"/" + below + b"/file", os.O_CREAT))
    remove(base)
    assert sorted(path.name for path in base.iterdir()) == ["outside", "sentinel"]
    after = outside.stat()
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == (
        before.st_mode,
        before.st_uid,
        before.st_mtime_ns,
    )
    assert outside.read_text() == "precious"


def test_shapes_beyond_the_open_chain(base: Path) -> None:
    inner = make(base)
    for depth in range(1, 40):
        path = inner
        for level in range(depth):
            path = path / f"{depth}-{level}"
            path.mkdir()
            (path / "file").touch()
    assert remove(base).complete
    assert list(base.iterdir()) == []


def test_barrier_stays_small(base: Path, swept: bool) -> None:
    """Of thousands of directories below the chain, only a few wait in the barrier at once."""
    inner = make(base)
    at = inner
    for _ in range(31 if swept else 7):
        at = at / "d"
        at.mkdir()
    for number in range(1000):
        (at / str(number) / "x" / "y").mkdir(parents=True)
    most = 0

    def sample() -> bool:
        nonlocal most
        if random.random() < 0.05:
            most = max(most, len(os.listdir(base / NAME)))
        return False

    assert remove(base, cancelled=sample).complete
    assert 10 < most <= 2 * deletion._WAITING


def test_progress_and_cancel(base: Path) -> None:
    inner = make(base)
    for number in range(5000):
        (inner / str(number)).touch()
    calls = 0
    reports: list[int] = []

    def cancelled() -> bool:
        nonlocal calls
        calls += 1
        return calls > 100

    first = remove(base, report=reports.append, cancelled=cancelled)
    assert not first.complete
    assert 2500 < first.entries < 4000
    assert [entries // 1024 for entries in reports[:-1]] == [*range(1, first.entries // 1024 + 1)]
    assert reports[-1] == first.entries
    second = remove(base, report=reports.append)
    assert second.complete
    assert first.entries + second.entries == 5003


@pytest.mark.parametrize("spare", [9, 14])
def test_very_deep_with_few_descriptors_and_a_small_stack(base: Path, spare: int) -> None:
    depth = 500 if spare == 9 else 100_000 if SLOW or base.parent != Path("/var/tmp") else 3_000
    inner = make(base)
    deep(inner, depth)
    (inner / "file").touch()

    def work() -> None:
        limit = max(int(fd) for fd in os.listdir("/proc/self/fd")) + spare
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(32, limit), min(32, limit)))
        threading.stack_size(64 * 1024)
        results: list[object] = []

        def in_thread() -> None:
            fd = os.open(inner, os.O_PATH)
            started = time.monotonic()
            if spare == 14:
                results.append(usage.count(fd))
                say(f"usage of {depth} levels: {time.monotonic() - started:.2f} s")
            os.close(fd)
            started = time.monotonic()
            results.append(remove(base))
            say(f"{depth} levels removed in {time.monotonic() - started:.2f} s")

        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        assert results.pop() == deletion.Removed(depth + 4, complete=True)
        for found in results:
            assert isinstance(found, usage.Usage)
            assert found.complete
            assert found.inodes == depth + 3

    in_child(work)
    assert list(base.iterdir()) == []


def test_many_files(base: Path) -> None:
    # On ext4, creating them is slow, removing them is not.
    count = 1_000_000 if SLOW else 20_000 if base.parent == Path("/var/tmp") else 200_000
    inner = make(base)
    with opened(inner) as fd:
        for number in range(count):
            os.close(os.open(f"a file of some length {number}", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        started = time.monotonic()
        assert usage.count(fd).inodes == count + 2
        counted = time.monotonic() - started
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    assert remove(base).entries == count + 3
    say(
        f"{count} files on {base}: counted in {counted:.1f} s, removed in {time.monotonic() - started:.1f} s"
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024

# SPDX-License-Identifier: LGPL-2.1-or-later
"""remove_tree against real file systems, real mounts, and real processes of an attacker."""

import errno
import fcntl
import os
import random
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from polytmpd.blocking import deletion, storage, usage
from polytmpd.kernel import syscalls
from tests.bed import eventually
from tests.kernel.children import alone, attackers, become, in_child, in_namespace, start
from tests.kernel.places import opened

pytestmark = pytest.mark.kernel

ATTACKER = 12345
RENAME_EXCHANGE = 2
SLOW = bool(os.environ.get("POLYTMP_SLOW"))
NAME = "polytmp-removing-0123456789abcdef"


def say(text: str) -> None:
    """Timings, for `pytest -s`."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


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


@pytest.fixture
def sentinel(base: Path) -> Iterator[Path]:
    """A tree beside the instance, which each test must leave as it is."""
    root = base / "sentinel"
    (root / "sub" / "deeper").mkdir(parents=True)
    (root / "file").write_text("precious")
    (root / "sub" / "file").write_text("precious too")
    before = snapshot(root)
    yield root
    assert snapshot(root) == before


def bind(source: Path, target: Path) -> None:
    syscalls.mount(str(source), str(target), None, 0x1000)


# --- what to remove ---


def test_nothing_in_it(base: Path) -> None:
    make(base)
    assert remove(base) == deletion.Removed(3, complete=True)
    assert list(base.iterdir()) == []


def test_missing(base: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        remove(base)
    assert caught.value.filename == str(base / NAME)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/"])
def test_not_a_name(base: Path, name: str) -> None:
    with opened(base) as fd, pytest.raises(OSError, match="not the name"):
        deletion.remove_tree(fd, name)


@pytest.mark.parametrize("kind", ["file", "symlink", "fifo", "foreign", "open"])
def test_what_is_not_ours_is_refused(base: Path, kind: str) -> None:
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


def test_barrier_stays_small(base: Path) -> None:
    """Of thousands of directories below the chain, only a few wait in the barrier at once."""
    inner = make(base)
    at = inner
    for _ in range(7):
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
        return calls > 3000

    first = remove(base, report=reports.append, cancelled=cancelled)
    assert not first.complete
    assert 2500 < first.entries <= 3000
    assert reports == [1024, 2048, first.entries]
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
    # On ext4 creating them takes long, not removing them.
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


# --- flags ---


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


# --- mounts ---


@pytest.mark.parametrize("kind", ["bind", "tmpfs", "file"])
@pytest.mark.parametrize("depth", [0, 3, 20])
def test_mounts_are_in_the_way(base: Path, sentinel: Path, kind: str, depth: int) -> None:
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


def test_a_mount_in_another_namespace_is_not_in_the_way(base: Path, sentinel: Path) -> None:
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


@pytest.mark.parametrize("swap", ["symlink", "bind", "tmpfs", "file"])
def test_exchanged_between_question_and_answer(
    base: Path, sentinel: Path, swap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worst case, which taking possession prevents: it is something else by the time we open it."""
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


# --- possession ---


@pytest.mark.parametrize("acl", [False, True])
def test_possession_shuts_out_who_holds_a_descriptor(base: Path, acl: bool) -> None:
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
    for number in range(100):
        (held / str(number)).touch()
    (held / "below").mkdir()
    with opened(held, os.O_RDONLY) as fd:
        remove(base, cancelled=lambda: len(os.listdir(fd)) < 50)
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
    """Directories of the attacker, some of them deep; returns a descriptor of each."""
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
    """Only taking possession ends this race before the attackers stop."""
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
    """Only root could do this. It fails instead of running forever."""
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


# --- no room ---


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


# --- leases ---


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

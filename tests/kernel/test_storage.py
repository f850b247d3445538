# SPDX-License-Identifier: LGPL-2.1-or-later
"""Making and adopting instance directories on real file systems."""

import errno
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from polytmpd.blocking import storage
from polytmpd.core import names
from polytmpd.kernel import syscalls
from tests.kernel.children import attackers, in_namespace
from tests.kernel.places import (
    NAME,
    SOCKETS,
    SQUATTERS,
    USER,
    acl,
    adopt,
    assert_as_made,
    keep,
    make,
    opened,
    release,
    squat,
)

pytestmark = pytest.mark.kernel

ASIDE = names.removing("a" * 16)


# --- make ---


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
@pytest.mark.parametrize("mode", [0o1777, 0o3777, 0o1770])
def test_make(base: Path, mask: int, mode: int) -> None:
    os.chown(base, 0, USER)
    base.chmod(mode)
    before = os.umask(mask)
    try:
        with opened(base) as fd:
            inner = storage.make(fd, NAME, SOCKETS)
        assert os.readlink(f"/proc/self/fd/{inner}") == str(base / NAME / "tmp")
        assert not os.get_inheritable(inner)
        os.close(inner)
    finally:
        os.umask(before)
    assert_as_made(base)
    assert sorted(path.name for path in (base / NAME / "tmp").iterdir()) == sorted(SOCKETS)


def test_make_copies_the_acl_to_the_inner_directory_only(base: Path) -> None:
    access = acl(
        (1, 7, 0xFFFFFFFF), (2, 7, USER), (4, 7, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF), (0x20, 7, 0xFFFFFFFF)
    )
    for kind in ("access", "default"):
        os.setxattr(base, f"system.posix_acl_{kind}", access)
    make(base)
    assert_as_made(base)
    inner = base / NAME / "tmp"
    for kind in ("access", "default"):
        assert os.getxattr(inner, f"system.posix_acl_{kind}") == os.getxattr(
            base, f"system.posix_acl_{kind}"
        )
    for path in (base / NAME, inner / ".X11-unix"):
        assert not [name for name in os.listxattr(path) if "posix_acl" in name]


def test_make_copies_the_label(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SELinux: the attribute is a fake."""
    labels: dict[str, bytes] = {str(base): b"system_u:object_r:tmp_t:s0\0"}
    real = os.getxattr

    def getxattr(fd: int, name: str) -> bytes:
        if name != "security.selinux":
            return real(fd, name)
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path not in labels:
            raise OSError(errno.ENODATA, "none")
        return labels[path]

    def setxattr(fd: int, name: str, value: bytes) -> None:
        assert name == "security.selinux"
        labels[os.readlink(f"/proc/self/fd/{fd}")] = value

    monkeypatch.setattr(os, "getxattr", getxattr)
    monkeypatch.setattr(os, "setxattr", setxattr)
    make(base)
    assert set(labels) == {str(base), str(base / NAME), str(base / NAME / "tmp")}
    assert len(set(labels.values())) == 1


@pytest.mark.parametrize("kind", [*SQUATTERS, "ours"])
def test_make_never_adopts(base: Path, kind: str) -> None:
    squat(base / NAME, kind)
    before = (base / NAME).lstat()
    with pytest.raises(FileExistsError) as caught:
        make(base)
    assert caught.value.filename == str(base / NAME)
    assert (base / NAME).lstat() == before


FUNCTIONS = [
    "mkdir",
    "symlink",
    "open",
    "fchown",
    "fchmod",
    "fstat",
    "getxattr",
    "setxattr",
    "removexattr",
    "openat2",
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_make_that_fails_at_any_step_leaves_nothing(
    base: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = acl(
        (1, 7, 0xFFFFFFFF), (2, 7, USER), (4, 7, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF), (0x20, 7, 0xFFFFFFFF)
    )
    for kind in ("access", "default"):
        os.setxattr(base, f"system.posix_acl_{kind}", access)
    module = syscalls if function == "openat2" else os
    real = getattr(module, function)
    failed = 0
    for step in range(1, 100):
        calls = 0

        def fake(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == step:  # noqa: B023
                raise OSError(errno.EIO, "injected", "some name")
            return real(*arguments, **named)

        with opened(base) as fd, monkeypatch.context() as patch:
            patch.setattr(module, function, fake)
            try:
                inner = storage.make(fd, NAME, SOCKETS, "alice")
            except OSError as error:
                assert error.errno == errno.EIO  # noqa: PT017  (it may succeed: the last step does not exist)
                assert str(error.filename).startswith(str(base))  # noqa: PT017
                failed += 1
            else:
                os.close(inner)
                break
        assert os.listdir(base) == []
    assert failed >= 1
    assert_as_made(base)


def test_a_base_in_which_others_can_rename_is_refused(base: Path) -> None:
    base.chmod(0o777)
    with pytest.raises(PermissionError, match="sticky"):
        make(base)
    base.chmod(0o1777)
    os.chown(base, USER, 0)
    with pytest.raises(PermissionError, match="root"):
        make(base)
    assert os.listdir(base) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc"])
def test_not_a_name(base: Path, name: str) -> None:
    with opened(base) as fd:
        with pytest.raises(OSError, match="not the name"):
            storage.make(fd, name, SOCKETS)
        with pytest.raises(OSError, match="not the name"):
            storage.make(fd, NAME, [name])
        with pytest.raises(OSError, match="not the name"):
            storage.set_aside(fd, name, ASIDE)
        with pytest.raises(OSError, match="not the name"):
            storage.set_aside(fd, NAME, name)
    assert os.listdir(base) == []


# --- adopt ---


def test_adopt(base: Path) -> None:
    keep(base)
    inner = base / NAME / "tmp"
    (inner / "kept").write_text("x")
    adopt(base)
    assert_as_made(base)
    assert (inner / "kept").read_text() == "x"
    release(base)
    base.chmod(0o1770)
    (inner / ".X11-unix").chmod(0o700)
    (inner / ".ICE-unix").rmdir()
    adopt(base)
    assert_as_made(base)
    release(base)
    shutil.rmtree(inner)
    adopt(base)
    assert_as_made(base)


def test_adopt_nothing(base: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        adopt(base)
    assert caught.value.filename == str(base / NAME)
    assert os.listdir(base) == []


@pytest.mark.parametrize("kind", SQUATTERS)
def test_adopt_refuses_squatters(base: Path, kind: str) -> None:
    squat(base / NAME, kind)
    before = (base / NAME).lstat()
    with pytest.raises(FileExistsError, match="not made by polytmpd") as caught:
        adopt(base)
    assert caught.value.filename == str(base / NAME)
    assert (base / NAME).lstat() == before


@pytest.mark.parametrize("kind", [kind for kind in SQUATTERS if kind != "mode"])
def test_adopt_refuses_a_wrong_inner_directory(base: Path, kind: str) -> None:
    (base / NAME).mkdir(0o700)
    squat(base / NAME / "tmp", kind)
    before = (base / NAME / "tmp").lstat()
    with pytest.raises(FileExistsError) as caught:
        adopt(base)
    assert caught.value.filename == str(base / NAME / "tmp")
    assert (base / NAME / "tmp").lstat() == before


@pytest.mark.parametrize("place", ["", "tmp"])
@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
def test_adopt_and_set_aside_enter_no_mount(base: Path, place: str, kind: str) -> None:
    make(base)
    other = base / "other"
    other.mkdir(0o700)

    def work() -> None:
        target = base / NAME / place
        if kind == "bind":
            syscalls.mount(str(other), str(target), None, 0x1000)
        else:
            syscalls.mount("tmpfs", str(target), "tmpfs", 0, "mode=700")
        with pytest.raises(OSError, match=r"mount point|Something is mounted there"):
            adopt(base)
        if not place:
            with opened(base) as fd, pytest.raises(FileExistsError, match="mount point"):
                storage.set_aside(fd, NAME, ASIDE)
        assert os.listdir(target) == []

    in_namespace(work)


@pytest.mark.parametrize("kind", [kind for kind in SQUATTERS if kind != "mode"])
def test_adopt_moves_what_is_in_place_of_a_mount_point(base: Path, kind: str) -> None:
    keep(base)
    inner = base / NAME / "tmp"
    (inner / ".X11-unix").rmdir()
    squat(inner / ".X11-unix", kind)
    before = (inner / ".X11-unix").lstat()
    adopt(base)
    assert_as_made(base)
    (moved,) = inner.glob(".X11-unix.moved-*")
    assert moved.lstat().st_ino == before.st_ino


@pytest.mark.parametrize("step", range(1, 12))
def test_adopt_that_fails_removes_what_it_made_and_nothing_else(
    base: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(base)
    inner = base / NAME / "tmp"
    (inner / "kept").touch()
    (inner / ".ICE-unix").rmdir()
    real = os.open
    calls = 0

    def fake(*arguments: object, **named: object) -> int:
        nonlocal calls
        calls += 1
        if calls == step:
            raise OSError(errno.EIO, "injected")
        return real(*arguments, **named)  # type: ignore[arg-type]  # as given

    with opened(base) as fd, monkeypatch.context() as patch:
        patch.setattr(os, "open", fake)
        try:
            os.close(storage.adopt(fd, NAME, SOCKETS))
        except OSError:
            patch.undo()
            assert sorted(os.listdir(inner)) == [".X11-unix", "kept"]
        else:
            assert step > 4
            assert sorted(os.listdir(inner)) == [".ICE-unix", ".X11-unix", "kept"]


def test_adopt_while_the_user_interferes(base: Path) -> None:
    """A process left over from before keeps creating links in place of the mount point."""
    keep(base)
    inner = base / NAME / "tmp"
    fd = os.open(inner, os.O_RDONLY)

    def link(_number: int) -> None:
        os.symlink("/etc", ".X11-unix", dir_fd=fd)

    with attackers(USER, link) as attack:
        for _ in range(200):
            with suppress(OSError):
                (inner / ".X11-unix").unlink()
            with suppress(OSError):
                (inner / ".X11-unix").rmdir()
            try:
                adopt(base)
            except OSError as error:
                assert error.errno == errno.EBUSY  # noqa: PT017  (the attacker may win a round)
                continue
            assert_as_made(base)
        assert attack.rounds[0] > 200
    os.close(fd)
    assert stat.S_ISDIR(os.stat("/etc").st_mode)


# --- the owner ---


def test_a_barrier_remembers_its_user(base: Path) -> None:
    with opened(base) as fd:
        with pytest.raises(FileNotFoundError):
            storage.remembered(fd, NAME)
        os.close(storage.make(fd, NAME, SOCKETS, "alice"))
        assert storage.remembered(fd, NAME) == "alice"
        os.close(storage.adopt(fd, NAME, SOCKETS, "bob"))
        assert storage.remembered(fd, NAME) == "alice", "the first user stays"
    assert_as_made(base)


def test_a_barrier_without_a_user(base: Path) -> None:
    make(base)
    with opened(base) as fd:
        assert storage.remembered(fd, NAME) is None
        os.close(storage.adopt(fd, NAME, SOCKETS, "DOM\\alice"))
        assert storage.remembered(fd, NAME) == "DOM\\alice"


def test_a_user_mark_that_is_not_a_link(base: Path) -> None:
    keep(base)
    (base / NAME / "user").write_text("alice")
    with opened(base) as fd, pytest.raises(FileExistsError, match="not a symbolic link") as caught:
        storage.remembered(fd, NAME)
    assert caught.value.filename == str(base / NAME / "user")


def test_a_full_disk_does_not_lock_users_out_of_persistent_files(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(base)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "symlink", full)
    with opened(base) as fd:
        os.close(storage.adopt(fd, NAME, SOCKETS, "alice"))
        monkeypatch.undo()
        assert storage.remembered(fd, NAME) is None
        os.close(storage.adopt(fd, NAME, SOCKETS, "alice"))
        assert storage.remembered(fd, NAME) == "alice"

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The immutable flag of a barrier in use, and the watches on its removal, on real file systems."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from polytmpd.blocking import barriers, deletion, storage
from polytmpd.core import names
from polytmpd.kernel import inotify, syscalls
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.inotify import Inotify
from tests.kernel.children import in_namespace
from tests.kernel.places import NAME, SOCKETS, adopt, assert_as_made, keep, make, opened, release

pytestmark = pytest.mark.kernel

ASIDE = names.removing("a" * 16)


@pytest.fixture
def watches() -> Iterator[Inotify]:
    made = Inotify()
    yield made
    made.close()


def is_immutable(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return bool(syscalls.get_inode_flags(fd) & syscalls.FS_IMMUTABLE_FL)
    finally:
        os.close(fd)


def immutable(base: Path) -> list[str]:
    """Everything below the base directory that is immutable."""
    return sorted(
        str(path.relative_to(base)) for path in base.rglob("*") if path.is_dir() and is_immutable(path)
    )


PROTECTED = sorted([NAME, *(f"{NAME}/tmp/{name}" for name in SOCKETS)])


def empty(path: Path) -> None:
    subprocess.run(["rm", "-rf", path], check=False, capture_output=True)


def test_a_cleaner_empties_and_removes_nothing_else(base: Path) -> None:
    make(base)
    assert immutable(base) == PROTECTED
    inode = (base / NAME / "tmp").stat().st_ino
    (base / NAME / "tmp" / "file").touch()
    empty(base / NAME)
    assert_as_made(base)
    assert (base / NAME / "tmp").stat().st_ino == inode
    assert sorted(os.listdir(base / NAME / "tmp")) == sorted(SOCKETS)


def test_adopt_protects_again(base: Path) -> None:
    keep(base)
    assert immutable(base) == []
    adopt(base)
    assert immutable(base) == PROTECTED
    adopt(base)
    assert immutable(base) == PROTECTED
    assert_as_made(base)


def test_what_fails_protects_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(base)

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(storage, "_set_owner_and_mode", fail)
    with pytest.raises(OSError, match="Input/output"):
        adopt(base)
    assert immutable(base) == []


def test_set_aside_and_removed(base: Path) -> None:
    make(base)
    with opened(base) as fd:
        storage.set_aside(fd, NAME, ASIDE)
        assert immutable(base) == [f"{ASIDE}/tmp/{name}" for name in sorted(SOCKETS)]
        assert deletion.remove_tree(fd, ASIDE).complete
        os.close(storage.make(fd, NAME, SOCKETS))
        storage.set_aside(fd, NAME, ASIDE, SOCKETS)
        assert immutable(base) == []
        os.close(storage.make(fd, NAME, SOCKETS))
        assert deletion.remove_tree(fd, NAME).complete, "a leftover of a crash"
    shutil.rmtree(base / ASIDE)


def test_an_empty_barrier_is_removed(base: Path) -> None:
    """Nothing in it needs the flag to be cleared, only the barrier itself does."""
    keep(base)
    shutil.rmtree(base / NAME / "tmp")
    subprocess.run(["chattr", "+i", base / NAME], check=True)
    with opened(base) as fd:
        assert deletion.remove_tree(fd, NAME).complete


def test_without_flags(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has none, or a container without the capability."""

    def get_inode_flags(_: int) -> int:
        raise OSError(25, "Inappropriate ioctl for device")

    monkeypatch.setattr(syscalls, "get_inode_flags", get_inode_flags)
    make(base)
    adopt(base)
    assert_as_made(base)
    with opened(base) as fd:
        storage.set_aside(fd, NAME, ASIDE)
        assert deletion.remove_tree(fd, ASIDE).complete


@pytest.mark.parametrize("kind", ["symlink", "user's"])
def test_release_leaves_what_is_in_place_of_a_mount_point(base: Path, kind: str) -> None:
    keep(base)
    place = base / NAME / "tmp" / SOCKETS[0]
    place.rmdir()
    other = base / "other"
    other.mkdir()
    if kind == "symlink":
        place.symlink_to(other)
    else:
        other.rename(place)
        os.chown(place, 12345, 12345)
        other = place
    subprocess.run(["chattr", "+i", other], check=True)
    release(base)
    assert is_immutable(other)


def test_kept_names(base: Path) -> None:
    keep(base)
    (base / "polytmp-x").mkdir()
    (base / "polytmp-1001").touch()
    with opened(base) as fd:
        assert sorted(storage.kept(fd)) == [NAME, "polytmp-1001"]
        with pytest.raises(FileExistsError):
            storage.release(fd, "polytmp-1001", SOCKETS)


# What is removed is reported


def watch(base: Path, watches: Inotify) -> dict[int, str]:
    found: dict[int, str] = {}

    def add(path: str, mask: int) -> None:
        found[watches.add_watch(path, mask)] = os.path.relpath(os.readlink(path), base)

    with opened(base) as fd:
        assert storage.guard(fd, NAME, SOCKETS, add)
    return found


def test_the_user_causes_no_event(base: Path, watches: Inotify) -> None:
    make(base)
    watch(base, watches)
    inner = base / NAME / "tmp"
    (inner / "file").touch()
    (inner / "file").unlink()
    (inner / "directory").mkdir()
    (inner / "directory").rmdir()
    assert watches.read() == []


def test_removal_is_reported(base: Path, watches: Inotify) -> None:
    """While the inner directory is mounted elsewhere, as it is in the user's namespace."""
    keep(base)
    elsewhere = base / "elsewhere"
    elsewhere.mkdir()

    def clean() -> None:
        syscalls.umount2(str(elsewhere), 0)
        shutil.rmtree(base / NAME)

    def work() -> None:
        syscalls.mount(str(base / NAME / "tmp"), str(elsewhere), None, 0x1000)
        found = watch(base, watches)
        release(base)
        in_namespace(clean)
        events = {(found[event.watch], event.mask & 0xFFF, event.name) for event in watches.read()}
        assert (NAME, inotify.IN_DELETE, "tmp") in events
        for name in SOCKETS:
            assert (f"{NAME}/tmp/{name}", inotify.IN_DELETE_SELF, "") in events

    in_namespace(work)


@pytest.mark.parametrize("step", [storage.make, storage.adopt])
def test_what_is_taken_into_use_is_watched_at_once(
    base: Path, watches: Inotify, step: Callable[..., Descriptor]
) -> None:
    if step is storage.adopt:
        keep(base)
    masks: dict[int, int] = {}

    def add(path: str, mask: int) -> None:
        masks[watches.add_watch(path, mask)] = mask

    with opened(base) as fd:
        step(fd, NAME, SOCKETS, add=add).close()
        again: list[int] = []
        assert storage.guard(fd, NAME, SOCKETS, lambda _, mask: again.append(mask))
    assert masks.keys() == watch(base, watches).keys()
    assert list(masks.values()) == again


def test_what_an_earlier_daemon_made_is_protected(base: Path, watches: Inotify) -> None:
    keep(base)
    watch(base, watches)
    assert immutable(base) == PROTECTED


@pytest.mark.parametrize("gone", ["", "tmp", f"tmp/{SOCKETS[0]}"])
def test_what_is_missing_already(base: Path, gone: str) -> None:
    keep(base)
    shutil.rmtree(base / NAME / gone)
    with opened(base) as fd:
        assert not storage.guard(fd, NAME, SOCKETS, lambda *_: None)


def test_protect_is_for_directories_of_ours(base: Path) -> None:
    """The flags are set through a descriptor of what was made, not by name."""
    make(base)
    with opened(base / NAME, os.O_RDONLY | os.O_DIRECTORY) as fd:
        assert barriers.unprotect(fd)
        assert not barriers.unprotect(fd)

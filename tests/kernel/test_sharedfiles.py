# SPDX-License-Identifier: LGPL-2.1-or-later
"""The links to the host's sockets and files: made, replaced, removed, and refused."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from polytmpd.blocking import sharedfiles, storage
from polytmpd.core.model import Directory, InstanceDirectory, Lifetime
from polytmpd.core.sharing import LINKS, Sharing
from polytmpd.kernel import host
from tests.kernel import places

pytestmark = pytest.mark.kernel

SERVER, USER = 115, 1003
NAME = ".s.DB.1"


@pytest.fixture(autouse=True)
def no_other_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "ROOT", "")


@pytest.fixture
def sharing(base: Path) -> Sharing:
    return Sharing(str(base), (".s.DB.*", "plain"))


@contextmanager
def server(path: Path, uid: int = SERVER) -> Iterator[socket.socket]:
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(path))
        os.chown(path, uid, uid)
        listening.listen()
        yield listening


def instance(base: Path, lifetime: Lifetime = Lifetime.INSTANCE) -> InstanceDirectory:
    with places.opened(base) as fd:
        os.close(storage.make(fd, places.NAME, [LINKS]))
    return InstanceDirectory(Directory(str(base), lifetime, (LINKS,)), places.NAME)


def furnish(entry: InstanceDirectory, sharing: Sharing, *gone: str) -> set[str]:
    return sharedfiles.furnish(entry, gone, lambda _: None, sharing)


def reaches(listening: socket.socket, path: Path) -> bool:
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(str(path))
        listening.settimeout(5)
        listening.accept()[0].close()
    return True


def test_a_server_is_reached_and_followed(base: Path, sharing: Sharing) -> None:
    entry = instance(base)
    inside = base / places.NAME / "tmp" / NAME
    assert sharedfiles.update(sharing, None).links == set()
    with server(base / NAME) as first:
        assert sharedfiles.update(sharing, None).links == {NAME}
        assert furnish(entry, sharing) == set()
        assert reaches(first, inside)
        (base / NAME).unlink()
        with server(base / NAME) as second:
            assert sharedfiles.update(sharing, {NAME}) == sharedfiles.Found({NAME})
            assert reaches(second, inside), "without a change in the instance"
    (base / NAME).unlink()
    found = sharedfiles.update(sharing, {NAME})
    assert (found.links, found.gone) == (set(), {NAME})
    assert furnish(entry, sharing, NAME) == set()
    assert not inside.is_symlink()
    sharedfiles.forget(sharing, {NAME})
    assert list((base / LINKS).iterdir()) == []


def test_only_root_may_write_to_the_links(base: Path, sharing: Sharing) -> None:
    sharedfiles.update(sharing, None)
    found = (base / LINKS).stat()
    assert (found.st_uid, found.st_mode) == (0, 0o40755)
    (base / LINKS).chmod(0o1777)
    with pytest.raises(PermissionError, match="writable by others; run chmod 0755"):
        sharedfiles.update(sharing, None)
    (base / LINKS).rmdir()
    (base / LINKS).mkdir()
    os.chown(base / LINKS, USER, USER)
    with pytest.raises(PermissionError, match=f"owned by UID {USER}, not by root"):
        sharedfiles.update(sharing, None)


def squat(path: Path) -> None:
    with server(path, USER):
        pass


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "socket": (squat, "owned by UID 1003"),
    "link": (lambda path: path.symlink_to("/etc/passwd"), "neither a socket nor a file"),
    "directory": (lambda path: path.mkdir(), f"a directory; to share it, write {NAME}/ in SharedPaths="),
    "device": (lambda path: os.mknod(path, 0o20666, os.makedev(1, 3)), "neither a socket nor a file"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_squatter_on_the_host_is_not_shared(base: Path, sharing: Sharing, kind: str) -> None:
    make, why = REFUSED[kind]
    make(base / NAME)
    found = sharedfiles.update(sharing, {NAME})
    assert found.links == found.gone == set()
    assert why in found.objections[NAME]
    assert list((base / LINKS).iterdir()) == []


def test_a_squatter_after_the_server_ends_what_is_shared(base: Path, sharing: Sharing) -> None:
    with server(base / NAME):
        sharedfiles.update(sharing, None)
    (base / NAME).unlink()
    squat(base / NAME)
    found = sharedfiles.update(sharing, None)
    assert (found.links, found.gone) == (set(), {NAME})
    assert NAME in found.objections


def test_a_file_that_is_replaced(base: Path, sharing: Sharing) -> None:
    entry = instance(base)
    for text in ("one", "two"):
        (base / "new").write_text(text)
        (base / "new").rename(base / "plain")
        sharedfiles.update(sharing, {"plain"})
        furnish(entry, sharing)
        assert (base / places.NAME / "tmp" / "plain").read_text() == text


@pytest.mark.parametrize("kind", ["socket", "file", "link", "directory"])
def test_what_the_user_has_stays_theirs(base: Path, sharing: Sharing, kind: str) -> None:
    entry = instance(base)
    inside = base / places.NAME / "tmp" / NAME
    if kind == "socket":
        squat(inside)
    elif kind == "file":
        inside.write_text("hers")
    elif kind == "link":
        inside.symlink_to(f"{base}/{LINKS}/{NAME}")
    else:
        inside.mkdir()
    os.chown(inside, USER, USER, follow_symlinks=False)
    before = inside.lstat()
    with server(base / NAME):
        sharedfiles.update(sharing, None)
        watched: list[str] = []
        assert sharedfiles.furnish(entry, (), watched.append, sharing) == {NAME}
        assert len(watched) == 1
    assert furnish(entry, sharing, NAME) == set()
    after = inside.lstat()
    assert (after.st_ino, after.st_uid, after.st_mode) == (before.st_ino, before.st_uid, before.st_mode)


def test_the_directory_of_an_older_configuration_is_named(base: Path, sharing: Sharing) -> None:
    (base / "plain").mkdir()
    (base / ".s.DB.2").mkdir()
    found = sharedfiles.update(sharing, None)
    assert found.objections == {"plain": "a directory; to share it, write plain/ in SharedPaths="}


def test_a_kept_directory_loses_what_went_meanwhile(base: Path, sharing: Sharing) -> None:
    entry = instance(base, Lifetime.PERSISTENT)
    with server(base / NAME):
        sharedfiles.update(sharing, None)
        furnish(entry, sharing)
    (base / NAME).unlink()
    sharedfiles.forget(sharing, sharedfiles.update(sharing, None).gone)
    furnish(entry, sharing)
    assert sorted(path.name for path in (base / places.NAME / "tmp").iterdir()) == [LINKS]


def test_an_instance_that_is_being_removed(base: Path, sharing: Sharing) -> None:
    sharedfiles.update(sharing, None)
    with pytest.raises(FileNotFoundError):
        furnish(InstanceDirectory(Directory(str(base), Lifetime.INSTANCE, (LINKS,)), "polytmp-1"), sharing)


def test_no_more_than_an_instance_can_take(base: Path, sharing: Sharing) -> None:
    for number in range(sharedfiles.SHARED_AT_MOST + 2):
        (base / f".s.DB.{number:03}").touch()
    found = sharedfiles.update(sharing, None)
    assert len(found.links) == sharedfiles.SHARED_AT_MOST
    assert len(found.objections) == 2


def test_nothing_is_left_when_nothing_is_shared(base: Path, sharing: Sharing) -> None:
    with server(base / NAME):
        sharedfiles.update(sharing, None)
        sharedfiles.clear(sharing)
        assert [path.name for path in base.iterdir()] == [NAME]

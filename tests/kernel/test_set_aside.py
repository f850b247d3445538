# SPDX-License-Identifier: LGPL-2.1-or-later
"""Setting instance directories aside, and finding leftovers, on real file systems."""

import os
from pathlib import Path

import pytest

from polytmpd.blocking import storage
from polytmpd.core import names
from polytmpd.kernel import syscalls
from tests.kernel.children import in_namespace
from tests.kernel.places import NAME, SOCKETS, SQUATTERS, make, opened, squat

pytestmark = pytest.mark.kernel

ASIDE = names.removing("a" * 16)


def test_set_aside_under_another_name(base: Path) -> None:
    with opened(base) as fd:
        os.close(storage.make(fd, NAME, SOCKETS, "alice"))
        new = names.former(1000, "0" * 16)
        storage.set_aside(fd, NAME, new)
        assert storage.remembered(fd, new) == "alice"
        assert storage.leftovers(fd) == storage.Leftovers((), (), 0), "it is not deleted"


def test_set_aside_and_leftovers(base: Path) -> None:
    make(base)
    inode = (base / NAME).stat().st_ino
    with opened(base) as fd:
        storage.set_aside(fd, NAME, ASIDE)
        assert (base / ASIDE).stat().st_ino == inode
        with pytest.raises(FileNotFoundError):
            storage.set_aside(fd, NAME, ASIDE)
        os.close(storage.make(fd, NAME, SOCKETS))
        with pytest.raises(FileExistsError):
            storage.set_aside(fd, NAME, ASIDE)
        (base / "polytmp-removing-0123").mkdir(0o700)
        (base / f"{ASIDE}x").mkdir(0o700)
        (base / f"{ASIDE}\n").mkdir(0o700)
        assert storage.leftovers(fd) == storage.Leftovers((ASIDE,), (), 0)
        former_boot = names.barrier("f" * 32, 1000, "0" * 16)
        os.close(storage.make(fd, former_boot, SOCKETS))
        assert set(storage.leftovers(fd).removable) == {ASIDE, former_boot}


@pytest.mark.parametrize("kind", SQUATTERS)
def test_foreign_leftovers(base: Path, kind: str) -> None:
    name = "polytmp-removing-" + "0" * 16
    squat(base / name, kind)
    with opened(base) as fd:
        found = storage.leftovers(fd)
        assert found.removable == ()
        assert found.foreign[0][0] == name
        assert found.foreign[0][1]
        with pytest.raises(FileExistsError, match="not made by polytmpd"):
            storage.set_aside(fd, name, ASIDE)


def test_many_foreign_leftovers(base: Path) -> None:
    for number in range(100):
        (base / f"polytmp-removing-{number:016x}").touch()
    with opened(base) as fd:
        found = storage.leftovers(fd)
    assert (len(found.foreign), found.foreign_count) == (16, 100)


def test_mounted_leftovers(base: Path) -> None:
    name = "polytmp-removing-" + "0" * 16
    (base / name).mkdir(0o700)

    def work() -> None:
        syscalls.mount("tmpfs", str(base / name), "tmpfs", 0, "mode=700")
        with opened(base) as fd:
            assert storage.leftovers(fd).foreign == ((name, "is a mount point"),)

    in_namespace(work)

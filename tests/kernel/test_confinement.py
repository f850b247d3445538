# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a daemon that has gone wrong can still reach by path in its own mount namespace."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from polytmpd.kernel import confinement, mountinfo, syscalls
from tests.kernel.children import in_child

pytestmark = pytest.mark.kernel

MS_SHARED = 1 << 20


def confined(work: Callable[[], object], writable: Path) -> None:
    def run() -> None:
        confinement.confine([str(writable)])
        work()

    in_child(run)


def refused(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError as error:
        return error.errno == errno.EROFS
    return False


def test_only_its_own_directory_is_writable(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()

    def work() -> None:
        (own / "file").write_text("written")
        places = ("/etc", "/usr", "/tmp", "/var/tmp", "/run", "/dev", str(tmp_path))
        assert [place for place in places if not refused(f"{place}/polytmp-test")] == []
        assert refused("/proc/sys/kernel/hostname")
        assert all("ro" in line for line in mountinfo_options() if not line.startswith(str(own)))
        os.close(os.open("/dev/null", os.O_WRONLY))

    confined(work, own)
    assert (own / "file").read_text() == "written"


def mountinfo_options() -> list[str]:
    """`mount point options` of each mount."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [f"{line.split()[4]} {line.split()[5].split(',')}" for line in lines]


def test_the_directories_of_people_are_empty(tmp_path: Path) -> None:
    def work() -> None:
        there = [path for path in confinement.EMPTY if Path(path).is_dir() and not Path(path).is_symlink()]
        assert there
        for path in there:
            assert os.listdir(path) == []
            assert refused(f"{path}/polytmp-test")

    confined(work, tmp_path)


def test_what_the_host_unmounts_goes_away(tmp_path: Path) -> None:
    """A memory stick must not stay busy because the daemon was started while it was mounted."""
    own, stick = tmp_path / "own", tmp_path / "stick"
    own.mkdir()
    stick.mkdir()

    def work() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        with syscalls.open_tree(syscalls.AT_FDCWD, "/", 0) as root:
            syscalls.mount_setattr(root, propagation=MS_SHARED, recursive=True)
        syscalls.mount("none", str(stick), "tmpfs", 0)
        ours = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        syscalls.unshare(syscalls.CLONE_NEWNS)
        confinement.confine([str(own)])
        theirs = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        assert any(mount.mount_point == str(stick) for mount in mountinfo.read())
        syscalls.setns(ours, syscalls.CLONE_NEWNS)
        syscalls.umount2(str(stick), 0)
        syscalls.setns(theirs, syscalls.CLONE_NEWNS)
        assert not any(mount.mount_point == str(stick) for mount in mountinfo.read())

    in_child(work)


def test_nothing_happens_to_the_host(tmp_path: Path) -> None:
    before = mountinfo_options()
    confined(lambda: None, tmp_path)
    assert mountinfo_options() == before

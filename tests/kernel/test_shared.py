# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's socket directories: which are made, completed, refused."""

import os
from pathlib import Path
from unittest import mock

import pytest

from polytmpd.blocking import shared

pytestmark = pytest.mark.kernel

NAME = ".X11-unix"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.fail("these tests need root")
    tmp_path.chmod(0o1777)
    return tmp_path


def ensure(base: Path) -> tuple[int, int]:
    """Returns the (mode, owner) of the result."""
    fd = os.open(base, os.O_PATH | os.O_DIRECTORY)
    try:
        shared.ensure(fd, NAME)
    finally:
        os.close(fd)
    found = (base / NAME).lstat()
    return found.st_mode, found.st_uid


@pytest.mark.parametrize("mode", [0o1777, 0o3777])
def test_a_missing_directory_is_made(base: Path, mode: int) -> None:
    base.chmod(mode)
    assert ensure(base) == (0o41777, 0)


@pytest.mark.parametrize("mode", [0o1777, 0o3777])
@pytest.mark.parametrize("step", ["fchown", "fchmod"])
def test_a_half_made_directory_is_completed(base: Path, step: str, mode: int) -> None:
    base.chmod(mode)
    with mock.patch.object(os, step, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        ensure(base)
    assert (base / NAME).stat().st_mode & 0o1777 == 0o700
    assert ensure(base) == (0o41777, 0)


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o1700, 0o1777])
def test_a_mode_set_by_root_stays(base: Path, mode: int) -> None:
    (base / NAME).mkdir()
    (base / NAME).chmod(mode)
    assert ensure(base) == (0o40000 | mode, 0)


def test_a_directory_that_root_has_closed_stays_closed(base: Path) -> None:
    (base / NAME).mkdir(mode=0o700)
    (base / NAME / "secret").touch()
    assert ensure(base) == (0o40700, 0)


def test_what_must_not_be_shared(base: Path) -> None:
    path = base / NAME
    path.mkdir(mode=0o700)
    os.chown(path, 1001, 1001)
    with pytest.raises(PermissionError, match="owned by UID 1001"):
        ensure(base)
    assert path.stat().st_mode == 0o40700
    os.chown(path, 0, 0)
    path.chmod(0o777)
    with pytest.raises(PermissionError, match="without the sticky bit"):
        ensure(base)
    path.rmdir()
    path.symlink_to(base)
    with pytest.raises(PermissionError, match="not a directory"):
        ensure(base)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A descriptor has one owner, which closes it once."""

import fcntl
import os
from pathlib import Path

import pytest

from polytmpd.kernel.descriptor import Descriptor

pytestmark = pytest.mark.kernel


def is_open(fd: int) -> bool:
    return Path(f"/proc/self/fd/{fd}").is_symlink()


def test_it_is_closed_at_the_end_of_the_block() -> None:
    with Descriptor.open("/", os.O_PATH) as fd:
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert is_open(fd)
    assert not is_open(fd)


def test_it_is_closed_when_the_block_fails() -> None:
    with pytest.raises(ZeroDivisionError), Descriptor.open("/", os.O_PATH) as fd:
        1 / 0  # noqa: B018
    assert not is_open(fd)


def test_closing_twice_does_not_close_a_reused_number() -> None:
    fd = Descriptor.open("/", os.O_PATH)
    fd.close()
    with Descriptor.open("/", os.O_PATH) as other:
        assert int(other) == int(fd)
        fd.close()
        assert is_open(other)


def test_a_detached_one_stays_open() -> None:
    with Descriptor.open("/", os.O_PATH) as fd:
        number = fd.detach()
    assert is_open(number)
    os.close(number)


def test_a_duplicate_is_closed_separately() -> None:
    with Descriptor.open("/", os.O_PATH) as fd:
        other = fd.dup()
    assert is_open(other)
    other.close()

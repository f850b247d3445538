# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which process has an instance mounted, wherever its directory is."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from polytmpd.blocking import recovery
from polytmpd.kernel import syscalls
from tests.kernel import children
from tests.kernel.world import run_alone

BARRIER = "polytmp-1001"
_MS_BIND = 4096


def _taken_along(base: str) -> None:
    """A process that has part of the instance mounted in another namespace is found until it ends."""
    inside = f"{base}/{BARRIER}/tmp/inside"
    os.makedirs(inside)
    os.makedirs(f"{base}/polytmp-1002/tmp")
    ready, done = os.pipe(), os.pipe()

    def takes_it_along() -> None:
        children.alone()
        syscalls.mount(inside, "/mnt", None, _MS_BIND)
        os.write(ready[1], b".")
        os.close(done[1])
        os.read(done[0], 1)

    places = [(base, BARRIER), (base, "polytmp-1002")]
    assert recovery.mounted_barriers(places) == {}
    pid = children.start(takes_it_along)
    os.close(ready[1])
    assert os.read(ready[0], 1) == b"."
    assert recovery.mounted_barriers(places) == {BARRIER: pid}
    os.close(done[1])
    assert os.waitpid(pid, 0) == (pid, 0)
    assert recovery.mounted_barriers(places) == {}


def _in_the_root_file_system() -> None:
    # Two levels, like /tmp on Debian 12, and /var/tmp everywhere.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as base:
        _taken_along(base)


def _in_a_directory_of_the_root() -> None:
    with tempfile.TemporaryDirectory(dir="/") as base:
        _taken_along(base)


def _in_a_mount_of_its_own() -> None:
    base = Path("/mnt/own")
    base.mkdir()
    syscalls.mount("none", str(base), "tmpfs", 0)
    _taken_along(str(base))


def _in_a_bind_mount() -> None:
    base, elsewhere = Path("/mnt/bind"), Path("/mnt/else/where")
    base.mkdir()
    elsewhere.mkdir(parents=True)
    syscalls.mount(str(elsewhere), str(base), None, _MS_BIND)
    _taken_along(str(base))


@pytest.mark.parametrize(
    "where",
    [_in_the_root_file_system, _in_a_directory_of_the_root, _in_a_mount_of_its_own, _in_a_bind_mount],
    ids=lambda where: where.__name__.strip("_"),
)
def test_an_instance_that_is_mounted_elsewhere(where: Callable[[], None]) -> None:
    run_alone(__name__, where.__name__)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The filter for uevents, on a socket of another family: the kernel runs it in the same way."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from polytmpd.kernel.uevents import only_removals

pytestmark = pytest.mark.unit

REST = b"\0ACTION=x\0DEVPATH=/devices/x\0SUBSYSTEM=x\0SEQNUM=1\0"


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with here, there:
        here.setblocking(False)
        only_removals(here.fileno())
        yield here, there


@pytest.mark.parametrize(
    ("path", "arrives"),
    [
        ("remove@/devices/pci0000:00/0000:00:14.0/usb2/2-1/block/sdb", True),
        ("remove@/devices/pci0000:00/0000:00:14.0/usb2/2-1/block/sdb/sdb1", True),
        ("remove@/devices/virtual/block/loop0", True),
        ("remove@/devices/virtually/block/sdc", True),
        ("remove@/devices/platform/mmc0/block/mmcblk0", True),
        ("remove@/devices/virtual/bdi/0:55", False),
        ("add@/devices/virtual/bdi/0:55", False),
        ("add@/devices/virtual/block/loop0", False),
        ("change@/devices/virtual/block/loop0", False),
        ("remove@/devices/virtual/net/veth0/queues/rx-0", False),
        ("remove@/kernel/slab/:a-0000104/cgroup/x", False),
        ("removed@/devices/pci0000:00/block/sdb", False),
    ],
)
def test_what_passes(ends: tuple[socket.socket, socket.socket], path: str, arrives: bool) -> None:
    here, there = ends
    there.send(path.encode() + REST)
    if arrives:
        assert here.recv(4096) == path.encode() + REST
    else:
        with pytest.raises(BlockingIOError):
            here.recv(4096)


@pytest.mark.parametrize("text", [b"", b"rem", b"remove@/devices/virtual/b"])
def test_what_is_too_short_is_dropped(ends: tuple[socket.socket, socket.socket], text: bytes) -> None:
    here, there = ends
    there.send(text)
    with pytest.raises(BlockingIOError):
        here.recv(4096)


def test_the_socket_stays_open(ends: tuple[socket.socket, socket.socket]) -> None:
    assert ends[0].fileno() != -1
    assert ends[0].getsockname() == ""


def test_a_descriptor_that_is_no_socket() -> None:
    with Path("/dev/null").open("rb") as file, pytest.raises(OSError, match="non-socket"):
        only_removals(file.fileno())

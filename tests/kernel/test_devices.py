# SPDX-License-Identifier: LGPL-2.1-or-later
"""Devices that go away, with real events: the kernel sends what root writes to a device's uevent file."""

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from polytmpd import devices
from polytmpd.devices import BlockDevice, Devices, exists
from tests.unit.settled import eventually

LOOP = next(Path("/sys/class/block").glob("loop?"))


class Heard:
    def __init__(self) -> None:
        self.gone: list[BlockDevice] = []
        self.missed = 0
        self.devices = Devices(self.go, self.miss)

    async def go(self, device: BlockDevice) -> None:
        self.gone.append(device)

    async def miss(self) -> None:
        self.missed += 1


@pytest.fixture
def without_udevd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "UDEVD", tmp_path / "none")


@pytest.fixture
async def heard() -> AsyncIterator[Heard]:
    if os.geteuid() != 0:
        pytest.fail("these tests need root")
    turn = os.open("/run/polytmp-test-devices", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    fcntl.flock(turn, fcntl.LOCK_EX)  # other tests of the same device may run in parallel
    made = Heard()
    made.devices.start()
    await eventually(lambda: made.missed == 1)
    yield made
    await made.devices.close()
    send("add")
    os.close(turn)


def send(action: str) -> None:
    (LOOP / "uevent").write_text(action)


def ours(heard: Heard) -> list[BlockDevice]:
    number = (LOOP / "dev").read_text().strip()
    return [device for device in heard.gone if device.number == number]


async def test_a_device_goes_away(heard: Heard) -> None:
    send("change")
    send("remove")
    await eventually(lambda: ours(heard))
    assert ours(heard) == [BlockDevice((LOOP / "dev").read_text().strip(), f"/dev/{LOOP.name}")]
    assert heard.missed == 1, "at start"


async def test_more_events_than_the_socket_holds(heard: Heard) -> None:
    """Events are lost while no one reads; afterwards the monitor works as before."""
    heard.devices._monitor.set_receive_buffer_size(4096)
    for _ in range(100):
        send("remove")
    await eventually(lambda: heard.missed == 2)
    heard.gone.clear()
    send("remove")
    await eventually(lambda: ours(heard))


@pytest.mark.usefixtures("without_udevd")
async def test_the_kernel_filters_events(heard: Heard) -> None:
    """What does not matter does not reach the socket, so that it cannot overrun it either."""
    heard.devices._monitor.set_receive_buffer_size(4096)
    for _ in range(1000):
        send("change")
    send("remove")
    await eventually(lambda: ours(heard))
    assert heard.missed == 1, "at start"


async def test_close_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        heard = Heard()
        heard.devices.start()
        await asyncio.sleep(0)
        await heard.devices.close()
    await eventually(lambda: len(os.listdir("/proc/self/fd")) == before)


def test_exists() -> None:
    assert exists((LOOP / "dev").read_text().strip())
    assert exists("0:77"), "not a device number"
    assert not exists("239:239")

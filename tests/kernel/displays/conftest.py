# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fixtures of the display tests: a base directory, and a host in it."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from polytmpd.displays.lockfiles import SOCKETS
from polytmpd.displays.registry import Registry
from tests.kernel.displays.host import Host
from tests.unit.settled import no_descriptor_leaks

__all__ = ["no_descriptor_leaks"]


@pytest.fixture(params=["/var/tmp", "/dev/shm"])
def base(request: pytest.FixtureRequest) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.fail("these tests need root")
    path = Path(tempfile.mkdtemp(prefix="polytmp-test-", dir=request.param))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def host(base: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Host]:
    host = Host(base)
    update = Registry.update

    def counted(registry: Registry, seconds: float) -> None:
        try:
            update(registry, seconds)
        finally:
            host.updates += 1

    # in a container, PID 1 may belong to another user
    monkeypatch.setattr("polytmpd.kernel.host.ROOT", "/proc/self/root")
    monkeypatch.setattr(Registry, "update", counted)
    (base / SOCKETS).mkdir()
    (base / SOCKETS).chmod(0o1777)
    yield host
    await host.locks.close()
    assert len(asyncio.all_tasks()) == 1

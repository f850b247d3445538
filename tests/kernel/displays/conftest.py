# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host of the display tests, in a base directory (tests/kernel/conftest.py)."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from polytmpd.displays.lockfiles import SOCKETS
from polytmpd.displays.registry import Registry
from tests.kernel.displays.host import Host
from tests.unit.settled import no_descriptor_leaks

__all__ = ["no_descriptor_leaks"]


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

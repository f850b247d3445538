# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which callers may leave their mount namespace, in a world of fakes.

Not here: real systems (tests/e2e/test_sandboxes).
"""

import logging
import os
from collections.abc import AsyncIterator, Collection
from typing import Any, cast

import pytest

from polytmpd.bus.connection import BusError, Connection
from polytmpd.bus.systemd1 import Service
from polytmpd.core.views import Views
from polytmpd.errors import ExemptError, NotPolyinstantiatedError, PolytmpError
from polytmpd.placement import Placement
from tests.bus.world import view

pytestmark = pytest.mark.unit

HOST, ALICES, SERVICES, OTHERS = 1, 4026532000, 3, 4
UID, PID, MAIN = 1001, 42, 41
UNIT = {"User": "alice", "PAMName": "login", "MainPID": PID, "ControlPID": 0, "PrivateTmp": True}


class World:
    """A process, its unit, and what systemd says of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.namespaces: dict[int, set[int]] = {PID: {HOST}, MAIN: {SERVICES}}
        self.started_by_systemd = True
        self.cgroup = "0::/system.slice/x.service"
        self.unit: dict[str, Any] | Exception = UNIT
        self.program = "server"
        self.services: list[Service | Exception] = [
            Service("none.service", 0, 0),
            Service("ended.service", 8, 0),
            Service("x.service", MAIN, PID),
        ]
        self.main_uid = 0
        self.hosts: set[str] | Exception = set()
        self.asked: list[str] = []
        self.views = Views(("/tmp", "/var/tmp"))
        self.views.show(view(1500))  # its namespace is ALICES
        self.placement = Placement(cast("Connection", None), self.views)
        here = "polytmpd.placement"
        monkeypatch.setattr(f"{here}.processes.namespaces", lambda pid: self.namespaces.get(pid, set()))
        monkeypatch.setattr(f"{here}.host.namespace_inode", lambda: HOST)
        monkeypatch.setattr(f"{here}.origin.is_started_by_systemd", lambda _: self.started_by_systemd)
        monkeypatch.setattr(f"{here}.origin.cgroup", lambda _: self.cgroup)
        monkeypatch.setattr(f"{here}.origin.real_uid", lambda _: self.main_uid)
        monkeypatch.setattr(f"{here}.origin.has_the_hosts", self._has_the_hosts)
        monkeypatch.setattr(f"{here}.systemd1.unit_properties", self._properties)
        monkeypatch.setattr(f"{here}.systemd1.services", self._services)
        monkeypatch.setattr(f"{here}.origin.program", lambda _: self.program)

    def _has_the_hosts(self, _: int, directory: str) -> bool:
        if isinstance(self.hosts, Exception):
            raise self.hosts
        return directory in self.hosts

    async def _properties(self, _: Connection, unit: str, wanted: Collection[str]) -> dict[str, Any]:
        self.asked.append(unit)
        if isinstance(self.unit, Exception):
            raise self.unit
        return {key: value for key, value in self.unit.items() if key in wanted}

    async def _services(self, _: Connection) -> AsyncIterator[Service]:
        for service in self.services:
            if isinstance(service, Exception):
                raise service
            yield service

    async def outcome(self) -> str:
        try:
            await self.placement.require_movable(UID, PID)
            return "in an instance" if self.placement.is_in_instance(PID) else "moves"
        except ExemptError:
            return "stays"
        except NotPolyinstantiatedError:
            return "refused"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


# The process of a unit


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "stays"),
        ({"started_by_systemd": False}, "moves"),
        ({"unit": UNIT | {"PrivateTmp": False}}, "moves"),
        ({"unit": UNIT | {"PAMName": ""}}, "moves"),
        ({"unit": UNIT | {"MainPID": 7}}, "moves"),
        ({"unit": UNIT | {"MainPID": 0, "ControlPID": PID}}, "stays"),
        ({"unit": {}}, "moves"),
        ({"unit": BusError("org.x.Failed", "no answer")}, "moves"),
        ({"cgroup": "0::/user.slice/user-1001.slice/user@1001.service"}, "moves"),
        ({"cgroup": "0::/init.scope", "services": [Service("user@1001.service", PID, 0)]}, "moves"),
        ({"cgroup": "0::/init.scope", "services": []}, "moves"),
        ({"cgroup": "0::/user.slice/user-1001.slice/session-4.scope"}, "stays"),
        ({"cgroup": "0::/user.slice/user-1001.slice/session-4.scope", "services": []}, "moves"),
    ],
    ids=str,
)
async def test_the_process_of_a_unit(world: World, changes: dict[str, Any], outcome: str) -> None:
    for name, value in changes.items():
        setattr(world, name, value)
    assert await world.outcome() == outcome


async def test_a_unit_that_stays_is_in_the_journal(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert await world.outcome() == "stays"
    assert await world.outcome() == "stays"
    text = "x.service of user alice stays in the host's mount namespace, because of PrivateTmp=yes. "
    assert [record.getMessage().startswith(text) for record in caplog.records] == [True, True]


async def test_the_directories_of_an_existing_instance_count(world: World) -> None:
    world.views.show_directories(("/srv",))
    world.unit = UNIT | {"PrivateTmp": False, "WorkingDirectory": "/tmp/x"}
    assert await world.outcome() == "moves"
    world.views.show(view(UID))
    assert await world.outcome() == "stays"


# A process elsewhere


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "stays"),
        ({"hosts": {"/tmp"}}, "refused"),
        ({"hosts": {"/var/tmp"}}, "refused"),
        ({"hosts": OSError(40, "Too many levels of symbolic links")}, "refused"),
        ({"hosts": OSError(2, "No such file or directory")}, "refused"),
        ({"main_uid": 1001}, "refused"),
        ({"services": []}, "refused"),
        ({"services": [Service("x.service", 0, MAIN)]}, "refused"),
        ({"services": [BusError("org.x.Failed", "no answer")]}, "refused"),
        ({"services": [Service("user@1001.service", MAIN, 0)]}, "refused"),
        ({"services": [Service("cron.service", MAIN, 0)]}, "refused"),
        ({"services": [Service("ssh@4-5.service", MAIN, 0)]}, "refused"),
        ({"program": "login"}, "refused"),
        ({"program": "sshd-session"}, "refused"),
        ({"namespaces": {PID: {OTHERS}, MAIN: {SERVICES}}}, "refused"),
        ({"namespaces": {PID: {SERVICES, OTHERS}, MAIN: {SERVICES, OTHERS}}}, "refused"),
        ({"namespaces": {PID: {SERVICES}, MAIN: {HOST}}}, "refused"),
        ({"namespaces": {}}, "refused"),
        ({"namespaces": {PID: {ALICES}}}, "in an instance"),
    ],
    ids=str,
)
async def test_a_process_that_is_not_on_the_host(
    world: World, changes: dict[str, Any], outcome: str
) -> None:
    world.namespaces[PID] = {SERVICES}
    for name, value in changes.items():
        setattr(world, name, value)
    assert await world.outcome() == outcome


async def test_a_service_is_in_the_journal_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.namespaces[PID] = {SERVICES}
    for name in ("x", "y", "x"):
        world.services = [Service(f"{name}.service", MAIN, 0)]
        assert await world.outcome() == "stays"
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == ["x.service", "y.service"]
    assert "which has its own /tmp and /var/tmp: they stay there" in caplog.text


async def test_a_directory_that_is_not_in_force_any_more(world: World) -> None:
    """The user's instance has it, so a service that shares it with the host does not do."""
    world.namespaces[PID] = {SERVICES}
    world.hosts = {"/var/tmp"}
    world.views.show_directories(("/tmp",))
    assert await world.outcome() == "stays"
    world.views.show(view(UID))
    assert await world.outcome() == "refused"


async def test_the_message_of_a_refusal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.namespaces[PID] = {OTHERS}
    with pytest.raises(
        NotPolyinstantiatedError, match=f"process {PID} has its own mount namespace; see Priv"
    ):
        await world.placement.require_movable(UID, PID)

    def fail() -> int:
        raise PermissionError(13, os.strerror(13), "/proc/1/ns/mnt")

    monkeypatch.setattr("polytmpd.placement.host.namespace_inode", fail)
    with pytest.raises(PolytmpError, match="failed to determine the mount namespace of process 42: Perm"):
        await world.placement.require_movable(UID, PID)

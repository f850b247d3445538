# SPDX-License-Identifier: LGPL-2.1-or-later
"""A private bus, and the service on it.

POLYTMP_TEST_BUS_LIBRARY=dbus_fast runs the tests as if dbus-next could not be imported; test_libraries.py
does so.
"""

import contextlib
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LIBRARY = os.environ.get("POLYTMP_TEST_BUS_LIBRARY", "dbus_next")
if LIBRARY != "dbus_next":
    assert "polytmpd.bus.library" not in sys.modules, f"{LIBRARY}: run tests/bus by itself"
    sys.modules["dbus_next"] = None  # type: ignore[assignment]  # tells the import system that there is none

from polytmpd.acquisition import Acquisition  # noqa: E402
from polytmpd.bus import library, polkit  # noqa: E402
from polytmpd.bus.connection import Connection  # noqa: E402
from polytmpd.bus.service import Service  # noqa: E402
from polytmpd.core.names import object_path  # noqa: E402
from tests.bus.polkit_world import FakePolkit, Stranger  # noqa: E402
from tests.bus.world import Backend, Client, close, view  # noqa: E402
from tests.unit.settled import no_descriptor_leaks, no_task_leaks  # noqa: E402

__all__ = ["no_descriptor_leaks", "no_task_leaks"]

CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={path}/bus</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/>
    <allow send_type="method_call"/><allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/><allow receive_type="signal"/>
    <allow receive_type="method_return"/><allow receive_type="error"/>
  </policy>
</busconfig>
"""


@pytest.fixture(scope="session", autouse=True)
def library_under_test() -> None:
    assert library.LIBRARY == LIBRARY


@pytest.fixture(autouse=True)
def settled(no_descriptor_leaks: None, no_task_leaks: None) -> None:
    """A test leaves no descriptor open and no task running."""


@contextlib.contextmanager
def running_bus() -> Iterator[str]:
    program = shutil.which("dbus-daemon")
    if program is None:
        pytest.fail("dbus-daemon is not installed: make setup (Debian: apt install dbus)", pytrace=False)
    path = Path(tempfile.mkdtemp(prefix="polytmp-test-bus-"))
    path.chmod(0o755)
    (path / "bus.conf").write_text(CONFIG.format(path=path))
    process = subprocess.Popen(
        [program, f"--config-file={path}/bus.conf", "--nofork", "--print-address"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        readable, _, _ = select.select([process.stdout], [], [], 10)
        address = process.stdout.readline().strip() if readable else ""
        if not address:
            process.kill()
            pytest.fail(f"dbus-daemon does not start: {process.communicate()[1]}", pytrace=False)
        yield address.partition(",")[0]
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(path)


@pytest.fixture(scope="session")
def bus() -> Iterator[str]:
    """The address of a bus like the system's, except that its policy allows everything."""
    with running_bus() as address:
        yield address


@pytest.fixture
def short_bus() -> Iterator[tuple[str, Callable[[], None]]]:
    """The address of another one, and a function that ends it."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(running_bus()), stack.close


@pytest.fixture
async def connect(bus: str) -> AsyncIterator[Callable[[], Any]]:
    """A function that opens the daemon's kind of connection; closed after the test."""
    made: list[Connection] = []

    async def make() -> Connection:
        made.append(await Connection.open(bus))
        return made[-1]

    yield make
    for connection in made:
        connection.close()
        await connection.wait_closed()
        await close(connection._bus)


@pytest.fixture
async def new_client(bus: str) -> AsyncIterator[Callable[[], Any]]:
    """A function that opens foreign clients: the bare library, which can send anything."""
    made: list[Client] = []

    async def make() -> Client:
        made.append(await Client.open(bus))
        return made[-1]

    yield make
    for client in made:
        await client.close()


@pytest.fixture
async def client(new_client: Callable[[], Any]) -> Client:
    made: Client = await new_client()
    return made


@pytest.fixture
async def connection(connect: Callable[[], Any]) -> Connection:
    made: Connection = await connect()
    return made


@pytest.fixture
async def backend() -> AsyncIterator[Backend]:
    made = Backend()
    yield made
    made.close()


@pytest.fixture
async def service(connection: Connection, backend: Backend) -> Service:
    """org.polytmp1 on the private bus, with no instance."""
    made = Service(connection, backend.views, backend, backend, Acquisition(backend, backend).namespace)
    await made.publish()
    return made


@pytest.fixture
async def authority(new_client: Callable[[], Any]) -> AsyncIterator[FakePolkit]:
    client = await new_client()
    made = FakePolkit(client)
    await client.own(polkit.SERVICE)
    yield made
    await client.disown(polkit.SERVICE)


@pytest.fixture
async def stranger(bus: str) -> AsyncIterator[Stranger]:
    made = Stranger(bus)
    yield made
    await made.close()


@pytest.fixture
def shown(service: Service, backend: Backend) -> str:
    """The object path of bob's instance."""
    backend.views.show(view(1002, "bob"))
    return object_path(1002)


@pytest.fixture(scope="session")
def root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: the service tells callers apart by their UID")

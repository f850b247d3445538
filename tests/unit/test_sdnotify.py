# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service manager's protocol, over a real socket in place of PID 1's."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from polytmpd import sdnotify

pytestmark = pytest.mark.unit


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield sock


def received(manager: socket.socket) -> tuple[list[str], list[int]]:
    data, fds, _, _ = socket.recv_fds(manager, 4096, 4)
    return data.decode().split("\n"), fds


def test_states(manager: socket.socket) -> None:
    sdnotify.ready("Private directories: /tmp")
    sdnotify.watchdog()
    sdnotify.stopping()
    assert received(manager) == (["READY=1", "STATUS=Private directories: /tmp"], [])
    assert received(manager) == (["WATCHDOG=1"], [])
    assert received(manager) == (["STOPPING=1"], [])


def test_store_replaces_the_descriptor_of_that_name(manager: socket.socket) -> None:
    reader, writer = os.pipe()
    try:
        sdnotify.store("ns-1000", reader)
        assert received(manager) == (["FDSTOREREMOVE=1", "FDNAME=ns-1000"], [])
        lines, fds = received(manager)
        assert lines == ["FDSTORE=1", "FDNAME=ns-1000", "FDPOLL=0"]
        (stored,) = fds
        assert os.path.sameopenfile(stored, reader)
        os.close(stored)
        assert os.path.sameopenfile(reader, reader), "the caller's descriptor stays open"
    finally:
        os.close(reader)
        os.close(writer)


def test_remove(manager: socket.socket) -> None:
    sdnotify.remove("ns-1000")
    assert received(manager) == (["FDSTOREREMOVE=1", "FDNAME=ns-1000"], [])


def test_without_a_service_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    sdnotify.ready("x")
    sdnotify.store("x", 0)
    assert sdnotify.take_passed() == []


def test_a_dead_service_manager_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    sdnotify.ready("x")
    sdnotify.store("ns-1", 0)
    assert [", ignoring: " in record.getMessage() for record in caplog.records] == [True] * 3


@pytest.mark.parametrize(
    ("value", "seconds"), [("3000000", 1.5), ("0", None), ("", None), ("-5", None), ("soon", None)]
)
def test_watchdog_interval(monkeypatch: pytest.MonkeyPatch, value: str, seconds: float | None) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", value)
    assert sdnotify.watchdog_interval() == seconds


def test_no_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert sdnotify.watchdog_interval() is None


def test_take_passed() -> None:
    """In a child: PID 1 passes descriptors from 3 on, and 3 is in use in this process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            first, second = os.open("/dev/null", os.O_RDONLY), os.open("/dev/zero", os.O_RDONLY)
            high = os.dup2(second, 200)
            os.dup2(first, 3, inheritable=True)
            os.dup2(high, 4, inheritable=True)
            os.environ.update(
                LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="sentinels:ns-1000"
            )
            stored = sdnotify.take_passed()
            good = stored == [("sentinels", 3), ("ns-1000", 4)]
            good &= not any(os.get_inheritable(fd) for _, fd in stored)
            good &= not any(name.startswith("LISTEN_") for name in os.environ)
            good &= sdnotify.take_passed() == []
            code = 0 if good else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize(
    ("configured", "limit", "capacity"),
    [
        (None, "1073741816", sdnotify._UNIT_HAS),
        ("100", "1073741816", 100),
        ("16384", "20000", (20000 - 1024) // 2),
        ("16384", "unlimited", 16384),
        ("16384", "512", 0),
    ],
)
def test_as_much_is_stored_as_the_service_can_be_started_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, configured: str | None, limit: str, capacity: int
) -> None:
    """PID 1 has each descriptor twice when it starts the service."""
    limits = tmp_path / "limits"
    limits.write_text(
        f"Limit  Soft Limit  Hard Limit  Units\nMax open files            {limit}  {limit}  files\n"
    )
    monkeypatch.setattr(sdnotify, "_MANAGER_LIMITS", limits)
    monkeypatch.delenv("FDSTORE", raising=False)
    if configured is not None:
        monkeypatch.setenv("FDSTORE", configured)
    assert sdnotify.store_capacity() == capacity


def test_the_unit_has_what_is_assumed() -> None:
    unit = (Path(__file__).parents[2] / "units/polytmpd.service").read_text()
    assert f"\nFileDescriptorStoreMax={sdnotify._UNIT_HAS}\n" in unit

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's socket directory: lost events, long listings, and a directory that is made again."""

import errno
import math
import os
import shutil
import time
from pathlib import Path

import pytest

from polytmpd.displays import displaylocks, lockfiles, socketdir
from polytmpd.displays.complaints import Complaints
from polytmpd.displays.lockfiles import SOCKETS
from polytmpd.displays.places import Place
from polytmpd.displays.socketdir import SocketDirectory
from polytmpd.kernel.inotify import IN_DELETE, IN_IGNORED, IN_Q_OVERFLOW, Event, Inotify
from tests.kernel.displays.host import (
    ALICE,
    BOB,
    Host,
    make_lock,
    make_socket,
    opened,
    serve,
)
from tests.unit.settled import eventually

pytestmark = pytest.mark.kernel

MAX_QUEUED_EVENTS = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


async def test_lost_events_are_made_up_for(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    await host.start(ALICE, BOB)
    await host.shows([])
    await eventually(lambda: host.shared_again == 1)
    ignored: list[str] = []
    with monkeypatch.context() as context:
        context.setattr(lockfiles, "display_of_socket", ignored.append)
        serve(host, ALICE)
        await eventually(lambda: "X7" in ignored)
    assert host.shown() == [str(ALICE)], "the event was ignored"
    first, second = host.base / SOCKETS / "a", host.base / SOCKETS / "b"
    for _ in range(MAX_QUEUED_EVENTS // 4 + 10):  # four different events each, and no time to read them
        first.touch()
        second.touch()
        first.unlink()
        second.unlink()
    await host.shows(["host", ALICE, BOB])
    assert host.shared_again == 1, "it is still the same directory"


async def test_a_large_directory_is_listed_bit_by_bit(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logins go on during a listing. Events lost during it do not restart it."""
    monkeypatch.setattr(displaylocks, "_UPDATE", 0.0005)
    monkeypatch.setattr(displaylocks, "_REST", 0.001)
    for number in range(20000):
        (host.base / SOCKETS / f"junk{number}").touch()
    tmp = host.tmp(ALICE)
    tmp.mkdir(parents=True)
    serve(host, ALICE)
    monkeypatch.setattr(Inotify, "read", lambda _: [Event(-1, IN_Q_OVERFLOW, "")])
    await host.start(ALICE, BOB)
    await host.shows(["host", ALICE, BOB])
    serve(host, ALICE, 8)  # without an event
    await host.shows(["host", ALICE, BOB], 8)
    assert host.updates > 10
    assert host.shared_again == 1


async def test_a_listing_that_lost_events_is_repeated(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        (host.base / SOCKETS / f"junk{number}").touch()
    directory = SocketDirectory(Place(str(host.base)), Complaints(), lambda: False)
    directory.refresh([])
    directory.list_until(0)
    assert directory.has_work
    with monkeypatch.context() as context:
        context.setattr(Inotify, "read", lambda _: [Event(-1, IN_Q_OVERFLOW, "")])
        directory.refresh([])
    goes_on = []
    for _ in range(3):
        directory.list_until(math.inf)
        directory.refresh([])
        goes_on.append(directory.has_work)
    directory.close()
    assert goes_on == [True, False, False]


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
async def test_a_socket_directory_that_is_made_again(
    host: Host, monkeypatch: pytest.MonkeyPatch, bound: bool
) -> None:
    monkeypatch.setattr(socketdir, "CHECK_INTERVAL", 0.1)
    monkeypatch.setattr(socketdir, "_MOVED_DELAY", 0.1)
    await host.start(ALICE, BOB)
    serve(host, ALICE)
    await host.shows(["host", ALICE, BOB])
    holder = (
        os.open(host.base / SOCKETS, os.O_PATH) if bound else -1
    )  # keeps the inode, as a bind mount does
    shutil.rmtree(host.base / SOCKETS)
    await host.shows([ALICE])
    await eventually((host.base / SOCKETS).exists)
    assert (host.base / SOCKETS).stat().st_mode == 0o41777
    await eventually(lambda: host.shared_again == 2)
    serve(host, BOB, 8)
    await host.shows(["host", ALICE, BOB], 8)
    if bound:
        os.close(holder)


async def test_an_empty_directory_that_is_replaced_without_an_event(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socketdir, "CHECK_INTERVAL", 0.1)
    await host.start(ALICE, BOB)
    await eventually(lambda: host.shared_again == 1)
    with opened(host.base / SOCKETS):
        (host.base / SOCKETS).rmdir()
        (host.base / SOCKETS).mkdir()
        serve(host, ALICE)
        await host.shows(["host", ALICE, BOB])


async def test_nothing_is_checked_while_nothing_happens(host: Host) -> None:
    await host.start(ALICE, BOB)
    serve(host, ALICE)
    await host.shows(["host", ALICE, BOB])
    await eventually(lambda: host.shared_again == 1 and host.locks._due() is None)
    host.base.joinpath("made").touch()
    assert host.locks._due() is None, "by root, in the host's /tmp"
    host.base.joinpath("made").unlink()
    await eventually(lambda: host.locks._due() is not None)


async def test_a_busy_parent_causes_one_event_for_each_check(host: Host) -> None:
    """A compiler works in the host's /tmp. Nothing queues up, and no check comes early."""
    directory = SocketDirectory(Place(str(host.base)), Complaints(), lambda: False)
    directory.refresh([])
    begun = time.monotonic()
    for number in range(1000):
        (host.base / f"{number}.o").touch()
        (host.base / f"{number}.o").unlink()
    assert directory._inotify is not None
    events = directory._inotify.read()
    assert [event.mask & ~IN_IGNORED for event in events] == [IN_DELETE, 0]
    (host.base / "x").touch()
    directory.check_soon(-1)
    directory.refresh([])
    assert directory.check_due == math.inf
    (host.base / "x").unlink()
    directory.refresh([])
    due = directory.check_due - begun
    directory.close()
    assert due >= socketdir.CHECK_INTERVAL


async def test_a_directory_replaced_by_another_that_took_its_name(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socketdir, "CHECK_INTERVAL", 0.1)
    monkeypatch.setattr(socketdir, "_MOVED_DELAY", 0.1)
    await host.start(ALICE, BOB)
    await eventually(lambda: host.shared_again == 1 and host.locks._due() is None)
    with opened(host.base / SOCKETS):
        (host.base / "other").mkdir()
        (host.base / "other").rename(host.base / SOCKETS)
        await eventually(lambda: host.shared_again == 2)


async def test_a_login_notices_another_directory_at_once(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socketdir, "CHECK_INTERVAL", 1000)
    await host.start(ALICE)
    await eventually(lambda: host.shared_again == 1)
    with opened(host.base / SOCKETS):
        (host.base / SOCKETS).rmdir()
        (host.base / SOCKETS).mkdir(0o700)
        await host.locks.instance_came(host.instance(BOB))
        await eventually(lambda: host.shared_again == 2)
    assert (host.base / SOCKETS).stat().st_mode == 0o41777


async def test_a_socket_directory_that_cannot_be_shared(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(socketdir, "CHECK_INTERVAL", 0.05)
    (host.base / SOCKETS).rename(host.base / "real")
    (host.base / SOCKETS).symlink_to("real")
    await host.start(ALICE, BOB)
    make_lock(host.tmp(ALICE), 7, ALICE)
    await eventually(lambda: "Failed to watch" in caplog.text)
    await host.updated(10)
    assert len([record for record in caplog.records if "Failed to watch" in record.message]) == 1
    (host.base / SOCKETS).unlink()
    (host.base / "real").rename(host.base / SOCKETS)
    make_socket(host.base, 7, ALICE)
    await host.shows(["host", ALICE, BOB])


@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), OSError(errno.EMFILE, "none left")]
)
async def test_sharing_that_fails_is_retried(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    monkeypatch.setattr(socketdir, "CHECK_INTERVAL", 0.05)
    host.failures = [error, error]
    await host.start(ALICE, BOB)
    serve(host, ALICE)
    await host.shows(["host", ALICE, BOB])
    await eventually(lambda: host.shared_again)
    assert [record.args for record in caplog.records] == [(str(host.base), SOCKETS, error)], "logged once"
    for name in "abc":
        (host.base / SOCKETS / name).touch()
        await host.updated(1)
    assert host.shared_again == 1

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Display locks with sockets and instances: where a lock is shown, and when it goes."""

import asyncio
import errno
import os
import shutil
import threading

import pytest

from polytmpd.core.model import Directory, Lifetime
from polytmpd.displays import lockfiles
from polytmpd.displays.lockfiles import SOCKETS
from polytmpd.displays.registry import PER_OWNER
from tests.kernel.displays.host import (
    ALICE,
    BOB,
    CAROL,
    Host,
    make_lock,
    make_socket,
    put_copy,
    read,
    serve,
)
from tests.unit.settled import eventually

pytestmark = pytest.mark.kernel


async def test_a_lock_is_shown_and_goes_with_its_socket(host: Host) -> None:
    await host.start(ALICE, BOB)
    path = serve(host, ALICE)
    await host.shows(["host", ALICE, BOB])
    assert (host.tmp(ALICE) / ".X7-lock").stat().st_uid == ALICE
    path.unlink()
    await host.shows([ALICE])
    assert read(host.tmp(ALICE), 7, ALICE) == 4711, "the original stays"


async def test_a_new_server_of_the_same_display(host: Host) -> None:
    await host.start(ALICE, BOB)
    path = serve(host, ALICE)
    await host.shows(["host", ALICE, BOB])
    path.unlink()
    (host.tmp(ALICE) / ".X7-lock").unlink()
    await host.shows([])
    make_lock(host.tmp(BOB), 7, BOB, f"{4712:10}\n")
    path = make_socket(host.base, 7, BOB)
    await host.shows(["host", ALICE, BOB])
    (host.tmp(BOB) / ".X7-lock").write_text(f"{4713:10}\n")
    path.unlink()
    make_socket(host.base, 7, BOB)
    await eventually(lambda: (host.tmp(ALICE) / ".X7-lock").read_text() == f"{4713:10}\n")


async def test_locks_of_the_host_and_in_another_users_place(host: Host) -> None:
    await host.start(ALICE, BOB)
    serve(host, CAROL, 3, host.base)  # an exempt user
    await host.shows(["host", ALICE, BOB], 3)
    assert (host.base / ".X3-lock").stat().st_uid == CAROL
    serve(host, 0, 4, host.tmp(ALICE))  # by root in the session of alice
    await host.shows(["host", ALICE, BOB], 4)


async def test_instances_come_and_go(host: Host) -> None:
    await host.start(ALICE)
    serve(host, ALICE)
    await host.shows(["host", ALICE])
    await host.locks.instance_came(host.instance(BOB))
    assert str(BOB) in host.shown(), "before the user enters"
    host.locks.instance_gone(ALICE)
    await host.shows([ALICE])
    assert (host.base / SOCKETS / "X7").exists(), "the socket is not polytmp's"
    await host.locks.instance_came(host.instance(ALICE, "-again"))
    assert host.shown() == [str(ALICE)]


async def test_copies_do_not_outlive_the_instance(host: Host) -> None:
    """The directory may be persistent."""
    await host.start(ALICE, BOB)
    serve(host, ALICE)
    await host.shows(["host", ALICE, BOB])
    host.locks.instance_gone(BOB)
    await host.shows(["host", ALICE])


async def test_nothing_happens_until_an_instance_shares_the_sockets(host: Host) -> None:
    host.directory = Directory(str(host.base), Lifetime.INSTANCE, (".ICE-unix",))
    await host.start(ALICE, BOB)
    serve(host, ALICE)
    host.locks.instance_gone(BOB)
    await host.locks.instance_came(host.instance(BOB))
    assert len(asyncio.all_tasks()) == 1
    assert host.updates == 0
    assert host.shown() == [str(ALICE)]
    host.directory = Directory(str(host.base), Lifetime.INSTANCE, (SOCKETS,))
    await host.locks.instance_came(host.instance(BOB))  # after a reload
    await host.locks.instance_came(host.instance(ALICE))
    await host.shows(["host", ALICE, BOB])


async def test_a_new_daemon_keeps_what_is_right_and_removes_the_rest(host: Host) -> None:
    await host.start(ALICE, BOB)
    path = serve(host, ALICE)
    serve(host, ALICE, 8)
    await host.shows(["host", ALICE, BOB])
    await host.shows(["host", ALICE, BOB], 8)
    inode = (host.tmp(BOB) / ".X7-lock").stat().st_ino
    await host.locks.close()
    (host.base / SOCKETS / "X8").unlink()
    (host.tmp(ALICE) / ".X8-lock").unlink()
    serve(host, BOB, 9)
    await host.again(ALICE, BOB)
    await host.shows([], 8)
    await host.shows(["host", ALICE, BOB], 9)
    assert (host.tmp(BOB) / ".X7-lock").stat().st_ino == inode
    path.unlink()
    await host.shows([ALICE])


async def test_a_copy_is_not_taken_for_the_hosts_own_lock(host: Host) -> None:
    """The socket belongs to root, and the host's directory has a copy of a user's lock."""
    put_copy(host.base, 7)
    make_socket(host.base, 7, 0)
    await host.start(ALICE)
    await host.shows([])


async def test_copies_of_an_earlier_boot_are_removed_from_a_persistent_directory(host: Host) -> None:
    host.directory = Directory(str(host.base), Lifetime.PERSISTENT, (SOCKETS,))
    await host.start(ALICE)
    instance = host.instance(BOB)
    put_copy(host.tmp(BOB), 7)
    await host.locks.instance_came(instance)
    await host.shows([])


async def test_only_so_many_displays_of_one_user_are_shown(
    host: Host, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host.start(ALICE, BOB)
    for display in range(100, 100 + PER_OWNER + 200):
        serve(host, ALICE, display)
    serve(host, BOB)
    await host.shows(["host", ALICE, BOB])
    await eventually(lambda: len(list(host.tmp(BOB).glob(".X???-lock"))) == PER_OWNER)

    def complaints() -> list[object]:
        return [record.args for record in caplog.records if "more than" in record.message]

    await eventually(complaints)  # the display after the last one shown may not have been compared yet
    assert complaints() == [(ALICE, PER_OWNER)]
    for path in (host.base / SOCKETS).glob("X???"):
        path.unlink()
    await eventually(lambda: not list(host.tmp(BOB).glob(".X???-lock")))


async def test_a_place_that_cannot_be_written_does_not_affect_the_others(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await host.start(ALICE, BOB, CAROL)
    shutil.rmtree(host.tmp(CAROL))  # the instance is being removed
    real = lockfiles.publish

    def fail(copy: int, directory: int, display: int) -> bool:
        if os.path.samestat(os.fstat(directory), host.tmp(BOB).stat()):
            raise OSError(errno.ENOSPC, "full")
        return real(copy, directory, display)

    monkeypatch.setattr(lockfiles, "publish", fail)
    serve(host, ALICE)
    serve(host, ALICE, 8)
    await host.shows(["host", ALICE])
    await host.shows(["host", ALICE], 8)
    assert len([record for record in caplog.records if "full" in record.message]) == 1


async def test_an_unexpected_error_is_logged_once_and_stops_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = lockfiles.socket_owner
    failures = 0

    def fail(sockets: int, display: int) -> int | None:
        nonlocal failures
        if display == 8:
            failures += 1
            raise ValueError("8")
        return real(sockets, display)

    monkeypatch.setattr(lockfiles, "socket_owner", fail)
    await host.start(ALICE, BOB)
    for display in (8, 7):
        path = serve(host, ALICE, display)
    await host.shows(["host", ALICE, BOB])
    before = failures
    path.unlink()
    (host.base / SOCKETS / "X8").unlink()
    await host.shows([ALICE])
    await eventually(lambda: failures > before)
    await host.locks.instance_came(host.instance(BOB))  # its work comes after the update that failed
    (record,) = [record for record in caplog.records if "out of date" in record.message]
    assert record.exc_info


async def test_a_login_succeeds_if_no_thread_can_be_started(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:

        def fail(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        context.setattr(threading.Thread, "start", fail)
        await host.locks.instance_came(host.instance(ALICE))
    await host.locks.instance_came(host.instance(BOB))
    serve(host, ALICE)
    await host.shows(["host", ALICE, BOB])


async def test_closing_in_the_middle_of_an_update(host: Host) -> None:
    await host.start(ALICE, BOB)
    for display in range(100, 400):
        serve(host, ALICE, display)
    await host.locks.instance_came(host.instance(CAROL))
    former = host.locks
    await former.close()
    await host.again(ALICE, BOB)
    former.instance_gone(ALICE)  # has no effect

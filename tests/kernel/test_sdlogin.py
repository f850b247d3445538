# SPDX-License-Identifier: LGPL-2.1-or-later
"""logind's files, as libsystemd reads them: real ones, of sessions that logind does not know."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from polytmpd import sdlogin
from polytmpd.kernel.inotify import IN_Q_OVERFLOW, Event
from polytmpd.sdlogin import SessionFile, SessionFiles
from tests.unit.settled import eventually

pytestmark = pytest.mark.kernel

SESSION = f"polytmptest{os.getpid()}"


@pytest.fixture
async def files() -> AsyncIterator[SessionFiles]:
    made = SessionFiles()
    yield made
    made.close()


@pytest.fixture
def path() -> Iterator[Path]:
    path = Path(sdlogin.SESSIONS, SESSION)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path
    path.unlink(missing_ok=True)


def save(path: Path, text: str) -> None:
    """As logind does it."""
    other = path.with_name(f".#{path.name}")
    other.write_text(text)
    other.rename(path)


async def test_what_libsystemd_says(files: SessionFiles, path: Path) -> None:
    assert files.read(SESSION) is None
    save(path, "UID=1000\nUSER=alice\nACTIVE=1\nSTATE=active\nCLASS=user\n")
    assert files.read(SESSION) == SessionFile(1000, "user", is_closing=False)
    save(path, "UID=4294967294\nUSER=x\nACTIVE=0\nSTATE=closing\nCLASS=manager-early\n")
    assert files.read(SESSION) == SessionFile(4294967294, "manager-early", is_closing=True)
    for text in ("UID=1000\n", "UID=1000\nCLASS=user\n", "UID=x\nCLASS=user\nSTATE=active\n", ""):
        save(path, text)
        assert files.read(SESSION) is None, text


@pytest.mark.parametrize("session", ["", "../etc/passwd", "a b", "a" * 5000, ".", "\udcff"])
async def test_what_is_no_session(files: SessionFiles, session: str) -> None:
    assert files.read(session) is None


async def test_each_save_is_reported(files: SessionFiles, path: Path) -> None:
    changed: list[str | None] = []
    files.follow(changed.append)
    save(path, "UID=1000\n")
    await eventually(lambda: SESSION in changed)
    changed.clear()
    save(path, "UID=1000\n")
    await eventually(lambda: SESSION in changed)


async def test_lost_events(files: SessionFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[str | None] = []
    files.follow(changed.append)
    monkeypatch.setattr(files._inotify, "read", lambda: [Event(-1, IN_Q_OVERFLOW, "")])
    files._read()
    assert changed == [None]


async def test_a_directory_that_cannot_be_watched_is_tried_again(
    files: SessionFiles, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    changed: list[str | None] = []
    with monkeypatch.context() as context:

        def fail(*_: object) -> int:
            raise OSError(errno.ENOSPC, "the limit is reached")

        context.setattr(files._inotify, "add_watch", fail)
        files.follow(changed.append)
        files.read(SESSION)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
    files.read(SESSION)
    save(path, "UID=1000\n")
    await eventually(lambda: SESSION in changed)


async def test_close_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        SessionFiles().close()
        await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) == before

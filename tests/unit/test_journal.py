# SPDX-License-Identifier: LGPL-2.1-or-later
"""Log records reach the journal or standard error, with their fields."""

import errno
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from polytmpd import journal
from polytmpd.journal import MessageId, fields

pytestmark = pytest.mark.unit

# JournalHandler or logging itself uses these names: an `extra` with one of them loses the record.
RESERVED = {
    "PRIORITY",
    "MESSAGE",
    "LOGGER",
    "THREAD_NAME",
    "PROCESS_NAME",
    "CODE_FILE",
    "CODE_LINE",
    "CODE_FUNC",
    "SYSLOG_IDENTIFIER",
    *vars(logging.makeLogRecord({})),
}


@pytest.fixture
def loggers() -> Iterator[logging.Logger]:
    root, ours = logging.getLogger(), logging.getLogger("polytmpd")
    before = root.handlers[:], root.level, ours.level
    yield ours
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def test_fields() -> None:
    assert fields() == {}
    assert fields(MessageId.INSTANCE_NEW, 1000, "alice") == {
        "MESSAGE_ID": MessageId.INSTANCE_NEW.value,
        "POLYTMP_UID": "1000",
        "POLYTMP_USER": "alice",
    }
    assert fields(uid=0) == {"POLYTMP_UID": "0"}
    assert not RESERVED & set(fields(MessageId.BAD_CONFIG, 1, "x"))


def test_message_ids_are_valid_and_unique() -> None:
    assert all(re.fullmatch("[0-9a-f]{32}", entry.value) for entry in MessageId)
    assert len({entry.value for entry in MessageId}) == len(MessageId)


def test_without_a_journal_records_go_to_standard_error(
    loggers: logging.Logger,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(journal, "_SOCKET", tmp_path / "none")
    journal.set_up()
    loggers.info("made for %s", "alice", extra=fields(MessageId.INSTANCE_NEW, 1000, "alice"))
    loggers.debug("not shown")
    logging.getLogger("some.library").info("not shown either")
    assert capsys.readouterr().err == "INFO: made for alice\n"


def test_with_a_journal_records_have_fields(
    loggers: logging.Logger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "socket").touch()
    monkeypatch.setattr(journal, "_SOCKET", tmp_path / "socket")
    sent: list[dict[str, object]] = []
    journal.set_up(logging.DEBUG)
    (handler,) = logging.getLogger().handlers
    handler.send = lambda text, /, **extra: sent.append({"text": text, **extra})  # type: ignore[attr-defined]
    loggers.error("failed", extra=fields(MessageId.PREPARE_FAILED, 1000, "alice"))
    loggers.debug("shown")
    assert sent[0]["text"] == "failed"
    assert sent[0]["MESSAGE_ID"] == MessageId.PREPARE_FAILED.value
    assert sent[0]["POLYTMP_UID"] == "1000"
    assert sent[0]["SYSLOG_IDENTIFIER"] == "polytmpd"
    assert sent[1]["text"] == "shown"


@pytest.mark.parametrize(("level", "prefix"), [(logging.DEBUG, "<7>"), (logging.WARNING, "<4>")])
def test_what_the_journal_does_not_take_goes_to_standard_error(
    level: int, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """sd_journal_send(3) opens its socket at the first message, and there may be no descriptor left."""

    def send(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    handler = journal._Journal(SYSLOG_IDENTIFIER="polytmpd")
    monkeypatch.setattr(handler, "send", send)
    handler.handle(logging.LogRecord("polytmpd", level, "x.py", 1, "Failed: %s", ("because",), None))
    assert capsys.readouterr().err == f"{prefix}Failed: because\n"


def test_a_message_that_cannot_be_formatted_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    handler = journal._Journal(SYSLOG_IDENTIFIER="polytmpd")
    handler.handle(logging.LogRecord("polytmpd", logging.INFO, "x.py", 1, "%d", ("no number",), None))
    assert "Arguments: ('no number',)" in capsys.readouterr().err

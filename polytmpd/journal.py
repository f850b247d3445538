# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sends log records to the journal, with fields, or to standard error if there is no journal.

A log call passes `extra=fields(...)` for the fields that administrators search for.
Not here: what is logged.
"""

import logging
import sys
from collections.abc import MutableMapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from systemd.journal import JournalHandler

_SOCKET: Final = Path("/run/systemd/journal/socket")
_PRIORITIES: Final = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.NOTSET, 7))


class MessageId(StrEnum):
    """MESSAGE_ID= of the messages that administrators search for, see sd_journal_print(3)."""

    INSTANCE_NEW = "5f3b8c1d6c0a4f0db58c2e6a9d7b1e01"
    INSTANCE_REMOVED = "5f3b8c1d6c0a4f0db58c2e6a9d7b1e02"
    PREPARE_FAILED = "5f3b8c1d6c0a4f0db58c2e6a9d7b1e03"
    REMOVE_FAILED = "5f3b8c1d6c0a4f0db58c2e6a9d7b1e04"
    BAD_CONFIG = "5f3b8c1d6c0a4f0db58c2e6a9d7b1e05"
    FORMER_USER = "5f3b8c1d6c0a4f0db58c2e6a9d7b1e06"
    DEVICE_GONE = "5f3b8c1d6c0a4f0db58c2e6a9d7b1e07"
    DIRECTORY_LOST = "5f3b8c1d6c0a4f0db58c2e6a9d7b1e08"
    EXEMPT = "5f3b8c1d6c0a4f0db58c2e6a9d7b1e09"


def fields(
    message_id: MessageId | None = None, uid: int | None = None, user: str | None = None
) -> dict[str, str]:
    """The journal fields of a record.

    They avoid the names that JournalHandler uses itself, such as PRIORITY and MESSAGE.
    """
    found = {
        "MESSAGE_ID": None if message_id is None else message_id.value,
        "POLYTMP_UID": None if uid is None else str(uid),
        "POLYTMP_USER": user,
    }
    return {name: value for name, value in found.items() if value is not None}


class UserLog(logging.LoggerAdapter[logging.Logger]):
    """A logger whose records have the fields of one user, and those that a call adds with extra=fields()."""

    def __init__(self, logger: logging.Logger, uid: int, user: str) -> None:
        super().__init__(logger, fields(uid=uid, user=user))

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """LoggerAdapter's own would drop the call's fields; merge_extra= came with Python 3.13."""
        return msg, {**kwargs, "extra": {**(self.extra or {}), **kwargs.get("extra", {})}}


class _Journal(JournalHandler):  # type: ignore[misc]  # systemd-python has no types
    def handleError(self, record: logging.LogRecord) -> None:
        """Send it to standard error: there may be no descriptor left for the journal's socket.

        See SyslogLevelPrefix= in systemd.exec(5).
        """
        try:
            text = record.getMessage()
        except (TypeError, ValueError):  # our mistake
            super().handleError(record)
        else:
            priority = next(number for level, number in _PRIORITIES if record.levelno >= level)
            sys.stderr.write(f"<{priority}>{text}\n")


def set_up(level: int = logging.INFO) -> None:
    """Send records to the journal; in a container without one, or on a terminal, to standard error."""
    handler: logging.Handler
    if _SOCKET.exists() and not sys.stderr.isatty():
        handler = _Journal(SYSLOG_IDENTIFIER="polytmpd")
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("polytmpd").setLevel(level)

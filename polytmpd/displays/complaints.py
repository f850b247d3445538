# SPDX-License-Identifier: LGPL-2.1-or-later
"""Logs each warning once, until its cause is gone.

Runs in any thread.
Not here: what is wrong.
"""

import logging
import threading

from polytmpd.journal import fields

log = logging.getLogger(__name__)


class Complaints:
    """Remembers the subjects of its warnings: short strings that the caller chooses."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subjects: set[str] = set()

    def warn(self, subject: str, message: str, *args: object, uid: int | None = None) -> None:
        """Log a warning, unless this subject already has one. uid goes into the journal's fields."""
        if self._is_new(subject):
            log.warning(message, *args, extra=fields(uid=uid))

    def report(self, error: Exception) -> None:
        """Log an unexpected error with its traceback, once for each type."""
        if self._is_new(f"internal {type(error).__name__}"):
            log.error("Unexpected error, X display locks may be out of date: %r", error, exc_info=error)

    def settle(self, subject: str) -> None:
        """Forget a subject whose cause is gone. If the cause comes back, it is logged again."""
        with self._lock:
            self._subjects.discard(subject)

    def _is_new(self, subject: str) -> bool:
        with self._lock:
            if subject in self._subjects:
                return False
            self._subjects.add(subject)
            return True

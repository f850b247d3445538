# SPDX-License-Identifier: LGPL-2.1-or-later
"""Warnings that are logged once until their cause is gone.

Any thread may use it. Not here: what is wrong.
"""

import logging
import threading

from polytmpd.journal import fields

log = logging.getLogger(__name__)


class Complaints:
    """Remembers what it has complained about. Each subject is a short string of the caller's choice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subjects: set[str] = set()

    def warn(self, subject: str, message: str, *args: object, uid: int | None = None) -> None:
        """Log a warning, unless there is one about this subject already."""
        if self._is_new(subject):
            log.warning(message, *args, extra=fields(uid=uid))

    def report(self, error: Exception) -> None:
        """Log an unexpected error with its traceback, once for each type of error."""
        if self._is_new(f"internal {type(error).__name__}"):
            log.error("Display locks are not shown everywhere: %r", error, exc_info=error)

    def settle(self, subject: str) -> None:
        """The cause is gone: complain again if it comes back."""
        with self._lock:
            self._subjects.discard(subject)

    def _is_new(self, subject: str) -> bool:
        with self._lock:
            if subject in self._subjects:
                return False
            self._subjects.add(subject)
            return True

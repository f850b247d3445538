# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was done and seen in a round: the action log, the counts, the violations, the disturbances.

Not here: who acts and who checks. All of their threads use the same record.
"""

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

_LAST_ACTIONS = 80


class Violation(Exception):
    """Something is not as it must be."""


class Record:
    def __init__(self, path: Path, seed: str) -> None:
        self.path = path
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.violations: list[str] = []
        self.stop = threading.Event()
        self._begin = time.monotonic()
        self._lock = threading.Lock()
        self._last: deque[str] = deque(maxlen=_LAST_ACTIONS)
        self._disturbing = 0
        self._steady_from = self._begin
        self._killed: dict[str, float] = {}
        self._file = path.open("w", buffering=1)

    def close(self) -> None:
        self._file.close()

    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def act(self, who: str, what: str) -> None:
        with self._lock:
            line = f"{time.strftime('%H:%M:%S')} {self.seconds():8.2f} {who:9} {what}"
            self._last.append(line)
            self._file.write(line + "\n")

    def last(self) -> list[str]:
        with self._lock:
            return list(self._last)

    def count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.counts[what] += number

    def refuse(self, reason: str) -> None:
        with self._lock:
            self.counts["refused"] += 1
            self.refused[reason] += 1

    def violate(self, what: str) -> None:
        """Report a violation. The first one ends the round; others that come until then are kept."""
        self.act("VIOLATION", what)
        with self._lock:
            if what not in self.violations:
                self.violations.append(what)
        self.stop.set()

    # Disturbances: during a disturbance and its settling time, logins may be refused and traces may stay.

    @contextlib.contextmanager
    def disturbance(self, settle: float) -> Iterator[None]:
        with self._lock:
            self._disturbing += 1
        try:
            yield
        finally:
            with self._lock:
                self._disturbing -= 1
                self._steady_from = max(self._steady_from, time.monotonic() + settle)

    def steady(self) -> float:
        """Return for how many seconds nothing has disturbed the system; negative during a disturbance."""
        with self._lock:
            return -1.0 if self._disturbing else time.monotonic() - self._steady_from

    def kill(self, user: str) -> None:
        with self._lock:
            self._killed[user] = time.monotonic()

    def killed_since(self, user: str, when: float) -> bool:
        """Whether the user, or every user, was killed after that time (time.monotonic())."""
        with self._lock:
            return max(self._killed.get(user, 0), self._killed.get("*", 0)) > when

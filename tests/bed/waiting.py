# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting for a condition, with a bound.

Not here: what is waited for.
"""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(condition: Callable[[], T], timeout: float = 60, what: str = "condition") -> T:
    """Return the first true value of condition(). An exception counts as "not yet".

    timeout is in seconds. Raises AssertionError, which shows the last value or exception.
    """
    deadline = time.monotonic() + timeout
    delay = 0.02
    while True:
        cause: Exception | None = None
        try:
            value = condition()
        except Exception as error:
            cause = error
            last = f"{type(error).__name__}: {error}"
        else:
            if value:
                return value
            last = repr(value)
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}; the last was {last}") from cause
        time.sleep(delay)  # between two looks at the condition
        delay = min(delay * 1.5, 0.05)

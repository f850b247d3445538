# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon is doing, for SIGUSR1: the stacks of its threads and of its tasks go to the journal.

Not here: when somebody wants to know.

Hard facts
- The threads' stacks are written by faulthandler in the signal handler, also while the event loop hangs. It
  writes to standard error, which is the journal, and knows no tasks.
- The event loop writes the tasks' stacks when it has its turn.
"""

import asyncio
import faulthandler
import logging
import signal
from collections import Counter
from typing import Any, Final

log = logging.getLogger(__name__)

SIGNAL: Final = signal.SIGUSR1
_AT_MOST: Final = 50
"""Different stacks that are written. A thousand logins that wait have the same one."""


def answer(loop: asyncio.AbstractEventLoop) -> None:
    """Answer SIGNAL from now on, until the loop is closed."""
    loop.add_signal_handler(SIGNAL, _write_tasks, loop)
    faulthandler.register(SIGNAL, all_threads=True, chain=True)  # calls asyncio's handler, too


def _write_tasks(loop: asyncio.AbstractEventLoop) -> None:
    stacks = Counter(_stack(task) for task in asyncio.all_tasks(loop))
    log.info("%d tasks, %d different stacks", stacks.total(), len(stacks))
    for stack, number in stacks.most_common(_AT_MOST):
        log.info("%d x %s", number, stack)


def _stack(task: "asyncio.Task[object]") -> str:
    """Where a task waits: each coroutine that awaits another, the outermost first."""
    waits = []
    coroutine: Any = task.get_coro()
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None)  # None once it has ended; a future has none
        if frame is not None:
            waits.append(f"{coroutine.__qualname__}:{frame.f_lineno}")
        coroutine = getattr(coroutine, "cr_await", None)
    return " > ".join(waits) or "about to end"

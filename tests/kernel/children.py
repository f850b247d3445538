# SPDX-License-Identifier: LGPL-2.1-or-later
"""Forked processes that run part of a test elsewhere, or attack it.

A forked child has all of pytest on its stack, and pytest-timeout's handler of SIGALRM. An exception must end
it: otherwise it would return into pytest and become a second test run.
"""

import ctypes
import mmap
import os
import signal
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from polytmpd.kernel import syscalls
from tests.bed import eventually

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def start(work: Callable[[], object], seconds: int = 120, errors: int = 2) -> int:
    """Call work() in a child; returns its pid, which the caller waits for.

    SIGALRM ends it after that many seconds. If work() raises, the traceback goes to the descriptor `errors`,
    and the exit status is 1.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent:
            work()
        os._exit(0)
    except BaseException:
        os.write(errors, traceback.format_exc().encode()[-60000:])
    finally:
        os._exit(1)


def in_child(work: Callable[[], object], seconds: int = 120) -> None:
    """Call work() in a child and wait for it. If it raises, the test fails."""
    with tempfile.TemporaryFile() as said:
        _, status = os.waitpid(start(work, seconds, said.fileno()), 0)
        said.seek(0)
        assert status == 0, said.read().decode() or f"the child ended with status {status}"


def alone() -> None:
    """Hide the mounts that this process makes from now on."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)


def in_namespace(work: Callable[[], object]) -> None:
    """Call work() in a child with its own mount namespace."""

    def inside() -> None:
        alone()
        work()

    in_child(inside)


def become(uid: int) -> None:
    """Switch to that user, for good. Sets the parent-death signal again, which that clears (prctl(2))."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Attack:
    """Processes that attack the test."""

    def __init__(self, pids: list[int], counts: mmap.mmap) -> None:
        self._pids = pids
        self._counts = counts

    @property
    def rounds(self) -> list[int]:
        """How often each has attacked."""
        return list(struct.unpack(f"{len(self._pids)}q", self._counts[:]))


@contextmanager
def attackers(uid: int, *works: Callable[[int], object], seconds: float = 20) -> Iterator[Attack]:
    """A process of that user for each work, which calls it repeatedly with the number of the round.

    They stop after that many seconds. On few processors, several that never pause slow down their target as
    far as the scheduler lets them. A test wants to see them fail, not to see which side tires first.
    """
    counts = mmap.mmap(-1, 8 * len(works))
    attack = Attack([], counts)
    try:
        for index, work in enumerate(works):
            attack._pids.append(start(partial(_strike, uid, index, work, counts, seconds)))
        eventually(lambda: 0 not in attack.rounds, 10, "all attackers have begun")
        yield attack
    finally:
        for pid in attack._pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _strike(uid: int, index: int, work: Callable[[int], object], counts: mmap.mmap, seconds: float) -> None:
    become(uid)
    until = time.monotonic() + seconds
    number = 0
    while time.monotonic() < until:
        number += 1
        with suppress(OSError):
            work(number)
        struct.pack_into("q", counts, 8 * index, number)
    signal.pause()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Forked processes that do a test's work elsewhere, or attack it, and never come back as a second test run.

A forked child has the whole of pytest above it on its stack, and pytest-timeout's handler of SIGALRM: what
it raises must end it, not go on there and report results of its own.
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

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def start(work: Callable[[], object], seconds: int = 120, errors: int = 2) -> int:
    """Returns the child's pid; the caller waits for it. SIGALRM ends it after so long.

    What `work` raises is written to `errors`, and the exit status is 1.
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
    """What it raises fails the test."""
    with tempfile.TemporaryFile() as said:
        _, status = os.waitpid(start(work, seconds, said.fileno()), 0)
        said.seek(0)
        assert status == 0, said.read().decode() or f"the child ended with status {status}"


def alone() -> None:
    """From here on what this process mounts is seen by nobody else."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)


def in_namespace(work: Callable[[], object]) -> None:
    """In a child with a mount namespace of its own."""

    def inside() -> None:
        alone()
        work()

    in_child(inside)


def become(uid: int) -> None:
    """Without a way back; the parent-death signal, which that would clear, is set again (prctl(2))."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Attack:
    """Processes at work against the test."""

    def __init__(self, pids: list[int], counts: mmap.mmap) -> None:
        self._pids = pids
        self._counts = counts

    @property
    def rounds(self) -> list[int]:
        """How often each has struck."""
        return list(struct.unpack(f"{len(self._pids)}q", self._counts[:]))


@contextmanager
def attackers(uid: int, *works: Callable[[int], object], seconds: float = 20) -> Iterator[Attack]:
    """One process each of that user that calls its work over and over, with the number of the round.

    They let off after so long. Several of them on few processors, at it without a pause, can slow down whom
    they attack as far as the scheduler lets them; a test wants to see them fail, and not to see who tires
    first.
    """
    counts = mmap.mmap(-1, 8 * len(works))
    attack = Attack([], counts)
    try:
        for index, work in enumerate(works):
            attack._pids.append(start(partial(_strike, uid, index, work, counts, seconds)))
        deadline = time.monotonic() + 10
        while 0 in attack.rounds and time.monotonic() < deadline:
            time.sleep(0.001)
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

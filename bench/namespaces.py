# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures what a namespace costs, with the daemon's own module: python -m bench.namespaces, JSON on stdout.

Run it under `unshare --mount --pid --fork --mount-proc`: then mounts do no harm, and PID 1's
namespace is this process's.
Not here: logins and calls (__main__.py).
"""

import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from polytmpd.kernel import mountns
from polytmpd.kernel.inotify import IN_DELETE_SELF, Inotify

ALIVE = (1, 50, 200)
REPEAT = 40
CLONE_NEWNS = 0x00020000
CLONE_FS = 0x00000200

_libc = ctypes.CDLL(None, use_errno=True)


def _call(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _slab() -> int:
    """Kernel memory in KiB: all slabs, percpu and kernel stacks."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("Slab", "Percpu", "KernelStack"))


def _milliseconds(work: Callable[[], object], repeat: int = REPEAT) -> float:
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times)


class _Builder:
    """Makes namespaces with a private /tmp and /var/tmp, as the daemon does."""

    def __init__(self, base: Path) -> None:
        self._inotify = Inotify()
        self._places = []
        for path in ("/tmp", "/var/tmp"):
            directory = base / path[1:] / f"polytmp-bench-{os.getpid()}" / "tmp"
            directory.mkdir(parents=True)
            found = directory.stat()
            source = str(directory.relative_to(path))
            self._places.append(mountns.PrivateDirectory(path, source, (found.st_dev, found.st_ino)))

    def build(self) -> int:
        return mountns.build(self._places, lambda path: self._inotify.add_watch(path, IN_DELETE_SELF)).fd


def main() -> int:
    root = Path("/")
    _call(_libc.mount(b"none", b"/", None, (1 << 20) | (1 << 14), None))  # MS_SHARED | MS_REC
    for path in (b"/tmp", b"/var/tmp"):
        _call(_libc.mount(b"bench", path, b"tmpfs", 0, None))  # our own, so that nothing is written outside
    builder = _Builder(root)
    result: dict[str, float] = {"mounts": len(Path("/proc/self/mountinfo").read_text().splitlines())}
    alive: list[int] = []
    memory = 0
    for number in ALIVE:
        before, made_before = _slab(), len(alive)
        while len(alive) < number:
            alive.append(builder.build())
        if (
            number == ALIVE[-1]
        ):  # system-wide: a short interval contains less of what other processes allocate
            memory = (_slab() - before) // (number - made_before)
        made: list[int] = []
        result[f"create, {number} alive, ms"] = _milliseconds(lambda: made.append(builder.build()))  # noqa: B023
        result[f"destroy, {number} alive, ms"] = _milliseconds(lambda: os.close(made.pop()))  # noqa: B023
        result[f"mount on the host, {number} alive, ms"] = _milliseconds(_mount_and_umount)
    result["kernel memory per namespace, KiB"] = memory
    result["setns, µs"] = _setns(alive[0])
    json.dump(result, sys.stdout)
    return 0


def _mount_and_umount() -> None:
    _call(_libc.mount(b"probe", b"/mnt", b"tmpfs", 0, None))
    _call(_libc.umount2(b"/mnt", 2))


def _setns(fd: int) -> float:
    """Microseconds per setns(2). It moves this process, so measure it last."""
    _call(_libc.unshare(CLONE_FS))
    return _milliseconds(lambda: _call(_libc.setns(fd, CLONE_NEWNS)), 1000) * 1000


if __name__ == "__main__":
    sys.exit(main())

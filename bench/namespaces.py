# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures what a namespace costs, with the daemon's own module: python -m bench.namespaces MOUNTS, JSON on
stdout. MOUNTS: how many mounts the host has besides its own.

Run it under `unshare --mount --pid --fork --mount-proc`: then mounts do no harm, and PID 1's
namespace is this process's.
Not here: logins (logins), instances of the daemon (crowd).
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
FOR_MEMORY = 500
CLONE_NEWNS = 0x00020000
CLONE_FS = 0x00000200

_libc = ctypes.CDLL(None, use_errno=True)


def _call(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class _Memory:
    """What the kernel charges to this process: a memory cgroup of its own, version 1 or 2.

    The kernel charges in steps of up to 64 pages for each CPU: measure something large.
    """

    def __init__(self) -> None:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        first = next((line.split(":")[2] for line in groups if ":memory:" in line), None)
        if first is not None:
            self._group, self._file = Path("/sys/fs/cgroup/memory"), "memory.kmem.usage_in_bytes"
            self._former = self._group / first.lstrip("/")
        else:
            self._group, self._file = Path("/sys/fs/cgroup"), "memory.stat"
            self._former = self._group / groups[-1].split(":")[2].lstrip("/")
        self._own = self._group / f"polytmp-bench-{os.getpid()}"
        self._own.mkdir()
        (self._own / "cgroup.procs").write_text("0")

    def used(self) -> int:
        """Bytes of kernel memory."""
        text = (self._own / self._file).read_text()
        fields = dict(line.split() for line in text.splitlines()) if " " in text else {"kernel": text}
        return int(fields["kernel"])

    def close(self) -> None:
        (self._former / "cgroup.procs").write_text("0")
        self._own.rmdir()


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
    for number in range(int(sys.argv[1])):
        place = f"/mnt/{number}"
        if number == 0:
            _call(_libc.mount(b"bench", b"/mnt", b"tmpfs", 0, None))
        os.mkdir(place)  # noqa: PTH102
        _call(_libc.mount(b"bench", place.encode(), b"tmpfs", 0, None))
    builder = _Builder(root)
    result: dict[str, float] = {"mounts": len(Path("/proc/self/mountinfo").read_text().splitlines())}
    alive: list[int] = []
    for number in ALIVE:
        while len(alive) < number:
            alive.append(builder.build())
        made: list[int] = []
        result[f"create, {number} alive, ms"] = _milliseconds(lambda: made.append(builder.build()))  # noqa: B023
        result[f"destroy, {number} alive, ms"] = _milliseconds(lambda: os.close(made.pop()))  # noqa: B023
        result[f"mount on the host, {number} alive, ms"] = _milliseconds(_mount_and_umount)
    memory = _Memory()
    before = memory.used()
    alive += [builder.build() for _ in range(FOR_MEMORY)]
    result["kernel memory per namespace, KiB"] = (memory.used() - before) / FOR_MEMORY / 1024
    memory.close()
    result["setns, µs"] = _setns(alive[0])
    json.dump(result, sys.stdout)
    return 0


def _mount_and_umount() -> None:
    _call(_libc.mount(b"probe", b"/media", b"tmpfs", 0, None))
    _call(_libc.umount2(b"/media", 2))


def _setns(fd: int) -> float:
    """Microseconds per setns(2). It moves this process, so measure it last."""
    _call(_libc.unshare(CLONE_FS))
    return _milliseconds(lambda: _call(_libc.setns(fd, CLONE_NEWNS)), 1000) * 1000


if __name__ == "__main__":
    sys.exit(main())

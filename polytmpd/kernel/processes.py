# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which processes live in which mount namespace, and in which cgroup.

Not here: what follows from it. A scan of /proc is used to answer questions and to join a namespace again,
never to decide that nobody is left: a process may come and go between two reads.

Hard facts
- /proc/PID/ns/mnt is the thread group leader's. A leader that ended while other threads live has none
  (ENOENT or EINVAL): /proc/PID/task/TID/ns/mnt of a living thread has.
- Pids are used again. A namespace descriptor is checked by its inode after it was opened: then it is the
  right one, whoever's it was.
- Reading /proc/PID/cmdline waits for the process's memory map, which its user can keep locked for ever: a
  thread in mmap(2) of a file of his own FUSE. Nothing but SIGKILL ends the wait, so another process reads.
- Reading another user's ns links needs CAP_SYS_PTRACE (PTRACE_MODE_READ_FSCREDS).
"""

import contextlib
import errno
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

_COMMANDS_TIMEOUT: Final = 1.0
_DESCRIPTORS_TIMEOUT: Final = 1.0
_THREADS_AT_MOST: Final = 1000
"""Threads that are asked whose a process is.

Threads that live elsewhere than their leader are rare, and are few where they are: container runtimes.
"""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Process:
    """A process as a listing shows it: pid, and its command line, or [comm] where it has none."""

    pid: int
    command: str


def pids() -> Iterator[int]:
    """All processes of this pid namespace, in no order."""
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdecimal():
                yield int(entry.name)


def namespace_paths(pid: int) -> Iterator[str]:
    """Paths under which a process's mount namespaces can be opened: the leader's, then every thread's."""
    yield f"/proc/{pid}/ns/mnt"
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            if int(task) != pid:
                yield f"/proc/{pid}/task/{task}/ns/mnt"


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def namespaces(pid: int) -> set[int]:
    """The inodes of the mount namespaces that a process lives in; empty where there is no such process.

    Of one with very many threads, only some are looked at, its leader in any case: 15 ms, not a second.
    """
    some = itertools.islice(namespace_paths(pid), _THREADS_AT_MOST)
    return {inode for path in some if (inode := _inode(path)) is not None}


def in_namespace(pid: int, inode: int, cancelled: Callable[[], bool] = lambda: False) -> bool:
    """Whether the process, or any thread of it, lives in the mount namespace with that inode now.

    Cancelled, it says that it does not. Blocking: a process may have as many threads as there are pids.
    """
    wanted = itertools.takewhile(lambda _: not cancelled(), namespace_paths(pid))
    return any(_inode(path) == inode for path in wanted)


def open_namespace(inode: int) -> int | None:
    """A descriptor of the mount namespace with that inode, through any process that lives in it or holds it
    open.

    The caller closes it. None where nobody was found. TimeoutError where nobody lives in it, and there are
    more open descriptors than can be looked at in a second: users decide how many. Blocking: reads all of
    /proc.
    """
    for pid in pids():
        for path in namespace_paths(pid):
            if _inode(path) == inode and (fd := _open_checked(path, inode)) is not None:
                return fd
    deadline = time.monotonic() + _DESCRIPTORS_TIMEOUT
    for pid in pids():  # a namespace can be held by an open descriptor alone
        for path in _descriptors(pid):
            if time.monotonic() > deadline:
                text = f"too many open descriptors to find who holds mnt:[{inode}]"
                raise TimeoutError(errno.ETIMEDOUT, text)
            with contextlib.suppress(OSError):
                if os.readlink(path) == f"mnt:[{inode}]" and (fd := _open_checked(path, inode)) is not None:
                    return fd
    return None


def _descriptors(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            yield entry.path


def _open_checked(path: str, inode: int) -> int | None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(fd).st_ino == inode:
            return fd
        os.close(fd)
    return None


def in_each_namespace(look: Callable[[str], T]) -> Iterator[tuple[int, int, T]]:
    """(namespace inode, pid, what look gave) of each mount namespace that a process lives in, once.

    look(process) reads /proc/{process}/mountinfo; where it raises OSError another process is tried, but for
    ECANCELED, which is passed on. Blocking: reads all of /proc.
    """
    seen: set[int] = set()
    for pid in pids():
        for path in namespace_paths(pid):
            inode = _inode(path)
            if inode is None or inode in seen:
                continue
            process = path.removeprefix("/proc/").removesuffix("/ns/mnt")
            try:
                found = look(process)
            except OSError as error:
                if error.errno == errno.ECANCELED:
                    raise
                continue
            if _inode(path) == inode:
                seen.add(inode)
                yield inode, pid, found


def commands(pids: Sequence[int], cancelled: Callable[[], bool] = lambda: False) -> list[str]:
    """The command line of each on one line, unprintable characters replaced; [comm] for those without one,
    and for all that are left when somebody's cannot be read in time. Cancelled, any text.
    """
    deadline = time.monotonic() + _COMMANDS_TIMEOUT
    return ["?" if cancelled() else _command(pid, deadline - time.monotonic()) for pid in pids]


def _command(pid: int, timeout: float) -> str:
    words = _command_line(pid, timeout).rstrip(b"\0").split(b"\0") if timeout > 0 else []
    text = b" ".join(words).decode(errors="replace").strip()
    if not text:
        try:
            text = "[" + Path(f"/proc/{pid}/comm").read_text(errors="replace").strip() + "]"
        except OSError:
            return "?"
    return "".join(character if character.isprintable() else "?" for character in text)


def _command_line(pid: int, timeout: float) -> bytes:
    argv = ["/bin/cat", f"/proc/{pid}/cmdline"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        # All our descriptors are O_CLOEXEC.
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
            close_fds=False,
            check=False,
        ).stdout
    return b""


def _processes(pids: Iterable[int], cancelled: Callable[[], bool]) -> list[Process]:
    ordered = sorted(pids)
    return [Process(pid, text) for pid, text in zip(ordered, commands(ordered, cancelled), strict=True)]


def living_in(inode: int, cancelled: Callable[[], bool] = lambda: False) -> list[Process]:
    """The processes with at least one thread in that mount namespace; cancelled, some of them.

    Blocking: reads all of /proc.
    """
    return _processes((pid for pid in pids() if in_namespace(pid, inode, cancelled)), cancelled)


def in_cgroup(directory: str, cancelled: Callable[[], bool] = lambda: False) -> list[Process]:
    """The processes in a cgroup and below it (its path in /sys/fs/cgroup); cancelled, some of them.

    Empty where there is no such cgroup.
    """
    found: set[int] = set()
    for path, _, files in os.walk(directory):
        if cancelled():
            break
        if "cgroup.procs" in files:
            with contextlib.suppress(OSError):
                found.update(map(int, Path(path, "cgroup.procs").read_text().split()))
    return _processes(found - {0}, cancelled)

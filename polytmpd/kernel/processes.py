# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which processes live in which mount namespace, and which in which cgroup.

Not here: what follows from it. A scan of /proc answers questions and finds a namespace to join again. It
never proves that a namespace is empty: a process may come and go between two reads.

Hard facts
- /proc/PID/ns/mnt is that of the thread group leader. If the leader has ended while other threads live, it
  cannot be read (ENOENT or EINVAL), but /proc/PID/task/TID/ns/mnt of a living thread can.
- Pids are reused. So the inode of a namespace is checked after the namespace has been opened: if it matches,
  the descriptor is the right one, whichever process it came from.
- Reading /proc/PID/cmdline takes the lock of the process's memory map, which its user can hold indefinitely:
  a thread in mmap(2) of a file on their own FUSE. Only SIGKILL ends the wait, so another process reads it.
- Reading another user's ns links needs CAP_SYS_PTRACE (PTRACE_MODE_READ_FSCREDS).
"""

import contextlib
import errno
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from polytmpd.kernel.descriptor import Descriptor

_COMMANDS_TIMEOUT: Final = 1.0
_DESCRIPTORS_TIMEOUT: Final = 1.0
_THREADS_AT_MOST: Final = 1000
"""How many threads of a process are checked for their namespace.

Threads that live in another namespace than their leader are rare, and few: those of container runtimes.
"""
_AT_ONCE: Final = 64
_GIVES_UP: Final = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ECANCELED}
"""Errors that are about us, not about the process."""
_LINKS_OF_ONE_THREAD: Final = 3
"""Of /proc/PID/task: each thread adds one, also a leader that has ended."""


@contextlib.contextmanager
def _may_be_gone() -> Iterator[None]:
    """Suppress the errors of a process that has ended, or may not be examined. Raise those about us."""
    try:
        yield
    except OSError as error:
        if error.errno in _GIVES_UP:
            raise


class Process(NamedTuple):
    """A process as a listing shows it: its pid, and its command line, or [comm] if it has none."""

    pid: int
    command: str


def pids() -> Iterator[int]:
    """All processes of this pid namespace, in no particular order."""
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdecimal():
                yield int(entry.name)


def namespace_paths(pid: int) -> Iterator[str]:
    """Paths that open a process's mount namespaces: the leader's, then that of every other thread.

    Raises OSError if we lack descriptors or memory.
    """
    yield f"/proc/{pid}/ns/mnt"
    with _may_be_gone():
        if os.stat(f"/proc/{pid}/task").st_nlink == _LINKS_OF_ONE_THREAD:
            return
        for task in os.listdir(f"/proc/{pid}/task"):
            if int(task) != pid:
                yield f"/proc/{pid}/task/{task}/ns/mnt"


def descriptor_paths(pid: int) -> Iterator[str]:
    """The links of a process's open descriptors, in no particular order; none if it is gone.

    Reads the directory piece by piece: listing a million descriptors takes seconds. Raises OSError if we
    lack descriptors or memory.
    """
    with _may_be_gone(), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            yield entry.path


def open_namespaces(pid: int, go_on: Callable[[], None]) -> Iterator[tuple[str, int]]:
    """(link, inode) of each mount namespace that a process has open; none if it is gone.

    go_on() is called now and then, and may raise. Raises OSError, too, if we lack descriptors or memory.
    """
    with (
        _may_be_gone(),
        Descriptor.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY) as directory,
        os.scandir(directory) as entries,
    ):
        for number, entry in enumerate(entries):
            if not number % _AT_ONCE:
                go_on()
            try:
                target = os.readlink(entry.name, dir_fd=directory)  # half the time of a whole path
            except OSError:
                continue
            if target.startswith("mnt:["):
                yield f"/proc/{pid}/fd/{entry.name}", int(target[5:-1])


def cgroup_pids(directory: str, cancelled: Callable[[], bool] = lambda: False) -> set[int]:
    """The pids in a cgroup and all cgroups below it; if cancelled, some of them.

    directory: the cgroup's path in /sys/fs/cgroup. Users nest cgroups as deep as they like, so this does not
    recurse. Empty if there is no such cgroup.
    """
    found: set[int] = set()
    pending = [directory]
    while pending and not cancelled():
        path = pending.pop()
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            pending.extend(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
        with contextlib.suppress(OSError), open(f"{path}/cgroup.procs") as file:
            found.update(map(int, file.read().split()))
    return found - {0}  # 0: a process of another pid namespace


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


def namespaces(pid: int) -> set[int]:
    """The inodes of the mount namespaces that a process lives in; empty if there is no such process.

    Checks the leader and at most 1000 threads in all, which takes 15 ms and not a second.
    """
    some = itertools.islice(namespace_paths(pid), _THREADS_AT_MOST)
    return {inode for path in some if (inode := _inode(path)) is not None}


def in_namespace(pid: int, inode: int, cancelled: Callable[[], bool] = lambda: False) -> bool:
    """Whether any thread of the process now lives in the mount namespace with that inode.

    False if cancelled. Blocking: a process may have as many threads as there are pids.
    """
    wanted = itertools.takewhile(lambda _: not cancelled(), namespace_paths(pid))
    return any(_inode(path) == inode for path in wanted)


def open_namespace(inode: int) -> Descriptor | None:
    """Open the mount namespace with that inode through any process that lives in it or has it open.

    The caller closes it. None if there is no such process. Raises TimeoutError if no process lives in it and
    there are more open descriptors than can be checked in a second: users decide how many. Raises OSError if
    this process cannot open anything (EMFILE). Blocking: reads all of /proc.
    """
    for pid in pids():
        for path in namespace_paths(pid):
            if _inode(path) == inode and (fd := _open_checked(path, inode)) is not None:
                return fd
    deadline = time.monotonic() + _DESCRIPTORS_TIMEOUT
    for pid in pids():  # an open descriptor alone keeps a namespace, too
        for path in descriptor_paths(pid):
            if time.monotonic() > deadline:
                text = f"too many open descriptors to find which process holds mnt:[{inode}]"
                raise TimeoutError(errno.ETIMEDOUT, text)
            if _target(path) == f"mnt:[{inode}]" and (fd := _open_checked(path, inode)) is not None:
                return fd
    return None


def _target(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _open_checked(path: str, inode: int) -> Descriptor | None:
    """None if the process has ended, or does not have that one any more."""
    with _may_be_gone(), Descriptor.open(path, os.O_RDONLY) as fd:
        if os.fstat(fd).st_ino == inode:
            return Descriptor(fd.detach())
    return None


def commands(pids: Sequence[int], cancelled: Callable[[], bool] = lambda: False) -> list[str]:
    """The command line of each process on one line, with unprintable characters replaced.

    [comm] for a process without one, and for all that remain after a second. If cancelled, any text.
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
        # close_fds=False: all our descriptors are O_CLOEXEC.
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
    """The processes with at least one thread in that mount namespace; if cancelled, some of them.

    Blocking: reads all of /proc.
    """
    return _processes((pid for pid in pids() if in_namespace(pid, inode, cancelled)), cancelled)


def in_cgroup(directory: str, cancelled: Callable[[], bool] = lambda: False) -> list[Process]:
    """The processes that cgroup_pids() finds."""
    return _processes(cgroup_pids(directory, cancelled), cancelled)

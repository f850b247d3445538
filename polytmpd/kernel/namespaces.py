# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds every mount namespace, whatever the processes in it would show.

Not here: what is mounted in one (mounted), and joining one (processes.open_namespace).

Hard facts
- NS_MNT_GET_NEXT (Linux 6.12) finds all namespaces, also those that only a descriptor keeps: open, in flight
  between processes, or bind-mounted. Since Linux 6.18 the kernel refuses it in a container. Then the open
  descriptors of all processes are searched.
- A namespace in which our own threads work is in no list unless another process is there, too.
"""

import contextlib
import errno
import os
from collections.abc import Collection, Iterator
from functools import partial
from typing import NamedTuple

from polytmpd.kernel import host, patience
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.patience import Cancelled, Patience
from polytmpd.kernel.processes import namespace_paths, open_namespaces, pids
from polytmpd.kernel.syscalls import NS_MNT_GET_NEXT, NS_MNT_GET_PREV, neighbour


def _never() -> bool:
    return False


class Found(NamedTuple):
    """A mount namespace.

    fd: valid until the next one is asked for. processes: those that live in it, as directories of /proc;
    None if they have not been searched for, see inhabitants(). pid: one of them, or one that has it open; 0
    if there is none to name.
    """

    fd: Descriptor
    inode: int
    pid: int = 0
    processes: tuple[str, ...] | None = ()


def inhabited(cancelled: Cancelled = _never, known: Collection[int] = ()) -> Iterator[Found]:
    """The mount namespaces that processes live in, once each; not those that only our own threads are in.

    known: inodes of those that are left out.
    Blocking: reads all of /proc. Raises OSError; ECANCELED if cancelled.
    """
    members: dict[int, list[str]] = {}
    for pid in pids():
        if pid == os.getpid():
            continue
        for path in namespace_paths(pid):
            go_on(cancelled)
            with contextlib.suppress(OSError):
                members.setdefault(os.stat(path).st_ino, []).append(path)
    for inode, paths in members.items():
        go_on(cancelled)
        if inode in known:
            continue
        if (opened := _open_any(paths, inode)) is not None:
            with opened:
                inside_of = tuple(map(_process_of, paths))
                yield Found(opened, inode, _pid_of(inside_of), inside_of)


def every(limits: Patience) -> Iterator[Found]:
    """All mount namespaces, as far as the kernel shows them, once each.

    If it shows them all, no process is searched for: a host may have thousands. Otherwise inhabited(), and
    then those that only an open descriptor keeps. Blocking, for as long as users have open descriptors,
    within the limits. Raises OSError; ECANCELED if cancelled.
    """
    if _shows_neighbours():
        yield from _neighbours(limits.cancelled)
        return
    seen: set[int] = set()
    for found in inhabited(limits.cancelled):
        seen.add(found.inode)
        yield found
    for found in _open_ones(seen, limits):
        if found.inode not in seen:
            seen.add(found.inode)
            yield found


def inhabitants(found: Found) -> tuple[str, ...]:
    """The processes that live in a namespace, as directories of /proc. Blocking: may read all of /proc."""
    if found.processes is not None:
        return found.processes
    living: list[str] = []
    for pid in pids():
        if pid == os.getpid():
            continue
        for path in namespace_paths(pid):
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == found.inode:
                    living.append(_process_of(path))
    return tuple(living)


def pid_of(found: Found) -> int:
    """A process that lives in a namespace; 0 if there is none to name. Blocking: may read all of /proc."""
    return found.pid or _pid_of(inhabitants(found))


def users_of(found: Found) -> set[int]:
    """The users whose processes live in a namespace, without those that have ended."""
    users: set[int] = set()
    for process in inhabitants(found):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            users.add(patience.user_of(process))
    return users


def go_on(cancelled: Cancelled) -> None:
    """Raise OSError ECANCELED if cancelled."""
    if cancelled():
        raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))


def _process_of(path: str) -> str:
    return path.removeprefix("/proc/").removesuffix("/ns/mnt")


def _pid_of(processes: Collection[str]) -> int:
    return int(next(iter(processes), "0").partition("/")[0])


def _open_any(paths: Collection[str], inode: int) -> Descriptor | None:
    """Open a namespace through the first of the paths that still leads to it.

    Raises OSError if one may lead to it and cannot be opened.
    """
    for path in paths:
        try:
            with Descriptor.open(path, os.O_RDONLY) as fd:
                if os.fstat(fd).st_ino == inode:
                    return Descriptor(fd.detach())
        except OSError as error:
            # What /proc says of a process that has ended. Anything else may be our own lack of descriptors.
            if error.errno not in {errno.ENOENT, errno.ESRCH, errno.EINVAL}:
                raise
    return None


def _shows_neighbours() -> bool:
    with host.open_namespace() as fd:
        try:
            neighbour(fd, NS_MNT_GET_NEXT).close()
        except OSError as error:
            return error.errno == errno.ENOENT
    return True


def _neighbours(cancelled: Cancelled) -> Iterator[Found]:
    with host.open_namespace() as fd:
        yield Found(fd, os.fstat(fd).st_ino, processes=None)
    for direction in (NS_MNT_GET_NEXT, NS_MNT_GET_PREV):
        with contextlib.ExitStack() as at:
            fd = at.enter_context(host.open_namespace())
            while True:
                go_on(cancelled)
                try:
                    following = neighbour(fd, direction)
                except OSError as error:
                    if error.errno != errno.ENOENT:
                        raise
                    break
                at.close()
                fd = at.enter_context(following)
                yield Found(fd, os.fstat(fd).st_ino, processes=None)


def _open_ones(seen: Collection[int], limits: Patience) -> Iterator[Found]:
    for pid in pids():
        if pid == os.getpid():
            continue
        with limits.on_account_of(partial(patience.user_of, str(pid))) as cancelled:
            yield from _opened_by(pid, seen, cancelled)


def _opened_by(pid: int, seen: Collection[int], cancelled: Cancelled) -> Iterator[Found]:
    for path, inode in open_namespaces(pid, partial(go_on, cancelled)):
        if inode not in seen and (fd := _open_any([path], inode)) is not None:
            with fd:
                yield Found(fd, inode, pid)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds every mount namespace, and what each has mounted, whatever the processes in it would show.

Not here: what a mount means to polytmp, and joining a namespace (processes.open_namespace).

Hard facts
- The mount table of a process has only what its root directory reaches, and a namespace may have mounts that
  no process reaches by a path any more: they lie beneath another mount on "/". Such a mount is in use like
  any other. listmount(2) lists all that are below the first mount of the namespace, which statmount(2) finds
  by going from parent to parent.
- Without those (before Linux 6.11, or in a sandbox whose libseccomp does not know them), the tables of the
  namespace's own root and of every process in it are put together. Then a mount that is hidden from all of
  them is not found.
- The IDs that listmount(2) uses are never given again, and it continues after an ID in ascending order. So a
  mount that is there all the time is listed, whatever else comes and goes.
- The kernel looks each mount up under a lock that every mount(2) of the system waits for, and climbs from it
  to the root: users pile mounts up, up to 100,000. So few are listed at a time, and roots on other devices
  are not read.
- NS_MNT_GET_NEXT (Linux 6.12) finds all namespaces, also those that only a descriptor keeps: open, in flight
  between processes, or bind-mounted. Since Linux 6.18 the kernel refuses it in a container. Then the open
  descriptors of all processes are searched.
- A namespace in which our own threads work is in no list unless another process is there, too.
"""

import contextlib
import errno
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Final, NamedTuple

from polytmpd.kernel import host, inside, mountinfo, patience
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.patience import Cancelled, Patience
from polytmpd.kernel.processes import descriptor_paths, namespace_paths, pids
from polytmpd.kernel.syscalls import (
    LSMT_ROOT,
    NS_MNT_GET_NEXT,
    NS_MNT_GET_PREV,
    STATMOUNT_MNT_BASIC,
    STATMOUNT_MNT_ROOT,
    STATMOUNT_SB_BASIC,
    get_mntns_id,
    listmount,
    neighbour,
    statmount,
)

_LISTED_AT_ONCE: Final = 64
_ATTEMPTS: Final = 100
_ROOT_AT_MOST: Final = 16 << 20
_TOLD_APART_BY: Final = 128
"""Bytes of a line: the IDs of the mount and of its parent come first."""
_NO_ID_YET: Final = 0


def _never() -> bool:
    return False


class Found(NamedTuple):
    """A mount namespace.

    fd: valid until the next one is asked for. processes: those that live in it, as directories of /proc.
    pid: one of them, or one that has it open; 0 if there is none to name.
    """

    fd: Descriptor
    inode: int
    pid: int
    processes: tuple[str, ...] = ()


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
            _go_on(cancelled)
            with contextlib.suppress(OSError):
                members.setdefault(os.stat(path).st_ino, []).append(path)
    for inode, paths in members.items():
        _go_on(cancelled)
        if inode in known:
            continue
        if (opened := _open_any(paths, inode)) is not None:
            with opened:
                inside_of = tuple(path.removeprefix("/proc/").removesuffix("/ns/mnt") for path in paths)
                yield Found(opened, inode, int(inside_of[0].partition("/")[0]), inside_of)


def every(limits: Patience) -> Iterator[Found]:
    """inhabited(), and then those that only a descriptor keeps, as far as the kernel shows them.

    Blocking, for as long as users have open descriptors, within the limits. Raises OSError; ECANCELED if
    cancelled.
    """
    seen: set[int] = set()
    for found in inhabited(limits.cancelled):
        seen.add(found.inode)
        yield found
    others = _neighbours(limits.cancelled) if _shows_neighbours() else _open_ones(seen, limits)
    for found in others:
        if found.inode not in seen:
            seen.add(found.inode)
            yield found


def users_of(found: Found) -> set[int]:
    """The users whose processes live in a namespace, without those that have ended."""
    users: set[int] = set()
    for process in found.processes:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            users.add(patience.user_of(process))
    return users


def roots(
    found: Found, devices: Collection[str], cancelled: Cancelled = _never
) -> Iterator[tuple[str, str]]:
    """(device, root) of each mount of the devices in a namespace, as in mountinfo.

    devices: MAJOR:MINOR. A root may be cut off after 64 KiB. Blocking, for as long as users make their
    tables. Raises OSError; ECANCELED if cancelled, EOVERFLOW if there is a root too long to be read.
    """
    try:
        namespace = get_mntns_id(found.fd)
        top = _top(namespace)
    except OSError as error:
        # Which error depends on who refuses it: the kernel, or the filter of a sandbox.
        if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
            raise
        return _of_devices(tables(found, cancelled), devices, cancelled)
    return _listed(found, namespace, top, devices, cancelled)


def _go_on(cancelled: Cancelled) -> None:
    if cancelled():
        raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))


# Which there are


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
    for direction in (NS_MNT_GET_NEXT, NS_MNT_GET_PREV):
        with contextlib.ExitStack() as at:
            fd = at.enter_context(host.open_namespace())
            while True:
                _go_on(cancelled)
                try:
                    following = neighbour(fd, direction)
                except OSError as error:
                    if error.errno != errno.ENOENT:
                        raise
                    break
                at.close()
                fd = at.enter_context(following)
                yield Found(fd, os.fstat(fd).st_ino, 0)


def _open_ones(seen: Collection[int], limits: Patience) -> Iterator[Found]:
    for pid in pids():
        if pid == os.getpid():
            continue
        try:
            user = patience.user_of(str(pid))
        except (FileNotFoundError, ProcessLookupError):
            continue
        with limits.on_account_of(user) as cancelled:
            yield from _opened_by(pid, seen, cancelled)


def _opened_by(pid: int, seen: Collection[int], cancelled: Cancelled) -> Iterator[Found]:
    for path in descriptor_paths(pid):
        _go_on(cancelled)
        try:
            target = os.readlink(path)
        except OSError:
            continue
        if target.startswith("mnt:["):
            inode = int(target[5:-1])
            if inode not in seen and (fd := _open_any([path], inode)) is not None:
                with fd:
                    yield Found(fd, inode, pid)


# What is mounted


def _top(namespace: int) -> int:
    """The mount that all others of a namespace are below, even those beneath another mount on "/".

    Raises OSError, ENOENT if users unmount what it starts from each time.
    """
    for _ in range(_ATTEMPTS):
        try:
            (mount_id,) = listmount(namespace, LSMT_ROOT, _NO_ID_YET, 1)
            while (parent := statmount(namespace, mount_id, STATMOUNT_MNT_BASIC).parent_id) != mount_id:
                mount_id = parent
            return mount_id
        except FileNotFoundError:
            continue
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))


def _listed(
    found: Found, namespace: int, top: int, devices: Collection[str], cancelled: Cancelled
) -> Iterator[tuple[str, str]]:
    after, ids = _NO_ID_YET, [top]
    while ids:
        _go_on(cancelled)
        for mount_id in ids:
            try:
                device = statmount(namespace, mount_id, STATMOUNT_SB_BASIC).device
                if device in devices:
                    yield device, _root(namespace, mount_id)
            except FileNotFoundError:
                continue  # unmounted meanwhile
            except OSError as error:
                if error.errno == errno.EOVERFLOW:
                    text = f"process {found.pid} has mounted a directory whose path is too long to be read"
                    raise OSError(errno.EOVERFLOW, text) from error
                raise
        ids = listmount(namespace, top, after, _LISTED_AT_ONCE)
        after = ids[-1] if ids else after


def _root(namespace: int, mount_id: int) -> str:
    size = 4096
    while True:
        try:
            return os.fsdecode(statmount(namespace, mount_id, STATMOUNT_MNT_ROOT, size).root)
        except OSError as error:
            if error.errno != errno.EOVERFLOW or size >= _ROOT_AT_MOST:
                raise
            size *= 16


def tables(found: Found, cancelled: Cancelled = _never) -> Iterator[bytes]:
    """The lines of mountinfo of a namespace's own root and of all processes in it, see mountinfo.lines().

    A mount may come more than once, and those that are hidden from all of them do not come. Raises OSError;
    ECANCELED if cancelled.
    """
    with inside.open_table(found.fd) as table:
        yield from mountinfo.lines_from(table)
    read: set[tuple[str, bytes]] = set()
    for process in found.processes:
        _go_on(cancelled)
        try:
            yield from _table_of(process, found.inode, read)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ESRCH, errno.EINVAL}:
                raise  # it has not merely ended


def _table_of(process: str, inode: int, read: set[tuple[str, bytes]]) -> Iterator[bytes]:
    """The table of one process, unless one with the same root directory was read.

    Two root directories with the same path lie on different mounts, and the first line of the table tells
    them apart: it is about the mount that is lowest in the table.
    """
    with contextlib.closing(mountinfo.lines(process)) as lines:
        first = next(lines, b"")
        seen = os.readlink(f"/proc/{process}/root"), first[:_TOLD_APART_BY]
        if seen not in read and os.stat(f"/proc/{process}/ns/mnt").st_ino == inode:
            yield first
            yield from lines
            read.add(seen)


def _of_devices(
    lines: Iterable[bytes], devices: Collection[str], cancelled: Cancelled
) -> Iterator[tuple[str, str]]:
    wanted = [f" {device} ".encode() for device in devices]
    for line in lines:
        _go_on(cancelled)
        if line and any(device in line for device in wanted):
            device, root = mountinfo.device_and_root(line)
            if device in devices:
                yield device, root

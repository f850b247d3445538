# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is mounted in a mount namespace, whatever the processes in it would show.

Not here: which namespaces there are (namespaces), and what a mount means to polytmp.

Hard facts
- The mount table of a process has only what its root directory reaches, and a namespace may have mounts that
  no process reaches by a path any more: they lie beneath another mount on "/". Such a mount is in use like
  any other. listmount(2) lists all that are below the first mount of the namespace, which statmount(2) finds
  by going from parent to parent.
- Without those (before Linux 6.11, or in a sandbox whose libseccomp does not know them), the tables of the
  namespace's own root and of every process in it are put together. Then a mount that is hidden from all of
  them is not found.
- The IDs that listmount(2) uses are never given again, and it continues after an ID in ascending order. So a
  mount that is there all the time is listed, whatever else comes and goes. A mount may be attached long
  after it got its ID: one with a low ID may be new in a namespace.
- A mount never changes its file system. What it shows of it may get another path: directories are renamed.
  The first mount of a namespace stays the first: it has no parent from which it could be moved.
- The kernel looks each mount up under a lock that every mount(2) of the system waits for, and climbs from it
  to the root: users pile mounts up, up to 100,000. So few are listed at a time, and long roots on other
  devices are not read.
"""

import contextlib
import errno
import os
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final, NamedTuple

from polytmpd.kernel import host, inside, mountinfo
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.namespaces import Found, go_on, inhabitants, pid_of
from polytmpd.kernel.patience import Cancelled
from polytmpd.kernel.syscalls import (
    LSMT_ROOT,
    STATMOUNT_MNT_BASIC,
    STATMOUNT_MNT_ROOT,
    STATMOUNT_SB_BASIC,
    get_mntns_id,
    listmount,
    statmount,
)

_LISTED_AT_ONCE: Final = 64
_ATTEMPTS: Final = 100
_ROOT_AT_MOST: Final = 16 << 20
_SIZE: Final = 1024
"""Room for what statmount(2) says of a mount, with a root of the usual length."""
_READ_AT_ONCE: Final = 1 << 16
_TOLD_APART_BY: Final = 128
"""Bytes of a line: the IDs of the mount and of its parent come first."""
_NO_ID_YET: Final = 0
_OUR_LACK: Final = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_HAS_ENDED: Final = {errno.ENOENT, errno.ESRCH, errno.EINVAL}
"""What /proc says of a process."""
KNOWN_AT_MOST: Final = 1 << 20
"""Mounts that are remembered, eight bytes each: enough for 25,000 namespaces with 40 mounts."""


OpenTable = Callable[[int], Descriptor]
"""Opens the table of a namespace as its own root directory shows it; the caller closes it."""


def _never() -> bool:
    return False


class _Listed(NamedTuple):
    """A namespace's first mount, and the IDs of those that are of other devices than the searched ones."""

    top: int
    others: "array[int]"


class Known:
    """What former searches found that cannot change. For one search at a time."""

    def __init__(self) -> None:
        self._devices: frozenset[str] = frozenset()
        self._namespaces: dict[int, _Listed] = {}
        self._seen: dict[int, _Listed] = {}
        self._room = KNOWN_AT_MOST

    @contextlib.contextmanager
    def searching(self, devices: Collection[str]) -> Iterator[None]:
        """During a search for mounts of these devices. At the end, forget the namespaces that are gone."""
        if self._devices != frozenset(devices):
            self._devices, self._namespaces = frozenset(devices), {}
        self._seen, self._room = {}, KNOWN_AT_MOST
        yield
        self._namespaces = self._seen

    def of(self, namespace: int) -> _Listed | None:
        return self._namespaces.get(namespace)

    def note(self, namespace: int, listed: _Listed) -> None:
        self._room -= len(listed.others)
        if self._room >= 0:
            self._seen[namespace] = listed


def lists_mounts() -> bool:
    """Whether the kernel, and our sandbox, let us list the mounts of other namespaces."""
    try:
        with host.open_namespace() as fd:
            listmount(get_mntns_id(fd), LSMT_ROOT, _NO_ID_YET, 1)
    except OSError as error:
        # Which error depends on who refuses it: the kernel, or the filter of a sandbox.
        if error.errno in _OUR_LACK:
            raise
        return False
    return True


def roots(
    found: Found,
    devices: Collection[str],
    names: Collection[str],
    known: Known,
    open_table: OpenTable = inside.open_table,
    cancelled: Cancelled = _never,
) -> Iterator[tuple[str, str]]:
    """(device, root) of each mount of the devices in a namespace, as in mountinfo.

    devices: MAJOR:MINOR. A root in which none of the names is may be left out, and one may be cut off after
    64 KiB. Blocking, for as long as users make their tables. Raises OSError; ECANCELED if cancelled,
    EOVERFLOW if there is a root too long to be read.
    """
    try:
        namespace = get_mntns_id(found.fd)
        former = known.of(namespace)
        top = _top(namespace) if former is None else former.top
    except OSError as error:
        if error.errno in _OUR_LACK:
            raise
        needles = [name.encode() for name in names]
        return _of_devices(_mentioning(found, needles, open_table, cancelled), devices, cancelled)
    return _listed(
        found, namespace, _Listed(top, former.others if former else array("Q")), devices, known, cancelled
    )


# By ID


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
    found: Found,
    namespace: int,
    former: _Listed,
    devices: Collection[str],
    known: Known,
    cancelled: Cancelled,
) -> Iterator[tuple[str, str]]:
    before, others = set(former.others), array("Q")
    after, ids = _NO_ID_YET, array("Q", (former.top,))
    while ids:
        go_on(cancelled)
        for mount_id in ids:
            if mount_id in before:
                others.append(mount_id)
                continue
            try:
                device, root = _device_and_root(namespace, mount_id, devices)
                if root is None:
                    others.append(mount_id)
                else:
                    yield device, root
            except FileNotFoundError:
                continue  # unmounted meanwhile
            except OSError as error:
                if error.errno == errno.EOVERFLOW:
                    text = (
                        f"process {pid_of(found)} has mounted a directory whose path is too long to be read"
                    )
                    raise OSError(errno.EOVERFLOW, text) from error
                raise
        if len(ids) < _LISTED_AT_ONCE and after != _NO_ID_YET:
            break
        try:
            ids = listmount(namespace, former.top, after, _LISTED_AT_ONCE)
        except FileNotFoundError:  # the first mount is another one now
            top = _top(namespace)
            if top == former.top:
                raise
            yield from _listed(found, namespace, _Listed(top, array("Q")), devices, known, cancelled)
            return
        after = ids[-1] if ids else after
    known.note(namespace, _Listed(former.top, others))


def _device_and_root(namespace: int, mount_id: int, devices: Collection[str]) -> tuple[str, str | None]:
    """The root is None if the device is not one of these."""
    try:
        mount = statmount(namespace, mount_id, STATMOUNT_SB_BASIC | STATMOUNT_MNT_ROOT, _SIZE)
    except OSError as error:
        if error.errno != errno.EOVERFLOW:
            raise
        device = statmount(namespace, mount_id, STATMOUNT_SB_BASIC).device
        return device, _root(namespace, mount_id) if device in devices else None
    return mount.device, os.fsdecode(mount.root) if mount.device in devices else None


def _root(namespace: int, mount_id: int) -> str:
    size = 4 * _SIZE
    while True:
        try:
            return os.fsdecode(statmount(namespace, mount_id, STATMOUNT_MNT_ROOT, size).root)
        except OSError as error:
            if error.errno != errno.EOVERFLOW or size >= _ROOT_AT_MOST:
                raise
            size *= 16


# By table


def tables(found: Found, cancelled: Cancelled = _never) -> Iterator[bytes]:
    """The lines of mountinfo of a namespace's own root and of all processes in it, see mountinfo.lines().

    A mount may come more than once, and those that are hidden from all of them do not come. Raises OSError;
    ECANCELED if cancelled.
    """
    for table, _ in _tables(found, inside.open_table, cancelled):
        os.lseek(table, 0, os.SEEK_SET)
        yield from mountinfo.lines_from(table)


def _mentioning(
    found: Found, needles: Collection[bytes], open_table: OpenTable, cancelled: Cancelled
) -> Iterator[bytes]:
    """The lines of those tables() in which one of the needles is. The others are not parsed."""
    for table, begin in _tables(found, open_table, cancelled):
        if _mentions(table, begin, needles, cancelled):
            os.lseek(table, 0, os.SEEK_SET)
            yield from mountinfo.lines_from(table)


def _mentions(table: int, begin: bytes, needles: Collection[bytes], cancelled: Cancelled) -> bool:
    overlap = max(map(len, needles)) - 1
    text = begin
    while text:
        go_on(cancelled)
        if any(needle in text for needle in needles):
            return True
        more = os.read(table, _READ_AT_ONCE)
        text = text[-overlap:] + more if more else b""
    return False


def _tables(found: Found, open_table: OpenTable, cancelled: Cancelled) -> Iterator[tuple[int, bytes]]:
    """(open table, the beginning of it, which has been read), one for each root directory."""
    with open_table(found.fd) as table:
        begin = os.read(table, _READ_AT_ONCE)
        read = {_identity("/", begin)}
        yield table, begin
    for process in inhabitants(found):
        go_on(cancelled)
        try:
            with Descriptor.open(f"/proc/{process}/mountinfo", os.O_RDONLY) as table:
                begin = os.read(table, _READ_AT_ONCE)
                seen = _identity(os.readlink(f"/proc/{process}/root"), begin)
                if seen not in read and os.stat(f"/proc/{process}/ns/mnt").st_ino == found.inode:
                    yield table, begin
                    read.add(seen)
        except OSError as error:
            if error.errno not in _HAS_ENDED:
                raise


def _identity(root: str, table: bytes) -> tuple[str, bytes]:
    """Two root directories with the same path lie on different mounts, and the first line of the table tells
    them apart: it is about the mount that is lowest in the table.
    """
    return root, table[:_TOLD_APART_BY].partition(b"\n")[0]


def _of_devices(
    lines: Iterable[bytes], devices: Collection[str], cancelled: Cancelled
) -> Iterator[tuple[str, str]]:
    wanted = [f" {device} ".encode() for device in devices]
    for line in lines:
        go_on(cancelled)
        if line and any(device in line for device in wanted):
            device, root = mountinfo.device_and_root(line)
            if device in devices:
                yield device, root

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes a mount namespace in which some directories are private and every other mount stays the host's peer.

Not here: which directories, who owns them, how long the namespace lives, and what happens in it afterwards
(kernel/inside).

Hard facts
- A thread may unshare(CLONE_FS | CLONE_NEWNS) for itself alone; nothing else in the process moves. Such a
  thread is disposable: it must never return to a pool.
- unshare(CLONE_NEWNS) copies all mounts as *peers* of the host's (mount_namespaces(7), "shared subtrees").
  util-linux's unshare(1) makes them private by default; the system call does not.
- Making a mount private and undoing it: move_mount(2) with MOVE_MOUNT_SET_GROUP, Linux 5.15. Source and
  target must both be roots of mounts, and the target must be private.
- What happens on the host between the two is missed. As a slave a mount still receives events, but what is
  mounted meanwhile becomes a slave, too. So the containing mounts are slaves for a few system calls, and
  private between two. Any user may mount a thousand times per second (fusermount3).
- poll(2) of a mount table reports each event in its namespace since the table was opened or last polled.
  Without an event, nothing was missed. Otherwise the namespace is built again. Only if that happens many
  times are the tables compared: what was missed stays different, and what comes and goes does not.
- Mounts below /tmp on the host are copied, too. When the host unmounts them, the copies would stay behind,
  hidden and busy: nothing propagates below a private parent. So they are detached here. They are made
  private first, recursively: MNT_DETACH of a shared subtree would propagate to the host.
- open_tree(OPEN_TREE_CLONE) and move_mount() act only on mounts of the caller's own namespace (check_mnt in
  fs/namespace.c). So the sources are opened after unshare(), and must have the inodes that storage made.
- In the end, the mount that contains a plain directory is the host's peer again: what is mounted on that
  directory from then on appears on the host, too. So beneath each private directory lies the sentinel, a
  private mount. kernel/inside can mount on it, and the user never sees the host's directory.
- Any descriptor that was opened through a mount of the new namespace keeps that mount's file system busy.
  None may outlive build(), or the sentinel never reports the end.
- fs.mount-max (100000 by default) makes unshare() fail with ENOSPC, and so does user.max_mnt_namespaces.
"""

import contextlib
import errno
import functools
import os
import select
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from polytmpd.kernel import host, mountinfo
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.inside import (
    act_on,
    attach,
    clone,
    detach_all,
    enter,
    in_disposable_thread,
    new_sentinel,
    watch,
)
from polytmpd.kernel.mountinfo import Mount
from polytmpd.kernel.syscalls import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    CLONE_NEWNS,
    MOVE_MOUNT_SET_GROUP,
    MS_PRIVATE,
    MS_REC,
    MS_SLAVE,
    OPEN_TREE_CLONE,
    get_nstype,
    get_userns,
    mount,
    move_mount,
    open_tree,
    set_propagation,
    unshare,
)

_BUILDS_AT_MOST: Final = 32
_BUILDS_UNCOMPARED: Final = 6
"""With a thousand mounts on the host, another attempt takes 10 ms, and comparing takes 50 ms or more."""
_READS_AT_MOST: Final = 4
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY


class PrivateDirectory(NamedTuple):
    """One directory to make private.

    path: absolute path on the host without symbolic links, for example /tmp.
    source: the directory that takes its place, relative to path, for example polytmp-…/tmp.
    identity: the (st_dev, st_ino) that the source must have; anything else in its place is refused.
    shared: names in path that stay the host's directories, for example .X11-unix; they must exist in source,
    too.
    """

    path: str
    source: str
    identity: tuple[int, int]
    shared: tuple[str, ...] = ()


class Namespace(NamedTuple):
    """A new mount namespace.

    fd: the caller closes it. watch: the watch descriptor of the sentinel.
    """

    fd: Descriptor
    inode: int
    watch: int


class _HostChangedError(Exception):
    """The namespace may have missed a mount event of the host; build it again."""


def build(directories: Sequence[PrivateDirectory], watch_sentinel: Callable[[str], int]) -> Namespace:
    """Make the namespace from PID 1's, whatever the calling process's own is. Blocks for a millisecond.

    watch_sentinel(path) watches the sentinel's root and returns a watch descriptor; the path is valid during
    the call only. Requires CAP_SYS_ADMIN, CAP_SYS_CHROOT and CAP_SYS_PTRACE. Raises OSError, and then leaves
    nothing behind.
    """
    if not directories:
        raise OSError(errno.EINVAL, "no directory to make private")
    for number in range(_BUILDS_AT_MOST):
        build_once = functools.partial(_build, directories, watch_sentinel, number >= _BUILDS_UNCOMPARED)
        try:
            return in_disposable_thread(build_once)
        except _HostChangedError:
            continue
    raise OSError(
        errno.EAGAIN, "the host's mounts change too fast to make a namespace that agrees with them"
    )


def is_privileged(fd: int) -> bool:
    """Whether a mount namespace belongs to our own user namespace, like those that root makes.

    One that a user makes without privileges (unshare -U, bwrap, podman) belongs to a user namespace of
    theirs.
    """
    with get_userns(fd) as owner:
        return os.path.samestat(os.fstat(owner), os.stat("/proc/self/ns/user"))


def namespace_inode(fd: int) -> int:
    """The inode of a mount namespace. Raises OSError (EINVAL) if the descriptor is anything else."""
    if get_nstype(fd) != CLONE_NEWNS:
        raise OSError(errno.EINVAL, f"descriptor {fd} is a namespace, but not a mount namespace")
    return os.fstat(fd).st_ino


class _Containing(NamedTuple):
    """The mount in which a private directory lies. host_fd: the mount itself, in the host's namespace."""

    mount: Mount
    host_fd: Descriptor


class _Prepared(NamedTuple):
    """What is mounted for one directory, and the directory itself, in the new namespace."""

    path: str
    place: Descriptor
    source: Descriptor
    shared: dict[str, Descriptor]

    def cover(self, sentinel: int) -> None:
        move_mount(sentinel, self.place)
        move_mount(self.source, sentinel)

    def share(self) -> None:
        for place, tree in self.shared.items():
            attach(tree, place)


def _build(
    directories: Sequence[PrivateDirectory], watch_sentinel: Callable[[str], int], compare: bool
) -> Namespace:
    """compare: find out whether a mount event was missed, rather than raise _HostChangedError at once."""
    with contextlib.ExitStack() as fds:
        enter(fds.enter_context(host.open_namespace()))
        containing = _find_containing(directories, fds)
        unshare(CLONE_NEWNS)
        paths = [directory.path for directory in directories]
        for mount_point in set(paths) & set(containing):  # these stay private, with all below them
            mount("none", mount_point, None, MS_PRIVATE | MS_REC)
        outer = {
            fds.enter_context(Descriptor.open(mount_point, _DIRECTORY)): holder
            for mount_point, holder in containing.items()
            if mount_point not in paths
        }
        with contextlib.closing(mountinfo.lines("thread-self")) as lines:
            table = mountinfo.below(lines, paths)
        sentinel = fds.enter_context(new_sentinel())
        sentinels = _copies(sentinel, fds)
        prepared = [_prepare(directory, fds) for directory in directories]
        own = [each for each in prepared if each.path in containing]
        plain = [each for each in prepared if each.path not in containing]
        _cover(own, table, sentinels)
        if plain and _away_from_host(outer, lambda: _cover(plain, table, sentinels)):
            if not compare:
                raise _HostChangedError
            _compare_with_host(paths)
        for each in prepared:
            each.share()
        number = watch(sentinel, watch_sentinel)
        inode = os.stat("/proc/thread-self/ns/mnt").st_ino
        return Namespace(Descriptor.open("/proc/thread-self/ns/mnt", os.O_RDONLY), inode, number)


def _copies(mounted: Descriptor, fds: contextlib.ExitStack) -> Iterator[Descriptor]:
    """A mount, and then as many copies of it as are asked for. It must be mounted before the first copy."""
    yield mounted
    while True:
        yield fds.enter_context(open_tree(mounted, "", OPEN_TREE_CLONE | AT_EMPTY_PATH))


def _prepare(directory: PrivateDirectory, fds: contextlib.ExitStack) -> _Prepared:
    source = fds.enter_context(_open_source(directory))
    place = fds.enter_context(Descriptor.open(directory.path, _DIRECTORY | os.O_NOFOLLOW))
    places = [f"{directory.path}/{name}" for name in directory.shared]
    shared = {path: fds.enter_context(clone(path)) for path in places}
    return _Prepared(directory.path, place, source, shared)


def _cover(prepared: Iterable[_Prepared], table: Sequence[Mount], sentinels: Iterator[Descriptor]) -> None:
    for each in prepared:
        _detach_below(table, each.path)
        each.cover(next(sentinels))


def _away_from_host(outer: Mapping[Descriptor, _Containing], work: Callable[[], None]) -> bool:
    """Call work() while these mounts of ours send nothing to the host. Every system call in it counts.

    Returns whether an event of the host may have been missed.
    """
    with open("/proc/1/mountinfo", "rb", buffering=0) as events:
        for root in outer:
            set_propagation(root, MS_SLAVE)
        work()
        for root, holder in outer.items():
            if holder.mount.propagates:
                set_propagation(root, MS_PRIVATE)
                move_mount(holder.host_fd, root, MOVE_MOUNT_SET_GROUP)
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        return any(what & (select.POLLERR | select.POLLPRI) for _, what in poll.poll(0))


def _find_containing(
    directories: Sequence[PrivateDirectory], fds: contextlib.ExitStack
) -> dict[str, _Containing]:
    """The mounts that contain the directories, by mount point; fds closes their descriptors.

    Runs in the host's namespace, before unshare().
    """
    ids: dict[str, int] = {}
    for directory in directories:
        with Descriptor.open(directory.path, _DIRECTORY | os.O_NOFOLLOW) as fd:
            ids[directory.path] = mountinfo.mount_id_of(fd)
    with contextlib.closing(mountinfo.lines("thread-self")) as lines:
        by_id = mountinfo.with_ids(lines, set(ids.values()))
    found: dict[str, _Containing] = {}
    for directory in directories:
        entry = by_id.get(ids[directory.path])
        if entry is None:
            raise _HostChangedError
        if entry.mount_point in found:
            continue
        root = fds.enter_context(Descriptor.open(entry.mount_point, _DIRECTORY))
        if mountinfo.mount_id_of(root) != entry.mount_id:
            raise OSError(
                errno.EBUSY,
                f"another mount covers the one that contains {directory.path}; unmount the upper one",
                entry.mount_point,
            )
        found[entry.mount_point] = _Containing(entry, root)
    return found


def _open_source(directory: PrivateDirectory) -> Descriptor:
    path = f"{directory.path}/{directory.source}"
    with open_tree(AT_FDCWD, path, OPEN_TREE_CLONE) as tree:
        status = os.fstat(tree)
        if (status.st_dev, status.st_ino) != directory.identity or not stat.S_ISDIR(status.st_mode):
            raise OSError(errno.ESTALE, "not the instance directory that was made a moment ago", path)
        set_propagation(tree, MS_PRIVATE)  # the copy of a shared mount is its peer
        return Descriptor(tree.detach())


def _detach_below(table: Sequence[Mount], path: str) -> None:
    """Detach everything mounted below a directory whose own mount is already private.

    If a mount's parent is still the host's peer, unmounting it would unmount it on the host, too. If path is
    itself a mount, everything below became private with it. Otherwise each mount is made private here,
    parents first. A mount on a covered mount cannot be reached that way. It stays, hidden and busy, until
    the namespace ends.
    """
    below = [entry for entry in table if mountinfo.is_below(entry.mount_point, path)]
    below = [entry for entry in below if entry.mount_point != path]
    is_own_mount = any(entry.mount_point == path for entry in table)
    shared = set() if is_own_mount else {entry.mount_id for entry in below}
    for entry in below:
        if act_on(entry, lambda place: mount("none", place, None, MS_PRIVATE)):
            shared.discard(entry.mount_id)
    detach_all(entry for entry in below if entry.parent_id not in shared)


def _compare_with_host(paths: Sequence[str]) -> None:
    """Raise _HostChangedError unless this namespace has the host's mounts outside of the directories.

    Events do arrive again, and the host may go on changing: no two tables are of the same moment. Each table
    is compared with what the other one had both before and after it. What was missed is different each time.
    """

    outside = mountinfo.Outside(paths)

    def table(process: str) -> Counter[mountinfo.Key]:
        with contextlib.closing(mountinfo.lines(process)) as lines:
            return outside.of(lines)

    own_before = extra = table("thread-self")
    host_before = missing = table("1")
    for _ in range(_READS_AT_MOST):
        own = table("thread-self")
        extra = extra & ((own_before & own) - host_before)
        host_now = table("1")
        missing = missing & ((host_before & host_now) - own)
        if not missing and not extra:
            return
        own_before, host_before = own, host_now
    raise _HostChangedError

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes a mount namespace in which some directories are private and every other mount stays the host's peer.

Not here: which directories, whose they are, how long the namespace lives.

Hard facts
- A thread may unshare(CLONE_FS | CLONE_NEWNS) for itself alone; nothing else in the process moves. Such a
  thread is thrown away afterwards: it must never come back to a pool.
- unshare(CLONE_NEWNS) copies all mounts as *peers* of the host's (mount_namespaces(7), "shared subtrees").
  util-linux's unshare(1) makes them private by default; the system call does not.
- Making a mount private and putting it back: move_mount(2) with MOVE_MOUNT_SET_GROUP, Linux 5.15. Source and
  target must both be roots of mounts, the target must be private.
- Mounts that lie below /tmp on the host are copied too and would stay behind, hidden and busy, when the host
  unmounts them: below a private parent nothing propagates. So they are detached here. Private first,
  recursively: MNT_DETACH of a shared subtree would propagate to the host.
- open_tree(OPEN_TREE_CLONE) and move_mount() act only on mounts of the caller's own namespace (check_mnt in
  fs/namespace.c), so the sources are opened after unshare() and compared by inode with what storage made.
- Any descriptor that was opened through a mount of the new namespace keeps that mount's file system busy.
  None may survive this module, or the sentinel would never report the end.
- The sentinel lies beneath the private directory, where no path leads: it is set once, and can be watched
  again only by setting a new one. move_mount(2) can do so beneath what is mounted, MOVE_MOUNT_BENEATH, Linux
  6.5. Before that, one is set on a shared directory and covered again by it: for some microseconds an X
  client that connects is refused.
- fs.mount-max (100000 by default) makes unshare() fail with ENOSPC, user.max_mnt_namespaces likewise.
"""

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from polytmpd.core.names import SENTINEL
from polytmpd.kernel import host, mountinfo
from polytmpd.kernel.mountinfo import Mount
from polytmpd.kernel.syscalls import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    CLONE_FS,
    CLONE_NEWNS,
    MNT_DETACH,
    MOVE_MOUNT_BENEATH,
    MOVE_MOUNT_SET_GROUP,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_REC,
    OPEN_TREE_CLONE,
    RESOLVE_NO_SYMLINKS,
    UMOUNT_NOFOLLOW,
    fsmount,
    get_nstype,
    get_userns,
    mount,
    move_mount,
    open_tree,
    openat2,
    setns,
    umount2,
    unshare,
)

T = TypeVar("T")

# One page at most, no access for anybody: it only has to end with the namespace.
_SENTINEL_OPTIONS: Final = (("size", "4k"), ("nr_inodes", "2"), ("mode", "0000"))
_BUILDS_AT_MOST: Final = 8
_READS_AT_MOST: Final = 50
_O_DIRECTORY_PATH: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class PrivateDirectory:
    """One directory to make private.

    path: absolute path on the host, no symlink in it, e.g. /tmp.
    source: what takes its place, relative to path, e.g. polytmp-…/tmp.
    identity: (st_dev, st_ino) that the source must have; anything else in its place is refused.
    shared: names in path that stay the host's own directories, e.g. .X11-unix; they must exist in source
    too.
    """

    path: str
    source: str
    identity: tuple[int, int]
    shared: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Namespace:
    """A new mount namespace:

    its descriptor (the caller's to close), its inode, and the sentinel's watch descriptor.
    """

    fd: int
    inode: int
    watch: int


class _HostChangedError(Exception):
    """A mount event of the host may have been missed; build again."""


def mounts_in(namespace: int) -> list[Mount]:
    """The mounts of the namespace behind a descriptor. Blocking, about a millisecond. Raises OSError."""

    def look() -> list[Mount]:
        unshare(CLONE_FS)
        setns(namespace, CLONE_NEWNS)
        return mountinfo.read()

    return _in_disposable_thread(look)


def renew_sentinel(
    namespace: int, path: str, shared: Sequence[str], watch_sentinel: Callable[[str], int]
) -> int:
    """Set a new sentinel in a namespace whose old one is not watched any more; returns its watch descriptor.

    path, shared: a private directory of the namespace, and the names in it that are the host's own. Raises
    OSError.
    """

    def renew() -> int:
        unshare(CLONE_FS)
        setns(namespace, CLONE_NEWNS)
        try:
            return _set_sentinel_beneath(path, watch_sentinel)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP} or not shared:
                raise
            return _set_sentinel_under_shared(f"{path}/{shared[0]}", watch_sentinel)

    return _in_disposable_thread(renew)


def _set_sentinel_beneath(path: str, watch_sentinel: Callable[[str], int]) -> int:
    with contextlib.ExitStack() as fds:
        sentinel = fsmount(SENTINEL, "tmpfs", _SENTINEL_OPTIONS)
        fds.callback(os.close, sentinel)
        target = os.open(path, _O_DIRECTORY_PATH | os.O_NOFOLLOW)
        fds.callback(os.close, target)
        move_mount(sentinel, target, MOVE_MOUNT_BENEATH)
        return watch_sentinel(f"/proc/self/fd/{sentinel}")


def _set_sentinel_under_shared(place: str, watch_sentinel: Callable[[str], int]) -> int:
    with contextlib.ExitStack() as fds:
        cover = open_tree(AT_FDCWD, place, OPEN_TREE_CLONE)
        fds.callback(os.close, cover)
        watch = _mount_sentinel(place, watch_sentinel)
        target = os.open(place, _O_DIRECTORY_PATH | os.O_NOFOLLOW)
        fds.callback(os.close, target)
        move_mount(cover, target)
        return watch


def share_again(namespace: int, path: str, names: Sequence[str]) -> list[str]:
    """Put the host's directories of these names in path over those that a namespace has, where the host made
    them again; returns which.

    What is open in a former one stays open; for some microseconds a client that connects is refused. Raises
    OSError.
    """

    def share() -> list[str]:
        changed = []
        with contextlib.ExitStack() as fds:
            host_ns = host.open_namespace()
            fds.callback(os.close, host_ns)
            unshare(CLONE_FS)
            setns(host_ns, CLONE_NEWNS)
            trees = []
            for place in (f"{path}/{name}" for name in names):
                trees.append((place, _clone(place)))
                fds.callback(os.close, trees[-1][1])
            setns(namespace, CLONE_NEWNS)
            for place, tree in trees:
                there = os.stat(place, follow_symlinks=False)
                if os.path.samestat(there, os.fstat(tree)):
                    continue
                with contextlib.suppress(OSError):  # EINVAL: the mount went with its mount point
                    umount2(place, MNT_DETACH | UMOUNT_NOFOLLOW)
                target = os.open(place, _O_DIRECTORY_PATH | os.O_NOFOLLOW)
                fds.callback(os.close, target)
                move_mount(tree, target)
                mount("none", place, None, MS_PRIVATE)  # a copy of the host's mount is its peer
                changed.append(place)
        return changed

    return _in_disposable_thread(share)


def detach(namespace: int, directories: Sequence[str], chosen: Callable[[Mount], bool]) -> list[str]:
    """Detach the chosen ones of the mounts below the private directories of a namespace, lazily.

    Returns their mount points. One that is covered by another stays. Raises OSError.
    """

    def act() -> list[str]:
        unshare(CLONE_FS)
        setns(namespace, CLONE_NEWNS)
        found = [
            entry
            for entry in mountinfo.read()
            if chosen(entry) and any(mountinfo.is_below(entry.mount_point, path) for path in directories)
        ]
        # What covers another stands later in the table.
        gone = [
            entry for entry in reversed(found) if _act_on(entry, lambda place: umount2(place, MNT_DETACH))
        ]
        return [entry.mount_point for entry in reversed(gone)]

    return _in_disposable_thread(act)


def build(directories: Sequence[PrivateDirectory], watch_sentinel: Callable[[str], int]) -> Namespace:
    """Make the namespace from PID 1's, whatever the calling process's own is. Blocking, about a millisecond.

    watch_sentinel gets the path of the sentinel's root, valid during the call only, and returns a watch
    descriptor. Needs CAP_SYS_ADMIN, CAP_SYS_CHROOT and CAP_SYS_PTRACE. Raises OSError; nothing is left
    behind then.
    """
    if not directories:
        raise OSError(errno.EINVAL, "no directory to make private")
    for _ in range(_BUILDS_AT_MOST):
        try:
            return _in_disposable_thread(lambda: _build(directories, watch_sentinel))
        except _HostChangedError:
            continue
    raise OSError(
        errno.EAGAIN, "the host's mounts change too fast to make a namespace that agrees with them"
    )


def _in_disposable_thread(work: Callable[[], T]) -> T:
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the caller, whatever it is
            failures.append(error)

    thread = threading.Thread(target=run, name="mountns")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def is_privileged(fd: int) -> bool:
    """Whether a mount namespace belongs to our own user namespace, as what root makes does.

    One that a user makes without privilege (unshare -U, bwrap, podman) belongs to a user namespace of his.
    """
    owner = get_userns(fd)
    try:
        return os.path.samestat(os.fstat(owner), os.stat("/proc/self/ns/user"))
    finally:
        os.close(owner)


def namespace_inode(fd: int) -> int:
    """The inode of a mount namespace. Raises OSError (EINVAL) where the descriptor is none."""
    if get_nstype(fd) != CLONE_NEWNS:
        raise OSError(errno.EINVAL, f"descriptor {fd} is a namespace, but not a mount namespace")
    return os.fstat(fd).st_ino


@dataclass(frozen=True, slots=True)
class _Containing:
    """The mount in which a private directory lies:

    its mount point, and the host's own mount as a descriptor.
    """

    mount: Mount
    host_fd: int


def _build(directories: Sequence[PrivateDirectory], watch_sentinel: Callable[[str], int]) -> Namespace:
    with contextlib.ExitStack() as fds:

        def owned(fd: int) -> int:
            fds.callback(os.close, fd)
            return fd

        host_ns = owned(host.open_namespace())
        unshare(CLONE_FS)
        setns(host_ns, CLONE_NEWNS)
        containing = _find_containing(directories, owned)
        unshare(CLONE_NEWNS)
        paths = {directory.path for directory in directories}
        for mount_point in containing:  # one that becomes private for good, with all that lies below
            mount("none", mount_point, None, MS_PRIVATE | (MS_REC if mount_point in paths else 0))
        table = mountinfo.read()
        watch = -1
        for number, directory in enumerate(directories):
            source = owned(_open_source(directory))
            shared = [(name, owned(_clone(f"{directory.path}/{name}"))) for name in directory.shared]
            _detach_below(table, directory.path)
            if number == 0:
                watch = _mount_sentinel(directory.path, watch_sentinel)
            target = owned(os.open(directory.path, _O_DIRECTORY_PATH | os.O_NOFOLLOW))
            move_mount(source, target)
            for name, tree in shared:
                place = owned(os.open(f"{directory.path}/{name}", _O_DIRECTORY_PATH | os.O_NOFOLLOW))
                move_mount(tree, place)
        for mount_point, holder in containing.items():
            if mount_point not in paths and holder.mount.propagates:
                root = owned(os.open(mount_point, _O_DIRECTORY_PATH))
                move_mount(holder.host_fd, root, MOVE_MOUNT_SET_GROUP)
        _compare_with_host(directories, containing)
        inode = os.stat("/proc/thread-self/ns/mnt").st_ino
        fd = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        return Namespace(fd, inode, watch)


def _find_containing(
    directories: Sequence[PrivateDirectory], owned: Callable[[int], int]
) -> dict[str, _Containing]:
    """The mounts that hold the directories, by mount point.

    Runs in the host's namespace, before unshare().
    """
    by_id = {entry.mount_id: entry for entry in mountinfo.read()}
    found: dict[str, _Containing] = {}
    for directory in directories:
        fd = owned(os.open(directory.path, _O_DIRECTORY_PATH | os.O_NOFOLLOW))
        entry = by_id.get(mountinfo.mount_id_of(fd))
        if entry is None:
            raise _HostChangedError
        if entry.mount_point in found:
            continue
        root = owned(os.open(entry.mount_point, _O_DIRECTORY_PATH))
        if mountinfo.mount_id_of(root) != entry.mount_id:
            raise OSError(
                errno.EBUSY,
                f"the mount that holds {directory.path} is covered by another mount; unmount that one",
                entry.mount_point,
            )
        found[entry.mount_point] = _Containing(entry, root)
    return found


def _open_source(directory: PrivateDirectory) -> int:
    path = f"{directory.path}/{directory.source}"
    fd = open_tree(AT_FDCWD, path, OPEN_TREE_CLONE)
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != directory.identity or not stat.S_ISDIR(status.st_mode):
            raise OSError(errno.ESTALE, "not the instance directory that was made a moment ago", path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _clone(path: str) -> int:
    """A copy of the host's mount or directory at path, which must still be root's: names come and go."""
    fd = os.open(path, _O_DIRECTORY_PATH | os.O_NOFOLLOW)
    try:
        if (owner := os.fstat(fd).st_uid) != 0:
            raise OSError(errno.EPERM, f"owned by UID {owner} by now, not by root", path)
        return open_tree(fd, "", OPEN_TREE_CLONE | AT_EMPTY_PATH)
    finally:
        os.close(fd)


def _detach_below(table: Sequence[Mount], path: str) -> None:
    """Detach what is mounted below a directory whose own mount is private already.

    A mount whose parent is still the host's peer would go from the host, too. Where path is a mount of its
    own all below it were made private with it; else they are here, parents first. One that lies on a covered
    mount cannot be reached so, and stays: hidden, and busy until the namespace ends.

    Users write in path, and may exchange a directory on the way for a symbolic link meanwhile. Then a path
    would lead to any mount. So no link is followed, and what is found must be the very mount of the table.
    """
    below = [entry for entry in table if mountinfo.is_below(entry.mount_point, path)]
    below = [entry for entry in below if entry.mount_point != path]
    is_own_mount = any(entry.mount_point == path for entry in table)
    shared = set() if is_own_mount else {entry.mount_id for entry in below}
    for entry in below:
        if _act_on(entry, lambda place: mount("none", place, None, MS_PRIVATE)):
            shared.discard(entry.mount_id)
    for entry in reversed(below):  # what covers another stands later in the table
        if entry.parent_id not in shared:
            _act_on(entry, lambda place: umount2(place, MNT_DETACH))


def _act_on(entry: Mount, action: Callable[[str], None]) -> bool:
    """Whether it could be done; not where the mount is covered, or gone with its parent."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as fds:
        fd = openat2(AT_FDCWD, entry.mount_point, os.O_PATH, RESOLVE_NO_SYMLINKS)
        fds.callback(os.close, fd)
        if mountinfo.mount_id_of(fd) == entry.mount_id:
            action(f"/proc/thread-self/fd/{fd}")
            return True
    return False


def _mount_sentinel(path: str, watch_sentinel: Callable[[str], int]) -> int:
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    mount(SENTINEL, path, "tmpfs", flags, ",".join("=".join(option) for option in _SENTINEL_OPTIONS))
    root = os.open(path, _O_DIRECTORY_PATH | os.O_NOFOLLOW)
    try:
        return watch_sentinel(f"/proc/self/fd/{root}")
    finally:
        os.close(root)


def _compare_with_host(directories: Sequence[PrivateDirectory], containing: dict[str, _Containing]) -> None:
    """Raise _HostChangedError unless this namespace has just the mounts of the host outside of the
    directories.

    Between MS_PRIVATE and MOVE_MOUNT_SET_GROUP an event of the host could be missed, for good. Read twice
    around our own table: only where the host stood still does a difference mean something.
    """
    if all(mount_point in {directory.path for directory in directories} for mount_point in containing):
        return
    paths = [directory.path for directory in directories]
    for _ in range(_READS_AT_MOST):
        before = mountinfo.outside(mountinfo.read("1"), paths)
        own = mountinfo.outside(mountinfo.read(), paths)
        after = mountinfo.outside(mountinfo.read("1"), paths)
        if before == own:
            return
        if before == after:
            raise _HostChangedError
    raise _HostChangedError

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Acts in an existing mount namespace: reads its mounts, renews its sentinel, binds and detaches.

Not here: making a namespace (kernel/mountns), and which mounts to act on.

Hard facts
- setns(CLONE_NEWNS) needs a thread with its own fs_struct, so unshare(CLONE_FS) comes first. It affects only
  this thread, which must not return to a pool: it ends afterwards.
- setns() also moves the thread to the namespace's root directory, whatever root the processes in it have
  chosen. A /proc in there is the user's, or missing. So the thread's own directory of the host's /proc is
  opened before, and its mountinfo through that.
- A descriptor that was opened through a mount of the namespace keeps that mount's file system busy. None may
  outlive these functions, or the sentinel never reports the end.
- A directory that is removed stays mounted in other namespaces, and nothing can be made in it. In mountinfo,
  its root ends in "//deleted". Nothing can be mounted on it (ENOENT), only beneath it.
- The sentinel lies beneath a private directory, where no path leads. It is mounted once; to watch it again,
  mount a new one. move_mount(2) can mount beneath what is there: MOVE_MOUNT_BENEATH, Linux 6.5. On older
  kernels the new one goes on top of a shared directory, which then covers it again. For some microseconds
  an X client that connects is refused.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

from polytmpd.core.names import SENTINEL
from polytmpd.kernel import host, mountinfo
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.mountinfo import Mount
from polytmpd.kernel.syscalls import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    CLONE_FS,
    CLONE_NEWNS,
    MNT_DETACH,
    MOVE_MOUNT_BENEATH,
    MS_PRIVATE,
    OPEN_TREE_CLONE,
    RESOLVE_NO_SYMLINKS,
    UMOUNT_NOFOLLOW,
    fsmount,
    move_mount,
    open_tree,
    openat2,
    set_propagation,
    setns,
    umount2,
    unshare,
)

T = TypeVar("T")

# One page at most, and no access: its only task is to end with the namespace.
_SENTINEL_OPTIONS: Final = (("size", "4k"), ("nr_inodes", "2"), ("mode", "0000"))
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


def open_table(namespace: int) -> Descriptor:
    """Open the mount table of a namespace as its own root directory shows it; the caller closes it.

    Blocks for about a millisecond. Raises OSError.
    """

    def look() -> Descriptor:
        with Descriptor.open("/proc/thread-self", os.O_PATH | os.O_DIRECTORY) as own:
            enter(namespace)
            return Descriptor.open("mountinfo", os.O_RDONLY, dir_fd=own)

    return in_disposable_thread(look)


@contextlib.contextmanager
def visiting() -> Iterator[Callable[[int], Descriptor]]:
    """Yield an open_table() for many namespaces. Use it in a disposable thread only: it goes there and back.

    Raises OSError.
    """
    with (
        Descriptor.open("/proc/thread-self", os.O_PATH | os.O_DIRECTORY) as own,
        Descriptor.open("/proc/thread-self/ns/mnt", os.O_RDONLY) as home,
    ):
        unshare(CLONE_FS)

        def look(namespace: int) -> Descriptor:
            setns(namespace, CLONE_NEWNS)
            try:
                return Descriptor.open("mountinfo", os.O_RDONLY, dir_fd=own)
            finally:
                setns(home, CLONE_NEWNS)

        yield look


def mounts_in(namespace: int) -> list[Mount]:
    """The mounts of a namespace. Blocks for about a millisecond. Raises OSError."""
    with open_table(namespace) as table:
        return mountinfo.read_from(table)


def renew_sentinel(
    namespace: int, path: str, shared: Sequence[str], watch_sentinel: Callable[[str], int]
) -> int:
    """Mount a new sentinel in a namespace whose old one is no longer watched; returns its watch descriptor.

    path, shared: a private directory of the namespace, and the names in it that are the host's. Raises
    OSError.
    """

    def renew() -> int:
        enter(namespace)
        try:
            return _set_sentinel_beneath(path, watch_sentinel)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP} or not shared:
                raise
            return _set_sentinel_under_shared(f"{path}/{shared[0]}", watch_sentinel)

    return in_disposable_thread(renew)


def share_again(namespace: int, path: str, names: Sequence[str]) -> list[str]:
    """Bind the host's directories of these names in path into a namespace, if the host has made them again.

    Returns the paths of those that were bound. What is open in the former directories stays open; for some
    microseconds a client that connects is refused. Raises OSError.
    """

    def share() -> list[str]:
        changed = []
        with contextlib.ExitStack() as fds:
            enter(fds.enter_context(host.open_namespace()))
            places = [f"{path}/{name}" for name in names]
            trees = [fds.enter_context(clone(place)) for place in places]
            setns(namespace, CLONE_NEWNS)
            for place, tree in zip(places, trees, strict=True):
                if os.path.samestat(os.stat(place, follow_symlinks=False), os.fstat(tree)):
                    continue
                with contextlib.suppress(OSError):  # EINVAL: the mount went with its mount point
                    umount2(place, MNT_DETACH | UMOUNT_NOFOLLOW)
                attach(tree, place)
                changed.append(place)
        return changed

    return in_disposable_thread(share)


def replace(namespace: int, removed: Mount, source: int) -> None:
    """Mount a directory of the host in place of a mount whose directory was removed.

    source: the new directory, opened in the host's namespace; O_PATH is enough. The mount point never shows
    the host's directory. Raises OSError; EAGAIN if something else is mounted there now.
    """

    def swap() -> None:
        with contextlib.ExitStack() as fds:
            enter(fds.enter_context(host.open_namespace()))
            tree = fds.enter_context(open_tree(source, "", OPEN_TREE_CLONE | AT_EMPTY_PATH))
            set_propagation(tree, MS_PRIVATE)  # a copy of the host's mount is its peer
            setns(namespace, CLONE_NEWNS)
            target = fds.enter_context(
                openat2(AT_FDCWD, removed.mount_point, os.O_PATH | os.O_DIRECTORY, RESOLVE_NO_SYMLINKS)
            )
            if mountinfo.mount_id_of(target) != removed.mount_id:
                raise OSError(errno.EAGAIN, "something else is mounted there now", removed.mount_point)
            _require_sentinel_beneath(removed)
            place = f"/proc/thread-self/fd/{target}"
            try:
                move_mount(tree, target, MOVE_MOUNT_BENEATH)
            except OSError as error:
                if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
                    raise
                umount2(place, MNT_DETACH)  # for some microseconds the sentinel is seen
                attach(tree, removed.mount_point)
            else:
                umount2(place, MNT_DETACH)

    in_disposable_thread(swap)


def detach(namespace: int, directories: Sequence[str], chosen: Callable[[Mount], bool]) -> list[str]:
    """Lazily detach the chosen mounts below the private directories of a namespace.

    Returns their mount points. A mount that is covered by another one stays. Raises OSError.
    """

    def act() -> list[str]:
        enter(namespace)
        found = [
            entry
            for entry in mountinfo.read()
            if chosen(entry) and any(mountinfo.is_below(entry.mount_point, path) for path in directories)
        ]
        return [entry.mount_point for entry in detach_all(found)]

    return in_disposable_thread(act)


# For kernel/mountns, too


def in_disposable_thread(work: Callable[[], T]) -> T:
    """The result of work() in a thread that ends with it. Raises whatever it raises."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # the caller gets it, whatever it is
            failures.append(error)

    thread = threading.Thread(target=run, name="mountns")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def enter(namespace: int) -> None:
    """Move the calling thread into a namespace, for good. Raises OSError."""
    unshare(CLONE_FS)
    setns(namespace, CLONE_NEWNS)


def clone(path: str) -> Descriptor:
    """Clone the host's mount or directory at path, for attach(); the caller closes it.

    The clone is private: a copy of a shared mount is its peer. Raises OSError, also if root does not own it
    now: names come and go.
    """
    with Descriptor.open(path, _DIRECTORY) as directory:
        if (owner := os.fstat(directory).st_uid) != 0:
            raise OSError(errno.EPERM, f"now owned by UID {owner}, not by root", path)
        with open_tree(directory, "", OPEN_TREE_CLONE | AT_EMPTY_PATH) as tree:
            set_propagation(tree, MS_PRIVATE)
            return Descriptor(tree.detach())


def attach(tree: int, path: str, flags: int = 0) -> None:
    """Mount a tree that is not mounted yet on a directory. flags: MOVE_MOUNT_BENEATH. Raises OSError."""
    with Descriptor.open(path, _DIRECTORY) as target:
        move_mount(tree, target, flags)


def new_sentinel() -> Descriptor:
    """Make a sentinel, for attach(); the caller closes it. Raises OSError."""
    return fsmount(SENTINEL, "tmpfs", _SENTINEL_OPTIONS)


def set_sentinel(path: str, watch_sentinel: Callable[[str], int], flags: int = 0) -> int:
    """Mount a sentinel at path; returns its watch descriptor. flags: as for attach(). Raises OSError."""
    with new_sentinel() as sentinel:
        attach(sentinel, path, flags)
        return watch(sentinel, watch_sentinel)


def watch(sentinel: int, watch_sentinel: Callable[[str], int]) -> int:
    """Watch a sentinel; returns the watch descriptor. Raises OSError."""
    return watch_sentinel(f"/proc/self/fd/{sentinel}")


def detach_all(mounts: Iterable[Mount]) -> list[Mount]:
    """Lazily detach these mounts, in the order of mountinfo; returns those that could be detached."""
    gone = [
        entry
        for entry in reversed(list(mounts))  # a mount that covers another one comes later in the table
        if act_on(entry, lambda place: umount2(place, MNT_DETACH))
    ]
    return gone[::-1]


def act_on(entry: Mount, action: Callable[[str], None]) -> bool:
    """Call action(path) on a mount; returns whether it succeeded.

    It fails if the mount is covered, or gone with its parent.

    Users write in the directories on the way to the mount, and may replace one with a symbolic link. The
    path could then lead to any mount. So no link is followed, and what is found must be that very mount.
    """
    with (
        contextlib.suppress(OSError),
        openat2(AT_FDCWD, entry.mount_point, os.O_PATH, RESOLVE_NO_SYMLINKS) as fd,
    ):
        if mountinfo.mount_id_of(fd) == entry.mount_id:
            action(f"/proc/thread-self/fd/{fd}")
            return True
    return False


def _set_sentinel_beneath(path: str, watch_sentinel: Callable[[str], int]) -> int:
    return set_sentinel(path, watch_sentinel, MOVE_MOUNT_BENEATH)


def _set_sentinel_under_shared(place: str, watch_sentinel: Callable[[str], int]) -> int:
    with open_tree(AT_FDCWD, place, OPEN_TREE_CLONE) as cover:
        number = set_sentinel(place, watch_sentinel)
        attach(cover, place)
        return number


def _require_sentinel_beneath(mount: Mount) -> None:
    """Raise OSError if what lies beneath is the host's: its peers would get what is mounted on it."""
    if not any(
        (entry.mount_id, entry.mount_point, entry.source) == (mount.parent_id, mount.mount_point, SENTINEL)
        for entry in mountinfo.read()
    ):
        text = "was made by an earlier polytmpd and cannot be replaced; end the user's processes"
        raise OSError(errno.EOPNOTSUPP, text, mount.mount_point)

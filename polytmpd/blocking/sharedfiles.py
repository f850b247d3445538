# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's sockets and files that all instances share, for example a database server's /tmp/.s.PGSQL.5432.

The directory sharing.LINKS of the host has a hard link to each. All instances have that directory, as a bind
mount, and in place of each socket a symbolic link to the hard link. When a server makes its socket again,
only the hard link changes: for all instances at once, whatever mounts they have.
Not here: when to look (executor/sharedfiles), and what is shared (core/sharing).

Hard facts
- A bind mount of a socket stays on the old inode when the server makes a new one. connect(2) follows
  symbolic links, and knows a socket by its inode, so a hard link works.
- link(2) does not follow the name of the host again: it gets the inode that was examined. It needs the same
  mount, which is why the directory is in the host's /tmp.
- LINKS belongs to root and nobody else may write to it. A symbolic link that is root's is safe in a user's
  sticky /tmp: they cannot remove it, and protected_symlinks lets everyone follow it (sysctl/fs.rst).
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final

from polytmpd.blocking import barriers, shared
from polytmpd.core.model import InstanceDirectory, Lifetime
from polytmpd.core.names import INNER, PREFIX
from polytmpd.core.sharing import LINKS, Sharing
from polytmpd.kernel import host, syscalls
from polytmpd.kernel.descriptor import Descriptor

SHARED_AT_MOST: Final = 256
"""Names: each is a symbolic link in every instance."""
_SCANNED_AT_MOST: Final = 1_000_000
_ATTEMPTS: Final = 4
_NEW: Final = f"{PREFIX}new"
_INSIDE: Final = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_XDEV


@dataclass(slots=True)
class Found:
    """links: what is shared now. gone: names whose links lead to something that the host no longer has.

    objections: name → why it is not shared.
    """

    links: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    objections: dict[str, str] = field(default_factory=dict)


def watch(
    sharing: Sharing, add_host: Callable[[str], int], add_links: Callable[[str], int]
) -> tuple[int, int]:
    """The watches add_…(path) on the host's directory and on LINKS, which is made if it is missing.

    The paths are valid during the call only. Raises OSError, also if someone else has the name LINKS.
    """
    with host.open_directory(sharing.path) as base:
        shared.ensure(base, LINKS)
        with Descriptor.open(LINKS, barriers.DIRECTORY, dir_fd=base) as links:
            return add_host(f"/proc/self/fd/{base}"), add_links(f"/proc/self/fd/{links}")


def update(sharing: Sharing, names: Collection[str] | None) -> Found:
    """Let the links lead to what the host has now. What is gone keeps its link, for forget().

    names: what may have changed; None for everything. Slow if the host's directory is large and there are
    patterns. Raises OSError if nothing can be shared at all.
    """
    with (
        host.open_directory(sharing.path) as base,
        _open_links(base) as links,
    ):
        found = Found(set(_list(links)))
        if names is None:
            names = {*sharing.names, *found.links}
            if len(sharing.names) < len(sharing.patterns):
                names |= _matching(base, sharing)
        for name in sorted(names):
            if not sharing.matches(name):
                objection: str | None = "no longer named"
            else:
                has_room = name in found.links or len(found.links) < SHARED_AT_MOST
                try:
                    objection = _share(base, links, name, sharing, has_room=has_room)
                except FileNotFoundError:
                    objection = ""
                except OSError as error:
                    objection = str(error.strerror)
            if objection is None:
                found.links.add(name)
                continue
            if objection and sharing.matches(name):
                found.objections[name] = objection
            if name in found.links:
                found.links.remove(name)
                found.gone.add(name)
        return found


def forget(sharing: Sharing, names: Collection[str]) -> None:
    """Remove the links of what is gone. Raises OSError."""
    with host.open_directory(sharing.path) as base, _open_links(base) as links:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=links)


def clear(sharing: Sharing) -> None:
    """Remove LINKS with all that is in it: no instance has it. Raises OSError, also if there is none."""
    with (
        host.open_directory(sharing.path) as base,
        Descriptor.open(LINKS, barriers.DIRECTORY, dir_fd=base) as links,
    ):
        if os.fstat(links).st_uid == 0:
            for name in (*_list(links), _NEW):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=links)
            os.rmdir(LINKS, dir_fd=base)


def furnish(
    entry: InstanceDirectory, gone: Collection[str], add: Callable[[str], None], sharing: Sharing
) -> set[str]:
    """Let an instance have what is shared, and no longer what is gone. Returns names that its user has.

    What is the user's stays theirs. add(path) watches our symbolic links, which only root can remove, and
    what has taken the name of one; the path is valid during the call only. Raises OSError: FileNotFoundError
    if the instance is being removed.
    """
    taken = set()
    with host.open_directory(entry.directory.path) as base:
        with _open_links(base) as fd:
            links = set(_list(fd)) - set(gone)
        place = f"{entry.barrier}/{INNER}"
        with syscalls.openat2(base, place, os.O_PATH | os.O_DIRECTORY, _INSIDE) as inner:
            stale = set(gone)
            if entry.directory.lifetime is Lifetime.PERSISTENT:  # what went while the user was away
                stale |= {name for name in _list(inner) if sharing.matches(name)} - links
            for name in stale:
                if _is_ours(inner, name, entry):
                    os.unlink(name, dir_fd=inner)
            for name in links:
                if not _link_and_watch(inner, name, entry, add):
                    taken.add(name)
    return taken


def _open_links(base: int) -> Descriptor:
    """LINKS, for reading; the caller closes it. Raises OSError if it is not ours."""
    shared.ensure(base, LINKS)
    fd = Descriptor.open(LINKS, barriers.DIRECTORY, dir_fd=base)
    found = os.fstat(fd)
    if found.st_uid != 0 or found.st_mode & 0o022:
        fd.close()
        raise OSError(errno.EPERM, "has just been exchanged", LINKS)
    return fd


def _list(directory: int) -> list[str]:
    with (
        Descriptor.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory) as fd,
        os.scandir(fd) as entries,
    ):
        return [entry.name for entry in entries if entry.name != _NEW]


def _matching(base: int, sharing: Sharing) -> set[str]:
    found = set()
    with (
        Descriptor.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=base) as fd,
        os.scandir(fd) as entries,
    ):
        for count, entry in enumerate(entries):
            if count >= _SCANNED_AT_MOST:
                break
            if sharing.matches(entry.name) and not entry.is_dir(follow_symlinks=False):
                found.add(entry.name)
    return found


def _share(base: int, links: int, name: str, sharing: Sharing, *, has_room: bool) -> str | None:
    """Link to what the host has now; returns why not, if it must not be shared. Raises OSError."""
    with barriers.open_path(base, name) as fd:
        found = os.fstat(fd)
        if not (stat.S_ISSOCK(found.st_mode) or stat.S_ISREG(found.st_mode) or stat.S_ISFIFO(found.st_mode)):
            if stat.S_ISDIR(found.st_mode):
                return f"a directory; to share it, write {name}/ in SharedPaths="
            return "neither a socket nor a file"
        if objection := sharing.objection_to_owner(found.st_uid):
            return objection
        if not has_room:
            return f"there are {SHARED_AT_MOST} shared sockets and files already"
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(name, dir_fd=links, follow_symlinks=False), found):
                return None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_NEW, dir_fd=links)
        os.link(f"/proc/self/fd/{fd}", _NEW, dst_dir_fd=links, follow_symlinks=True)
        os.rename(_NEW, name, src_dir_fd=links, dst_dir_fd=links)
        return None


def _link_and_watch(inner: int, name: str, entry: InstanceDirectory, add: Callable[[str], None]) -> bool:
    """As _link(). Whatever has the name is watched, so that its removal is not missed."""
    for _attempt in range(_ATTEMPTS):
        is_ours = _link(inner, name, entry)
        with contextlib.suppress(FileNotFoundError), barriers.open_path(inner, name) as fd:
            add(f"/proc/self/fd/{fd}")
            return is_ours
    raise OSError(errno.EBUSY, "a process keeps removing it", f"{entry.host_path}/{name}")


def _link(inner: int, name: str, entry: InstanceDirectory) -> bool:
    """Make the symbolic link in an instance. False if something else has the name. Raises OSError."""
    try:
        os.symlink(_target(name, entry), name, dir_fd=inner)
    except FileExistsError:
        return _is_ours(inner, name, entry)
    return True


def _is_ours(inner: int, name: str, entry: InstanceDirectory) -> bool:
    """Whether it is a symbolic link that we made; the user cannot remove it."""
    try:
        found = os.stat(name, dir_fd=inner, follow_symlinks=False)
        return found.st_uid == 0 and os.readlink(name, dir_fd=inner) == _target(name, entry)
    except OSError:  # EINVAL: not a symbolic link
        return False


def _target(name: str, entry: InstanceDirectory) -> str:
    # Absolute: root, who finds it in the inner directory on the host, gets to the same socket.
    return f"{entry.directory.path}/{LINKS}/{name}"

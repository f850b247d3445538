# SPDX-License-Identifier: LGPL-2.1-or-later
"""What outlives the daemon: descriptors in systemd's FD store, and the state files.

The FD store (sd_pid_notify_with_fds(3)) has a copy of each namespace that the daemon holds, and of the
inotify instance on the sentinels. The state files say what the descriptors do not.
FileDescriptorStoreMax= bounds the FD store. So does execve(2), since systemd passes all names in one
environment variable: if it is longer than 128 KiB (MAX_ARG_STRLEN), the daemon cannot start. So what
would make it too long is not stored. After a restart, such a namespace is opened by its ID (Linux 6.18, not
in a container), or found if a process lives in it.
Not here: when a namespace is held (actions), systemd's protocol (sdnotify), and how a state file is written
(blocking/state).
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from polytmpd import sdnotify
from polytmpd.blocking.state import StateDirectory
from polytmpd.core.model import Instance
from polytmpd.journal import fields
from polytmpd.kernel import mountns
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.host import in_words
from polytmpd.kernel.inotify import is_inotify

log = logging.getLogger(__name__)

SENTINELS: Final = "sentinels"
_NAMESPACE: Final = "ns-"
NAMES_AT_MOST: Final = 120_000
"""Bytes of all names. That is room for 13,000 namespaces if UIDs have five digits, 8,500 with ten."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a former daemon left in the FD store. The owner of this object owns the descriptors."""

    namespaces: Mapping[int, Descriptor] = field(default_factory=dict)
    """By UID."""
    inotify: Descriptor | None = None

    @staticmethod
    def discard(uid: int, namespace: Descriptor) -> None:
        """Close a namespace that polytmp did not make, also in the FD store."""
        sdnotify.remove(_name(uid))
        namespace.close()


def take(passed: Iterable[tuple[str, Descriptor]]) -> Stored:
    """Take the FD store out of what PID 1 passed. Closes what polytmpd did not put there."""
    namespaces: dict[int, Descriptor] = {}
    inotify: Descriptor | None = None
    foreign: set[str] = set()
    for name, fd in passed:
        uid = name.removeprefix(_NAMESPACE)
        if name == SENTINELS and inotify is None and is_inotify(fd):
            inotify = fd
        elif (
            name.startswith(_NAMESPACE)
            and uid.isdecimal()
            and int(uid) not in namespaces
            and _is_namespace(fd)
        ):
            namespaces[int(uid)] = fd
        else:
            log.warning("Found %s in the FD store, but polytmpd did not put it there, closing it", name)
            sdnotify.remove(name)
            fd.close()
            foreign.add(name)
    for name, kept in ((SENTINELS, inotify), *((_name(uid), fd) for uid, fd in namespaces.items())):
        if name in foreign and kept is not None:
            sdnotify.store(name, kept)  # FDSTOREREMOVE removed every descriptor of that name
    return Stored(namespaces, inotify)


def store_sentinels(fd: int) -> None:
    """Put a copy of the inotify instance into the FD store."""
    sdnotify.store(SENTINELS, fd)


class Namespaces:
    """The namespaces that are held. Owns their descriptors. Logs what cannot be written to a state file."""

    def __init__(self, state: StateDirectory) -> None:
        self._state = state
        self._held: dict[int, Descriptor] = {}
        self._not_stored: set[int] = set()
        """Those of _held that the FD store has no room for."""
        self._bytes = 0
        """Of the names of those that it has."""
        self._capacity = sdnotify.store_capacity()

    def __contains__(self, uid: int) -> bool:
        return uid in self._held

    def take_over(self, uid: int, fd: Descriptor) -> None:
        """Hold a namespace that the FD store has already. fd belongs to this object from now on."""
        self._held[uid] = fd
        self._bytes += _size(uid)

    def hold(self, instance: Instance, fd: Descriptor) -> None:
        """Hold an instance's namespace in place of a former one, and record the instance.

        fd belongs to this object from now on.
        """
        uid = instance.uid
        was_stored = False
        if (former := self._held.pop(uid, None)) is not None:
            former.close()
            was_stored = self._leaves(uid)
        self._held[uid] = fd
        if obstacle := self._obstacle(uid):
            if not self._not_stored:
                text = (
                    "%s: after a restart, polytmpd finds the namespace of UID %d by its ID, if the kernel "
                    "lets it, or if a process is in it"
                )
                log.error(text, obstacle, uid, extra=fields(uid=uid))
            self._not_stored.add(uid)
            if was_stored:
                sdnotify.remove(_name(uid))
        else:
            self._bytes += _size(uid)
            sdnotify.store(_name(uid), fd)
        self.record(instance)

    def record(self, instance: Instance) -> None:
        """Write the instance's state file."""
        try:
            self._state.save(instance)
        except OSError as error:
            log.warning(
                "Failed to write the state file of UID %d, ignoring: %s", instance.uid, in_words(error)
            )

    def forget(self, uid: int) -> None:
        """Remove the state file of a user's instance."""
        try:
            self._state.forget(uid)
        except OSError as error:
            log.warning("Failed to remove the state file of UID %d, ignoring: %s", uid, in_words(error))

    def open(self, uid: int) -> Descriptor:
        """A second descriptor of a namespace that is held; the caller closes it.

        Raises OSError, such as EMFILE.
        """
        return self._held[uid].dup()

    def open_if_held(self, uid: int) -> Descriptor | None:
        """The same, or None if it is not held."""
        return self.open(uid) if uid in self._held else None

    def let_go(self, uid: int) -> None:
        """Close the descriptor, also in the FD store."""
        if self._leaves(uid):
            sdnotify.remove(_name(uid))
        self._held.pop(uid).close()

    def _leaves(self, uid: int) -> bool:
        """Make room for another. Whether it was stored."""
        if uid in self._not_stored:
            self._not_stored.remove(uid)
            return False
        self._bytes -= _size(uid)
        return True

    def _obstacle(self, uid: int) -> str:
        """Why the FD store does not take one more; empty if it does."""
        stored = 1 + len(self._held) - len(self._not_stored)  # one is the inotify instance's
        if stored > self._capacity:
            why = "FileDescriptorStoreMax= of polytmpd.service, and half of what PID 1 may open"
            return f"The FD store is full with {stored} descriptors (at most: {why})"
        if self._bytes + _size(uid) > NAMES_AT_MOST:
            return f"The FD store is full: systemd cannot pass more than {NAMES_AT_MOST} bytes of names"
        return ""

    def close(self) -> None:
        """Close all descriptors, but not those in the FD store."""
        for fd in self._held.values():
            fd.close()
        self._held.clear()


def _name(uid: int) -> str:
    return f"{_NAMESPACE}{uid}"


def _size(uid: int) -> int:
    return len(_name(uid)) + 1  # and the colon


def _is_namespace(fd: Descriptor) -> bool:
    try:
        return mountns.namespace_inode(fd) != 0
    except OSError:
        return False

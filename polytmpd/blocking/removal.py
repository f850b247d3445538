# SPDX-License-Identifier: LGPL-2.1-or-later
"""Removes instances: sets their directories aside, deletes them, and finds what former daemons left.

Not here: when an instance is removed (executor), and emptying one directory (deletion).
"""

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from polytmpd.blocking import deletion, instances, recovery, storage
from polytmpd.blocking.instances import effective
from polytmpd.core import names
from polytmpd.core.model import Directory, Instance, Lifetime
from polytmpd.journal import MessageId, fields
from polytmpd.kernel import host, mounted

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """A barrier's place: a base directory of the host, and the name in it."""

    base: str
    barrier: str


def set_aside(instance: Instance) -> list[Place]:
    """Rename what does not persist, and end the protection of the rest.

    Raises OSError if nothing can be renamed; logs partial failures.
    """
    aside: list[Place] = []
    failure: OSError | None = None
    for entry in instance.directories:
        if entry.directory.lifetime is Lifetime.PERSISTENT:
            instances.release([entry])
            continue
        try:
            with host.open_directory(entry.directory.path) as base:
                aside.append(Place(entry.directory.path, _set_aside(base, entry.barrier)))
        except FileNotFoundError:
            log.warning("%s no longer exists, ignoring", entry.host_path)
        except OSError as error:
            failure = error
    if failure is not None and not aside:
        raise failure
    if failure is not None:
        log.error(
            "Failed to rename a directory of the instance of user %s, retrying at the next start: %s",
            instance.user,
            host.in_words(failure),
        )
    return aside


def is_set_aside(instance: Instance) -> bool:
    """Whether set_aside() has begun: a directory that does not persist is no longer in its place."""
    return any(
        entry.directory.lifetime is Lifetime.INSTANCE and not os.path.lexists(host.path(entry.host_path))
        for entry in instance.directories
    )


def set_persistent_aside(uid: int, directories: Sequence[Directory]) -> list[Place]:
    """Rename what is kept for a user who has no instance. Raises OSError."""
    aside: list[Place] = []
    for directory in effective(directories):
        if directory.lifetime is Lifetime.PERSISTENT:
            with contextlib.suppress(FileNotFoundError), host.open_directory(directory.path) as base:
                aside.append(Place(directory.path, _set_aside(base, names.kept_barrier(uid))))
    return aside


def delete(aside: Sequence[Place], report: Callable[[int], None], cancelled: Callable[[], bool]) -> None:
    """Delete what set_aside() returned. Raises the first OSError, after trying them all.

    report(entries) is called with the number of entries deleted so far.
    """
    failures: list[OSError] = []
    done = 0

    def reported(entries: int) -> None:
        report(done + entries)

    for path, name in aside:
        try:
            with host.open_directory(path) as base:
                done += deletion.remove_tree(base, name, report=reported, cancelled=cancelled).entries
        except FileNotFoundError:
            continue  # an earlier attempt, or an administrator, deleted it
        except OSError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def find_leftovers(directories: Sequence[Directory], known: set[str]) -> list[Place]:
    """The barriers on disk that belong to no instance. Logs what cannot be read.

    known: the barriers of instances.
    """
    leftovers: list[Place] = []
    for directory in effective(directories):
        try:
            with host.open_directory(directory.path) as base:
                found = storage.leftovers(base)
        except OSError as error:  # logins are refused because of it, but the daemon goes on
            log.error(
                "Failed to search %s for what former instances left: %s",
                directory.path,
                host.in_words(error),
            )
            continue
        leftovers += [Place(directory.path, name) for name in found.removable if name not in known]
        for name, reason in found.foreign:
            log.warning("%s/%s was not made by polytmpd, ignoring: %s", directory.path, name, reason)
        if (more := found.foreign_count - len(found.foreign)) > 0:
            log.warning(
                "%d more in %s whose names begin with %s were not made by polytmpd, ignoring",
                more,
                directory.path,
                names.PREFIX,
            )
    return leftovers


def release_kept(directories: Sequence[Directory], known: set[str]) -> None:
    """End the protection of what is kept and of no instance: a crash has left it.

    known: the barriers of instances.
    """
    for directory in effective(directories):
        if directory.lifetime is Lifetime.PERSISTENT:
            with contextlib.suppress(OSError), host.open_directory(directory.path) as base:
                for name in storage.kept(base):
                    if name not in known:
                        with contextlib.suppress(OSError):  # FileExistsError: it is not ours
                            storage.release(base, name, directory.shared)


def unused(leftovers: Sequence[Place], cancelled: Callable[[], bool]) -> list[Place]:
    """The leftovers that no process has mounted. Raises OSError; ECANCELED if cancelled.

    Logs which may be in use.
    """
    in_use: Collection[str]
    try:
        in_use = recovery.mounted_barriers(leftovers, cancelled)
    except recovery.UnreadError as error:
        in_use = {*error.unknown, *error.found}
        log.error(
            "Failed to determine whether %s is in use, keeping it until the next start: %s",
            ", ".join(sorted(error.unknown)),
            host.in_words(error),
        )
    return [place for place in leftovers if place.barrier not in in_use]


def delete_leftover(place: Place, cancelled: Callable[[], bool]) -> None:
    """Delete a leftover. Logs what cannot be deleted."""
    try:
        with host.open_directory(place.base) as base:
            deletion.remove_tree(base, place.barrier, cancelled=cancelled)
    except OSError as error:
        log.error(
            "Failed to delete what a former instance left, retrying at the next start: %s",
            host.in_words(error),
            extra=fields(MessageId.REMOVE_FAILED),
        )


def who_mounts(
    instances: Sequence[Instance], known: mounted.Known | None, cancelled: Callable[[], bool]
) -> dict[int, int | Exception | None]:
    """UID → a process that has mounted what ends with the instance, in any namespace; or why none is known.

    0 for something that is no process. known: what former searches found. Raises OSError if that concerns
    all of them.
    """
    barriers = {
        instance.uid: [
            Place(entry.directory.path, entry.barrier)
            for entry in instance.directories
            if entry.directory.lifetime is Lifetime.INSTANCE
        ]
        for instance in instances
    }
    found: Mapping[str, int]
    unread: recovery.UnreadError | None = None
    try:
        found = recovery.mounted_barriers(
            [place for places in barriers.values() for place in places], cancelled, known
        )
    except recovery.UnreadError as error:
        found, unread = error.found, error
    answers: dict[int, int | Exception | None] = {}
    for uid, places in barriers.items():
        wanted = {place.barrier for place in places}
        answers[uid] = next((found[name] for name in wanted & found.keys()), None)
        if answers[uid] is None and unread is not None and wanted & unread.unknown:
            answers[uid] = OSError(unread.errno, unread.strerror)
    return answers


def _set_aside(base: int, barrier: str) -> str:
    new = names.removing(os.urandom(names.RANDOM_BYTES).hex())
    storage.set_aside(base, barrier, new)
    return new

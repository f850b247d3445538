# SPDX-License-Identifier: LGPL-2.1-or-later
"""Removes instances: sets their directories aside, deletes them, and finds what former daemons left.

Not here: when an instance is removed (executor), and emptying one directory (deletion).
"""

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple

from polytmpd.blocking import deletion, recovery, storage
from polytmpd.blocking.instances import effective
from polytmpd.core import names
from polytmpd.core.model import Directory, Instance, Lifetime
from polytmpd.journal import MessageId, fields
from polytmpd.kernel import host

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a barrier lies: its name in a base directory of the host."""

    base: str
    barrier: str


def set_aside(instance: Instance) -> list[Place]:
    """Rename what does not persist. Raises OSError where one could not be renamed, after the others were."""
    aside: list[Place] = []
    failure: OSError | None = None
    for entry in instance.directories:
        if entry.directory.lifetime is Lifetime.PERSISTENT:
            continue
        try:
            with host.open_directory(entry.directory.path) as base:
                aside.append(Place(entry.directory.path, _set_aside(base, entry.barrier)))
        except FileNotFoundError:
            log.warning("%s was gone already", entry.host_path)
        except OSError as error:
            failure = error
    if failure is not None and not aside:
        raise failure
    if failure is not None:
        log.error("%s", failure)
    return aside


def is_set_aside(instance: Instance) -> bool:
    """Whether set_aside() has begun: something that does not persist is not in its place any more."""
    return any(
        entry.directory.lifetime is Lifetime.INSTANCE and not os.path.lexists(host.path(entry.host_path))
        for entry in instance.directories
    )


def set_persistent_aside(uid: int, directories: Sequence[Directory]) -> list[Place]:
    """Rename what is kept of a user who has no instance. Raises OSError."""
    aside: list[Place] = []
    for directory in effective(directories):
        if directory.lifetime is Lifetime.PERSISTENT:
            with contextlib.suppress(FileNotFoundError), host.open_directory(directory.path) as base:
                aside.append(Place(directory.path, _set_aside(base, names.kept_barrier(uid))))
    return aside


def delete(aside: Sequence[Place], report: Callable[[int], None], cancelled: Callable[[], bool]) -> None:
    """Delete what set_aside() gave; the first OSError is raised after all were tried.

    report is told how many entries are gone.
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
    """(directory, barrier) of what is on disk and of no instance. Logs what cannot be read.

    known: the barriers of instances.
    """
    leftovers: list[Place] = []
    for directory in effective(directories):
        try:
            with host.open_directory(directory.path) as base:
                found = storage.leftovers(base)
        except OSError as error:  # whoever logs in is refused for it: no reason to end
            log.error("%s cannot be looked into: %s", directory.path, error)
            continue
        leftovers += [Place(directory.path, name) for name in found.removable if name not in known]
        for name, reason in found.foreign:
            log.warning(
                "%s/%s has a name of polytmp's but is not: %s, ignoring", directory.path, name, reason
            )
    return leftovers


def unused(leftovers: Sequence[Place], cancelled: Callable[[], bool]) -> list[Place]:
    """Those that nobody has mounted. Raises OSError, where it was cancelled too."""
    in_use = recovery.mounted_barriers(leftovers, cancelled)
    return [place for place in leftovers if place.barrier not in in_use]


def delete_leftover(place: Place, cancelled: Callable[[], bool]) -> None:
    """Logs what cannot be deleted."""
    try:
        with host.open_directory(place.base) as base:
            deletion.remove_tree(base, place.barrier, cancelled=cancelled)
    except OSError as error:
        log.error(
            "Left-over instance cannot be deleted, the next start tries again: %s",
            error,
            extra=fields(MessageId.REMOVE_FAILED),
        )


def who_mounts(instance: Instance, cancelled: Callable[[], bool]) -> int | None:
    """A process that has mounted what ends with the instance, in whatever namespace. Raises OSError."""
    places = [
        Place(entry.directory.path, entry.barrier)
        for entry in instance.directories
        if entry.directory.lifetime is Lifetime.INSTANCE
    ]
    return next(iter(recovery.mounted_barriers(places, cancelled).values()), None)


def _set_aside(base: int, barrier: str) -> str:
    new = names.removing(secrets.token_hex(names.RANDOM_BYTES))
    storage.set_aside(base, barrier, new)
    return new

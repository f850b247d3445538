# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which processes keep a mount namespace, and how: this explains why an instance is still there.

Not here: any decision. The result is a snapshot of /proc and may already be out of date.

Hard facts
- A mount namespace made from another one (unshare, bwrap, a unit's PrivateTmp=) has a copy of its sentinel
  and keeps it: the end is reported when the last copy is gone. The mountinfo of a copy shows the sentinel,
  and a mount whose root is in one of the instance's directories. That of a process in a chroot may not.
- PID 1 holds descriptors for the daemon (the FD store), and the daemon its own. Neither keeps an instance.
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection
from enum import StrEnum
from typing import Final, NamedTuple

from polytmpd.core.names import SENTINEL
from polytmpd.kernel import mounted, namespaces
from polytmpd.kernel.processes import cgroup_pids, commands, descriptor_paths, pids

_DESCRIPTORS_TIMEOUT: Final = 5.0


class How(StrEnum):
    """How a process keeps an instance; part of the D-Bus contract."""

    NAMESPACE = "namespace"
    """At least one of its threads lives in the instance's mount namespace."""
    DERIVED = "derived"
    """It lives in a mount namespace that was made from the instance's."""
    DESCRIPTOR = "descriptor"
    """It lives elsewhere and has the namespace open."""
    OUTSIDE = "outside"
    """It is in the user's slice but does not keep the namespace: it started before, or left it."""


class Holder(NamedTuple):
    """A process that keeps an instance.

    control_group: relative to the cgroup root; empty if unknown.
    """

    pid: int
    command: str
    control_group: str
    how: How


def find(
    namespace: int,
    roots: Collection[str],
    cgroups: Collection[str] = (),
    cancelled: Callable[[], bool] = lambda: False,
) -> list[Holder]:
    """The holders of the namespace with that inode, and all processes in the cgroups (directories).

    roots: the names of the instance's barriers. If cancelled, an empty or incomplete list. Blocking: reads
    all of /proc. A process may have millions of descriptors: those that are not checked within five seconds
    are left out, and processes with few descriptors come first.
    """
    found: dict[int, How] = {}
    candidates = list(pids())
    if namespace:
        with contextlib.suppress(OSError):  # what is found until then is shown
            for each in namespaces.inhabited(cancelled):
                is_own = each.inode == namespace
                if is_own or _is_copy(each, roots, cancelled):
                    for process in namespaces.inhabitants(each):
                        pid = int(process.partition("/")[0])
                        if is_own or pid not in found:  # its threads may live in both
                            found[pid] = How.NAMESPACE if is_own else How.DERIVED
    end = time.monotonic() + _DESCRIPTORS_TIMEOUT

    def is_over() -> bool:
        return cancelled() or time.monotonic() > end

    for pid in sorted(candidates, key=_descriptor_count) if namespace and not cancelled() else ():
        if is_over():
            break
        if pid in found or pid in {1, os.getpid()}:
            continue
        if _has_open(pid, f"mnt:[{namespace}]", is_over):
            found[pid] = How.DESCRIPTOR
    for directory in cgroups:
        for pid in cgroup_pids(directory, cancelled):
            found.setdefault(pid, How.OUTSIDE)
    ordered = sorted(found) if not cancelled() else []
    return [
        Holder(pid, command, "" if cancelled() else control_group(pid), found[pid])
        for pid, command in zip(ordered, commands(ordered, cancelled), strict=True)
    ]


def control_group(pid: int) -> str:
    """The process's cgroup in the hierarchy that systemd uses; see cgroups(7), /proc/PID/cgroup."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cgroup", errors="surrogateescape") as file:
        paths = {controllers: path for _, controllers, path in (line.strip().split(":", 2) for line in file)}
        found = [path for path in (paths.get("", ""), paths.get("name=systemd", "")) if path]
        # In the hierarchy that systemd does not manage ("hybrid"), every process is in the root.
        return max(found, key=len, default="")
    return ""


def _is_copy(found: namespaces.Found, roots: Collection[str], cancelled: Callable[[], bool]) -> bool:
    """Whether a namespace is a copy of the instance's.

    Searches the lines without parsing them: a user can have a hundred thousand mounts in each of many
    namespaces.
    """
    sentinel, inside = False, False
    names = [f"/{name}/".encode() for name in roots]
    with contextlib.suppress(OSError):
        for line in mounted.tables(found, cancelled):
            sentinel = sentinel or SENTINEL.encode() in line
            inside = inside or any(name in line for name in names)
            if sentinel and inside:
                return True
            if cancelled():
                break
    return False


def _descriptor_count(pid: int) -> int:
    """How many descriptors a process has open; always 0 before Linux 6.2."""
    try:
        return os.stat(f"/proc/{pid}/fd").st_size
    except OSError:
        return 0


def _has_open(pid: int, target: str, cancelled: Callable[[], bool]) -> bool:
    for path in descriptor_paths(pid):
        if cancelled():
            break
        with contextlib.suppress(OSError):
            if os.readlink(path) == target:
                return True
    return False

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who keeps a mount namespace, and how: an answer for people who ask why an instance is still there.

Not here: any decision. What is found is a snapshot of /proc, which may be out of date when it is read.

Hard facts
- A mount namespace made from another one (unshare, bwrap, a unit's PrivateTmp=) has a copy of its sentinel,
  and keeps it: the end is reported when the last copy is gone. Copies are told by what their mountinfo
  shows: the sentinel, and a mount whose root is in one of the instance's directories.
- PID 1 holds descriptors for the daemon (the FD store), and the daemon its own: neither is a reason.
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from polytmpd.core.names import SENTINEL
from polytmpd.kernel import mountinfo
from polytmpd.kernel.processes import commands, namespace_paths, pids

_DESCRIPTORS_TIMEOUT: Final = 5.0


class How(StrEnum):
    """How a process keeps an instance; part of the D-Bus contract."""

    NAMESPACE = "namespace"
    """It, or a thread of it, lives in the instance's mount namespace."""
    DERIVED = "derived"
    """It lives in a mount namespace that was made from the instance's."""
    DESCRIPTOR = "descriptor"
    """It lives elsewhere, and has the namespace open."""
    OUTSIDE = "outside"
    """It belongs to the user's slice and does not keep the namespace: it started before, or left it."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that keeps an instance.

    control_group: relative to the cgroup root; empty where not known.
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

    roots: the names of the instance's barriers. cancelled() ends it, with what was found so far. Blocking:
    reads all of /proc. Somebody may have millions of descriptors: those not looked at in time are left out,
    and processes with few come first.
    """
    found: dict[int, How] = {}
    derived: dict[int, bool] = {}
    everybody = list(pids())
    for pid in everybody if namespace else ():
        for path in namespace_paths(pid):
            if cancelled():
                break
            try:
                inode = os.stat(path).st_ino
            except OSError:
                continue
            if inode == namespace:
                found[pid] = How.NAMESPACE
                break
            if inode not in derived:
                derived[inode] = _is_copy(
                    path.removesuffix("/ns/mnt").removeprefix("/proc/"), roots, cancelled
                )
            if derived[inode]:
                found[pid] = How.DERIVED
    end = time.monotonic() + _DESCRIPTORS_TIMEOUT

    def is_over() -> bool:
        return cancelled() or time.monotonic() > end

    for pid in sorted(everybody, key=_descriptors) if namespace and not cancelled() else ():
        if is_over():
            break
        if pid in found or pid in {1, os.getpid()}:
            continue
        if _has_open(pid, f"mnt:[{namespace}]", is_over):
            found[pid] = How.DESCRIPTOR
    for directory in cgroups:
        for pid in _in_cgroup(directory, cancelled):
            found.setdefault(pid, How.OUTSIDE)
    ordered = sorted(found) if not cancelled() else []
    return [
        Holder(pid, command, "" if cancelled() else control_group(pid), found[pid])
        for pid, command in zip(ordered, commands(ordered, cancelled), strict=True)
    ]


def control_group(pid: int) -> str:
    """The process's cgroup, of the hierarchy that systemd uses (cgroups(7), /proc/PID/cgroup)."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cgroup", errors="surrogateescape") as file:
        paths = {controllers: path for _, controllers, path in (line.strip().split(":", 2) for line in file)}
        found = [path for path in (paths.get("", ""), paths.get("name=systemd", "")) if path]
        # In the one that systemd does not manage ("hybrid"), everything is in the root.
        return max(found, key=len, default="")
    return ""


def _is_copy(process: str, roots: Collection[str], cancelled: Callable[[], bool]) -> bool:
    """Not parsed: a user can have a hundred thousand mounts in each of many namespaces."""
    sentinel, inside = False, False
    names = [f"/{name}/".encode() for name in roots]
    with contextlib.suppress(OSError):
        for line in mountinfo.lines(process):
            sentinel = sentinel or SENTINEL.encode() in line
            inside = inside or any(name in line for name in names)
            if sentinel and inside:
                return True
            if cancelled():
                break
    return False


def _descriptors(pid: int) -> int:
    """How many it has open, since Linux 6.2; before, always 0."""
    try:
        return os.stat(f"/proc/{pid}/fd").st_size
    except OSError:
        return 0


def _has_open(pid: int, target: str, cancelled: Callable[[], bool]) -> bool:
    # Not listdir(): of a million descriptors the list alone takes seconds.
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            if cancelled():
                break
            with contextlib.suppress(OSError):
                if os.readlink(entry.path) == target:
                    return True
    return False


def _in_cgroup(directory: str, cancelled: Callable[[], bool]) -> set[int]:
    found: set[int] = set()
    for path, _, files in os.walk(directory):
        if cancelled():
            break
        if "cgroup.procs" in files:
            with contextlib.suppress(OSError), open(f"{path}/cgroup.procs") as file:
                found.update(map(int, file.read().split()))
    return found - {0}

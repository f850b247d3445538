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
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from polytmpd.kernel import mountinfo
from polytmpd.kernel.mountns import SENTINEL_SOURCE
from polytmpd.kernel.processes import commands, namespace_paths, pids


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


def find(namespace: int, roots: Collection[str], cgroups: Collection[str] = ()) -> list[Holder]:
    """The holders of the namespace with that inode, and all processes in the cgroups (directories).

    roots: the names of the instance's barriers. Blocking: reads all of /proc.
    """
    found: dict[int, How] = {}
    derived: dict[int, bool] = {}
    everybody = list(pids())
    for pid in everybody if namespace else ():
        for path in namespace_paths(pid):
            try:
                inode = os.stat(path).st_ino
            except OSError:
                continue
            if inode == namespace:
                found[pid] = How.NAMESPACE
                break
            if inode not in derived:
                derived[inode] = _is_copy(path.removesuffix("/ns/mnt").removeprefix("/proc/"), roots)
            if derived[inode]:
                found[pid] = How.DERIVED
    for pid in everybody if namespace else ():
        if pid not in found and pid not in {1, os.getpid()} and _has_open(pid, f"mnt:[{namespace}]"):
            found[pid] = How.DESCRIPTOR
    for directory in cgroups:
        for pid in _in_cgroup(directory):
            found.setdefault(pid, How.OUTSIDE)
    ordered = sorted(found)
    return [
        Holder(pid, command, control_group(pid), found[pid])
        for pid, command in zip(ordered, commands(ordered), strict=True)
    ]


def control_group(pid: int) -> str:
    """The process's cgroup, of the hierarchy that systemd uses (cgroups(7), /proc/PID/cgroup)."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cgroup", errors="surrogateescape") as file:
        paths = {controllers: path for _, controllers, path in (line.strip().split(":", 2) for line in file)}
        found = [path for path in (paths.get("", ""), paths.get("name=systemd", "")) if path]
        # In the one that systemd does not manage ("hybrid"), everything is in the root.
        return max(found, key=len, default="")
    return ""


def _is_copy(process: str, roots: Collection[str]) -> bool:
    """Not parsed: a user can have a hundred thousand mounts in each of many namespaces."""
    sentinel, inside = False, False
    names = [f"/{name}/".encode() for name in roots]
    with contextlib.suppress(OSError):
        for line in mountinfo.lines(process):
            sentinel = sentinel or SENTINEL_SOURCE.encode() in line
            inside = inside or any(name in line for name in names)
            if sentinel and inside:
                return True
    return False


def _has_open(pid: int, target: str) -> bool:
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}") == target:
                    return True
    return False


def _in_cgroup(directory: str) -> set[int]:
    found: set[int] = set()
    for path, _, files in os.walk(directory):
        if "cgroup.procs" in files:
            with contextlib.suppress(OSError), open(f"{path}/cgroup.procs") as file:
                found.update(map(int, file.read().split()))
    return found - {0}

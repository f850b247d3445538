# SPDX-License-Identifier: LGPL-2.1-or-later
"""The machine's processes and mounts, as the outer system's /proc shows them.

Reading from outside leaves no traces inside and starts no process. Namespaces are read and never opened: an
open descriptor would keep them alive.

Hard facts:
- An open /proc/PID/mountinfo holds its namespace (mounts_open_common() in fs/proc_namespace.c). The table
  that is read belongs to a living namespace, and the directories that it has mounted must exist.
- If a process calls setuid() after setns() and its UIDs are read first, it may be seen in the new namespace
  with the old UID, but never the other way round. A PID may belong to another process at each read, so the
  start time is compared at the end.
- The table is not in the order of mounting (since Linux 6.8 it is in the order of the mounts' numbers). The
  parents tell which mount is on top.
- Deleted directories carry "//deleted" in mountinfo's root field (seq_dentry(), d_path(9)).

Not here: what is right (checker.py).
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Ident = tuple[int, int]

UID_MIN, UID_MAX = 1000, 60000

# the directory of an instance, in a mount's root and on disk
BARRIER = re.compile(r"polytmp-(?:(removing)|[0-9a-f]{32}-(\d+)|(\d+))(?=[-/]|$)")
SENTINEL = "polytmp-sentinel"
_MOVING = re.compile(r"^/(run/user/\d+(/.*)?|mnt/soak-[^/]*|run/credentials/.*|run/host/.*|run/systemd/.*)$")


@dataclass(frozen=True, slots=True)
class Mount:
    number: int
    parent: int
    point: str
    root: str
    device: str
    kind: str
    source: str
    shared: str

    @property
    def owner(self) -> int | None:
        """The UID whose instance directory this mounts; None if it mounts none."""
        found = BARRIER.search(self.root)
        return int(found[2] or found[3]) if found and (found[2] or found[3]) else None


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    start: int
    name: str
    uids: frozenset[int]
    namespace: int
    tmp: Ident
    var_tmp: Ident
    cgroup: str

    @property
    def identity(self) -> Ident:
        return self.pid, self.start

    @property
    def user(self) -> int | None:
        """The regular user whose UID all its UIDs are; None for sudo while it changes them, for example."""
        uid = next(iter(self.uids))
        return uid if len(self.uids) == 1 and UID_MIN <= uid <= UID_MAX else None

    def __str__(self) -> str:
        uids = ",".join(map(str, sorted(self.uids)))
        return (
            f"process {self.pid} ({self.name}, UID {uids}, {self.cgroup}, mnt:[{self.namespace}], "
            f"/tmp {self.tmp}, /var/tmp {self.var_tmp})"
        )


@dataclass(slots=True)
class Look:
    """What was seen at about the same time. tables: namespace → (a process that lives in it, its mounts)."""

    processes: dict[Ident, Process] = field(default_factory=dict)
    tables: dict[int, tuple[Process, list[Mount]]] = field(default_factory=dict)


def _stat(pid: int) -> tuple[int, str]:
    """Return (start time, state)."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[19]), fields[0].decode()


def ident(path: str) -> Ident:
    """Return (device, inode); (0, 0) if there is no such file, as in a sandbox without /tmp."""
    try:
        found = os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        return 0, 0
    return found.st_dev, found.st_ino


def read_process(pid: int, machine: str) -> Process | None:
    """Read a process; None if it does not exist or is not of this machine (part of its cgroup's name)."""
    try:
        start, state = _stat(pid)
        groups = Path(f"/proc/{pid}/cgroup").read_text()
        if machine not in groups or state in "ZX":
            return None
        name, uids = "", frozenset[int]()
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith("Name:"):
                name = line.split(None, 1)[1]
            elif line.startswith("Uid:"):
                uids = frozenset(map(int, line.split()[1:]))
        namespace = int(os.readlink(f"/proc/{pid}/ns/mnt")[5:-1])  # noqa: PTH115
        tmp, var_tmp = ident(f"/proc/{pid}/root/tmp"), ident(f"/proc/{pid}/root/var/tmp")
        if _stat(pid)[0] != start or _stat(pid)[1] in "ZX":
            return None
    except (OSError, ValueError, IndexError):
        return None
    group = next(
        (line.rpartition("/payload")[2] for line in groups.splitlines() if line.startswith("0::")), ""
    )
    return Process(pid, start, name, uids, namespace, tmp, var_tmp, group)


def pids() -> Iterator[int]:
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdecimal():
            yield int(name)


def mounts(pid: int) -> list[Mount]:
    """Read the mount table of a process. Raises OSError (EINVAL for a zombie)."""
    found = []
    for line in Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        shared = next((text[7:] for text in fields[6:] if text.startswith("shared:")), "")
        found.append(
            Mount(
                int(fields[0]),
                int(fields[1]),
                _unescape(fields[4]),
                _unescape(fields[3]),
                fields[2],
                rest[0],
                rest[1],
                shared,
            )
        )
    return found


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def look(machine: str) -> Look:
    seen = Look()
    for pid in pids():
        process = read_process(pid, machine)
        if process is None:
            continue
        seen.processes[process.identity] = process
        if process.namespace not in seen.tables:
            with contextlib.suppress(OSError):
                table = mounts(pid)
                if int(os.readlink(f"/proc/{pid}/ns/mnt")[5:-1]) == process.namespace:  # noqa: PTH115
                    seen.tables[process.namespace] = process, table
    return seen


def is_still(process: Process, machine: str) -> bool:
    """Whether the process lives and is unchanged."""
    return read_process(process.pid, machine) == process


def namespace_holders(namespaces: set[int], machine: str) -> dict[int, str]:
    """Return namespace → a process that has it open; the daemon and PID 1 (its FD store) do not count."""
    found: dict[int, str] = {}
    for pid in pids():
        with contextlib.suppress(OSError, ValueError):
            groups = Path(f"/proc/{pid}/cgroup").read_text()
            if machine not in groups or "polytmpd.service" in groups or "init.scope" in groups:
                continue
            for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
                target = os.readlink(f"/proc/{pid}/fd/{name}")  # noqa: PTH115
                if target.startswith("mnt:[") and int(target[5:-1]) in namespaces:
                    found[int(target[5:-1])] = f"process {pid}, descriptor {name}"
    return found


def standing(table: list[Mount]) -> set[tuple[str, str, str, bool]]:
    """Return the mounts that do not come and go with users."""
    return {
        (mount.point, mount.device, mount.kind, bool(mount.shared))
        for mount in table
        if not _MOVING.match(mount.point)
    }


def outside(table: list[Mount]) -> set[tuple[str, str, str]]:
    """Return the mounts outside of /tmp and /var/tmp."""
    return {
        (mount.point, mount.device, mount.root)
        for mount in table
        if not re.match(r"/(var/)?tmp(/|$)", mount.point)
    }


def top(table: list[Mount], point: str) -> int | None:
    """Return whose instance lies at a path: that of the mount there which no other mount covers."""
    found = [mount for mount in table if mount.point == point]
    covered = {mount.parent for mount in found}
    return next((mount.owner for mount in found if mount.number not in covered), None)


def namespaces_of(pid: int) -> list[int]:
    """Return the mount namespaces that a process has open."""
    found = []
    for entry in scan(Path(f"/proc/{pid}/fd")):
        with contextlib.suppress(OSError):
            target = os.readlink(entry.path)  # noqa: PTH115
            if target.startswith("mnt:["):
                found.append(int(target[5:-1]))
    return found


def names(directory: str, prefix: str) -> set[str] | None:
    """Return the names in a directory that begin with prefix; None if it cannot be read."""
    try:
        return {name for name in os.listdir(directory) if name.startswith(prefix)}  # noqa: PTH208
    except OSError:
        return None


def scan(directory: Path) -> list["os.DirEntry[str]"]:
    """Return the entries of a directory; none if it cannot be read."""
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError:
        return []

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What must be, compared with what is, all the time, from outside of the machine.

Nothing of polytmpd is imported and nothing that it says is believed: processes, mounts and directories are
read from the outer /proc, the bus and the service manager are asked with their own tools.

No look is of one instant. What may only seem wrong is looked at again; what settles by itself within a
bounded time (GRACE) is wrong after that, counted from the last disturbance.
"""

import contextlib
import json
import os
import re
import stat
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.bed import CommandError, Machine

from . import proc
from .proc import BARRIER, SENTINEL, UID_MAX, UID_MIN, Ident, Look, Mount, Process
from .record import Record, Violation

GRACE = 15.0
"""Seconds in which everything of a user must be gone after his last process, descriptor and session."""
REFUSED_SSHD = 40.0
"""sshd gives a session that PAM refused to the user, waits for what he asks for, and only then says no."""
TICK = 0.4
SLOW = 2.0
DIFFERS_AT_MOST = 8
"""Looks in a row at which a user's mounts may differ from the host's in the same way."""
FDS_AT_MOST, RSS_AT_MOST, THREADS_AT_MOST = 120, 160 << 10, 40

_DELETED = re.compile(r"polytmp-[^/]+/tmp//deleted$")
_MOVING = re.compile(r"^/(run/user/\d+(/.*)?|mnt/soak-[^/]*|run/credentials/.*|run/host/.*|run/systemd/.*)$")
_CALL = ("busctl", "--json=short", "--timeout=10", "call", "org.polytmp1", "/org/polytmp1")
_TROUBLE = re.compile(
    r"Traceback|Internal error|IllegalEvent|cannot be deleted|never retrieved|stays until|cannot be told"
)


class Checker(threading.Thread):
    """Checks until the record says stop. What it finds goes to record.violate()."""

    def __init__(self, machine: Machine, users: dict[str, int], record: Record) -> None:
        super().__init__(name="checker")
        self._machine = machine
        self._users = users
        self._record = record
        self._root = Path("/proc", str(machine.leader), "root")
        self._host_namespace = int(os.readlink(f"/proc/{machine.leader}/ns/mnt")[5:-1])  # noqa: PTH115
        self._places = {
            directory: proc.ident(str(self._root / directory)) for directory in ("tmp", "var/tmp")
        }
        self._baseline = _standing(proc.mounts(machine.leader))
        self._group = next(mount.shared for mount in proc.mounts(machine.leader) if mount.point == "/")
        self._first_seen: dict[Ident, float] = {}
        self._private: dict[Ident, Ident] = {}
        self._marks: dict[Ident, tuple[set[str], set[Ident]]] = {}
        self._kept: dict[int, set[str]] = {}
        self._differs: Counter[tuple[int, str]] = Counter()
        self._last_active: dict[int, float] = dict.fromkeys(users.values(), time.monotonic())
        self._owners: dict[int, int] = {}
        self._aside: dict[str, float] = {}
        self._wrong: Counter[str] = Counter()
        self._slow_due = 0.0
        self._listed: dict[int, dict[str, Any]] = {}
        self.summary = ""
        self._daemon = "no daemon"
        self._daemon_at_rest = self._daemon_descriptors()[0] if self._daemon_pid() else 0

    def run(self) -> None:
        while not self._record.stop.is_set():
            begin = time.monotonic()
            try:
                self.tick()
            except Violation as violation:
                self._record.violate(str(violation))
            except Exception as error:
                self._record.violate(f"the checker itself failed: {type(error).__name__}: {error}")
                raise
            self._record.stop.wait(max(0.05, begin + TICK - time.monotonic()))

    def tick(self) -> None:
        seen = proc.look(self._machine.name)
        self._record.count("looks")
        for check in (
            self._landings,
            self._one_place_each,
            self._mounted_is_there,
            self._files_are_there,
            self._host_mounts,
            self._propagation,
            self._disk,
            self._daemon_is_bounded,
        ):
            check(seen)
            self._record.count("checks")
        if time.monotonic() >= self._slow_due:
            self._slow_due = time.monotonic() + SLOW
            self._bus(seen)
            self._record.count("checks")
        self._leftovers(seen)
        self._summarize(seen)

    def _still(self, *processes: Process) -> bool:
        return all(proc.is_still(process, self._machine.name) for process in processes)

    # The private directories

    def _landings(self, seen: Look) -> None:
        """No process that is a regular user's has the host's directories."""
        now = time.monotonic()
        for identity, process in seen.processes.items():
            if process.user is None:
                continue
            shared = process.tmp == self._places["tmp"] or process.var_tmp == self._places["var/tmp"]
            if not shared and process.namespace != self._host_namespace:
                continue
            since = self._first_seen.setdefault(identity, now)
            if process.name.startswith("sshd") and now - since < REFUSED_SSHD:
                continue  # refused: it has got no session, and runs nothing of the user's
            if self._still(process):
                raise Violation(f"a silent landing in the shared /tmp: {process}")
        self._first_seen = {key: when for key, when in self._first_seen.items() if key in seen.processes}

    def _one_place_each(self, seen: Look) -> None:
        """Two users never see the same /tmp; one user sees one, in one namespace; nobody's changes."""
        by_place: dict[Ident, Process] = {}
        by_user: dict[int, Process] = {}
        spaces: dict[int, Process] = {}
        private: dict[Ident, Ident] = {}
        for identity, process in seen.processes.items():
            user = process.user
            if user is None or process.namespace not in seen.tables:
                continue
            table = seen.tables[process.namespace][1]
            for place in {process.tmp, process.var_tmp} - {(0, 0)}:
                other = by_place.setdefault(place, process)
                if other.user != user and self._still(process, other):
                    raise Violation(f"two users see the same directory {place}: {process} and {other}")
            owner = _top(table, "/tmp")
            if owner is None:
                continue  # one that he made himself: bwrap --tmpfs /tmp
            if owner != user and self._still(process):
                raise Violation(f"{process} lives in the instance of UID {owner}")
            other = by_user.setdefault(user, process)
            if other.tmp != process.tmp and self._still(process, other):
                raise Violation(f"one user, two instances: {process} and {other}")
            if self._is_primary(table):
                other = spaces.setdefault(user, process)
                if other.namespace != process.namespace and self._still(process, other):
                    raise Violation(f"one user, two namespaces: {process} and {other}")
                private[identity] = process.tmp
                if self._private.get(identity, process.tmp) != process.tmp and self._still(process):
                    raise Violation(f"/tmp was {self._private[identity]} before: {process}")
        self._private = private

    def _is_primary(self, table: list[Mount]) -> bool:
        """In the host's peer group: not what users and sandboxes make for themselves."""
        return any(mount.point == "/" and mount.shared == self._group for mount in table)

    def _mounted_is_there(self, seen: Look) -> None:
        for process, table in seen.tables.values():
            for mount in table:
                found = BARRIER.search(mount.root)
                if found and (found[1] or _DELETED.search(mount.root)):
                    raise Violation(
                        f"an instance was removed that a process has mounted: {mount.root} on "
                        f"{mount.point}, {process}"
                    )

    def _files_are_there(self, seen: Look) -> None:
        """What was seen in a /tmp is seen again as long as one process lived all the time.

        People write mark-*, and never remove one.
        """
        places: dict[Ident, dict[Ident, Process]] = {}
        for identity, process in seen.processes.items():
            table = seen.tables.get(process.namespace)
            if process.user is not None and table is not None and _top(table[1], "/tmp") is not None:
                places.setdefault(process.tmp, {})[identity] = process
        marks: dict[Ident, tuple[set[str], set[Ident]]] = {}
        for place, living in places.items():
            found = None
            for process in living.values():
                found = _names(f"/proc/{process.pid}/root/tmp", "mark-")
                if found is not None and self._still(process):
                    break
                found = None
            if found is None:
                continue
            before, witnesses = self._marks.get(place, (set(), set()))
            missing = before - found
            for identity in witnesses & set(living):
                if missing and self._still(living[identity]):
                    again = _names(f"/proc/{living[identity].pid}/root/tmp", "mark-")
                    if again is not None and missing - again and self._still(living[identity]):
                        raise Violation(f"files are gone: {sorted(missing - again)} of {living[identity]}")
            marks[place] = found, set(living)
        self._marks = marks
        for uid in self._users.values():
            kept = _names(str(self._root / f"var/tmp/polytmp-{uid}/tmp"), "mark-")
            if missing := self._kept.get(uid, set()) - (kept or set()):
                raise Violation(f"files are gone from /var/tmp of UID {uid}: {sorted(missing)}")
            self._kept[uid] = kept or set()

    # The host

    def _host_mounts(self, _: Look) -> None:
        table = proc.mounts(self._machine.leader)
        for mount in table:
            if mount.source == SENTINEL or BARRIER.search(mount.root):
                raise Violation(f"a mount of an instance on the host: {mount}")
            if mount.point == "/" and mount.shared != self._group:
                raise Violation(f"the host's / is not in its peer group {self._group} any more: {mount}")
        changed = _standing(table) ^ self._baseline
        self._settled(f"the host's mounts changed: {sorted(changed)}" if changed else "", "mounts", GRACE)

    def _settled(self, wrong: str, kind: str, after: float) -> None:
        """Complain about what is the same wrong at three looks in a row, on a system left in peace."""
        key = f"{kind}: {wrong}"
        for other in [other for other in self._wrong if other.startswith(f"{kind}: ") and other != key]:
            del self._wrong[other]
        if wrong and self._record.steady() > after:
            self._wrong[key] += 1
            if self._wrong[key] >= 3:
                raise Violation(wrong)

    def _propagation(self, seen: Look) -> None:
        """Outside of the private directories a user's namespace has the host's mounts, no more, no less."""
        differs: Counter[tuple[int, str]] = Counter()
        host = _outside(proc.mounts(self._machine.leader))
        for namespace, (process, table) in seen.tables.items():
            if namespace == self._host_namespace or not self._is_primary(table):
                continue
            if _top(table, "/tmp") is None:
                continue
            for entry in host ^ _outside(table):
                key = (namespace, str(entry))
                differs[key] = self._differs[key] + 1
                if differs[key] > DIFFERS_AT_MOST:
                    raise Violation(f"host and mnt:[{namespace}] ({process}) differ for good: {entry}")
        self._differs = differs

    def _disk(self, _: Look) -> None:
        now = time.monotonic()
        aside: dict[str, float] = {}
        for directory in ("tmp", "var/tmp"):
            for entry in _scan(self._root / directory):
                with contextlib.suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    if UID_MIN <= found.st_uid <= UID_MAX:
                        raise Violation(f"a regular user's file in the shared /{directory}: {entry.name}")
                    match = BARRIER.match(entry.name)
                    if match and match[1]:
                        aside[entry.path] = self._aside.get(entry.path, now)
                    if match and (found.st_uid, stat.S_IMODE(found.st_mode)) != (0, 0o700):
                        raise Violation(f"a barrier that is none: {entry.path}, {found}")
        self._aside = aside
        for path, since in aside.items():
            if min(now - since, self._record.steady()) > GRACE:
                raise Violation(f"set aside, and not deleted for {now - since:.0f} s: {path}")

    # The daemon

    def _daemon_pid(self) -> int | None:
        for pid in proc.pids():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"/usr/libexec/polytmpd" not in command:
                    continue
                groups = Path(f"/proc/{pid}/cgroup").read_text()
                if self._machine.name in groups and "/polytmpd.service" in groups:
                    return pid
        return None

    def _daemon_descriptors(self) -> tuple[int, list[int]]:
        """(how many that are no namespaces, the namespaces)."""
        pid = self._daemon_pid()
        if pid is None:
            return 0, []
        namespaces = _namespaces_of(pid)
        return len(_scan(Path(f"/proc/{pid}/fd"))) - len(namespaces), namespaces

    def _daemon_is_bounded(self, _: Look) -> None:
        pid = self._daemon_pid()
        if pid is None:
            self._daemon = "no daemon"
            self._settled("the daemon does not run", "daemon", 20)
            return
        others, namespaces = self._daemon_descriptors()
        figures = {"VmRSS": 0, "Threads": 0}
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                key, value = line.split(":", 1)
                if key in figures:
                    figures[key] = int(value.split()[0])
        rss, threads = figures["VmRSS"], figures["Threads"]
        self._daemon = f"daemon {rss >> 10} MB, {others}+{len(namespaces)} fds, {threads} threads"
        if others > FDS_AT_MOST or rss > RSS_AT_MOST or threads > THREADS_AT_MOST:
            raise Violation(f"the daemon grows: {self._daemon}")
        repeated = [number for number, times in Counter(namespaces).items() if times > 1]
        # one that is just handed over is there twice for a moment
        self._settled(f"mnt:{repeated} open more than once" if repeated else "", "repeated", 5)
        excess = len(namespaces) > len(self._users)
        self._settled(f"the daemon holds {len(namespaces)} namespaces" if excess else "", "excess", 5)
        more = others > self._daemon_at_rest + 8
        self._settled(
            f"the daemon has {others} descriptors besides namespaces, {self._daemon_at_rest} at rest"
            if more
            else "",
            "descriptors",
            5,
        )

    def _bus(self, seen: Look) -> None:
        """What the bus says is what lives; the FD store holds what the daemon holds."""
        if self._record.steady() < 3:
            self._wrong.clear()
            return
        before = self._daemon_descriptors()[1]
        try:
            listed = self._managed()
            stored = int(
                self._machine.run("systemctl", "show", "-P", "NFileDescriptorStore", "polytmpd").stdout
            )
        except (CommandError, ValueError) as error:
            self._record.count("bus silent")
            if self._record.steady() > 3:
                self._settled(f"the bus does not answer: {error}", "silent", 30)
            return
        if self._record.steady() < 3:
            return
        self._listed = listed
        held = self._daemon_descriptors()[1]
        kept = set(_namespaces_of(self._machine.leader))  # PID 1's
        differ = held == before and (kept != set(held) or stored != len(kept) + 1)
        self._settled(
            f"{stored} descriptors stored, {sorted(kept)}; the daemon holds {sorted(held)}"
            if differ
            else "",
            "stored",
            3,
        )
        wrong = ""
        for process in seen.processes.values():
            table = seen.tables.get(process.namespace)
            if process.user is None or table is None or not self._is_primary(table[1]):
                continue
            entry = listed.get(process.user)
            if _top(table[1], "/tmp") != process.user or not self._still(process):
                continue
            if entry is None or entry["State"] not in ("active", "draining", "preparing"):
                wrong = f"it lives, and the bus says {entry}: {process}"
            elif entry["State"] != "preparing" and entry["NamespaceID"] != process.namespace:
                wrong = f"the bus says mnt:[{entry['NamespaceID']}], {entry['State']}: {process}"
        self._settled(wrong, "living", 3)

    def _managed(self) -> dict[int, dict[str, Any]]:
        method = ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
        answer = json.loads(self._machine.run(*_CALL, *method, timeout=15).stdout)
        found = {}
        for interfaces in answer["data"][0].values():
            properties = {
                name: value["data"] for name, value in interfaces.get("org.polytmp1.Instance", {}).items()
            }
            if properties:
                found[int(properties["UID"])] = properties
        return found

    # The end of an instance

    def _leftovers(self, seen: Look) -> None:
        """Nothing stays of a user who has no process, no session, no descriptor."""
        now = time.monotonic()
        active = self._active(seen)
        for uid in active:
            self._last_active[uid] = now
        for uid, since in self._last_active.items():
            if min(now - since, self._record.steady()) < GRACE:
                continue
            left = self._left_of(uid)
            if not left:
                continue
            namespaces = {number for number, owner in self._owners.items() if owner == uid}
            if holders := proc.namespace_holders(namespaces, self._machine.name):
                self._record.count("held by a descriptor")
                self._record.act("checker", f"UID {uid} is held: {holders}")
                self._last_active[uid] = now
                continue
            raise Violation(f"{now - since:.0f} s after the last of UID {uid} is left: {', '.join(left)}")

    def _active(self, seen: Look) -> set[int]:
        active: set[int] = set()
        for process in seen.processes.values():
            active |= {uid for uid in process.uids if UID_MIN <= uid <= UID_MAX}
            if match := re.search(r"user-(\d+)\.slice", process.cgroup):
                active.add(int(match[1]))
        for namespace, (_, table) in seen.tables.items():
            owners = {owner for mount in table if (owner := mount.owner) is not None}
            active |= owners
            if len(owners) == 1:
                self._owners[namespace] = next(iter(owners))
        return (active | self.sessions()) & set(self._users.values())

    def sessions(self) -> set[int]:
        """The UIDs of logind's sessions, whether anything of them lives or not."""
        found: set[int] = set()
        for entry in _scan(self._root / "run/systemd/sessions"):
            if entry.name.endswith(".ref"):
                continue  # a FIFO of logind's
            with contextlib.suppress(OSError):
                found |= {int(uid) for uid in re.findall(r"(?m)^UID=(\d+)", Path(entry.path).read_text())}
        return found

    def _left_of(self, uid: int) -> list[str]:
        left = []
        for directory in ("tmp", "var/tmp"):
            for entry in _scan(self._root / directory):
                match = BARRIER.match(entry.name)
                if match and match[2] == str(uid):
                    left.append(f"/{directory}/{entry.name}")
        if (self._root / f"run/polytmpd/instances/{uid}").exists():
            left.append("its state file")
        if uid in self._listed:
            with contextlib.suppress(CommandError):
                self._listed = self._managed()
                if uid in self._listed:
                    left.append(f"an instance on the bus, {self._listed[uid]['State']}")
        left += [
            f"mnt:[{number}] in the daemon"
            for number in self._daemon_descriptors()[1]
            if self._owners.get(number) == uid
        ]
        return left

    def nothing_is_left(self) -> list[str]:
        """What is left when everybody has gone; empty is right."""
        seen = proc.look(self._machine.name)
        left = [f"UID {uid}: {what}" for uid in self._users.values() for what in self._left_of(uid)]
        left += [str(process) for process in seen.processes.values() if process.user is not None]
        left += [
            f"mnt:[{namespace}] with an instance, {process}"
            for namespace, (process, table) in seen.tables.items()
            if any(mount.owner is not None or mount.source == SENTINEL for mount in table)
        ]
        for entry in _scan(self._root / "tmp"):
            if entry.name.startswith("polytmp-"):
                left.append(f"/tmp/{entry.name}")
        for entry in _scan(self._root / "var/tmp"):
            if re.match(r"polytmp-(?!\d+$)", entry.name):
                left.append(f"/var/tmp/{entry.name}")
        left += [f"state file {entry.name}" for entry in _scan(self._root / "run/polytmpd/instances")]
        left += [f"on the bus: {properties}" for properties in self._managed().values()]
        others, namespaces = self._daemon_descriptors()
        left += [f"mnt:[{number}] in the daemon" for number in namespaces]
        if others > self._daemon_at_rest:
            left.append(f"{others} descriptors in the daemon, {self._daemon_at_rest} at the begin")
        stored = self._machine.run("systemctl", "show", "-P", "NFileDescriptorStore", "polytmpd").stdout
        if stored.strip() != "1":
            left.append(f"{stored.strip()} descriptors in the FD store, the inotify instance is one")
        table = proc.mounts(self._machine.leader)
        left += [f"mount {entry}" for entry in sorted(_standing(table) ^ self._baseline)]
        left += [
            f"mount {mount.point}" for mount in table if re.match(r"/mnt/soak-|/run/user/\d+", mount.point)
        ]
        return left

    def journal(self) -> list[str]:
        """Lines of the daemon that must not be there."""
        lines = self._machine.journal("-u", "polytmpd").splitlines()
        return [line for line in lines if _TROUBLE.search(line)]

    def _summarize(self, seen: Look) -> None:
        users = {process.user for process in seen.processes.values()} - {None}
        instances = [table for table in seen.tables.values() if _top(table[1], "/tmp") is not None]
        counts = f"{len(users)} users, {len(seen.processes)} processes, {len(instances)} namespaces"
        self.summary = f"{counts}; {self._daemon}"


def _standing(table: list[Mount]) -> set[tuple[str, str, str, bool]]:
    """What does not come and go with users."""
    return {
        (mount.point, mount.device, mount.kind, bool(mount.shared))
        for mount in table
        if not _MOVING.match(mount.point)
    }


def _outside(table: list[Mount]) -> set[tuple[str, str, str]]:
    return {
        (mount.point, mount.device, mount.root)
        for mount in table
        if not re.match(r"/(var/)?tmp(/|$)", mount.point)
    }


def _top(table: list[Mount], point: str) -> int | None:
    """Whose instance lies at a path: in the mount there that no other one covers."""
    found = [mount for mount in table if mount.point == point]
    covered = {mount.parent for mount in found}
    return next((mount.owner for mount in found if mount.number not in covered), None)


def _namespaces_of(pid: int) -> list[int]:
    """The mount namespaces that a process has open."""
    found = []
    for entry in _scan(Path(f"/proc/{pid}/fd")):
        with contextlib.suppress(OSError):
            target = os.readlink(entry.path)  # noqa: PTH115
            if target.startswith("mnt:["):
                found.append(int(target[5:-1]))
    return found


def _names(directory: str, prefix: str) -> set[str] | None:
    try:
        return {name for name in os.listdir(directory) if name.startswith(prefix)}  # noqa: PTH208
    except OSError:
        return None


def _scan(directory: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError:
        return []

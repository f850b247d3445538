# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compares what is with what must be, all the time, from outside of the machine.

Nothing of polytmpd is imported or believed: processes, mounts and directories are read from the outer /proc,
and the bus and the service manager are asked with their own tools.

A look takes time, so what it shows may never have been true at one instant. Anything that looks wrong is
checked again. Whatever settles by itself is wrong only if it has not settled within a bounded time (GRACE)
after the last disturbance.

Not here: the end of an instance (leftovers.py).
"""

import contextlib
import os
import re
import stat
import threading
import time
from collections import Counter
from pathlib import Path

from tests.bed import CommandError, Machine

from . import proc
from .daemon import Daemon
from .leftovers import GRACE, Leftovers
from .proc import BARRIER, SENTINEL, UID_MAX, UID_MIN, Ident, Look, Mount, Process
from .record import Record, Violation

REFUSED_SSHD = 40.0
"""Seconds. After PAM has refused a session, sshd becomes the user, waits for a request and then refuses."""
TICK = 0.4
SLOW = 2.0
DIFFERS_AT_MOST = 8
"""For how many looks in a row a user's mounts may differ from the host's in the same way."""
FDS_AT_MOST, RSS_AT_MOST, THREADS_AT_MOST = 120, 160 << 10, 40

_DELETED = re.compile(r"polytmp-[^/]+/tmp//deleted$")


class Checker(threading.Thread):
    """Checks until record.stop is set, and reports to record.violate()."""

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
        self.polytmpd = Daemon(machine)
        self.leftovers = Leftovers(machine, users, record, self.polytmpd)
        self._group = next(mount.shared for mount in proc.mounts(machine.leader) if mount.point == "/")
        self._first_seen: dict[Ident, float] = {}
        self._private: dict[Ident, Ident] = {}
        self._marks: dict[Ident, tuple[set[str], set[Ident]]] = {}
        self._kept: dict[int, set[str]] = {}
        self._differs: Counter[tuple[int, str]] = Counter()
        self._aside: dict[str, float] = {}
        self._wrong: Counter[str] = Counter()
        self._slow_due = 0.0
        self.summary = ""
        self._figures = "no daemon"

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
        self.leftovers.check(seen)
        self._summarize(seen)

    def _still(self, *processes: Process) -> bool:
        return all(proc.is_still(process, self._machine.name) for process in processes)

    # The private directories

    def _landings(self, seen: Look) -> None:
        """No process of a regular user has the host's directories."""
        now = time.monotonic()
        for identity, process in seen.processes.items():
            if process.user is None:
                continue
            shared = process.tmp == self._places["tmp"] or process.var_tmp == self._places["var/tmp"]
            if not shared and process.namespace != self._host_namespace:
                continue
            since = self._first_seen.setdefault(identity, now)
            if process.name.startswith("sshd") and now - since < REFUSED_SSHD:
                continue  # refused: it gets no session and runs nothing for the user
            if self._still(process):
                raise Violation(f"silently in the shared /tmp: {process}")
        self._first_seen = {key: when for key, when in self._first_seen.items() if key in seen.processes}

    def _one_place_each(self, seen: Look) -> None:
        """No two users see the same /tmp; each user sees one, in one namespace; no process changes it."""
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
            owner = proc.top(table, "/tmp")
            if owner is None:
                continue  # made by the user: bwrap --tmpfs /tmp
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
        """Whether / is in the host's peer group, which it is not in namespaces of users and sandboxes."""
        return any(mount.point == "/" and mount.shared == self._group for mount in table)

    def _mounted_is_there(self, seen: Look) -> None:
        for process, table in seen.tables.values():
            for mount in table:
                found = BARRIER.search(mount.root)
                if found and (found[1] or _DELETED.search(mount.root)):
                    raise Violation(
                        f"an instance was removed while a process has it mounted: {mount.root} on "
                        f"{mount.point}, {process}"
                    )

    def _files_are_there(self, seen: Look) -> None:
        """A file that was in a /tmp is still there as long as one process has been living in it.

        Persons write files mark-*, and never remove any.
        """
        places: dict[Ident, dict[Ident, Process]] = {}
        for identity, process in seen.processes.items():
            table = seen.tables.get(process.namespace)
            if process.user is not None and table is not None and proc.top(table[1], "/tmp") is not None:
                places.setdefault(process.tmp, {})[identity] = process
        marks: dict[Ident, tuple[set[str], set[Ident]]] = {}
        for place, living in places.items():
            found = None
            for process in living.values():
                found = proc.names(f"/proc/{process.pid}/root/tmp", "mark-")
                if found is not None and self._still(process):
                    break
                found = None
            if found is None:
                continue
            before, witnesses = self._marks.get(place, (set(), set()))
            missing = before - found
            for identity in witnesses & set(living):
                if missing and self._still(living[identity]):
                    again = proc.names(f"/proc/{living[identity].pid}/root/tmp", "mark-")
                    if again is not None and missing - again and self._still(living[identity]):
                        raise Violation(f"files are gone: {sorted(missing - again)} of {living[identity]}")
            marks[place] = found, set(living)
        self._marks = marks
        for uid in self._users.values():
            kept = proc.names(str(self._root / f"var/tmp/polytmp-{uid}/tmp"), "mark-")
            if missing := self._kept.get(uid, set()) - (kept or set()):
                raise Violation(f"files are gone from /var/tmp of UID {uid}: {sorted(missing)}")
            self._kept[uid] = kept or set()

    # The host

    def _host_mounts(self, _: Look) -> None:
        table = proc.mounts(self._machine.leader)
        for mount in table:
            if mount.source == SENTINEL or BARRIER.search(mount.root):
                raise Violation(f"the host has a mount of an instance: {mount}")
            if mount.point == "/" and mount.shared != self._group:
                raise Violation(f"the host's / has left its peer group {self._group}: {mount}")
        changed = self.leftovers.changed_mounts(table)
        self._settled(f"the host's mounts changed: {changed}" if changed else "", "mounts", GRACE)

    def _settled(self, wrong: str, kind: str, after: float) -> None:
        """Raise Violation if the same thing is wrong at three looks in a row on an undisturbed system.

        wrong: what it is, or "". after: for how many seconds nothing may have disturbed the system.
        """
        key = f"{kind}: {wrong}"
        for other in [other for other in self._wrong if other.startswith(f"{kind}: ") and other != key]:
            del self._wrong[other]
        if wrong and self._record.steady() > after:
            self._wrong[key] += 1
            if self._wrong[key] >= 3:
                raise Violation(wrong)

    def _propagation(self, seen: Look) -> None:
        """Outside of the private directories, a user's namespace has exactly the host's mounts."""
        differs: Counter[tuple[int, str]] = Counter()
        host = proc.outside(proc.mounts(self._machine.leader))
        for namespace, (process, table) in seen.tables.items():
            if namespace == self._host_namespace or not self._is_primary(table):
                continue
            if proc.top(table, "/tmp") is None:
                continue
            for entry in host ^ proc.outside(table):
                key = (namespace, str(entry))
                differs[key] = self._differs[key] + 1
                if differs[key] > DIFFERS_AT_MOST:
                    raise Violation(f"host and mnt:[{namespace}] ({process}) keep differing: {entry}")
        self._differs = differs

    def _disk(self, _: Look) -> None:
        now = time.monotonic()
        aside: dict[str, float] = {}
        for directory in ("tmp", "var/tmp"):
            for entry in proc.scan(self._root / directory):
                with contextlib.suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    if UID_MIN <= found.st_uid <= UID_MAX:
                        raise Violation(
                            f"the shared /{directory} has a file of a regular user: {entry.name}"
                        )
                    match = BARRIER.match(entry.name)
                    if match and match[1]:
                        aside[entry.path] = self._aside.get(entry.path, now)
                    if match and (found.st_uid, stat.S_IMODE(found.st_mode)) != (0, 0o700):
                        raise Violation(f"a barrier with the wrong owner or mode: {entry.path}, {found}")
        self._aside = aside
        for path, since in aside.items():
            if min(now - since, self._record.steady()) > GRACE:
                raise Violation(f"set aside {now - since:.0f} s ago and still not deleted: {path}")

    # The daemon

    def _daemon_is_bounded(self, _: Look) -> None:
        pid = self.polytmpd.pid()
        if pid is None:
            self._figures = "no daemon"
            self._settled("the daemon does not run", "daemon", 20)
            return
        others, namespaces = self.polytmpd.descriptors()
        figures = {"VmRSS": 0, "Threads": 0}
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                key, value = line.split(":", 1)
                if key in figures:
                    figures[key] = int(value.split()[0])
        rss, threads = figures["VmRSS"], figures["Threads"]
        self._figures = f"daemon {rss >> 10} MB, {others}+{len(namespaces)} fds, {threads} threads"
        if others > FDS_AT_MOST or rss > RSS_AT_MOST or threads > THREADS_AT_MOST:
            raise Violation(f"the daemon grows: {self._figures}")
        repeated = [number for number, times in Counter(namespaces).items() if times > 1]
        # while a namespace is handed over, it is open twice for a moment
        self._settled(f"mnt:{repeated} open more than once" if repeated else "", "repeated", 5)
        excess = len(namespaces) > len(self._users)
        self._settled(f"the daemon holds {len(namespaces)} namespaces" if excess else "", "excess", 5)
        more = others > self.polytmpd.at_rest + 8
        self._settled(
            f"the daemon has {others} descriptors besides namespaces, {self.polytmpd.at_rest} at rest"
            if more
            else "",
            "descriptors",
            5,
        )

    def _bus(self, seen: Look) -> None:
        """The bus lists the instances that live; the FD store holds the namespaces that the daemon holds."""
        if self._record.steady() < 3:
            self._wrong.clear()
            return
        before = self.polytmpd.descriptors()[1]
        try:
            listed = self.polytmpd.instances()
            stored = self.polytmpd.stored()
        except (CommandError, ValueError) as error:
            self._record.count("bus silent")
            if self._record.steady() > 3:
                self._settled(f"the bus does not answer: {error}", "silent", 30)
            return
        if self._record.steady() < 3:
            return
        held = self.polytmpd.descriptors()[1]
        kept = set(proc.namespaces_of(self._machine.leader))  # PID 1's
        differ = held == before and (kept != set(held) or stored != len(kept) + 1)
        self._settled(
            f"the FD store has {stored} descriptors, {sorted(kept)}; the daemon holds {sorted(held)}"
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
            if proc.top(table[1], "/tmp") != process.user or not self._still(process):
                continue
            if entry is None or entry["State"] not in ("active", "draining", "preparing"):
                wrong = f"a process lives, but the bus has {entry}: {process}"
            elif entry["State"] != "preparing" and entry["NamespaceID"] != process.namespace:
                wrong = f"the bus has mnt:[{entry['NamespaceID']}], {entry['State']}, for {process}"
        self._settled(wrong, "living", 3)

    def _summarize(self, seen: Look) -> None:
        users = {process.user for process in seen.processes.values()} - {None}
        instances = [table for table in seen.tables.values() if proc.top(table[1], "/tmp") is not None]
        counts = f"{len(users)} users, {len(seen.processes)} processes, {len(instances)} namespaces"
        self.summary = f"{counts}; {self._figures}"

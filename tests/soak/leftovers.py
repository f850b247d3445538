# SPDX-License-Identifier: LGPL-2.1-or-later
"""The end of an instance: what must be gone some time after the last process, and at the end of a round.

Not here: what must hold while an instance lives (checker.py).
"""

import contextlib
import re
import time
from pathlib import Path

from tests.bed import CommandError, Machine

from . import proc
from .daemon import Daemon
from .proc import BARRIER, SENTINEL, UID_MAX, UID_MIN, Look
from .record import Record, Violation

GRACE = 15.0
"""Seconds in which all traces of a user must go after their last process, descriptor and session."""


class Leftovers:
    def __init__(self, machine: Machine, users: dict[str, int], record: Record, daemon: Daemon) -> None:
        self._machine = machine
        self._users = users
        self._record = record
        self._daemon = daemon
        self._root = Path("/proc", str(machine.leader), "root")
        self._baseline = proc.standing(proc.mounts(machine.leader))
        self._last_active: dict[int, float] = dict.fromkeys(users.values(), time.monotonic())
        self._owners: dict[int, int] = {}

    def changed_mounts(self, table: list[proc.Mount]) -> list[tuple[str, str, str, bool]]:
        """Compare the host's mounts with those at the beginning."""
        return sorted(proc.standing(table) ^ self._baseline)

    def check(self, seen: Look) -> None:
        """Raise Violation if anything stays of a user who has no process, no session, no descriptor."""
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
            raise Violation(
                f"{now - since:.0f} s after UID {uid} was last active, this is left: {', '.join(left)}"
            )

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
        """Return the UIDs of logind's sessions, including sessions of which no process lives."""
        found: set[int] = set()
        for entry in proc.scan(self._root / "run/systemd/sessions"):
            if entry.name.endswith(".ref"):
                continue  # a FIFO of logind
            with contextlib.suppress(OSError):
                found |= {int(uid) for uid in re.findall(r"(?m)^UID=(\d+)", Path(entry.path).read_text())}
        return found

    def _left_of(self, uid: int) -> list[str]:
        left = []
        for directory in ("tmp", "var/tmp"):
            for entry in proc.scan(self._root / directory):
                match = BARRIER.match(entry.name)
                if match and match[2] == str(uid):
                    left.append(f"/{directory}/{entry.name}")
        if (self._root / f"run/polytmpd/instances/{uid}").exists():
            left.append("its state file")
        if uid in self._daemon.listed:
            with contextlib.suppress(CommandError):
                listed = self._daemon.instances()
                if uid in listed:
                    left.append(f"an instance on the bus, {listed[uid]['State']}")
        left += [
            f"mnt:[{number}] in the daemon"
            for number in self._daemon.descriptors()[1]
            if self._owners.get(number) == uid
        ]
        return left

    def everything(self) -> list[str]:
        """Return what is left when everybody has logged out; an empty list is right."""
        seen = proc.look(self._machine.name)
        left = [f"UID {uid}: {what}" for uid in self._users.values() for what in self._left_of(uid)]
        left += [str(process) for process in seen.processes.values() if process.user is not None]
        left += [
            f"mnt:[{namespace}] with an instance, {process}"
            for namespace, (process, table) in seen.tables.items()
            if any(mount.owner is not None or mount.source == SENTINEL for mount in table)
        ]
        for entry in proc.scan(self._root / "tmp"):
            if entry.name.startswith("polytmp-"):
                left.append(f"/tmp/{entry.name}")
        for entry in proc.scan(self._root / "var/tmp"):
            if re.match(r"polytmp-(?!\d+$)", entry.name):
                left.append(f"/var/tmp/{entry.name}")
        left += [f"state file {entry.name}" for entry in proc.scan(self._root / "run/polytmpd/instances")]
        left += [f"on the bus: {properties}" for properties in self._daemon.instances().values()]
        others, namespaces = self._daemon.descriptors()
        left += [f"mnt:[{number}] in the daemon" for number in namespaces]
        if others > self._daemon.at_rest:
            left.append(f"{others} descriptors in the daemon, {self._daemon.at_rest} at the beginning")
        stored = self._daemon.stored()
        if stored != 1:
            left.append(f"{stored} descriptors in the FD store, instead of the inotify instance alone")
        table = proc.mounts(self._machine.leader)
        left += [f"mount {entry}" for entry in self.changed_mounts(table)]
        left += [
            f"mount {mount.point}" for mount in table if re.match(r"/mnt/soak-|/run/user/\d+", mount.point)
        ]
        return left

# SPDX-License-Identifier: LGPL-2.1-or-later
"""python -m bench.scale: logs in as many users as are asked for, through PAM and logind.

1. The tail: further and first sessions while 0, 100 and USERS users are logged in. If one takes more than
   five seconds, the journal and polytmpd's stacks go to stderr.
2. A restart of polytmpd: each user has the same namespace and the same file after it.
3. Everybody logs out: the soak's checker must find nothing left.

Each user has a session and a service manager, so 1,000 of them take 10 GB of memory.
Not here: instances without sessions, which go to 10,000 (crowd).
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.bed import RELEASES, BedError, Machine, eventually
from tests.bed.nspawn import require_tools
from tests.soak.checker import Checker
from tests.soak.leftovers import GRACE
from tests.soak.record import Record

from . import crowd, report
from .contestants import FIRST_UID, LOGIND, MODULE, OURS, PLAIN, STACK, Contestant, Pam, booted
from .figures import RESULTS, Figures, describe, summary

_TOGETHER: Final = 4
"""Sessions that are opened at the same time, until all are there."""
_BATCH: Final = 50
_EVIDENCE: Final = """
systemctl kill --kill-whom=main --signal=SIGUSR1 polytmpd.service
sleep 0.2; journalctl --sync
journalctl --no-pager --boot --output=short-precise --lines=150 -u polytmpd -u systemd-logind -u dbus
"""


KINDS: Final = ("further", "first")
PARTS: Final = ("pam_systemd", "module", "both")


def tail(kind: str, part: str, users: int) -> str:
    return f"tail: {kind} session, {users:,} logged in, {part}"


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)  # noqa: T201


def _report_slow(machine: Machine, users: list[str]) -> None:
    print(f"--- {users}: more than 5 s", file=sys.stderr)  # noqa: T201
    print(machine.sh(_EVIDENCE, check=False).stdout, file=sys.stderr)  # noqa: T201


def _names(first: int, count: int) -> list[str]:
    return [f"u{FIRST_UID + first + number}" for number in range(count)]


class Scale:
    """A machine with users who log in. further, first: how many sessions measure the tail."""

    def __init__(self, contestant: Contestant, pam: Pam, further: int, first: int, figures: Figures) -> None:
        self._contestant = contestant
        self._pam = pam
        self._further = further
        self._first = first
        self._figures = figures
        self._there = 0
        pam.slow = lambda users: _report_slow(contestant.machine, users)

    @property
    def users(self) -> list[str]:
        return _names(0, self._there)

    def grow(self, count: int) -> None:
        """Have so many users logged in. Reports how long their sessions took, four at a time."""
        spent: list[float] = []
        while self._there < count:
            new = _names(self._there, min(_BATCH, count - self._there))
            spent += self._pam.open([STACK], new, _TOGETHER)
            self._there += len(new)
        if spent:
            found = summary(spent)
            _tell(f"{count} users: median {found.median:.0f} ms, maximum {found.maximum:.0f} ms")

    def measure_tail(self) -> None:
        """Further sessions of one user and first ones of others, beside those who are there."""
        kept = ["alice", *self.users]
        self._pam.open([STACK], ["alice"])
        for _ in range(0, self._further, _BATCH):
            self._time("further", random.choice(kept), min(_BATCH, self._further))
        self._pam.close(["alice"])
        self._wait_for(self._there)
        for user in _names(5000, self._first):
            self._time("first", user, 1)
        self._wait_for(self._there)
        for kind in KINDS:
            for part in PARTS:
                found = summary(self._figures.of(tail(kind, part, self._there), self._contestant.name))
                _tell(
                    f"{self._there} logged in, {found.count} {kind} sessions, {part}: median "
                    f"{found.median:.1f} ms, p99 {found.tail:.1f} ms, maximum {found.maximum:.1f} ms"
                )

    def _time(self, kind: str, user: str, count: int) -> None:
        for logind, module in self._pam.times([LOGIND, MODULE], user, count):
            for part, spent in (("pam_systemd", logind), ("module", module), ("both", logind + module)):
                self._figures.add(tail(kind, part, self._there), self._contestant.name, [spent])

    def _wait_for(self, count: int) -> None:
        users = self._contestant.root / "run/systemd/users"
        eventually(lambda: len(list(users.iterdir())) <= count, 120, "the others have left")
        if self._contestant.name == OURS:
            eventually(lambda: crowd.instances(self._contestant) == count, 120, "their instances are gone")

    def restart(self) -> None:
        """Raises AssertionError if anyone's namespace or file is another one afterwards."""
        before = self._pam.look(self.users)
        self._contestant.machine.run("systemctl", "restart", "polytmpd", timeout=120)
        after = self._pam.look(self.users)
        moved = [user for user in before if before[user] != after[user] or after[user][1] != user]
        if moved or len({namespace for namespace, _ in after.values()}) != len(after):
            raise AssertionError(f"{len(moved)} of {len(after)} users were moved by a restart: {moved[:3]}")
        shown = crowd.properties(
            self._contestant, "ExecMainStartTimestampMonotonic", "ActiveEnterTimestampMonotonic"
        )
        took = (
            int(shown["ActiveEnterTimestampMonotonic"]) - int(shown["ExecMainStartTimestampMonotonic"])
        ) / 1000
        # What a login gets after the restart is the namespace that the user has.
        spent = self._pam.time([STACK], self.users[-1], 1)
        _tell(f"restarted: READY after {took:.0f} ms, the next session opened in {spent[0]:.1f} ms")

    def end(self) -> None:
        self._pam.close(self.users)
        self._there = 0

    def describe(self) -> None:
        shown = crowd.properties(
            self._contestant, "NFileDescriptorStore", "MainPID", "MemoryCurrent", "TasksCurrent"
        )
        fds = len(list((self._contestant.root / "proc" / shown["MainPID"] / "fd").iterdir()))
        _tell(
            f"polytmpd with {self._there} users: RSS {crowd.resident(self._contestant) / 1024:.1f} MiB, "
            f"{fds} descriptors, {shown['NFileDescriptorStore']} in the FD store, "
            f"{self._contestant.cpu() / 1000:.2f} s of CPU"
        )


def plateaus(users: int) -> list[int]:
    return sorted({0, min(100, users), users})


def run_plain(release: str, users: int, further: int, first: int, figures: Figures) -> None:
    """The tail without polytmp, to know whose it is. Raises BedError."""
    with booted(release, (PLAIN,), crowd=True) as (contestant,), contestant.pam() as pam:
        scale = Scale(contestant, pam, further, first, figures)
        for count in plateaus(users):
            scale.grow(count)
            scale.measure_tail()


def run(release: str, users: int, further: int, first: int, figures: Figures) -> None:
    """Raises BedError, AssertionError if something is not as it must be."""
    with booted(release, (OURS,), crowd=True) as (contestant,), contestant.pam() as pam:
        machine = contestant.machine
        machine.ssh("alice", "true")  # the daemon opens its permanent descriptors
        contestant.wait_until_quiet()
        with tempfile.TemporaryDirectory() as directory:
            record = Record(Path(directory, "log"), "scale")
            known = {name: int(name[1:]) for name in _names(0, users)} | {"alice": 1001}
            known |= {name: int(name[1:]) for name in _names(5000, first)}
            checker = Checker(machine, known, record)
            scale = Scale(contestant, pam, further, first, figures)
            for count in plateaus(users):
                scale.grow(count)
                scale.describe()
                scale.measure_tail()
            scale.restart()
            checker.tick()
            _tell(f"checked: {checker.summary}")
            scale.end()
            left = _left(checker, 60 + GRACE + users / 5)
            if left:
                raise AssertionError(
                    f"everybody has logged out, but {len(left)} things are left: {left[:5]}"
                )
            if trouble := checker.polytmpd.trouble():
                raise AssertionError(f"{len(trouble)} lines in the journal, such as: {trouble[0]}")
            scale.describe()
            record.close()


def _left(checker: Checker, patience: float) -> list[str]:
    end = time.monotonic() + patience
    while True:
        left = checker.leftovers.everything()
        if not left or time.monotonic() > end:
            return left
        time.sleep(1)  # each look reads every process


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description="Log in many users.")
    parser.add_argument("--release", choices=RELEASES, default="trixie")
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--further", type=int, default=1000, help="further sessions to measure")
    parser.add_argument("--first", type=int, default=200, help="first sessions to measure")
    parser.add_argument("--plain", action="store_true", help="also measure a system without polytmp")
    parser.add_argument("--write", action="store_true", help="also write docs/performance.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    figures = Figures(arguments.results)
    figures.load()
    try:
        require_tools()
        describe(figures, arguments.release)
        for name in [name for name in figures.samples if name.startswith("tail: ")]:
            del figures.samples[name]
        for way in (run, *((run_plain,) if arguments.plain else ())):
            way(arguments.release, arguments.users, arguments.further, arguments.first, figures)
    except (BedError, AssertionError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    figures.save()
    if arguments.write:
        report.write(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())

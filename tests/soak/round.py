# SPDX-License-Identifier: LGPL-2.1-or-later
"""One round: boots a machine, soaks it, logs everybody out and checks what is left.

Not here: what happens meanwhile (people.py, trouble.py) and what is checked (checker.py, leftovers.py).
"""

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests import observe
from tests.bed import CommandError, Machine, eventually

from . import sabotage
from .checker import Checker
from .leftovers import GRACE
from .people import Person
from .record import Record, Violation
from .trouble import Trouble

EXTRA_USERS = 8
PROGRESS = 10.0
EMPTY_TIMEOUT = 60.0
STALE_SESSIONS = 20.0
"""Seconds. systemd 252's logind may keep a session forever if its leader is killed while it is created."""
EVIDENCE = {
    "journal": (
        "journalctl --no-pager --boot --output=short-precise --lines=200 -u polytmpd -u systemd-logind "
        "-u dbus"
    ),
    "/tmp, /var/tmp, state": (
        "ls -la /tmp /var/tmp /run/polytmpd/instances; head /run/polytmpd/instances/*; "
        "systemctl show -P NFileDescriptorStore polytmpd"
    ),
    "bus": (
        "busctl --timeout=5 --json=short call org.polytmp1 /org/polytmp1 "
        "org.freedesktop.DBus.ObjectManager GetManagedObjects"
    ),
    "logind, slices": (
        "timeout 5 loginctl list-sessions; grep -H . /run/systemd/users/*; "
        "grep -H populated /sys/fs/cgroup/user.slice/user-*/cgroup.events; systemctl list-units 'user*'"
    ),
    "processes": "ps -eo pid,ppid,uid,mntns,lstart,cgroup,args --sort=mntns",
}


@dataclass(slots=True)
class Report:
    release: str
    seed: str
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    evidence: str = ""
    log: Path = Path()
    daemon: str = ""

    def __str__(self) -> str:
        lines = [f"{self.release}, seed {self.seed}, {self.seconds:.0f} s: {self.daemon}"]
        lines += [f"  {number:7} {what}" for what, number in sorted(self.counts.items())]
        lines += [f"  {number:7} refused: {reason}" for reason, number in sorted(self.refused.items())]
        lines += [f"  VIOLATION: {violation}" for violation in self.violations]
        return "\n".join(lines)


def soak(
    release: str,
    deb: Path,
    seconds: float,
    seed: str,
    tell: Callable[[str], None],
    *,
    fault: str | None = None,
    phase: float = 25.0,
) -> Report:
    """Boot, soak, empty. Violations are in the report; only what keeps the bed from working raises."""
    descriptor, name = tempfile.mkstemp(prefix=f"polytmp-soak-{release}-", suffix=".log")
    record = Record(Path(name), f"{seed} {release}")
    os.close(descriptor)
    with contextlib.closing(record):
        report = Report(release, seed, log=record.path)
        delay = random.Random(record.seed).choice((0, 0, 2))

        def prepare(root: Path) -> None:
            observe.write(
                root, "etc/systemd/logind.conf.d/soak.conf", f"[Login]\nUserStopDelaySec={delay}\n"
            )
            if fault is not None:
                sabotage.put(root, fault)

        with Machine(release, deb, prepare=prepare) as machine:
            try:
                _run(machine, record, seconds, phase, tell, report)
            except Violation as violation:
                record.violate(str(violation))
            if record.violations:
                report.evidence = _evidence(machine, record)
        report.seconds = record.seconds()
        report.violations = record.violations
        report.counts, report.refused = dict(record.counts), dict(record.refused)
        return report


def _run(
    machine: Machine,
    record: Record,
    seconds: float,
    phase: float,
    tell: Callable[[str], None],
    report: Report,
) -> None:
    users = _make_users(machine)
    # the daemon opens its permanent descriptors at the first login
    machine.ssh("alice", "true")
    instances = Path("/proc", str(machine.leader), "root/run/polytmpd/instances")
    try:
        eventually(lambda: not list(instances.iterdir()), 30, "the first user's instance is gone")
    except AssertionError as error:
        raise Violation(str(error)) from error
    checker = Checker(machine, users, record)
    names = sorted(users)
    threads = [Person(machine, user, [name for name in names if name != user], record) for user in names]
    trouble = Trouble(machine, names, record, phase)
    checker.start()
    for thread in (*threads, trouble):
        thread.start()
    begin = time.monotonic()
    while not record.stop.wait(min(PROGRESS, max(0.1, begin + seconds - time.monotonic()))):
        counts = record.counts
        tell(
            f"{machine.release} {time.monotonic() - begin:5.0f} s: {checker.summary} | "
            f"{counts['logins']} logins, {counts['refused']} refused, {counts['kills']} kills, "
            f"{counts['troubles']} troubles | {counts['checks']} checks"
        )
        if time.monotonic() - begin >= seconds:
            break
    ended_by_violation = record.stop.is_set()
    record.stop.set()
    for thread in (*threads, trouble, checker):
        thread.join(200)
        if thread.is_alive():
            record.violate(f"{thread.name} does not stop")
    report.daemon = checker.summary
    if not ended_by_violation:
        _empty(machine, users, record, checker)


def _make_users(machine: Machine) -> dict[str, int]:
    machine.sh(
        f"""
        set -eu
        for n in $(seq {EXTRA_USERS}); do
            useradd --create-home --shell /bin/bash --uid $((1100 + n)) --password '*' user$n
            install -d -m 0700 -o user$n -g user$n /home/user$n/.ssh
            install -m 0600 -o user$n -g user$n /home/alice/.ssh/authorized_keys /home/user$n/.ssh/
            echo "user$n ALL=(ALL:ALL) NOPASSWD: ALL" > /etc/sudoers.d/user$n
        done
        """
    )
    return {"alice": 1001, "bob": 1002, **{f"user{n}": 1100 + n for n in range(1, EXTRA_USERS + 1)}}


def _empty(machine: Machine, users: dict[str, int], record: Record, checker: Checker) -> None:
    """Log everybody out. Raises Violation if anything is left."""
    record.act("end", "everybody logs out")
    machine.sh(
        "rm -f /etc/cron.d/soak-*; systemctl kill --signal=CONT polytmpd; systemctl start polytmpd "
        "systemd-logind; atq | while read -r job _; do atrm $job; done; cut -d' ' -f5 /proc/1/mountinfo | "
        "grep ^/mnt/soak- | while read -r point; do umount $point; done",
        check=False,
    )
    names = " ".join(sorted(users))
    leave = (
        f"rm -f /var/lib/systemd/linger/*; for user in {names}; do pkill -KILL -u $user; done; "
        f"pkill -KILL -x sleep; for user in {names}; do timeout 3 loginctl disable-linger $user; "
        "timeout 3 loginctl terminate-user $user; done; true"
    )
    begin = time.monotonic()
    left: list[str] = ["not checked yet"]
    while time.monotonic() - begin < EMPTY_TIMEOUT + 2 * GRACE and left:
        try:
            if time.monotonic() - begin < EMPTY_TIMEOUT:
                machine.sh(
                    leave, check=False, timeout=30
                )  # a restart of the bus delays some logins until now
            left = checker.leftovers.everything()
            stale = checker.leftovers.sessions() if time.monotonic() - begin > STALE_SESSIONS else set()
            if left and stale:
                record.act("end", f"logind keeps dead sessions of {stale}, restarting it")
                record.count("users with a session that logind never ended", len(stale))
                machine.run("systemctl", "restart", "systemd-logind")
        except (CommandError, OSError, ValueError) as error:
            left = [str(error)]
        time.sleep(1)  # between two attempts, which are expensive; the loop has a bound
    record.count("seconds until nothing was left", round(time.monotonic() - begin))
    if left:
        raise Violation(f"everybody has logged out, but this is left: {left}")
    if lines := checker.polytmpd.trouble():
        raise Violation(f"{len(lines)} lines in the journal, such as: {lines[0]}")
    eventually(lambda: machine.run("systemctl", "is-active", "polytmpd").stdout, 10, "the daemon is up")


def _evidence(machine: Machine, record: Record) -> str:
    parts = ["--- last actions", *record.last()]
    for title, script in EVIDENCE.items():
        parts.append(f"--- {title}")
        with contextlib.suppress(CommandError, OSError):
            parts.append(machine.sh(script, check=False, timeout=20).stdout)
    return "\n".join(parts)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The administrator on a bad day: kills users' processes all the time and, in phases, disturbs services.

Between two phases the services run undisturbed, which shows what must end by itself.

Not here: what users do (people.py).
"""

import random
import threading
import time

from tests.bed import CommandError, CommandTimeout, Machine

from .record import Record

# (weight, name, script, seconds until everything has settled); {0}: how long the daemon is away, in seconds
SERVICES: list[tuple[int, str, str, float]] = [
    (5, "SIGKILL polytmpd", "systemctl kill --signal=KILL polytmpd", 4),
    (4, "restart polytmpd", "systemctl restart polytmpd", 4),
    (4, "stop and start polytmpd", "systemctl stop polytmpd; sleep {0}; systemctl start polytmpd", 4),
    (2, "stop polytmpd", "systemctl stop polytmpd; sleep {0}", 6),  # the next login starts it
    (2, "SIGSTOP", "systemctl kill -s STOP polytmpd; sleep {0}; systemctl kill -s CONT polytmpd", 4),
    (3, "reload polytmpd", "systemctl reload polytmpd", 3),
    (1, "lose the state", "rm -f /run/polytmpd/instances/*; systemctl restart polytmpd", 4),
    (2, "restart logind", "systemctl restart systemd-logind", 15),
    # logind never connects to a new bus by itself, and PID 1 takes a while
    (1, "restart dbus and logind", "systemctl restart dbus; systemctl restart systemd-logind", 60),
    (1, "daemon-reexec", "systemctl daemon-reexec", 6),
    (1, "daemon-reload", "systemctl daemon-reload", 4),
]  # fmt: skip

KILLS: list[tuple[int, str, str]] = [
    (4, "terminate-user", "loginctl terminate-user {0}"),
    (2, "kill-user", "loginctl kill-user --signal=KILL {0}"),
    (4, "SIGKILL sshd", "pkill -KILL -f '^sshd.*: {0}(@| \\[priv)' | head -n1"),
    (3, "SIGKILL systemd --user", "pkill -KILL -u {0} -x systemd"),
    (2, "SIGKILL all", "pkill -KILL -u {0}"),
    (2, "disable linger", "loginctl disable-linger {0}"),
    (1, "stop the slice", "systemctl stop user-$(id -u {0}).slice"),
]


class Trouble(threading.Thread):
    def __init__(self, machine: Machine, users: list[str], record: Record, phase: float) -> None:
        """phase: seconds of trouble and then of peace, each at random up to a half shorter or longer."""
        super().__init__(name="trouble")
        self._machine = machine
        self._users = users
        self._record = record
        self._phase = phase
        self._random = random.Random(f"{record.seed} trouble")

    def run(self) -> None:
        try:
            while not self._record.stop.is_set():
                self._spend(self._phase * self._random.uniform(0.5, 1.5), services=True)
                self._record.act("trouble", "peace")
                self._spend(self._phase * self._random.uniform(0.5, 1.5), services=False)
        except Exception as error:
            if not self._record.stop.is_set():
                self._record.violate(f"the soak itself failed: {type(error).__name__}: {error}")
                raise

    def _spend(self, seconds: float, *, services: bool) -> None:
        end = time.monotonic() + seconds
        while not self._record.stop.wait(self._random.uniform(0.5, 4)) and time.monotonic() < end:
            if services and self._random.random() < 0.5:
                self._trouble()
            else:
                self._kill()

    def _trouble(self) -> None:
        ((_, name, script, settle),) = self._random.choices(SERVICES, [entry[0] for entry in SERVICES])
        script = script.format(f"{self._random.choice((0, 0.1, 0.5, 1, 3)):g}")
        with self._record.disturbance(settle):
            self._record.act("trouble", f"{name}: {script}")
            self._run(script)
            self._record.act("trouble", f"{name}: done")
        self._record.count("troubles")
        self._record.count(f"trouble: {name}")

    def _kill(self) -> None:
        user = self._random.choice(self._users)
        ((_, name, script),) = self._random.choices(KILLS, [entry[0] for entry in KILLS])
        self._record.act("trouble", f"{name} {user}")
        self._record.kill(user)
        self._run(script.format(user))
        self._record.kill(user)
        self._record.count("kills")

    def _run(self, script: str) -> None:
        try:
            self._machine.sh(script, check=False, timeout=100)
        except CommandTimeout as error:
            self._record.act("trouble", f"timed out: {error}")
        except CommandError as error:
            self._record.act("trouble", str(error))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Logins over ssh, the PAM module alone, and the CPU time that polytmpd spends on them.

The contestants take turns, in random order, one login after the other.
Not here: many users at once (crowd), what is said about the samples (figures).
"""

import random
import subprocess
import time
from typing import Final

from tests.bed import Machine, eventually

from .contestants import LOGIND, MODULE, OURS, STACK, Contestant, Pam, settled
from .figures import Figures

FIRST: Final = "first ssh login"
FURTHER: Final = "further ssh login"
AT_ONCE: Final = "20 ssh logins at once"
MODULE_WITH: Final = "PAM module, the user is logged in"
MODULE_WITHOUT: Final = "PAM module, first session of the user"
STACK_WITH: Final = "PAM session stack, the user is logged in"
CPU_FURTHER: Final = "CPU of polytmpd, further login"
CPU_FIRST: Final = "CPU of polytmpd, first login and removal"

_TOGETHER: Final = 20
_FURTHER_EACH: Final = 2
_EVERY: Final = 5
"""In which rounds 20 log in at once, and in which CPU time is measured: it takes as long as all the rest."""
_FOR_CPU: Final = 10
_PAM_EACH: Final = 20


def ssh_login(machine: Machine, user: str) -> float:
    """Milliseconds of `ssh USER true`, from a client outside."""
    command = [*machine.ssh_command(user), "true"]
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return (time.perf_counter() - begin) * 1000


def _ssh_logins_at_once(machine: Machine, user: str) -> float:
    command = [*machine.ssh_command(user), "true"]
    begin = time.perf_counter()
    clients = [
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(_TOGETHER)
    ]
    failed = [client.args for client in clients if client.wait()]
    spent = (time.perf_counter() - begin) * 1000
    if failed:
        raise subprocess.CalledProcessError(1, command)
    return spent


def by_ssh(contestants: list[Contestant], figures: Figures, number: int) -> None:
    """One round."""
    for contestant in random.sample(contestants, len(contestants)):
        machine, name = contestant.machine, contestant.name
        figures.add(FIRST, name, [ssh_login(machine, "alice")])
        contestant.wait_until_quiet()
        with machine.session("alice"):
            figures.add(FURTHER, name, [ssh_login(machine, "alice") for _ in range(_FURTHER_EACH)])
        contestant.wait_until_quiet()
        if number % _EVERY == 0:
            figures.add(AT_ONCE, name, [_ssh_logins_at_once(machine, "alice")])
            contestant.wait_until_quiet()
            if name == OURS:
                _cpu(contestant, figures)


def _cpu(contestant: Contestant, figures: Figures) -> None:
    before = contestant.cpu()
    ssh_login(contestant.machine, "alice")
    contestant.wait_until_quiet()
    figures.add(CPU_FIRST, OURS, [settled(contestant) - before])
    with contestant.machine.session("alice"):
        sessions = contestant.sessions()
        before = settled(contestant)
        for _ in range(_FOR_CPU):
            ssh_login(contestant.machine, "alice")
        eventually(lambda: contestant.sessions() <= sessions, 30, "the sessions have ended")
        figures.add(CPU_FURTHER, OURS, [(settled(contestant) - before) / _FOR_CPU])
    contestant.wait_until_quiet()


def by_pam(contestants: list[Contestant], pams: dict[str, Pam], figures: Figures) -> None:
    """One round of the module alone and of the whole stack, without ssh's share.

    With a session: sshd's way, pam_systemd first. Without one, the module alone makes the instance, which no
    session claims: so it is gone again when the process has ended.
    """
    for contestant in random.sample(contestants, len(contestants)):
        pam, name = pams[contestant.name], contestant.name
        pam.open([STACK], ["bob"])
        figures.add(MODULE_WITH, name, pam.time([LOGIND, MODULE], "bob", _PAM_EACH))
        figures.add(STACK_WITH, name, pam.time([STACK], "bob", _PAM_EACH))
        pam.close(["bob"])
        contestant.wait_until_quiet()
        for _ in range(_PAM_EACH // 2):
            figures.add(MODULE_WITHOUT, name, pam.time([MODULE], "alice", 1))
            contestant.wait_until_quiet()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel takes for namespaces, by the number of mounts on the host, and what that is for many.

Not here: how one is measured (namespaces), which daemon holds them (crowd).
"""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Final

from tests.bed import BedError

from . import crowd
from .contestants import OURS
from .figures import PROJECT, Figures

MORE_MOUNTS: Final = (0, 100, 1000)
"""How many mounts are added to those that the machine has."""
SHOWN: Final = (0, 100)
USERS: Final = (1000, 10_000)
COUNT: Final = "mounts of the host"
CREATE: Final = "make a namespace, ms"
MEMORY: Final = "kernel memory of a namespace, KiB"
PROPAGATE: Final = "mount on the host, µs for each namespace"


def case(more: int) -> str:
    return f"{more} mounts more"


def measure(figures: Figures) -> None:
    """One round. Raises BedError."""
    for more in MORE_MOUNTS:
        unshare = ["unshare", "--mount", "--pid", "--fork", "--mount-proc"]
        argv = [*unshare, sys.executable, "-m", "bench.namespaces", str(more)]
        done = subprocess.run(argv, capture_output=True, cwd=PROJECT, text=True, check=False)
        if done.returncode:
            raise BedError(f"bench.namespaces: {done.stderr}")
        found: dict[str, float] = json.loads(done.stdout)
        mounts = [found[f"mount on the host, {alive} alive, ms"] for alive in (1, 200)]
        for name, value in (
            (COUNT, found["mounts"]),
            (CREATE, found["create, 200 alive, ms"]),
            (MEMORY, found["kernel memory per namespace, KiB"]),
            (PROPAGATE, max(0.0, mounts[1] - mounts[0]) / 199 * 1000),
        ):
            figures.add(name, case(more), [value])


def model(figures: Figures) -> list[list[str]]:
    """Rows: a cost, and its value for each number of users, with few mounts and with many."""

    def of_namespaces(name: str, users: int, more: int) -> float | None:
        each = figures.median(name, case(more))
        return None if each is None else each * users

    def with_runtime_directories(users: int, more: int) -> float | None:
        """logind mounts /run/user/UID for each user, and each namespace has all of them."""
        few, many = (figures.median(MEMORY, case(mounts)) for mounts in (0, MORE_MOUNTS[-1]))
        if few is None or many is None:
            return None
        return users * (few + (many - few) / MORE_MOUNTS[-1] * (users + more))

    def measured(figure: Callable[[int], str]) -> Callable[[int, int], float | None]:
        return lambda users, more: None if more else figures.median(figure(users), OURS)

    def daemon(figure: Callable[[int], str]) -> Callable[[int, int], float | None]:
        return lambda users, _: figures.median(figure(users), OURS)

    costs: dict[str, Callable[[int, int], float | None]] = {
        "mounts of the host": lambda _, more: figures.median(COUNT, case(more)),
        "kernel memory, MiB": lambda users, more: _scaled(of_namespaces(MEMORY, users, more), 1 / 1024),
        "the same, with a session of logind for each, MiB": lambda users, more: _scaled(
            with_runtime_directories(users, more), 1 / 1024
        ),
        "RSS of polytmpd, MiB": lambda users, _: _scaled(
            figures.median(crowd.memory(users), OURS), 1 / 1024
        ),
        "descriptors": daemon(crowd.descriptors),
        "inotify watches": daemon(crowd.watches),
        "mount on the host, ms": lambda users, more: _scaled(of_namespaces(PROPAGATE, users, more), 1e-3),
        "a new namespace, ms": lambda _, more: figures.median(CREATE, case(more)),
        "a new instance and its removal, ms of CPU": measured(crowd.churn),
        "start to READY, ms": measured(crowd.start),
    }
    rows = []
    for name, cost in costs.items():
        values = [cost(users, more) for users in USERS for more in SHOWN]
        rows.append(
            [
                name,
                *(
                    "" if value is None else f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
                    for value in values
                ),
            ]
        )
    return rows


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor

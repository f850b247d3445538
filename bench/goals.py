# SPDX-License-Identifier: LGPL-2.1-or-later
"""The goals, each with the figure that meets or misses it.

Not here: how it is measured, and how the table looks (report).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from . import crowd, logins
from .contestants import OURS, PEER, PLAIN
from .figures import Figures, summary

Measured = Callable[[Figures], float | None]


@dataclass(frozen=True, slots=True)
class Goal:
    """measured: in the unit of most; None if it was not measured."""

    what: str
    most: float
    unit: str
    measured: Measured


def _ratio(figure: str, contestant: str = OURS, base: str = PLAIN) -> Measured:
    return lambda figures: figures.ratio(figure, contestant, base)


def _median(figure: str, contestant: str = OURS) -> Measured:
    return lambda figures: figures.median(figure, contestant)


def _tail(figure: str) -> Measured:
    def measured(figures: Figures) -> float | None:
        values = figures.of(figure, OURS)
        return summary(values).tail if values else None

    return measured


def _megabytes(figure: str) -> Measured:
    def measured(figures: Figures) -> float | None:
        found = figures.median(figure, OURS)
        return None if found is None else found / 1024

    return measured


def _each(count: int) -> Measured:
    """kB of RSS for each instance."""

    def measured(figures: Figures) -> float | None:
        none, many = (figures.median(crowd.memory(number), OURS) for number in (0, count))
        return None if none is None or many is None else (many - none) * 1.024 / count

    return measured


GOALS: Final = (
    Goal("first ssh login", 1.03, "x plain", _ratio(logins.FIRST)),
    Goal("further ssh login", 1.01, "x plain", _ratio(logins.FURTHER)),
    Goal("20 ssh logins at once", 1.0, "x pam_namespace", _ratio(logins.AT_ONCE, base=PEER)),
    Goal("PAM module, first session, median", 2, "ms", _median(logins.MODULE_WITHOUT)),
    Goal("PAM module, first session, p99", 10, "ms", _tail(logins.MODULE_WITHOUT)),
    Goal("PAM module, further session, median", 2, "ms", _median(logins.MODULE_WITH)),
    Goal("PAM module, further session, p99", 10, "ms", _tail(logins.MODULE_WITH)),
    Goal("CPU of polytmpd, further login", 1.5, "ms", _median(logins.CPU_FURTHER)),
    Goal("CPU of polytmpd, first login and removal", 4, "ms", _median(logins.CPU_FIRST)),
    *(
        Goal(
            f"deletion, {shape}, {place}",
            1.0,
            "x rm -rf",
            _ratio(f"deletion, {shape}, {place}", OURS, "rm -rf"),
        )
        for shape in ("one directory", "ten files a directory", "each in the other")
        for place in ("/var/tmp", "/dev/shm")
    ),
    Goal("start to READY, no instances", 100, "ms", _median(crowd.start(0))),
    Goal("start to READY, 10,000 instances", 3000, "ms", _median(crowd.start(10_000))),
    Goal("first request after that start", 10, "ms", _median(crowd.acquired(10_000))),
    *(
        Goal(f"{name}, {count:,} instances", most, "ms", _median(crowd.command(name, count)))
        for count, most in ((0, 30), (1000, 80))
        for name in ("polytmpctl list", "polytmpctl status USER", "polytmpctl path FILE")
    ),
    Goal("RSS, no instances", 28, "MiB", _megabytes(crowd.memory(0))),
    Goal("RSS for each of 10,000 instances", 5, "kB", _each(10_000)),
    Goal("context switches, idle, with udevd", 8, "in 60 s", _median(crowd.IDLE, "with systemd-udevd")),
    Goal(
        "context switches, idle, without udevd", 8, "in 60 s", _median(crowd.IDLE, "without systemd-udevd")
    ),
    Goal("mount on the host, 1,000 alive", 1.0, "x pam_namespace", _ratio(crowd.MOUNT, base=PEER)),
)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What was measured: samples by figure and contestant, kept in a file so that an interrupted run goes on.

Also what is said about them: the median with its 90 % interval, the 99th percentile, the ratio to another
contestant.
Not here: how anything is measured, and which figures there are (the other modules), how it looks (report).
"""

import datetime
import json
import os
import platform
import random
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

PROJECT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = PROJECT / "build/bench.json"
BOOTSTRAP: Final = 1000
_Z: Final = 1.645
"""Of the normal distribution: 5 % lie above."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one contestant's samples. low, high: the 90 % interval of the median.

    tail: the 99th percentile, or the maximum of fewer than 100 samples.
    """

    count: int
    median: float
    low: float
    high: float
    tail: float
    maximum: float


def summary(values: list[float]) -> Summary:
    ordered = sorted(values)
    count = len(ordered)
    # Order statistics: the ranks between which the median lies do not depend on the distribution.
    outside = max(0, int(count / 2 - _Z / 2 * count**0.5))
    return Summary(
        count,
        statistics.median(ordered),
        ordered[outside],
        ordered[-1 - outside],
        ordered[min(count - 1, count * 99 // 100)],
        ordered[-1],
    )


def ratio(values: list[float], base: list[float]) -> tuple[float, float, float]:
    """The ratio of two medians, and its 90 % interval by bootstrap. Equal samples give equal answers."""
    chance = random.Random(0)
    drawn = sorted(
        statistics.median(chance.choices(values, k=len(values)))
        / statistics.median(chance.choices(base, k=len(base)))
        for _ in range(BOOTSTRAP)
    )
    middle = statistics.median(values) / statistics.median(base)
    return middle, drawn[BOOTSTRAP * 5 // 100], drawn[BOOTSTRAP * 95 // 100 - 1]


class Figures:
    """The samples of a run and what it ran on. Written to its file by save()."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.facts: dict[str, str] = {}
        """About the machine, in the order in which they are shown."""
        self.samples: dict[str, dict[str, list[float]]] = {}
        """Figure → contestant → samples."""
        self.rounds: dict[str, int] = {}
        """Part of the benchmark → rounds that are done."""

    def load(self) -> None:
        """Go on with what the file has, if there is one."""
        if self._path.exists():
            found: dict[str, Any] = json.loads(self._path.read_text())
            self.facts, self.samples, self.rounds = found["facts"], found["samples"], found["rounds"]

    def save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        text = {"facts": self.facts, "samples": self.samples, "rounds": self.rounds}
        new.write_text(json.dumps(text))
        new.rename(self._path)

    def forget(self) -> None:
        """Begin again."""
        self.facts, self.samples, self.rounds = {}, {}, {}

    def add(self, figure: str, contestant: str, values: Iterable[float]) -> None:
        self.samples.setdefault(figure, {}).setdefault(contestant, []).extend(values)

    def done(self, part: str) -> None:
        """A round of a part is complete: keep what it has found."""
        self.rounds[part] = self.rounds.get(part, 0) + 1
        self.save()

    def of(self, figure: str, contestant: str) -> list[float]:
        """The samples; none if this was not measured."""
        return self.samples.get(figure, {}).get(contestant, [])

    def median(self, figure: str, contestant: str) -> float | None:
        values = self.of(figure, contestant)
        return statistics.median(values) if values else None

    def ratio(self, figure: str, contestant: str, base: str) -> float | None:
        values, other = self.of(figure, contestant), self.of(figure, base)
        return ratio(values, other)[0] if values and other else None


def describe(figures: Figures, release: str) -> None:
    """Note what the samples belong to. Those of another commit, kernel or release are forgotten."""
    commit = subprocess.run(
        ["git", "describe", "--always"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    belongs = {
        "Kernel": f"Linux {platform.release()}",
        "System": f"Debian {release} in containers of systemd-nspawn, one for each contestant",
        "polytmp": commit.stdout.strip(),
    }
    if all(figures.facts.get(name) == text for name, text in belongs.items()):
        return
    figures.forget()
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    figures.facts["Machine"] = f"{os.cpu_count()} CPUs ({model}), {memory:.0f} GiB of memory"
    figures.facts.update(belongs)
    figures.facts["Day"] = f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}"

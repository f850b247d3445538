# SPDX-License-Identifier: LGPL-2.1-or-later
"""Writes what was measured into docs/performance.md, between marks, and draws docs/performance/*.svg.

The text around the marks is written by hand, and says no figure.
Not here: the samples (figures) and the drawing (chart).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from . import chart, crowd, kernel, logins
from .contestants import AGAIN, NAMES, OURS, PEER, PLAIN, PROJECT
from .figures import Figures, ratio, summary
from .goals import GOALS

PAGE: Final = PROJECT / "docs/performance.md"
PLOTS: Final = PROJECT / "docs/performance"
_MARK: Final = "<!-- measured: {} -->"
_END: Final = "<!-- end -->"


def number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _contests(figures: Figures, names: Mapping[str, str], contestants: tuple[str, ...]) -> str:
    """A row for each figure and contestant. names: figure → contestant that the ratios are to."""
    rows = []
    for figure, base in names.items():
        for contestant in contestants:
            values = figures.of(figure, contestant)
            if not values:
                continue
            found = summary(values)
            to = figures.of(figure, base)
            shown = (
                ""
                if contestant == base or not to
                else "{:.2f} ({:.2f} to {:.2f})".format(*ratio(values, to))
            )
            interval = f"{number(found.median)} ({number(found.low)} to {number(found.high)})"
            rows.append([figure, contestant, interval, number(found.tail), shown, str(found.count)])
    return table(["", "", "median (90 %), ms", "p99, ms", "ratio (90 %)", "samples"], rows)


def _alone(figures: Figures, shown: list[str], unit: str) -> str:
    rows = []
    for figure in shown:
        if values := figures.of(figure, OURS):
            found = summary(values)
            interval = f"{number(found.median)} ({number(found.low)} to {number(found.high)})"
            rows.append([figure, interval, number(found.maximum), str(found.count)])
    return table(["", f"median (90 %), {unit}", "maximum", "samples"], rows)


def _goals(figures: Figures) -> str:
    rows = []
    for goal in GOALS:
        found = goal.measured(figures)
        met = "" if found is None else "yes" if found <= goal.most else "**no**"
        shown = "not measured" if found is None else f"{number(found)} {goal.unit}"
        rows.append([goal.what, f"{goal.most:g} {goal.unit}", shown, met])
    return table(["", "goal, at most", "measured", "met"], rows)


def _sizes(figures: Figures) -> list[int]:
    known = {
        int(name.rpartition(" with ")[2].split()[0].replace(",", ""))
        for name in figures.samples
        if "RSS" in name
    }
    return sorted(known)


def _by_size(figures: Figures) -> str:
    rows = []
    for count in _sizes(figures):
        cells = [f"{count:,}"]
        for figure, factor in (
            (crowd.memory(count), 1 / 1024),
            (crowd.start(count), 1),
            (crowd.acquired(count), 1),
            (crowd.command("polytmpctl list", count), 1),
            (crowd.command("polytmpctl status USER", count), 1),
            (crowd.command("polytmpctl path FILE", count), 1),
            (crowd.command("loginctl list-users", count), 1),
        ):
            found = figures.median(figure, OURS)
            cells.append("" if found is None else number(found * factor))
        rows.append(cells)
    head = ["instances", "RSS, MiB", "start to READY, ms", "first request after it, ms"]
    return table([*head, "list, ms", "status, ms", "path, ms", "loginctl, ms"], rows)


def _deletions(figures: Figures) -> str:
    rows = []
    for figure in (name for name in figures.samples if name.startswith("deletion, ")):
        times, cpu = figures.of(figure, OURS), figures.of(f"CPU of {figure}", OURS)
        theirs, their_cpu = figures.of(figure, "rm -rf"), figures.of(f"CPU of {figure}", "rm -rf")
        cells = [number(summary(values).median) for values in (theirs, times)]
        for own, base in ((times, theirs), (cpu, their_cpu)):
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*ratio(own, base)))
        rows.append([figure.removeprefix("deletion, "), *cells, str(len(times))])
    head = [
        "100,000 entries",
        "rm -rf, ms",
        "polytmpd, ms",
        "ratio (90 %)",
        "ratio of CPU time (90 %)",
        "samples",
    ]
    return table(head, rows)


def _idle(figures: Figures) -> str:
    rows = [
        [name, number(summary(values).median)]
        for name, values in figures.samples.get(crowd.IDLE, {}).items()
    ]
    return table(["", "context switches in 60 s"], rows)


def _tail(figures: Figures) -> str:
    rows = []
    for figure in (name for name in figures.samples if name.startswith("tail: ")):
        for contestant, values in figures.samples[figure].items():
            found = summary(values)
            cells = [number(value) for value in (found.median, found.tail, found.maximum)]
            rows.append([figure.removeprefix("tail: "), contestant, *cells, str(found.count)])
    return table(["", "", "median, ms", "p99, ms", "maximum, ms", "samples"], rows)


def _model(figures: Figures) -> str:
    head = [""]
    for users in kernel.USERS:
        head += [f"{users:,} users", f"with {kernel.SHOWN[-1]} more mounts"]
    return table(head, kernel.model(figures))


def _facts(figures: Figures) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in figures.facts.items())


_SSH: Final = (logins.FIRST, logins.FURTHER, logins.AT_ONCE)
_PAM: Final = (logins.MODULE_WITHOUT, logins.MODULE_WITH, logins.STACK_WITH)


def sections(figures: Figures) -> dict[str, str]:
    """Mark → text."""
    ssh = dict.fromkeys(_SSH, PLAIN)
    pam = {logins.MODULE_WITHOUT: PEER, logins.MODULE_WITH: PEER, logins.STACK_WITH: PLAIN}
    return {
        "machine": _facts(figures),
        "goals": _goals(figures),
        "logins": _contests(figures, ssh, NAMES),
        "pam": _contests(figures, pam, NAMES),
        "cpu": _alone(figures, [logins.CPU_FURTHER, logins.CPU_FIRST], "ms"),
        "deletion": _deletions(figures),
        "instances": _by_size(figures),
        "idle": _idle(figures),
        "mounts": _contests(figures, {crowd.MOUNT: PEER}, NAMES),
        "tail": _tail(figures),
        "model": _model(figures),
        "churn": _alone(figures, [crowd.churn(count) for count in _sizes(figures)], "ms"),
    }


_PLOTS: Final = ("logins.svg", "pam.svg", "deletion.svg", "start.svg", "tail.svg")


def plots(figures: Figures) -> dict[str, str]:
    """File → SVG."""
    found = {name: chart.empty(name.removesuffix(".svg")) for name in _PLOTS}
    groups = {}
    for figure in (*_SSH, logins.STACK_WITH):
        if base := figures.of(figure, PLAIN):
            members = (AGAIN, PEER, OURS)
            groups[figure] = {
                name: ratio(figures.of(figure, name), base) for name in members if figures.of(figure, name)
            }
    if groups:
        found["logins.svg"] = chart.intervals("Logins, compared with a plain system", "x plain", groups)
    parts = {
        f"{name}, {'first' if figure == logins.MODULE_WITHOUT else 'further'}": figures.of(figure, name)
        for figure in (logins.MODULE_WITHOUT, logins.MODULE_WITH)
        for name in (PEER, OURS)
        if figures.of(figure, name)
    }
    if parts:
        found["pam.svg"] = chart.curves("What the PAM module takes", "ms", parts)
    deletions = {
        name.removeprefix("deletion, "): {
            "wall time": ratio(figures.of(name, OURS), figures.of(name, "rm -rf")),
            "CPU time": ratio(figures.of(f"CPU of {name}", OURS), figures.of(f"CPU of {name}", "rm -rf")),
        }
        for name in figures.samples
        if name.startswith("deletion, ")
    }
    if deletions:
        found["deletion.svg"] = chart.intervals("Deletion, compared with rm -rf", "x rm -rf", deletions)
    starts = {
        f"{count:,} instances": {"READY": _interval(values), "first request": _interval(first)}
        for count in _sizes(figures)
        if (values := figures.of(crowd.start(count), OURS))
        and (first := figures.of(crowd.acquired(count), OURS))
    }
    if starts:
        found["start.svg"] = chart.intervals("Start of polytmpd", "ms", starts, log=True)
    tails = {
        name.removeprefix("tail: ").removesuffix(", both"): figures.of(name, OURS)
        for name in figures.samples
        if name.startswith("tail: first") and name.endswith(", both")
    }
    if tails:
        found["tail.svg"] = chart.curves("First sessions while others are logged in", "ms", tails)
    return found


def _interval(values: list[float]) -> chart.Interval:
    found = summary(values)
    return found.median, found.low, found.high


def write(figures: Figures, page: Path = PAGE, directory: Path = PLOTS) -> None:
    """Replace what the page says between the marks. Raises ValueError if a mark is missing."""
    text = page.read_text()
    for name, content in sections(figures).items():
        mark = _MARK.format(name)
        pattern = re.compile(re.escape(mark) + r"\n.*?" + re.escape(_END), re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page} has no {mark}")
        text = pattern.sub(lambda _, new=f"{mark}\n\n{content}\n\n{_END}": new, text)  # type: ignore[misc]
    page.write_text(text)
    directory.mkdir(exist_ok=True)
    for file, picture in plots(figures).items():
        (directory / file).write_text(picture)

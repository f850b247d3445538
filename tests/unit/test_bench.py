# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the benchmarks say about samples, and what they write."""

import random
import re
import statistics
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import chart, crowd, kernel, logins, report
from bench.contestants import NAMES, OURS, PEER
from bench.figures import Figures, describe, ratio, summary
from bench.goals import GOALS

pytestmark = pytest.mark.unit


def test_the_interval_contains_the_median_in_nine_of_ten_cases() -> None:
    chance = random.Random(1)
    hits = 0
    for _ in range(400):
        found = summary([chance.expovariate(1) for _ in range(30)])
        hits += found.low <= 0.6931 <= found.high
    assert 0.86 <= hits / 400 <= 0.97


def test_a_tail_of_few_samples_is_the_maximum() -> None:
    assert summary([1.0, 2.0, 9.0]).tail == 9.0
    assert summary([float(number) for number in range(1000)]).tail == 990.0
    assert summary([5.0]).low == summary([5.0]).high == 5.0


def test_a_ratio_and_its_interval() -> None:
    chance = random.Random(2)
    base = [chance.gauss(100, 3) for _ in range(60)]
    middle, low, high = ratio([value * 1.1 for value in base], base)
    assert middle == pytest.approx(1.1)
    assert low < 1.1 < high
    assert (low, high) == ratio([value * 1.1 for value in base], base)[1:]


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    figures = Figures(tmp_path / "results/bench.json")
    figures.facts["Kernel"] = "Linux"
    figures.add("login", OURS, [1.0, 2.0])
    figures.done("logins")
    figures.add("login", OURS, [3.0])  # of a round that is interrupted
    again = Figures(tmp_path / "results/bench.json")
    again.load()
    assert (again.of("login", OURS), again.rounds, again.facts) == ([1.0, 2.0], {"logins": 1}, figures.facts)


def test_samples_of_another_commit_are_forgotten(tmp_path: Path) -> None:
    figures = Figures(tmp_path / "bench.json")
    describe(figures, "trixie")
    figures.add("login", OURS, [1.0])
    describe(figures, "trixie")
    assert figures.of("login", OURS) == [1.0]
    figures.facts["polytmp"] = "another"
    describe(figures, "trixie")
    assert (figures.of("login", OURS), figures.rounds) == ([], {})


def _full(path: Path) -> Figures:
    figures = Figures(path)
    chance = random.Random(3)

    def some() -> list[float]:
        return [chance.uniform(1, 2) for _ in range(20)]

    for figure in (logins.FIRST, logins.FURTHER, logins.AT_ONCE, logins.STACK_WITH, crowd.MOUNT):
        for name in NAMES:
            figures.add(figure, name, some())
    for figure in (logins.MODULE_WITH, logins.MODULE_WITHOUT):
        figures.add(figure, PEER, some())
        figures.add(figure, OURS, some())
    for figure in (logins.CPU_FIRST, logins.CPU_FURTHER, "tail: first session, 100 logged in, both"):
        figures.add(figure, OURS, some())
    for shape in ("one directory", "ten files a directory", "each in the other"):
        for place in ("/var/tmp", "/dev/shm"):
            for name in ("rm -rf", OURS):
                figures.add(f"deletion, {shape}, {place}", name, some())
                figures.add(f"CPU of deletion, {shape}, {place}", name, some())
    for count in (0, 1000, 10_000):
        for figure in (crowd.memory(count), crowd.start(count), crowd.acquired(count)):
            figures.add(figure, OURS, some())
        for name in ("polytmpctl list", "polytmpctl status USER", "polytmpctl path FILE"):
            figures.add(crowd.command(name, count), OURS, some())
        for per_count in (crowd.churn, crowd.watches, crowd.descriptors):
            figures.add(per_count(count), OURS, some())
    for name in (kernel.COUNT, kernel.CREATE, kernel.MEMORY, kernel.PROPAGATE):
        for more in kernel.MORE_MOUNTS:
            figures.add(name, kernel.case(more), some())
    for label in ("with systemd-udevd", "without systemd-udevd"):
        figures.add(crowd.IDLE, label, [4.0])
    return figures


def test_every_goal_has_its_figure(tmp_path: Path) -> None:
    figures = _full(tmp_path / "x")
    assert [goal.what for goal in GOALS if goal.measured(figures) is None] == []
    empty = Figures(tmp_path / "y")
    assert {goal.measured(empty) for goal in GOALS} == {None}


def test_the_page_has_each_table_and_each_plot(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(report.PAGE.read_text())
    figures = _full(tmp_path / "x")
    report.write(figures, page, tmp_path / "plots")
    report.write(figures, page, tmp_path / "plots")  # again, over what it wrote
    text = page.read_text()
    for name, content in report.sections(figures).items():
        assert text.count(content) == 1 or not content, name
    assert sorted(re.findall(r"\]\(performance/(.*?)\)", text)) == sorted(report.plots(figures))
    for plot in (tmp_path / "plots").iterdir():
        ElementTree.parse(plot)


def test_a_page_without_a_mark_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("# Performance\n")
    with pytest.raises(ValueError, match="measured: machine"):
        report.write(_full(tmp_path / "x"), page, tmp_path)


def test_nothing_measured_leaves_an_empty_page(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(report.PAGE.read_text())
    report.write(Figures(tmp_path / "x"), page, tmp_path / "plots")
    assert page.read_text().count("| not measured |") == len(GOALS)
    assert {"not measured" in plot.read_text() for plot in (tmp_path / "plots").iterdir()} == {True}


def test_curves_rise_to_the_right() -> None:
    root = ElementTree.fromstring(chart.curves("t", "ms", {"a": [3.0, 1.0, 2.0, 10.0]}))
    points = next(node for node in root.iter() if node.tag.endswith("polyline")).attrib["points"]
    places = [tuple(map(float, point.split(","))) for point in points.split()]
    assert places == sorted(places)
    assert [y for _, y in places] == sorted((y for _, y in places), reverse=True)


def test_intervals_lie_in_order() -> None:
    svg = chart.intervals("t", "x", {"g": {"a": (1.0, 0.9, 1.2), "b": (2.0, 1.5, 3.0)}})
    root = ElementTree.fromstring(svg)
    dots = [node.attrib for node in root.iter() if node.tag.endswith("circle") and len(node)]
    assert float(dots[0]["cx"]) < float(dots[1]["cx"])
    assert statistics.mean(float(dot["cy"]) for dot in dots) > 58

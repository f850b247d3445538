# SPDX-License-Identifier: LGPL-2.1-or-later
"""Draws SVG: intervals beside each other, and distributions as curves.

Texts inherit the page's colour scheme as far as an image can: a light background of its own.
Not here: what is drawn.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

COLOURS: Final = ("#666666", "#b0b0b0", "#c4641f", "#1f6fb4", "#3a8f3a", "#8a4fb0")
_WIDTH: Final = 760
_LABELS: Final = 210
_RIGHT: Final = 30
_FONT: Final = "font-family='sans-serif' font-size='12' fill='#222222'"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _ticks(low: float, high: float, *, log: bool) -> list[float]:
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        found = [10.0**power * digit for power in range(first, last + 1) for digit in (1, 2, 5)]
        return [tick for tick in found if low <= tick <= high]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    return [step * count for count in range(math.ceil(low / step), math.floor(high / step) + 1)]


class _Axis:
    def __init__(self, values: Sequence[float], *, log: bool, zero: bool) -> None:
        self.log = log
        low, high = min(values), max(values)
        if log:
            low, high = max(low, 1e-6) * 0.8, high * 1.25
        else:
            margin = (high - low or high or 1.0) * 0.08
            low, high = (0.0 if zero else low - margin), high + margin
        self.low, self.high = low, high

    def at(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return _LABELS + share * (_WIDTH - _LABELS - _RIGHT)

    def lines(self, top: float, bottom: float) -> list[str]:
        found = []
        for tick in _ticks(self.low, self.high, log=self.log):
            x = self.at(tick)
            found.append(
                f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{top:.1f}' y2='{bottom:.1f}' stroke='#dddddd'/>"
                f"<text x='{x:.1f}' y='{bottom + 16:.1f}' text-anchor='middle' {_FONT}>"
                f"{_number(tick)}</text>"
            )
        return found


def _page(title: str, unit: str, height: float, parts: list[str]) -> str:
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height:.0f}' role='img'>"
        f"<title>{escape(title)}</title><rect width='100%' height='100%' fill='white'/>"
        f"<text x='12' y='22' font-weight='bold' {_FONT}>{escape(title)}</text>"
        f"<text x='{_WIDTH - 12}' y='{height - 8:.0f}' text-anchor='end' {_FONT}>{escape(unit)}</text>"
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


Interval = tuple[float, float, float]
"""The median, and the ends of its interval."""


def intervals(
    title: str, unit: str, groups: Mapping[str, Mapping[str, Interval]], *, log: bool = False
) -> str:
    """A row for each group and, below each other in it, its members: a dot with a line for the interval."""
    names = list(dict.fromkeys(name for members in groups.values() for name in members))
    colour = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    axis = _Axis(
        [value for members in groups.values() for item in members.values() for value in item],
        log=log,
        zero=False,
    )
    y, parts = 58.0, []
    for group, members in groups.items():
        middle = y + 7 * (len(members) - 1)
        parts.append(f"<text x='12' y='{middle + 4:.1f}' {_FONT}>{escape(group)}</text>")
        for name, (value, low, high) in members.items():
            stroke = f"stroke='{colour[name]}' stroke-width='3'"
            ends = f"x1='{axis.at(low):.1f}' x2='{axis.at(high):.1f}' y1='{y:.1f}' y2='{y:.1f}'"
            line = f"<line {ends} {stroke}/>"
            told = f"<title>{escape(name)}: {_number(value)} {escape(unit)}</title>"
            dot = (
                f"<circle cx='{axis.at(value):.1f}' cy='{y:.1f}' r='5' fill='{colour[name]}'>{told}</circle>"
            )
            parts += [line, dot]
            y += 14
        y += 14
    return _page(title, unit, y + 26, [*axis.lines(48, y - 8), *parts, *_legend(colour)])


def curves(title: str, unit: str, samples: Mapping[str, Sequence[float]]) -> str:
    """The share of the samples (up) that took no longer than (right), on a logarithmic axis."""
    colour = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(samples)}
    axis = _Axis([value for values in samples.values() for value in values], log=True, zero=False)
    top, bottom = 58.0, 300.0
    parts = axis.lines(top, bottom)
    for share in (0.0, 0.5, 0.9, 0.99):
        y = _rank(share, top, bottom)
        parts.append(
            f"<line x1='{_LABELS}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}' stroke='#dddddd'/>"
            f"<text x='{_LABELS - 8}' y='{y + 4:.1f}' text-anchor='end' {_FONT}>{share * 100:.0f} %</text>"
        )
    for name, values in samples.items():
        ordered = sorted(values)
        points = " ".join(
            f"{axis.at(value):.1f},{_rank(number / len(ordered), top, bottom):.1f}"
            for number, value in enumerate(ordered)
        )
        parts.append(f"<polyline points='{points}' fill='none' stroke='{colour[name]}' stroke-width='2'/>")
    return _page(title, unit, bottom + 46, [*parts, *_legend(colour)])


def empty(title: str) -> str:
    return _page(title, "not measured", 60, [])


def _rank(share: float, top: float, bottom: float) -> float:
    """The height of a share, stretched towards 1, as what is rare matters most."""
    stretched = -math.log10(max(1 - share, 1e-3)) / 3
    return bottom - stretched * (bottom - top)


def _legend(colour: Mapping[str, str]) -> list[str]:
    x, found = float(_LABELS), []
    for name, fill in colour.items():
        found.append(
            f"<circle cx='{x:.0f}' cy='38' r='5' fill='{fill}'/>"
            f"<text x='{x + 9:.0f}' y='42' {_FONT}>{escape(name)}</text>"
        )
        x += 26 + 6.6 * len(name)
    return found

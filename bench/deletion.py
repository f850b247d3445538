# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures deletion against `rm -rf`: python -m bench.deletion, as root; a table on stdout.

Each round makes two equal trees for each shape and place, and deletes one each way, in random order. The
ratio is taken within the round, so that what else happens on the machine affects both.
Not here: assertions; logins (__main__.py).
"""

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from polytmpd.blocking import deletion

PLACES: Final = ("/var/tmp", "/dev/shm")
_OWNER: Final = 12345
_BARRIER: Final = "polytmp-removing-0123456789abcdef"


class Spent(NamedTuple):
    """Seconds: how long it took, and CPU time."""

    wall: float
    cpu: float


def one_directory(inner: int, count: int) -> None:
    for number in range(count):
        os.close(os.open(f"file-{number}", os.O_CREAT | os.O_WRONLY, dir_fd=inner))


def many_directories(inner: int, count: int) -> None:
    """A tenth as many directories, of ten files each."""
    for number in range(count // 10):
        os.mkdir(str(number), dir_fd=inner)
        os.chown(str(number), _OWNER, _OWNER, dir_fd=inner)
        for file in range(10):
            os.close(os.open(f"{number}/file-{file}", os.O_CREAT | os.O_WRONLY, dir_fd=inner))


def deep(inner: int, count: int) -> None:
    fd = os.dup(inner)
    for _ in range(count):
        os.mkdir("d", dir_fd=fd)
        os.chown("d", _OWNER, _OWNER, dir_fd=fd)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)


SHAPES: Final[dict[str, Callable[[int, int], None]]] = {
    "one directory": one_directory,
    "ten files a directory": many_directories,
    "each in the other": deep,
}


def ours(base: Path) -> Spent:
    """remove_tree in this process, as a thread of the daemon does it."""
    fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    deletion.remove_tree(fd, _BARRIER)
    after, end = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    os.close(fd)
    return Spent(end - begin, _cpu(after) - _cpu(before))


def rm(base: Path) -> Spent:
    """`rm -rf`, its start included."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["/bin/rm", "-rf", base / _BARRIER], check=True)
    after, end = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    return Spent(end - begin, _cpu(after) - _cpu(before))


def _cpu(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def measure(base: Path, make: Callable[[int, int], None], count: int, way: Callable[[Path], Spent]) -> Spent:
    """Make a tree, and delete it."""
    inner = base / _BARRIER / "tmp"
    inner.parent.mkdir(0o700)
    inner.mkdir()
    os.chown(inner, _OWNER, _OWNER)
    fd = os.open(inner, os.O_RDONLY | os.O_DIRECTORY)
    make(fd, count)
    os.close(fd)
    return way(base)


def compare(
    places: Sequence[str], shapes: Sequence[str], count: int
) -> Iterator[tuple[str, str, Spent, Spent]]:
    """One round: (place, shape, rm's, ours)."""
    for place in random.sample(places, len(places)):
        with tempfile.TemporaryDirectory(prefix="polytmp-bench-", dir=place) as name:
            base = Path(name)
            base.chmod(0o1777)
            for shape in random.sample(shapes, len(shapes)):
                ways = random.sample((ours, rm), 2)
                spent = {way: measure(base, SHAPES[shape], count, way) for way in ways}
                yield place, shape, spent[rm], spent[ours]


def interval(values: list[float]) -> str:
    """The median, and the order statistics that enclose it with a probability of 90 %."""
    ordered = sorted(values)
    outside = max(0, round(len(ordered) / 2 - 0.82 * len(ordered) ** 0.5))
    return f"{statistics.median(ordered):.2f} ({ordered[outside]:.2f} to {ordered[-1 - outside]:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.deletion", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--count", type=int, default=100_000, help="entries of a tree")
    parser.add_argument("--place", action="append", help="a directory (default: /var/tmp and /dev/shm)")
    parser.add_argument("--shape", action="append", choices=SHAPES)
    arguments = parser.parse_args()
    places = arguments.place or PLACES
    shapes = arguments.shape or list(SHAPES)
    found: dict[tuple[str, str], list[tuple[Spent, Spent]]] = {}
    for _ in range(arguments.rounds):
        for place, shape, theirs, own in compare(places, shapes, arguments.count):
            found.setdefault((place, shape), []).append((own, theirs))
    lines = [
        f"{arguments.count} entries, medians of {arguments.rounds} (90 % interval):",
        "",
        "| | rm -rf, s | polytmpd, s | ratio | ratio of CPU time |",
        "|---|---|---|---|---|",
    ]
    for (place, shape), pairs in sorted(found.items()):
        cells = (
            interval([theirs.wall for _, theirs in pairs]),
            interval([own.wall for own, _ in pairs]),
            interval([own.wall / theirs.wall for own, theirs in pairs]),
            interval([own.cpu / theirs.cpu for own, theirs in pairs]),
        )
        lines.append(f"| {place}, {shape} | " + " | ".join(cells) + " |")
    print("\n".join(lines))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: LGPL-2.1-or-later
"""python -m bench: measures, and writes docs/performance.md. As root.

An interrupted run of the same commit goes on, with the samples in build/bench.json, unless --fresh is given.
Not here: the parts (logins, crowd, deletion, kernel, scale), what the page says (report).
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Final

from tests.bed import RELEASES, BedError
from tests.bed.nspawn import require_tools

from . import crowd, deletion, kernel, logins, report
from .contestants import NAMES, OURS, Contestant, booted
from .figures import RESULTS, Figures, describe

ROUNDS: Final = 30
QUICK: Final = 3
PARTS: Final = ("logins", "pam", "deletion", "kernel", "crowd")
SIZES: Final = (0, 1000, 10_000)
QUICK_SIZES: Final = (0, 100)
_DELETION_ROUNDS: Final = 10
"""By what --rounds is divided: each round makes and deletes 1,200,000 entries."""


_KERNEL_ROUNDS: Final = 5
"""At most: each makes some thousand namespaces, whose size does not vary."""


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)  # noqa: T201


def versions(figures: Figures, contestant: Contestant) -> None:
    script = "systemctl --version | head -n1; python3 --version; ssh -V 2>&1"
    figures.facts["Versions"] = ", ".join(contestant.machine.sh(script).stdout.splitlines())


def measure_logins(release: str, parts: list[str], rounds: int, figures: Figures) -> None:
    if all(figures.rounds.get(part, 0) >= rounds for part in parts):
        return
    with booted(release, NAMES) as contestants, contextlib.ExitStack() as stack:
        versions(figures, next(entry for entry in contestants if entry.name == OURS))
        pams = {entry.name: stack.enter_context(entry.pam()) for entry in contestants}
        for number in range(rounds):
            for part in parts:
                if figures.rounds.get(part, 0) > number:
                    continue
                if part == "logins":
                    logins.by_ssh(contestants, figures, number)
                else:
                    logins.by_pam(contestants, pams, figures)
                figures.done(part)
            _tell(f"logins: round {number + 1} of {rounds}")


def measure_deletion(rounds: int, count: int, figures: Figures) -> None:
    while figures.rounds.get("deletion", 0) < rounds:
        for place, shape, theirs, own in deletion.compare(deletion.PLACES, list(deletion.SHAPES), count):
            for name, spent in (("rm -rf", theirs), (OURS, own)):
                figures.add(f"deletion, {shape}, {place}", name, [spent.wall * 1000])
                figures.add(f"CPU of deletion, {shape}, {place}", name, [spent.cpu * 1000])
        figures.done("deletion")
        _tell(f"deletion: round {figures.rounds['deletion']} of {rounds}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of polytmp.")
    parser.add_argument("--release", choices=RELEASES, default="trixie")
    parser.add_argument("--rounds", type=int, default=0, help=f"default: {ROUNDS}, with --quick {QUICK}")
    parser.add_argument("--deletion-rounds", type=int, default=0, help="default: a tenth of --rounds")
    parser.add_argument("--quick", action="store_true", help="smaller numbers, to see that it runs; no page")
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--fresh", action="store_true", help="forget what an interrupted run has measured")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--write", action="store_true", help="only write the page, from the samples there are"
    )
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    rounds = arguments.rounds or (QUICK if quick else ROUNDS)
    parts = arguments.part or list(PARTS)
    results: Path = arguments.results.with_suffix(".quick.json") if quick else arguments.results
    if arguments.fresh:
        results.unlink(missing_ok=True)
    figures = Figures(results)
    figures.load()
    if arguments.write:
        report.write(figures)
        return 0
    try:
        require_tools()
        describe(figures, arguments.release)
        by_login = [part for part in parts if part in {"logins", "pam"}]
        if by_login:
            measure_logins(arguments.release, by_login, rounds, figures)
        if "deletion" in parts:
            measure_deletion(
                arguments.deletion_rounds or max(1, rounds // _DELETION_ROUNDS),
                10_000 if quick else 100_000,
                figures,
            )
        while "kernel" in parts and figures.rounds.get("kernel", 0) < min(rounds, _KERNEL_ROUNDS):
            kernel.measure(figures)
            figures.done("kernel")
        if "crowd" in parts and not figures.rounds.get("crowd"):
            sizes, seconds = (QUICK_SIZES, 10.0) if quick else (SIZES, 60.0)
            crowd.measure(arguments.release, rounds, sizes, seconds, figures)
            figures.done("crowd")
    except BedError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    if quick:
        for name, text in report.sections(figures).items():
            print(f"\n## {name}\n\n{text}")  # noqa: T201
    else:
        report.write(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())

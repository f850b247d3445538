# SPDX-License-Identifier: LGPL-2.1-or-later
"""python -m tests.soak: runs rounds on fresh machines, the releases in turn, until the first violation.

Not here: what a round is (round.py).
"""

import argparse
import secrets
import sys
from collections import Counter

from tests.bed import RELEASES, BedError, build
from tests.bed.nspawn import require_tools

from .round import soak
from .sabotage import FAULTS

ROUND = 300.0
"""Seconds. A longer soak is divided into rounds, so that each release gets its share."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Soak polytmp.")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--release", choices=(*RELEASES, "both"), default="both")
    parser.add_argument(
        "--seed", default="", help="the same seed gives each user the same sequence of actions"
    )
    parser.add_argument("--sabotage", choices=(*FAULTS, "open-door"), help="put this fault into the daemon")
    arguments = parser.parse_args()
    releases = RELEASES if arguments.release == "both" else (arguments.release,)
    seed = arguments.seed or secrets.token_hex(4)
    rounds = max(len(releases), round(arguments.seconds / ROUND))
    total: Counter[str] = Counter()
    try:
        require_tools()
        debs = {release: build(release) for release in releases}
        for number in range(rounds):
            release = releases[number % len(releases)]
            # the first round uses the seed itself, so that a single round can be repeated
            own = seed if number < len(releases) else f"{seed}.{number // len(releases)}"
            _tell(f"Round {number + 1} of {rounds}: {release}, SEED={own}")
            report = soak(
                release, debs[release], arguments.seconds / rounds, own, _tell, fault=arguments.sabotage
            )
            total.update(report.counts)
            _tell(str(report))
            _tell(f"  actions: {report.log}")
            if report.violations:
                _tell(report.evidence)
                _tell(
                    f"Again: make soak RELEASE={release} SEED={own} SECONDS={arguments.seconds / rounds:.0f}"
                )
                return 1
    except BedError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    _tell(f"{rounds} rounds, {total['logins']} logins, {total['checks']} checks: no violation")
    return 0


def _tell(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())

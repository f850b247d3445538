# SPDX-License-Identifier: LGPL-2.1-or-later
"""A short soak, and whether its checker notices a fault.

Not here: the long one (make soak).
"""

from pathlib import Path

import pytest

from tests.soak.round import Report, soak

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SEED = "short"
SECONDS = 30


def run(release: str, deb: Path, fault: str | None = None) -> Report:
    lines: list[str] = []
    report = soak(release, deb, SECONDS, SEED, lines.append, fault=fault, phase=8)
    print("\n".join([*lines, str(report), report.evidence]))  # noqa: T201  (shown if it fails)
    return report


def test_nothing_is_wrong(release: str, deb: Path) -> None:
    report = run(release, deb)
    assert not report.violations, f"{report.violations[0]}\nSee: {report.log}"
    assert report.counts["looks"] > 0
    report.log.unlink()


def test_the_checker_notices(release: str, deb: Path) -> None:
    """The daemon gives all users the same namespace."""
    report = run(release, deb, "one-for-all")
    assert report.violations, "the checker noticed nothing"
    report.log.unlink()

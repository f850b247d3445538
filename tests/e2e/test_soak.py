# SPDX-License-Identifier: LGPL-2.1-or-later
"""A short soak, and whether its checker notices a fault.

Not here: the long one (make soak).
"""

import ast
from pathlib import Path

import pytest

from tests.bed.tree import PROJECT
from tests.soak.daemon import TROUBLE
from tests.soak.round import Report, soak
from tests.soak.sabotage import FAULTS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SEED = "short"
SECONDS = 30


def test_every_fault_still_fits() -> None:
    """The text that a fault replaces is in the working tree, once."""
    for name, (file, there, _) in FAULTS.items():
        assert (PROJECT / "polytmpd" / file).read_text().count(there) == 1, name


def test_every_message_of_trouble_still_exists() -> None:
    """The soak searches the journal for texts that are arguments of calls, or names of classes."""
    known: set[str] = set()
    for path in (PROJECT / "polytmpd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                known.add(node.name)
            elif isinstance(node, ast.Call):
                known |= {str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant)}
    for text in TROUBLE:
        assert any(text in entry for entry in known), text


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

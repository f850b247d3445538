# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every test that docs/SECURITY.md names exists."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_page_names_exists() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"def ((?:test|case)_\w+)", sources))
    defined |= {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    named = set(re.findall(r"\b(?:test|case)_\w+", (ROOT / "docs/SECURITY.md").read_text()))
    assert len(named) > 50
    assert named <= defined

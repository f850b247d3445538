# SPDX-License-Identifier: LGPL-2.1-or-later
"""The documentation agrees with the code."""

import re
from pathlib import Path

import pytest

from polytmpd.core.lifecycle import TABLE

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def test_the_architecture_shows_the_transition_table() -> None:
    text = (ROOT / "docs/ARCHITECTURE.md").read_text()
    shown = re.findall(r"^\| (\w+) \| (\w+) \| (\w+) \| ([\w, ]*) ?\|$", text, re.MULTILINE)
    rows = {
        (state.value, event.name, following.value, ", ".join(action.name for action in actions))
        for (state, event), (following, actions) in TABLE.items()
    }
    assert {tuple(cell.strip() for cell in row) for row in shown if row[0] != "state"} == rows


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named
    assert named <= targets


def test_every_link_leads_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text())
    ]
    assert len(links) > 10
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []

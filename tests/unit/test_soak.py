# SPDX-License-Identifier: LGPL-2.1-or-later
"""The soak knows the source: the texts that its faults replace, and the messages that it looks for."""

import ast
from pathlib import Path

import pytest

from tests.soak.daemon import TROUBLE
from tests.soak.sabotage import FAULTS

pytestmark = pytest.mark.unit

PROJECT = Path(__file__).parents[2]


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

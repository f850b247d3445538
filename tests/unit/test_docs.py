# SPDX-License-Identifier: LGPL-2.1-or-later
"""The documentation agrees with the code."""

import ast
import errno
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from polytmpd.core.lifecycle import TABLE

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
TROUBLESHOOTING = ROOT / "docs/troubleshooting.md"


def test_the_lifecycle_page_shows_the_transition_table() -> None:
    text = (ROOT / "docs/lifecycle.md").read_text()
    shown = re.findall(r"^\| (\w+) \| (\w+) \| (\w+) \| ([\w, ]*) ?\|$", text, re.MULTILINE)
    rows = {
        (state.value, event.name, following.value, ", ".join(action.name for action in actions))
        for (state, event), (following, actions) in TABLE.items()
    }
    assert {tuple(cell.strip() for cell in row) for row in shown if row[0] != "state"} == rows


def test_the_architecture_names_every_directory() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = [Path(line) for line in files.splitlines()]
    tree = (ROOT / "docs/ARCHITECTURE.md").read_text().split("```")[1]
    top = {path.parts[0] for path in tracked if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    assert set(re.findall(r"([\w-]+)/", tree)) == top
    tests = {path.parts[1] for path in tracked if path.parts[0] == "tests" and len(path.parts) > 2}
    assert tests <= set(re.findall(r"\w+", tree))


def test_every_module_and_test_that_the_architecture_names_exists() -> None:
    """The rooms of the table are checked in test_floors.py."""
    text = (ROOT / "docs/ARCHITECTURE.md").read_text().partition("## The way of one login")[2]
    modules = re.findall(r"`(\w+(?:/\w+)?)(?:\.([\w.]+))?`", text)
    wrong = []
    for name, member in modules:
        path = ROOT / "polytmpd" / name
        file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path
        words = member.split(".") if member else []
        if not file.exists() or (file.is_file() and not all(word in file.read_text() for word in words)):
            wrong.append(f"{name}.{member}")
    assert set(wrong) <= {"pam_polytmp.", "pam_systemd."}
    paths = re.findall(r"(tests/[\w/.*]+)", text)
    assert len(paths) > 8
    assert [path for path in paths if not list(ROOT.glob(path.rstrip(".")))] == []


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named
    assert named <= targets


def test_every_link_resolves() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text())
    ]
    assert len(links) > 10
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def texts(path: Path) -> Iterator[str]:
    """The text in the source, with `…` for what is filled in."""
    if path.suffix == ".c":
        yield from re.findall(r'"((?:[^"\\\n]|\\.)*)"', path.read_text())
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "…"
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_message_that_troubleshooting_explains_exists() -> None:
    """`;` separates messages, and `…` stands for whatever varies, such as another message."""
    sources = [*(ROOT / "polytmpd").rglob("*.py"), *(ROOT / "pam").glob("*.c")]
    known = {re.sub(r"%[a-z]", "…", text) for path in sources for text in texts(path)}
    corpus = "\n".join([*known, *map(os.strerror, (errno.ENOSPC, errno.ENOENT))])
    tables = re.findall(
        r"(?m)^\| (?:reason|message|error) \|.*\n\|---.*\n((?:\|.*\n)+)", TROUBLESHOOTING.read_text()
    )
    cells = [line.split(" | ")[0].removeprefix("| ") for table in tables for line in table.splitlines()]
    pieces = {piece.strip(" :,") for cell in cells for piece in re.split("[…;]|: ", cell)} - {"", "."}
    assert len(pieces) > 60
    pieces -= {"and other mistakes in the configuration", "anything else"}
    assert {piece for piece in pieces if piece not in corpus} == set()

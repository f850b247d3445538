# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs the tour of README.md: types every command and compares every output.

The rule: `…` within a line of output stands for any text, including none; a line with only `…` stands for
any number of lines; several blanks match one, and blanks around `…` may be missing.
The expected output may take a moment: a command is repeated until its output is the one in README.md.

Not here: other documents (tests/unit/test_docs).
"""

import re
from dataclasses import dataclass, field
from difflib import unified_diff
from pathlib import Path
from typing import Any

import pytest

from tests import observe
from tests.bed import Machine, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.prepared(by=observe.quick_logouts)]

README = Path(__file__).parents[2] / "README.md"
ANYTHING = "…"
PATIENCE = 60


@dataclass(slots=True)
class Step:
    """A command, who types it, and its lines of output."""

    who: str
    command: str
    answer: list[str] = field(default_factory=list)


def tour() -> list[Step]:
    """The steps in the console blocks of the section."""
    section = README.read_text().partition("\n## Tour\n")[2].partition("\n## ")[0]
    steps: list[Step] = []
    for block in re.findall(r"(?ms)^```console\n(.*?)^```$", section):
        for number, line in enumerate(block.splitlines()):
            if typed := re.fullmatch(r"(alice\$|#) (.+)", line):
                steps.append(Step("alice" if typed[1] == "alice$" else "root", typed[2]))
            else:
                assert number, f"a block does not begin with a command: {line}"
                steps[-1].answer.append(line)
    return steps


def pattern(answer: list[str]) -> re.Pattern[str]:
    return re.compile("".join(map(_line, answer)))


def _line(line: str) -> str:
    if line == ANYTHING:
        return r"(?:.*\n)*"
    return " ?.* ?".join(re.escape(part.strip()) for part in one_blank(line).split(ANYTHING)) + r"\n"


def one_blank(text: str) -> str:
    return re.sub(r"(?m)[ \t]+", " ", re.sub(r"(?m)^[ \t]+|[ \t]+$", "", text))


def test_the_rule() -> None:
    assert pattern(["a … c", "…", "1 of …"]).fullmatch("a bb c\n1 of 2\n")
    assert pattern(["a … c", "…", "1 of …"]).fullmatch("a b c\nd\n\n1 of \n")
    assert pattern(["a … c"]).fullmatch("a c\n")
    assert not pattern(["a … c"]).fullmatch("a b\nc\n")
    assert not pattern(["a.c"]).fullmatch("abc\n")
    assert not pattern([]).fullmatch("a\n")


def test_the_tour_is_there() -> None:
    commands = [step.command for step in tour() if step.who == "root"]
    for command in ("list", "status", "path", "ps", "usage", "enter", "check", "remove"):
        assert any(f"polytmpctl {command}" in line for line in commands), command
    assert {line.split()[0] for line in commands} >= {"busctl", "journalctl"}
    for step in tour():
        assert re.sub(r"[\s…]", "", "".join(step.answer)) or not step.answer, f"{step.command}: all is …"


def test_the_tour(machine: Machine) -> None:
    with machine.session("alice") as alice:
        for step in tour():
            take(machine, alice, step)


def take(machine: Machine, alice: Any, step: Step) -> None:
    if step.who == "alice":
        if step.command == "exit":
            alice.close()
        else:
            assert alice.run(step.command) == "".join(f"{line}\n" for line in step.answer)
        return
    expected, said = pattern(step.answer), ""

    def answered() -> bool:
        nonlocal said
        done = machine.sh(f"exec 2>&1\n{step.command}", check=False)
        said = one_blank(done.stdout)
        return expected.fullmatch(said) is not None

    try:
        eventually(answered, PATIENCE)
    except AssertionError:
        wanted = one_blank("\n".join(step.answer)).splitlines()
        difference = "\n".join(unified_diff(wanted, said.splitlines(), "README.md", "said", lineterm=""))
        pytest.fail(f"# {step.command}\n{difference}", pytrace=False)

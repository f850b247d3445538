# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of polytmpd itself."""

import sys

import pytest

from polytmpd import __main__ as program
from polytmpd import journal

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("words", "status", "out", "err"),
    [
        (["--help"], 0, "polytmpd [OPTIONS...]", ""),
        (["--debug", "--version"], 0, "polytmpd ", ""),
        (["--bogus"], 2, "", "'--bogus'"),
        (["list"], 2, "", "'list'"),
    ],
)
def test_options(
    words: list[str],
    status: int,
    out: str,
    err: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start() -> None:
        raise AssertionError("it starts")

    monkeypatch.setattr(journal, "set_up", lambda _: start())
    monkeypatch.setattr(sys, "argv", ["polytmpd", *words])
    assert program.main() == status
    said = capsys.readouterr()
    assert (said.out.startswith(out), err in said.err) == (True, True)
    assert bool(said.out) != bool(said.err)

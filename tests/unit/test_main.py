# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of polytmpd itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polytmpd import __main__ as program
from polytmpd import journal

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


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


def test_what_a_start_does_not_import() -> None:
    """Each takes milliseconds and memory: OpenSSL, and what pyudev brings."""
    slow = ("_ssl", "_hashlib", "pyudev", "shutil", "tempfile", "polytmpd.ctl")
    program = f"import sys, polytmpd.__main__; sys.exit(str(sorted(set(sys.modules) & set({slow!r}))))"
    # -S: the site module of a virtual environment imports a lot by itself.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=ROOT,
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.stderr.strip() == "[]"

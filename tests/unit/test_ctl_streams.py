# SPDX-License-Identifier: LGPL-2.1-or-later
"""polytmpctl with standard streams that are closed, full or of another character set."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


def shell(
    line: str, *code: str, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[bytes]":
    """line: has the program as "$@"; code: Python instead of polytmpctl's main()."""
    program = "\n".join(code) or "import sys; from polytmpd.ctl.__main__ import main; sys.exit(main())"
    return subprocess.run(
        ["/bin/sh", "-c", line.replace("polytmpctl", '"$0" -c "$1"'), sys.executable, program],
        capture_output=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **(environment or {})},
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("line", ["polytmpctl --version >&-", "polytmpctl --help >&- <&-"])
def test_closed_streams_are_like_dev_null(line: str) -> None:
    done = shell(line)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_what_is_opened_later_takes_no_standard_descriptor() -> None:
    done = shell(
        "polytmpctl <&- 2>&-",
        "import os, sys",
        "from polytmpd.ctl.__main__ import main",
        "main(['--version'])",
        "print(sys.stdin.isatty(), os.dup(1), os.get_inheritable(0), os.get_inheritable(2), flush=True)",
    )
    assert done.stdout.splitlines()[1:] == [b"False 3 True True"]


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_a_full_disk_is_named(word: str) -> None:
    done = shell(f"polytmpctl {word} >/dev/full")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"polytmpctl: Failed to write output: No space left on device\n"


@pytest.mark.parametrize(
    ("environment", "lines"),
    [
        ({"LC_ALL": "C"}, ["* >", '"\\u00e9"']),
        ({"LC_ALL": "POSIX", "LANG": "C.UTF-8"}, ["* >", '"\\u00e9"']),
        ({"LC_ALL": "C.UTF-8"}, ["● →", '"é"']),
        ({"LANG": "C.UTF-8"}, ["● →", '"é"']),
        ({}, ["● →", '"é"']),  # as systemctl: what says nothing can do UTF-8
    ],
)
def test_the_locale_says_what_can_be_shown(environment: dict[str, str], lines: list[str]) -> None:
    code = "from polytmpd.ctl import output"
    shown = "output.show('● →', pager=False); output.show(output.to_json('é', 'short'), pager=False)"
    done = shell("polytmpctl", code, shown, environment=environment)
    assert done.stdout.decode().splitlines() == lines

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check makes of PAM stacks is what the installed libpam makes of them."""

from pathlib import Path

import pytest

from polytmpd.ctl import pamstacks
from tests.pamstacks import ECHO, FILES, at_random, both

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("case", FILES)
def test_a_file(tmp_path: Path, case: str) -> None:
    found, expected = both(tmp_path, FILES[case])
    assert found == expected, FILES[case]


@pytest.mark.parametrize("line", ["@include x", "session include x", "session include a"])
def test_a_loop_ends(tmp_path: Path, line: str) -> None:
    """It crashes libpam 1.5.2, so libpam is not asked."""
    directory = tmp_path / "etc/pam.d"
    directory.mkdir(parents=True)
    for name, text in {"x": f"{ECHO}{line}\n", "a": "@include a\n"}.items():
        (directory / name).write_text(text)
    assert "includes itself" in pamstacks.stack(tmp_path, "x").error


@pytest.mark.parametrize("comment", ["# x", "  # x \\"])
def test_a_comment_inside_a_continued_line(tmp_path: Path, comment: str) -> None:
    """It ends the line in libpam 1.7, and does not in 1.5.2: seen on Debian 13 and 12."""
    directory = tmp_path / "etc/pam.d"
    directory.mkdir(parents=True)
    (directory / "x").write_text(f"session required \\\n{comment}\n pam_echo.so mark\n")
    found = pamstacks.stack(tmp_path, "x")
    assert (found.doubtful, found.error) == (True, "it has a comment inside a continued line")


@pytest.mark.parametrize("tens", range(50))
def test_stacks_at_random(tmp_path: Path, tens: int) -> None:
    for seed in range(10 * tens, 10 * tens + 10):
        found, expected = both(tmp_path / str(seed), at_random(seed))
        assert found == expected, at_random(seed)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What bash offers after half a polytmpctl command line."""

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

COMPLETIONS = Path(__file__).resolve().parents[2] / "completions"
PROGRAMS = {
    "polytmpctl": "echo '1001 alice active'; echo '1002 bob active'",
    "machinectl": "echo 'box container systemd-nspawn'",
    "lonely": "",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name, answer in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "afile").touch()
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "xterm"}


def bash(words: str, environment: dict[str, str]) -> set[str]:
    script = (
        f". {COMPLETIONS}/polytmpctl.bash; COMP_WORDS=(polytmpctl {words}); "
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _polytmpctl; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=20, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered", "refused"),
    [
        ("st", {"status"}, set()),
        ("enter ''", {"alice", "bob"}, {"afile"}),
        ("enter alice lon", {"lonely"}, {"alice", "afile"}),
        ("-n 5 status ''", {"alice", "bob"}, {"list"}),
        ("-M ''", {"box"}, set()),
        ("--", {"--json", "--machine"}, {"--user", "--as-user", "--persistent", "--yes"}),
        ("list --", {"--json"}, {"--user", "--as-user", "--persistent", "--yes"}),
        ("path --", {"--user"}, {"--as-user", "--persistent", "--yes"}),
        ("enter --", {"--as-user"}, {"--user", "--persistent", "--yes"}),
        ("remove --", {"--persistent", "--yes"}, {"--user", "--as-user"}),
        ("--yes re", {"remove"}, set()),
        ("check --", {"--probe", "--service"}, {"--user", "--yes"}),
        ("status --", {"--json"}, {"--probe", "--service"}),
        ("check --probe = ro", {"root"}, set()),
        ("--probe ch", {"check"}, set()),
    ],
)
def test_what_is_offered(
    words: str,
    offered: set[str],
    refused: set[str],
    environment: dict[str, str],
) -> None:
    found = {word.rstrip("=") for word in bash(words, environment)}
    assert offered <= found, found
    assert not refused & found, found

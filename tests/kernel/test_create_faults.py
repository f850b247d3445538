# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each step of making an instance fails once: everything is rolled back, and the error says what failed.

Runs in new pid and mount namespaces in which tests/faults/private.py is PID 1: the executor makes its
namespaces from PID 1's.
"""

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]

PROJECT = Path(__file__).resolve().parents[2]
UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--kill-child")


@dataclass(frozen=True, slots=True)
class Case:
    """The outcome when one step fails. left: what differs, before and after."""

    step: str
    number: int
    error: str | None
    errno: int | None
    fired: str
    left: dict[str, Any]


def cases(operation: str, *options: str) -> list[Case]:
    if os.geteuid() != 0:
        pytest.fail("these tests need root")
    argv = [*UNSHARE, *options, "--", sys.executable, "-W", "error", "-m", "tests.faults.private", operation]
    done = subprocess.run(argv, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Case(**json.loads(line)) for line in done.stdout.splitlines()]


def assert_rolled_back(found: list[Case], survived: set[str], failures: int) -> None:
    """survived: the steps whose failure is ignored."""
    assert [case for case in found if case.left] == []
    assert {case.step for case in found if case.error is None} == survived
    failed = [case for case in found if case.error is not None]
    assert [case for case in failed if case.error and "(injected)" not in case.error] == []
    assert len(failed) >= failures


def test_each_step_of_create() -> None:
    """A login survives a name that cannot be shared and, thanks to the FD store, a lost state file."""
    survived = {"shared.os.mkdir", "shared.os.open", "shared.os.fstat", "mountinfo.mount_id_of"}
    survived |= {"StateDirectory.save", "state.write_text", "state.replace"}
    assert_rolled_back(cases("create"), survived, 100)


def test_each_step_of_rebuild() -> None:
    """A login after the last process of the namespace ended: the files stay, whatever fails."""
    survived = {"StateDirectory.save", "state.write_text", "state.replace"}
    assert_rolled_back(cases("rebuild"), survived, 60)


def test_out_of_descriptors() -> None:
    """RLIMIT_NOFILE, from no descriptor left to enough of them."""
    found = cases("no_descriptors")
    assert [case for case in found if case.left] == []
    assert {case.errno for case in found[:-1]} == {errno.EMFILE}
    assert len(found) > 10


def test_out_of_mount_namespaces() -> None:
    """user.max_mnt_namespaces, in a new user namespace."""
    limited, again = cases("no_namespaces", "--user", "--map-root-user")
    assert limited.errno == errno.ENOSPC
    assert limited.error is not None
    assert "user.max_mnt_namespaces" in limited.error
    assert limited.left == {}
    assert (again.error, again.left) == (None, {})


def test_out_of_inotify_watches() -> None:
    limited, again = cases("no_watches", "--user", "--map-root-user")
    assert limited.errno == errno.ENOSPC
    assert limited.error is not None
    assert "fs.inotify.max_user_watches is reached; raise it" in limited.error
    assert limited.left == {}
    assert (again.error, again.left) == (None, {})


def test_out_of_inotify_instances() -> None:
    (limited,) = cases("no_inotify", "--user", "--map-root-user")
    assert limited.errno == errno.EMFILE
    assert limited.error is not None
    assert "fs.inotify.max_user_instances" in limited.error


def test_out_of_mounts() -> None:
    """fs.mount-max, in a mount namespace that is full."""
    filled, limited, again = cases("no_mounts")
    assert (filled.step, filled.errno) == ("filled", errno.ENOSPC)
    assert limited.errno == errno.ENOSPC
    assert limited.error is not None
    assert "fs.mount-max is reached; raise it" in limited.error
    assert limited.left == {}
    assert (again.error, again.left) == (None, {})

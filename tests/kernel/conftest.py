# SPDX-License-Identifier: LGPL-2.1-or-later
"""Base directories on a disk and on a tmpfs, for the tests of instance directories."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(params=["/var/tmp", "/dev/shm"])
def base(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Empty, owned by root, with mode 1777. The test fails if it leaks a descriptor."""
    if os.geteuid() != 0:
        pytest.fail("these tests need root")
    path = Path(tempfile.mkdtemp(prefix="polytmp-test-", dir=request.param))
    path.chmod(0o1777)
    before = len(os.listdir("/proc/self/fd"))
    yield path
    after = len(os.listdir("/proc/self/fd"))
    subprocess.run(["chattr", "-R", "-f", "-ia", path], check=False)
    subprocess.run(["rm", "-rf", "--one-file-system", path], check=False)
    assert before == after, "a descriptor has leaked"

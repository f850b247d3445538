# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs a function in new mount and pid namespaces, whose process 1 it takes for the host.

polytmpd makes namespaces from PID 1's. Here /proc/1 is a process of the test, and its mounts propagate only
among themselves.
"""

import importlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENTER = (
    "mount --make-rshared / && mount -t proc proc /proc && mount -t tmpfs none /mnt && "
    '"$@"; exit $?'  # not exec: the shell stays process 1, the host
)


def run_alone(module: str, function: str, *, shared: bool = True) -> None:
    """Run module.function() there. Raises AssertionError with its output if it fails."""
    script = ENTER if shared else ENTER.replace("--make-rshared", "--make-rprivate")
    argv = [sys.executable, "-m", "tests.kernel.world", module, function]
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--propagation",
            "private",
            "sh",
            "-c",
            script,
            "sh",
            *argv,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, f"{function}: exit status {done.returncode}\n{done.stdout}{done.stderr}"


if __name__ == "__main__":
    getattr(importlib.import_module(sys.argv[1]), sys.argv[2])()

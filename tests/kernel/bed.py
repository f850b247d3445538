# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two private directories and what namespaces are made from them, for tests that run alone (world.py)."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from polytmpd.kernel import inotify, mountinfo, mountns
from polytmpd.kernel.mountns import Namespace, PrivateDirectory
from tests.bed import eventually

T = TypeVar("T")

POINT = "/var/tmp/polytmp-test-point"
"""On the root file system, which is briefly private while a namespace is made."""


class Bed:
    """Two private directories, as on Debian 13: a mount, and a plain directory of the root file system."""

    def __init__(self) -> None:
        self.watches = inotify.Inotify()
        self.mounted, self.plain = "/mnt/tmp", tempfile.mkdtemp(prefix="polytmp-test-", dir="/var/tmp")
        Path(self.mounted).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmp", self.mounted], check=True)
        Path(POINT).mkdir(exist_ok=True)
        self.directories = [
            self.make(self.mounted, (".X11-unix",)),
            self.make(self.plain),
        ]

    def make(self, path: str, shared: tuple[str, ...] = (), barrier: str = "barrier") -> PrivateDirectory:
        inner = Path(path, barrier, "tmp")
        inner.mkdir(parents=True)
        for name in shared:
            Path(path, name).mkdir()
            (inner / name).mkdir()
        status = inner.stat()
        return PrivateDirectory(path, f"{barrier}/tmp", (status.st_dev, status.st_ino), shared)

    def watch(self, path: str) -> int:
        return self.watches.add_watch(path, inotify.IN_DELETE_SELF)

    def build(self) -> Namespace:
        return mountns.build(self.directories, self.watch)

    def ended(self) -> list[int]:
        return [event.watch for event in self.watches.read() if event.mask & inotify.IN_UNMOUNT]


@contextlib.contextmanager
def bed() -> Iterator[Bed]:
    made = Bed()
    try:
        yield made
    finally:
        subprocess.run(["umount", "--lazy", "--quiet", f"{made.plain}/iso"], check=False)
        subprocess.run(["umount", "--lazy", "--quiet", f"{made.plain}/iso"], check=False)
        subprocess.run(["rm", "-rf", "--one-file-system", made.plain], check=True)


def within(namespace: Namespace, script: str) -> str:
    path = f"/proc/{os.getpid()}/fd/{namespace.fd}"
    done = subprocess.run(
        ["nsenter", f"--mount={path}", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{script}: {done.stderr}"
    return done.stdout


def soon(condition: Callable[[], T]) -> T:
    """The first true value, within 10 s."""
    return eventually(condition, 10)


def points() -> list[str]:
    return sorted(mount.mount_point for mount in mountinfo.read("1"))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The directory and the root file system of a machine, and the removal of what killed runs left behind.

Not here: making the image (tree.py).
"""

import contextlib
import fcntl
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from . import nspawn


@contextlib.contextmanager
def machine_directory(path: Path) -> Iterator[None]:
    """Make the directory of a machine, and lock it as long as the machine lives.

    An unlocked directory belongs to a run that was killed, and is removed.
    """
    path.parent.mkdir(exist_ok=True)
    _remove_abandoned(path.parent)
    path.mkdir(mode=0o755)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        shutil.rmtree(path)
        os.close(fd)


@contextlib.contextmanager
def mounted_copy(image: Path, target: Path) -> Iterator[None]:
    """Mount a private copy of the image at target, which is made."""
    copy = target.with_suffix(".img")
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", "--", str(image), str(copy)], check=True)
    target.mkdir()
    subprocess.run(["mount", "-o", "loop", "--", str(copy), str(target)], check=True)
    try:
        yield
    finally:
        _unmount(target)


def _unmount(target: Path) -> None:
    """Unmount target; its loop device goes with it."""
    done = subprocess.run(["umount", "--", str(target)], capture_output=True, text=True, check=False)
    if done.returncode:
        # another process uses it, which we need not wait for
        subprocess.run(["umount", "--lazy", "--", str(target)], check=True)


def _remove_abandoned(parent: Path) -> None:
    for path in parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # other runs remove theirs meanwhile
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or time.time() - found.st_ctime < 60:
                continue  # another run may be making it right now
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                nspawn.remove_leftovers(path.name)
                if (path / "root").is_mount():
                    _unmount(path / "root")
                shutil.rmtree(path)
            except BlockingIOError:
                pass
            finally:
                os.close(fd)

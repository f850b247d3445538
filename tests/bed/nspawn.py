# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd-nspawn's command line and the cgroup it runs in.

Not here: what runs inside, and for how long.

systemd-nspawn hard facts (252 and 257):
- It mounts a tmpfs on /tmp unless SYSTEMD_NSPAWN_TMPFS_TMP=0; /tmp would be a mount in every release.
- With --keep-unit it makes payload/ and supervisor/ below its own cgroup, and two of them in one cgroup
  collide: each needs its own cgroup. It leaves both directories behind.
- Without SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 it passes on a legacy or hybrid outer hierarchy, from which
  systemd 257 does not boot.
- --register=no leaves /run/systemd/nspawn/propagate/NAME behind on the outer system.
- It allows open_by_handle_at(2) only if it is told to. A system outside of a container has it.
- /proc/sys and /sys are read-only inside, unless SYSTEMD_NSPAWN_API_VFS_WRITABLE=1.
- root has the same UID inside and outside, and so one limit of inotify(7) instances: by default 128. A
  booted Debian takes about 20.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from .tree import BedError
from .waiting import eventually

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "LOGNAME": "root",
    "SHELL": "/bin/bash",
    "TERM": "dumb",
    "USER": "root",
}
INOTIFY_INSTANCES = 1024
NSPAWN_ENVIRONMENT = ENVIRONMENT | {
    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "1",
    "SYSTEMD_NSPAWN_TMPFS_TMP": "0",
    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
}


def command(name: str, root: Path, options: Sequence[str]) -> list[str]:
    """Return the command to run inside a cgroup(). It is killed when the thread that starts it ends."""
    return [
        "setpriv",
        "--pdeathsig=KILL",
        "systemd-nspawn",
        "--quiet",
        f"--directory={root}",
        f"--machine={name}",
        "--settings=no",
        "--register=no",
        "--keep-unit",
        "--private-network",
        "--link-journal=no",
        "--resolv-conf=off",
        "--timezone=off",
        "--system-call-filter=open_by_handle_at",
        *options,
    ]


def make_room() -> None:
    """Let root of several machines at once watch what each of them has to watch."""
    limit = Path("/proc/sys/fs/inotify/max_user_instances")
    if int(limit.read_text()) < INOTIFY_INSTANCES:
        limit.write_text(str(INOTIFY_INSTANCES))


def run(name: str, root: Path, options: Sequence[str], argv: Sequence[str], timeout: float) -> None:
    """Run a command in a tree that is not booted. timeout is in seconds.

    Raises BedError with the output if the command fails.
    """
    with cgroup(name) as group:
        done = subprocess.run(
            group.enter([*command(name, root, ["--as-pid2", "--console=pipe", *options]), *argv]),
            env=NSPAWN_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )
    if done.returncode:
        output = done.stdout.decode(errors="replace")
        raise BedError(f"{' '.join(argv)}: exit status {done.returncode}\n{output}")


class Cgroup:
    """The cgroups of one systemd-nspawn: the v2 one and, in a hybrid hierarchy, systemd's own."""

    def __init__(self, directories: list[Path]) -> None:
        self.directories = directories

    def enter(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs argv in these cgroups."""
        return enter_cgroups(self.directories, argv)


def enter_cgroups(directories: Sequence[Path], argv: Sequence[str]) -> list[str]:
    move = "".join(f"echo $$ >'{directory}/cgroup.procs' && " for directory in directories)
    return ["/bin/sh", "-c", f'{move}exec "$@"', "sh", *argv]


@contextlib.contextmanager
def cgroup(name: str) -> Iterator[Cgroup]:
    """Make cgroups of that name. At the end, kill what lives in them and remove them."""
    group = Cgroup([mount / f"polytmp-bed-{name}" for mount in _hierarchies()])
    for directory in group.directories:
        directory.mkdir()
    try:
        yield group
    finally:
        for directory in group.directories:
            _remove_cgroup(directory)
        propagate = Path("/run/systemd/nspawn/propagate", name)
        with contextlib.suppress(FileNotFoundError):
            propagate.rmdir()


def remove_leftovers(name: str) -> None:
    """Remove the cgroups of a run that was killed."""
    for mount in _hierarchies():
        _remove_cgroup(mount / f"polytmp-bed-{name}")


def _hierarchies() -> list[Path]:
    unified: list[Path] = []
    named: list[Path] = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        target = Path(fields.split()[4])
        kind, _, options = rest.split()[:3]
        if kind == "cgroup2" and target in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
            unified.append(target)
        elif kind == "cgroup" and "name=systemd" in options.split(","):
            named.append(target)
    if not unified:
        raise BedError("no cgroup2 file system on /sys/fs/cgroup or /sys/fs/cgroup/unified")
    return unified + named


def _remove_cgroup(directory: Path) -> None:
    def is_removed() -> bool:
        for parent, _, _ in os.walk(directory, topdown=False):
            # v1 and threaded cgroups have no cgroup.kill: one signal for each process
            for pid in Path(parent, "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(OSError):
                os.rmdir(parent)  # noqa: PTH106
        return not directory.exists()

    try:
        eventually(is_removed, 60, f"{directory} is removed")
    except AssertionError as error:
        raise BedError(str(error)) from error


def require_tools() -> None:
    """Raise BedError if this host cannot run the bed."""
    if os.geteuid() != 0:
        raise BedError("the test bed boots systems, which takes root. Try, as root: make setup")
    tools = ("mmdebstrap", "systemd-nspawn", "nsenter", "setpriv", "ssh", "ssh-keygen", "mke2fs", "git")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise BedError(f"the test bed needs {', '.join(missing)}. Try, as root: make setup")

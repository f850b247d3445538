# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a process comes from: whether systemd is starting it, its user and cgroup, and whether it has the
host's directories.

Not here: what follows, and which mount namespace a process lives in (processes).
"""

import os
import re
from pathlib import Path
from typing import Final

from polytmpd.kernel import host
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.syscalls import RESOLVE_NO_SYMLINKS, openat2

_PROGRAMS: Final = ("systemd", "systemd-executor")
"""What runs in a new process of a unit before its command: up to systemd 254 PID 1's own program."""
_DELETED: Final = " (deleted)"
"""proc_pid_exe(5): follows the name of a program that an upgrade has replaced."""
_STATUS: Final = re.compile(r"^(PPid|Uid):\t(\d+)", re.MULTILINE | re.ASCII)


def is_started_by_systemd(pid: int) -> bool:
    """Whether PID 1 has forked the process and its command has not been executed yet. Raises OSError."""
    directory, program = os.path.split(os.readlink(f"/proc/{pid}/exe").removesuffix(_DELETED))
    own = os.readlink("/proc/1/exe").removesuffix(_DELETED)
    return directory == os.path.dirname(own) and program in _PROGRAMS and _status(pid, "PPid") == 1


def program(pid: int) -> str:
    """The name of the program that the process executes. Raises OSError."""
    return os.path.basename(os.readlink(f"/proc/{pid}/exe").removesuffix(_DELETED))


def real_uid(pid: int) -> int:
    """The real UID: a server that works for a user changes only its effective one. Raises OSError."""
    return _status(pid, "Uid")


def _status(pid: int, key: str) -> int:
    return int(dict(_STATUS.findall(Path(f"/proc/{pid}/status").read_text()))[key])


def cgroup(pid: int) -> str:
    """What cgroups(7) calls /proc/PID/cgroup. Raises OSError."""
    return Path(f"/proc/{pid}/cgroup").read_text(errors="replace")


def has_the_hosts(pid: int, directory: str) -> bool:
    """Whether a directory is the same one for the process and for PID 1.

    Raises OSError; ELOOP if a component is a symbolic link.
    """
    with (
        Descriptor.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY) as root,
        openat2(root, f".{directory}", os.O_PATH | os.O_DIRECTORY, RESOLVE_NO_SYMLINKS) as theirs,
        Descriptor.open(host.ROOT, os.O_PATH | os.O_DIRECTORY) as host_root,
        openat2(host_root, f".{directory}", os.O_PATH | os.O_DIRECTORY, RESOLVE_NO_SYMLINKS) as hosts,
    ):
        return os.path.samestat(os.fstat(theirs), os.fstat(hosts))

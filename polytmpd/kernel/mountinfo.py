# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads /proc/PID/mountinfo, see proc_pid_mountinfo(5).

Not here: what the mounts mean to polytmp.

Hard facts
- A user decides how long the table of a namespace of his own is: 100,000 lines (fs.mount-max), and as
  nothing limits the depth of a directory, lines of as many kilobytes as he likes. 8000 such mounts are made
  in less than a second, and give 1.6 GB. So such tables are read line by line, and of a line its beginning.
"""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

_TABLE_AT_MOST: Final = 32 << 20
_LINE_AT_MOST: Final = 64 << 10
_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo. Paths are decoded as os.fsdecode() does and relative to the reader's root."""

    mount_id: int
    parent_id: int
    device: str
    root: str
    mount_point: str
    shared: int | None
    master: int | None
    fstype: str
    source: str

    @property
    def propagates(self) -> bool:
        """Whether a mount or umount under it is sent to, or received from, other namespaces."""
        return self.shared is not None or self.master is not None


def _unescape(field: bytes) -> str:
    # The kernel writes space, tab, newline, backslash and '#' as three octal digits (seq_path, mangle).
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field))


def parse_line(line: bytes) -> Mount:
    """Parse one line. Raises ValueError where it is not a line of mountinfo."""
    fields = line.split(b" ")
    try:
        separator = fields.index(b"-", 6)
        mount_id, parent_id = int(fields[0]), int(fields[1])
        device, root, mount_point = fields[2], fields[3], fields[4]
        fstype, source = fields[separator + 1], fields[separator + 2]
        tags = dict(tag.partition(b":")[::2] for tag in fields[6:separator])
        shared = int(tags[b"shared"]) if b"shared" in tags else None
        master = int(tags[b"master"]) if b"master" in tags else None
    except (ValueError, IndexError) as error:
        raise ValueError(f"not a line of mountinfo: {line!r}") from error
    return Mount(
        mount_id,
        parent_id,
        os.fsdecode(device),
        _unescape(root),
        _unescape(mount_point),
        shared,
        master,
        _unescape(fstype),
        _unescape(source),
    )


def parse(table: bytes) -> list[Mount]:
    """Parse a whole table. Raises ValueError."""
    return [parse_line(line) for line in table.split(b"\n") if line]


def read(process: str = "thread-self") -> list[Mount]:
    """The mounts that a process sees, in the order the kernel gives. Blocking, short.

    Raises OSError, EFBIG where the table has more than 32 MiB.
    """
    # One open file, read to its end: the kernel restarts from the right mount when the table changes in
    # between.
    with open(f"/proc/{process}/mountinfo", "rb") as file:
        table = file.read(_TABLE_AT_MOST + 1)
    if len(table) > _TABLE_AT_MOST:
        text = f"the table of mounts has more than {_TABLE_AT_MOST >> 20} MiB"
        raise OSError(errno.EFBIG, text, f"/proc/{process}/mountinfo")
    return parse(table)


def lines(process: str) -> Iterator[bytes]:
    """The lines of a table of any size, of each the first 64 KiB. Blocking. Raises OSError."""
    with open(f"/proc/{process}/mountinfo", "rb") as file:
        while line := file.readline(_LINE_AT_MOST):
            yield line
            while not line.endswith(b"\n") and line:
                line = file.readline(_LINE_AT_MOST)


def device_and_root(line: bytes) -> tuple[str, str]:
    """What is mounted; of a line that is cut off in the root, its beginning. Raises ValueError."""
    _, _, device, root, *_ = line.split(b" ", 4)
    return os.fsdecode(device), _unescape(root)


def mount_id_of(fd: int) -> int:
    """The mount_id of the mount that a descriptor (O_PATH too) was opened through, from /proc/PID/fdinfo."""
    with open(f"/proc/thread-self/fdinfo/{fd}", "rb") as file:
        for line in file:
            name, _, value = line.partition(b":")
            if name == b"mnt_id":
                return int(value)
    raise OSError(f"the kernel tells no mnt_id for descriptor {fd}")


def is_below(path: str, directory: str) -> bool:
    """Whether path is directory or lies in it; compared by component, so /tmpfoo is not below /tmp."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def outside(mounts: Iterable[Mount], directories: Iterable[str]) -> list[tuple[str, str, str]]:
    """What a namespace must share with the host:

    (mount point, device, root) of each mount not in the directories.
    """
    hidden = tuple(directories)
    return sorted(
        (mount.mount_point, mount.device, mount.root)
        for mount in mounts
        if not any(is_below(mount.mount_point, directory) for directory in hidden)
    )

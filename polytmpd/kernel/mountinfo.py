# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads /proc/PID/mountinfo, see proc_pid_mountinfo(5).

Not here: what the mounts mean to polytmp.

Hard facts
- Users decide how long the table of their own namespace is: up to 100,000 lines (fs.mount-max), and since
  nothing limits the depth of a directory, lines of any number of kilobytes. Making 8000 such mounts takes
  less than a second and gives a table of 1.6 GB. So such tables are read line by line, and of each line only
  the beginning.
- The table of a process has only the mounts that its root directory reaches: a process in a chroot hides the
  others. An open table belongs to the namespace and the root that the process had when it was opened.
"""

import errno
import os
import re
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator
from typing import BinaryIO, Final, NamedTuple, cast

_TABLE_AT_MOST: Final = 32 << 20
_LINE_AT_MOST: Final = 64 << 10
_REMOVED: Final = "//deleted"
"""What the kernel adds to the root of such a mount. No path has two slashes in a row."""
_OCTAL = re.compile(rb"\\([0-7]{3})")


Key = tuple[bytes, bytes, bytes, bytes]


class Mount(NamedTuple):
    """One line of mountinfo. Paths are decoded like os.fsdecode() and relative to the reader's root."""

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
    def is_removed(self) -> bool:
        """Whether the directory or file that is mounted has been deleted."""
        return self.root.endswith(_REMOVED)

    @property
    def former_root(self) -> str:
        """The root as it was called before it was deleted."""
        return self.root.removesuffix(_REMOVED)

    @property
    def propagates(self) -> bool:
        """Whether other namespaces send mounts and umounts below it to this one, or receive them."""
        return self.shared is not None or self.master is not None


def _unescape(field: bytes) -> str:
    if b"\\" not in field:
        return os.fsdecode(field)
    # The kernel writes space, tab, newline, backslash and '#' as three octal digits (seq_path, mangle).
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field))


def _escape(path: str) -> bytes:
    return re.sub(rb"[ \t\n\\#]", lambda match: b"\\%03o" % match[0][0], os.fsencode(path))


def parse_line(line: bytes) -> Mount:
    """Parse one line. Raises ValueError if it is not a line of mountinfo."""
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
    """The mounts that a process sees, in the kernel's order. Blocks briefly.

    Raises OSError; EFBIG if the table is larger than 32 MiB.
    """
    with open(f"/proc/{process}/mountinfo", "rb") as file:
        return parse(_whole(file))


def read_from(table: int) -> list[Mount]:
    """read() from an open table."""
    with open(table, "rb", closefd=False) as file:
        return parse(_whole(file))


def _whole(file: BinaryIO) -> bytes:
    # Open it once and read to the end: if the table changes meanwhile, the kernel continues at the right
    # mount.
    table = file.read(_TABLE_AT_MOST + 1)
    if len(table) > _TABLE_AT_MOST:
        raise OSError(errno.EFBIG, f"mount table larger than {_TABLE_AT_MOST >> 20} MiB")
    return table


def lines(process: str) -> Generator[bytes, None, None]:
    """The lines of a table of any size, each cut off after 64 KiB. Blocking. Raises OSError."""
    with open(f"/proc/{process}/mountinfo", "rb") as file:
        yield from _lines(file)


def lines_from(table: int) -> Iterator[bytes]:
    """lines() from an open table."""
    with open(table, "rb", closefd=False) as file:
        yield from _lines(file)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(_LINE_AT_MOST):
        yield line
        while not line.endswith(b"\n") and line:
            line = file.readline(_LINE_AT_MOST)


def device_and_root(line: bytes) -> tuple[str, str]:
    """What is mounted. If the line is cut off in the root, the root is, too. Raises ValueError."""
    _, _, device, root, *_ = line.split(b" ", 4)
    return os.fsdecode(device), _unescape(root)


def mount_id_of(fd: int) -> int:
    """The ID of the mount through which a descriptor was opened, even with O_PATH, from /proc/PID/fdinfo."""
    with open(f"/proc/thread-self/fdinfo/{fd}", "rb") as file:
        for line in file:
            name, _, value = line.partition(b":")
            if name == b"mnt_id":
                return int(value)
    raise OSError(f"the kernel reports no mnt_id for descriptor {fd}")


def is_below(path: str, directory: str) -> bool:
    """Whether path is the directory or lies in it; by component, so /tmpfoo is not below /tmp."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def with_ids(table: Iterable[bytes], ids: Collection[int]) -> dict[int, Mount]:
    """Those of the mounts that are in the table, by ID; it is read until all are found."""
    wanted = {str(number).encode() for number in ids}
    found: dict[int, Mount] = {}
    for line in table:
        if line.partition(b" ")[0] in wanted:
            entry = parse_line(line)
            found[entry.mount_id] = entry
            if len(found) == len(wanted):
                break
    return found


def below(table: Iterable[bytes], directories: Iterable[str]) -> list[Mount]:
    """The mounts of a table in or on the directories, in the kernel's order.

    The others are not parsed: there may be a thousand.
    """
    wanted = [(b" " + _escape(directory), directory) for directory in directories]
    return [
        parse_line(line)
        for line in table
        if any(
            begin in line and is_below(_unescape(line.split(b" ", 5)[4]), directory)
            for begin, directory in wanted
        )
    ]


class Outside:
    """Reads what a namespace must share with the host: the mounts outside of some directories."""

    def __init__(self, directories: Iterable[str]) -> None:
        self._directories = tuple(directories)
        self._known: dict[bytes, Key | None] = {}
        """What follows the IDs in a line → its key: the next table has nearly the same lines."""

    def of(self, table: Iterable[bytes]) -> Counter[Key]:
        """(mount point, device, root, peer group) of each such mount, as the kernel writes them."""
        found = Counter(map(self._key, table))
        del found[None]
        return cast("Counter[Key]", found)

    def _key(self, line: bytes) -> Key | None:
        rest = line.split(b" ", 2)[2]
        try:
            return self._known[rest]
        except KeyError:
            key = self._known[rest] = self._parse(rest)
            return key

    def _parse(self, rest: bytes) -> Key | None:
        device, root, point, _, *tags = rest.partition(b" - ")[0].split(b" ")
        if any(is_below(_unescape(point), directory) for directory in self._directories):
            return None
        return point, device, root, next((tag for tag in tags if tag.startswith(b"shared:")), b"")

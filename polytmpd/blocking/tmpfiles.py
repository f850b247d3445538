# SPDX-License-Identifier: LGPL-2.1-or-later
r"""Keeps systemd-tmpfiles --clean, the age cleaner, away from what root trusts in configured directories.

It writes lines of tmpfiles.d(5) to the host's /run, beside the package's own for the default directories.
Not here: the age, which administrators configure; the lines for the defaults (units/polytmp.conf, which says
what each is for).

Hard facts
- Paths are patterns, % begins a specifier, and a field ends at white space unless it is quoted. Not all of
  the manual's C-style escapes are understood: systemd 252 takes \x20 for x20. \\ and \" always are.
- If two lines have the same path, one of them is ignored, whichever files they are in, unless both say the
  same. So our lines spell each path in a way that no other is likely to.
- The cleaner goes by the path as its own line spells it, with or without symbolic links.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from polytmpd.config import SOCKET_DIRECTORIES
from polytmpd.core.model import Directory, Lifetime
from polytmpd.core.names import CLEANER_PATTERN, INNER
from polytmpd.core.sharing import LINKS
from polytmpd.kernel import host

DIRECTORY: Final = Path(host.path("/run/tmpfiles.d"))
NAME: Final = "polytmpd.conf"

_HEAD: Final = (
    "# Written by polytmpd for what /usr/lib/tmpfiles.d/polytmp.conf does not cover. Do not edit.\n"
)


def text(directories: Iterable[Directory]) -> str:
    """The file for these directories; empty if the package's own file covers them."""
    lines = dict.fromkeys(
        line
        for directory in dict.fromkeys(directories)
        for path in (directory.path, os.path.realpath(directory.path))
        for line in _lines(path, directory)
    )
    return _HEAD + "".join(f"{line}\n" for line in lines) if lines else ""


def write(directories: Iterable[Directory], where: Path = DIRECTORY) -> None:
    """Write the file, or remove it if none is needed. A reader sees the old one or the new one.

    Blocks, but not for long. Raises OSError.
    """
    content = text(directories)
    path, temporary = where / NAME, where / f".{NAME}.new"
    if not content:
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileExistsError):
        where.mkdir()
        where.chmod(0o755)  # regardless of the umask
    try:
        temporary.write_text(content, encoding="utf-8", errors="surrogateescape")
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _lines(path: str, directory: Directory) -> Iterator[str]:
    if "\n" in path:  # no line can contain it, so none can send the cleaner there
        return
    place = _pattern(path)
    # The package's file covers the barriers in /var/tmp, and for /tmp those of this boot and the socket
    # directories.
    is_covered = path == "/tmp" and directory.lifetime is Lifetime.INSTANCE
    if not is_covered and path != "/var/tmp":
        yield f"x {_field(f'{place}/{CLEANER_PATTERN}')}"
        yield f"X {_field(f'{place}/{CLEANER_PATTERN}/{INNER}')}"
    for name in directory.shared:
        if is_covered and name in SOCKET_DIRECTORIES:
            continue
        yield f"x {_field(f'{place}/{CLEANER_PATTERN}/{INNER}/{_pattern(name)}')}"
        if path != "/tmp" or name not in SOCKET_DIRECTORIES:
            # What is in LINKS must stay, too.
            yield f"{'x' if name == LINKS else 'X'} {_field(f'{place}/{_respelled(name)}')}"


def _pattern(path: str) -> str:
    """A pattern that matches the path and nothing else."""
    return re.sub(r"[*?\[\\]", r"\\\g<0>", path).replace("%", "%%")


def _respelled(name: str) -> str:
    # In a locale without UTF-8, a bracket matches single bytes.
    return f"{_pattern(name[:-1])}[{name[-1]}]" if name[-1].isascii() else _pattern(name)


def _field(pattern: str) -> str:
    if not re.search(r"[\s\"'\\]", pattern):
        return pattern
    return '"' + re.sub(r'["\\]', r"\\\g<0>", pattern) + '"'

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check finds of servers that listen in the host's private directories, where no session reaches them.

Not here: the sockets of users, which are in their instances.

Hard facts
- /proc/net/unix has the path that a socket was bound to, in whatever mount namespace: proc_net(5). So a
  path counts if the host has a socket there that belongs to root or a system user.
- Its flags contain __SO_ACCEPTCON (1 << 16) if the socket listens, see include/linux/net.h.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from polytmpd.config import Config
from polytmpd.core import sharing
from polytmpd.core.model import Directory
from polytmpd.ctl.host import Result

_TABLE: Final = "proc/net/unix"
_LISTENS: Final = 1 << 16
_NAMED_AT_MOST: Final = 20


def judge(root: Path, config: Config) -> Iterator[Result]:
    """root: where the host's root directory is."""
    try:
        table = (root / _TABLE).read_bytes().decode(errors="surrogateescape")
    except OSError as error:
        yield Result("software", "sockets", "skip", f"cannot read /{_TABLE}: {error.strerror}")
        return
    found = [
        (directory, path)
        for path in listening(table)
        for directory in config.directories
        if path.startswith(f"{directory.path}/") and _is_unreachable(root, path, directory, config)
    ]
    for directory, path in found[:_NAMED_AT_MOST]:
        text = "a server listens here, and no session can reach it"
        yield Result("software", _printable(path), "warn", text, _remedy(root, path, directory, config))
    if len(found) > _NAMED_AT_MOST:
        text = f"{len(found) - _NAMED_AT_MOST} more servers listen in private directories"
        yield Result("software", "sockets", "warn", text, "have them listen in /run")
    if not found:
        yield Result("software", "sockets", "pass", "no server listens where sessions cannot reach it")


def listening(table: str) -> list[str]:
    """The paths of listening sockets in /proc/net/unix, each once. A path may contain blanks."""
    paths = set()
    for line in table.split("\n")[1:]:
        words = line.split(maxsplit=7)
        if len(words) == 8 and words[7].startswith("/"):  # an abstract one begins with @
            try:
                if int(words[3], 16) & _LISTENS:
                    paths.add(os.path.normpath(words[7]))
            except ValueError:
                continue
    return sorted(paths)


def _is_unreachable(root: Path, path: str, directory: Directory, config: Config) -> bool:
    first, slash, _ = path.removeprefix(f"{directory.path}/").partition("/")
    of_files = config.sharing
    if first in directory.shared or (
        directory.path == of_files.path and not slash and of_files.matches(first)
    ):
        return False
    try:
        found = os.lstat(f"{root}/{path}")
    except OSError:
        return False  # it is in a user's instance, or gone
    return stat.S_ISSOCK(found.st_mode) and of_files.objection_to_owner(found.st_uid) is None


def _remedy(root: Path, path: str, directory: Directory, config: Config) -> str:
    """Both ways, if it can be shared."""
    elsewhere = f"have the server listen in /run, for example /run/{_printable(Path(path).name)}"
    word = _setting(root, path, directory, config)
    if word is None:
        return elsewhere
    present = [name for name in directory.shared if name != sharing.LINKS]
    words = " ".join((*present, *(f"/tmp/{name}" for name in config.shared_files), word))
    return f"SharedPaths={words} in polytmpd.conf; or {elsewhere}"


def _setting(root: Path, path: str, directory: Directory, config: Config) -> str | None:
    """The word of SharedPaths= that shares it; None if there is none."""
    base = directory.path
    first, slash, _ = path.removeprefix(f"{base}/").partition("/")
    if base != config.sharing.path or _printable(path) != path or any(char.isspace() for char in path):
        return None
    if slash:
        found = os.lstat(f"{root}/{base}/{first}")
        if found.st_uid != 0 or (found.st_mode & 0o002 and not found.st_mode & stat.S_ISVTX):
            return None
    elif not sharing.Sharing(base, (first,)).matches(first):  # not as a pattern
        return None
    word = f"{first}/" if slash else first
    try:
        if not slash and sharing.parse(first, base) == first:  # it would be taken for a directory
            word = f"{base}/{first}"
        return word if sharing.parse(word, base) else None
    except sharing.InvalidPathError:
        return None


def _printable(path: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in path)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What SharedPaths= names: directories, and sockets and files of the host's servers, by name or pattern.

Not here: what exists on the host (blocking/sharedfiles), and the directories (blocking/shared).
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Final, NamedTuple

from polytmpd.core.names import PREFIX
from polytmpd.core.policy import Exemptions

LINKS: Final = ".polytmp-shared"
"""The directory of the host that contains what is shared of its sockets and files, and nothing else."""

_WILD: Final = re.compile(r"[*?[]")
_OWN: Final = re.compile(rf"{re.escape(LINKS)}|{PREFIX}.*|\.X\d+-lock", re.DOTALL)
"""Names in /tmp that polytmp has a use for itself."""
_DYNAMIC_AND_SYSTEM: Final = (61184, 65519)
"""UIDs of units with DynamicUser=, and Debian's static system users that are not below UID_MIN."""


class InvalidPathError(ValueError):
    """(what is wrong, the remedy)"""


class Sharing(NamedTuple):
    """Which sockets and files of a directory of the host are shared with all instances.

    path: the directory. patterns: names in it, and patterns as in glob(7).
    """

    path: str = "/tmp"
    patterns: tuple[str, ...] = ()
    exemptions: Exemptions = Exemptions()

    def matches(self, name: str) -> bool:
        """Whether the settings name it. As in a shell, a wildcard does not match a leading dot."""
        return not _OWN.fullmatch(name) and any(
            fnmatchcase(name, pattern) and (name[0] != "." or pattern[0] == ".") for pattern in self.patterns
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names among the patterns. Only the directory itself says what the others match."""
        return tuple(pattern for pattern in self.patterns if not _WILD.search(pattern))

    def objection_to_owner(self, uid: int) -> str | None:
        """Why something of this owner is not shared; None if it is: it belongs to root or a system user.

        A user who is exempt is in the directory, too, and may have taken the name before a server did. All
        numbers count as users' that are not certainly a system user's: subordinate UIDs (subuid(5)) are.
        """
        is_systems = uid < self.exemptions.uid_min or _DYNAMIC_AND_SYSTEM[0] <= uid <= _DYNAMIC_AND_SYSTEM[1]
        if is_systems and not self.exemptions.lists(uid):
            return None
        return f"owned by UID {uid}, which is neither root nor a system user"


def parse(word: str, directory: str) -> str:
    """A word of SharedPaths=, normalized: the name of a directory, or the absolute path of anything else.

    directory: the absolute path of the directory that all names are in. Raises InvalidPathError.
    """
    name = word.removeprefix(f"{directory}/") if word.startswith("/") else word
    is_directory = name.endswith("/") or bool(re.fullmatch(r"\.[\w-]+", word))
    name = name.rstrip("/")
    if not name or "/" in name or name in {".", ".."} or not name.isprintable() or _OWN.fullmatch(name):
        remedy = f"name something in {directory}, such as .X11-unix, mysql.sock or .s.PGSQL.*"
        raise InvalidPathError(f"{word!r} is not a valid name", remedy)
    if not re.search(r"\w", re.sub(r"\[[^]]*\]", "", name)):
        raise InvalidPathError(
            f"{word!r} matches almost everything", "write at least one letter of the name"
        )
    if is_directory and _WILD.search(name):
        raise InvalidPathError(f"{word!r} is a pattern for directories", "name each directory")
    return name if is_directory else f"{directory}/{name}"


def split(words: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(directories that all instances share, names and patterns of sockets and files), of what parse() made.

    The first ones include LINKS if there are any of the second.
    """
    words = list(words)
    files = tuple(word.rpartition("/")[2] for word in words if word.startswith("/"))
    directories = tuple(word for word in words if not word.startswith("/"))
    return (*directories, *((LINKS,) if files else ())), files

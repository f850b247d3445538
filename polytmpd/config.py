# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads polytmpd.conf and its drop-ins, in systemd's syntax, and the range of regular UIDs from login.defs.

A mistake is a Problem, which names the place and the remedy; all other lines still apply. The caller decides
whether to log it and go on (at start) or to refuse the whole configuration (on reload).
Not here: what the settings do.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from polytmpd.core.model import Directory, Lifetime
from polytmpd.core.policy import UID_MAX_DEFAULT, UID_MIN_DEFAULT, Exemptions

SECTION: Final = "Polytmp"
SOCKET_DIRECTORIES: Final = (".X11-unix", ".ICE-unix", ".XIM-unix", ".font-unix")
_SEARCH: Final = ("etc", "run", "usr/lib")
_TMP: Final = "/tmp"
_UID_LAST: Final = 4294967294


class Problem(str):
    """A mistake, in systemd's style: `file:line: What is wrong, ignoring; the remedy`.

    `ignoring` stands for whatever polytmpd does instead, at start.
    """

    fault: str
    """The same without that: a reload refuses the whole configuration."""

    def __new__(cls, what: str, instead: str = "", remedy: str = "") -> "Problem":
        end = f"; {remedy}" if remedy else ""
        made = super().__new__(cls, f"{what}, {instead}{end}" if instead else f"{what}{end}")
        made.fault = f"{what}{end}"
        return made


@dataclass(frozen=True, slots=True)
class Config:
    """All settings."""

    directories: tuple[Directory, ...] = (
        Directory(_TMP, Lifetime.INSTANCE, SOCKET_DIRECTORIES),
        Directory("/var/tmp", Lifetime.PERSISTENT),
    )
    exemptions: Exemptions = field(default_factory=Exemptions)

    @property
    def paths(self) -> tuple[str, ...]:
        """The directories that are private, by path."""
        return tuple(directory.path for directory in self.directories)


@dataclass(frozen=True, slots=True)
class _Setting:
    """One assignment. place: its file and line."""

    key: str
    value: str
    place: str


class _BadValueError(ValueError):
    """(what is wrong, the remedy)"""


def load(root: Path = Path("/")) -> tuple[Config, list[Problem]]:
    """The configuration below that root directory, and the mistakes in it. Never raises."""
    problems: list[Problem] = []
    lists: dict[str, list[str]] = {}
    place_of: dict[str, str] = {}
    for path in _files(root, problems):
        for setting in _settings(path, problems):
            _collect(setting, lists, place_of, problems)
    return _assemble(lists, place_of, _regular_uids(root / "etc/login.defs", problems), problems), problems


def _files(root: Path, problems: list[Problem]) -> list[Path]:
    """The first main file of /etc, /run and /usr/lib, then the drop-ins by name.

    As in systemd.conf(5), a link to /dev/null masks the files of the same name.
    """
    found: list[Path] = []
    drop_ins: dict[str, Path] = {}
    for base in reversed(_SEARCH):
        main, directory = root / base / "polytmpd.conf", root / base / "polytmpd.conf.d"
        try:
            if main.exists():
                found = [main]
            if directory.is_dir():
                drop_ins.update({path.name: path for path in directory.iterdir() if path.suffix == ".conf"})
        except OSError as error:
            problems.append(Problem(f"{error.filename}: Failed to read: {error.strerror}", "ignoring"))
    found += [drop_ins[name] for name in sorted(drop_ins)]
    return [path for path in found if not (path.is_symlink() and str(path.readlink()) == "/dev/null")]


def _lines(path: Path, problems: list[Problem]) -> Iterator[tuple[int, str]]:
    """Logical lines, each with its number: comments and blank lines left out, continuation lines joined."""
    if (text := _read(path, problems)) is None:
        return
    pending, start = "", 0
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip()
        if line.startswith(("#", ";")):
            continue
        start = start or number
        if line.endswith("\\"):
            pending += line[:-1] + " "
            continue
        whole = (pending + line).strip()
        if whole:
            yield start, whole
        pending, start = "", 0
    if pending.strip():
        yield start, pending.strip()


def _read(path: Path, problems: list[Problem]) -> str | None:
    try:
        if path.is_file():
            return path.read_bytes().decode()
        problems.append(
            Problem(
                f"{path}: Not a regular file", "ignoring", "replace it with a regular file, or remove it"
            )
        )
    except UnicodeDecodeError as error:
        problems.append(
            Problem(f"{path}: Byte {error.start} is not UTF-8", "ignoring the file", "save it as UTF-8 text")
        )
    except OSError as error:
        problems.append(Problem(f"{path}: Failed to read: {error.strerror}", "ignoring the file"))
    return None


def _settings(path: Path, problems: list[Problem]) -> Iterator[_Setting]:
    section: str | None = None
    for number, line in _lines(path, problems):
        place = f"{path}:{number}"
        if line.startswith("["):
            section = line
            if section != f"[{SECTION}]":
                remedy = f"the only section is [{SECTION}]"
                problems.append(Problem(f"{place}: Unknown section {line!r}", "ignoring", remedy))
            continue
        key, equals, value = line.partition("=")
        if section is None:
            remedy = f"put [{SECTION}] above it"
            problems.append(Problem(f"{place}: Assignment outside of a section", "ignoring", remedy))
        elif section == f"[{SECTION}]" and not equals:
            problems.append(Problem(f"{place}: Missing '=' in {line!r}", "ignoring", "write Key=value"))
        elif section == f"[{SECTION}]":
            yield _Setting(key.strip(), value.strip(), place)


def _absolute(word: str) -> str:
    if not word.startswith("/"):
        raise _BadValueError(f"{word!r} is not an absolute path", "begin it with /")
    parts = [part for part in word.split("/") if part]
    if not parts:
        raise _BadValueError("The root directory cannot be private", "remove it from the list")
    if "." in parts or ".." in parts:
        raise _BadValueError(f"{word!r} is not normalized", "write it without . and ..")
    return "/" + "/".join(parts)


def _name_in_tmp(word: str) -> str:
    if "/" in word or word in {".", ".."} or not re.fullmatch(r"\.[\w.-]+", word):
        remedy = f"name a directory in {_TMP} that begins with a dot, such as .X11-unix"
        raise _BadValueError(f"{word!r} is not a valid name", remedy)
    return word


def _user(word: str) -> str:
    # int() refuses more than 4300 digits
    too_large = word.isdecimal() and (len(word) > len(str(_UID_LAST)) or int(word) > _UID_LAST)
    if ":" in word or "/" in word or too_large:
        raise _BadValueError(f"{word!r} is neither a user name nor a UID", "correct it, or remove it")
    return word


_KEYS: Final[dict[str, Callable[[str], str]]] = {
    "Directories": _absolute,
    "PersistentDirectories": _absolute,
    "SharedPaths": _name_in_tmp,
    "ExemptUsers": _user,
}


def _collect(
    setting: _Setting, lists: dict[str, list[str]], place_of: dict[str, str], problems: list[Problem]
) -> None:
    """Add an assignment to the lists.

    The first one for a setting replaces the default, later ones append, an empty one clears the list.
    """
    check = _KEYS.get(setting.key)
    if check is None:
        remedy = f"the settings are {', '.join(f'{key}=' for key in _KEYS)}"
        problems.append(Problem(f"{setting.place}: Unknown setting {setting.key}=", "ignoring", remedy))
        return
    place_of[setting.key] = setting.place
    values = lists.setdefault(setting.key, [])
    if not setting.value:
        values.clear()
    for word in setting.value.split():
        try:
            value = check(word)
        except _BadValueError as error:
            what, remedy = error.args
            problems.append(Problem(f"{setting.place}: {setting.key}=: {what}", "ignoring", remedy))
            continue
        if value not in values:
            values.append(value)


def _assemble(
    lists: dict[str, list[str]], place_of: dict[str, str], uids: tuple[int, int], problems: list[Problem]
) -> Config:
    default = Config()
    paths = lists.get("Directories", [directory.path for directory in default.directories])
    if not paths:
        what = f"{place_of['Directories']}: Directories= names no directory"
        remedy = "name at least one, or disable polytmpd.service"
        problems.append(Problem(what, "using the default", remedy))
        paths = [directory.path for directory in default.directories]
    nested = [path for path in paths if any(path.startswith(other + "/") for other in paths)]
    for path in nested:
        what = f"{place_of['Directories']}: Directories=: {path} is inside another directory of the list"
        problems.append(Problem(what, "ignoring", "remove one of the two"))
    paths = [path for path in paths if path not in nested]
    persistent = lists.get("PersistentDirectories", ["/var/tmp"])
    for path in persistent:
        if "PersistentDirectories" in place_of and path not in paths:
            what = (
                f"{place_of['PersistentDirectories']}: PersistentDirectories=: {path} is not in Directories="
            )
            problems.append(Problem(what, "ignoring", "add it there, too"))
    shared = tuple(lists.get("SharedPaths", SOCKET_DIRECTORIES))
    return Config(
        tuple(
            Directory(
                path,
                Lifetime.PERSISTENT if path in persistent else Lifetime.INSTANCE,
                shared if path == _TMP else (),
            )
            for path in paths
        ),
        Exemptions(*uids, frozenset(lists.get("ExemptUsers", []))),
    )


def _regular_uids(path: Path, problems: list[Problem]) -> tuple[int, int]:
    """UID_MIN and UID_MAX of login.defs(5), or its defaults if they are missing or invalid."""
    found = {"UID_MIN": UID_MIN_DEFAULT, "UID_MAX": UID_MAX_DEFAULT}
    default = dict(found)
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return default["UID_MIN"], default["UID_MAX"]
    except OSError as error:
        instead = f"using UID_MIN {default['UID_MIN']} and UID_MAX {default['UID_MAX']}"
        problems.append(Problem(f"{path}: Failed to read: {error.strerror}", instead))
        return default["UID_MIN"], default["UID_MAX"]
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split()
        if len(words) < 2 or words[0] not in found:
            continue
        try:
            value = int(words[1], 0)
        except ValueError:
            value = -1
        if 0 < value <= _UID_LAST:
            found[words[0]] = value
        else:
            what = f"{path}:{number}: {words[0]} {words[1]!r} is not a valid UID"
            problems.append(Problem(what, f"using {default[words[0]]}"))
    if found["UID_MIN"] > found["UID_MAX"]:
        instead = f"using {default['UID_MIN']} and {default['UID_MAX']}"
        problems.append(Problem(f"{path}: UID_MIN is greater than UID_MAX", instead))
        found = default
    return found["UID_MIN"], found["UID_MAX"]

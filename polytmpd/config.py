# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads polytmpd.conf and its drop-ins, in systemd's syntax, and the range of regular UIDs from login.defs.

A line that makes no sense is a Problem that names the place and the remedy; the others count all the same.
Who calls decides whether to go on (at start, with a journal line each) or to refuse (on reload).
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
    """One thing that is wrong: `file:line: what, and the remedy; what is made of it at start`."""

    fault: str
    """Without the last: who refuses the whole makes nothing of it."""

    def __new__(cls, fault: str, instead: str = "") -> "Problem":
        made = super().__new__(cls, f"{fault}; {instead}" if instead else fault)
        made.fault = fault
        return made


@dataclass(frozen=True, slots=True)
class Config:
    """What an administrator decides."""

    directories: tuple[Directory, ...] = (
        Directory(_TMP, Lifetime.INSTANCE, SOCKET_DIRECTORIES),
        Directory("/var/tmp", Lifetime.PERSISTENT),
    )
    exemptions: Exemptions = field(default_factory=Exemptions)


@dataclass(frozen=True, slots=True)
class _Setting:
    """One assignment and where it stands."""

    key: str
    value: str
    place: str


class _BadValueError(ValueError):
    pass


def load(root: Path = Path("/")) -> tuple[Config, list[Problem]]:
    """The configuration of the host whose root directory is given, and what was ignored in it.

    Raises nothing.
    """
    problems: list[Problem] = []
    lists: dict[str, list[str]] = {}
    place_of: dict[str, str] = {}
    for path in _files(root, problems):
        for setting in _settings(path, problems):
            _collect(setting, lists, place_of, problems)
    return _assemble(lists, place_of, _regular_uids(root / "etc/login.defs", problems), problems), problems


def _files(root: Path, problems: list[Problem]) -> list[Path]:
    """The first main file of /etc, /run, /usr/lib, then the drop-ins by name; as systemd.conf(5) has it:
    a link to /dev/null masks those of the same name.
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
            problems.append(
                Problem(f"{error.filename}: cannot be read ({error.strerror})", "ignoring what is there")
            )
    found += [drop_ins[name] for name in sorted(drop_ins)]
    return [path for path in found if not (path.is_symlink() and str(path.readlink()) == "/dev/null")]


def _lines(path: Path, problems: list[Problem]) -> Iterator[tuple[int, str]]:
    """Logical lines: without comments and blank lines, continued ones joined."""
    try:
        if not path.is_file():
            raise _BadValueError("is not a regular file; replace it by one, or remove it")
        text = path.read_bytes().decode()
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = f"byte {error.start} is not UTF-8; save it as UTF-8 text"
        problems.append(Problem(f"{path}: {reason}", "ignoring the file"))
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


def _settings(path: Path, problems: list[Problem]) -> Iterator[_Setting]:
    section: str | None = None
    for number, line in _lines(path, problems):
        place = f"{path}:{number}"
        if line.startswith("["):
            section = line
            if section != f"[{SECTION}]":
                problems.append(
                    Problem(
                        f"{place}: unknown section {line!r}; the only section is [{SECTION}]", "ignoring"
                    )
                )
            continue
        key, equals, value = line.partition("=")
        if section is None:
            problems.append(
                Problem(f"{place}: assignment outside of a section; put [{SECTION}] above it", "ignoring")
            )
        elif section == f"[{SECTION}]" and not equals:
            problems.append(Problem(f"{place}: {line!r} is no assignment; write Key=value", "ignoring"))
        elif section == f"[{SECTION}]":
            yield _Setting(key.strip(), value.strip(), place)


def _absolute(word: str) -> str:
    if not word.startswith("/"):
        raise _BadValueError(f"{word!r} is not an absolute path")
    parts = [part for part in word.split("/") if part]
    if not parts or "." in parts or ".." in parts:
        raise _BadValueError(f"{word!r} is not the normal path of a directory other than /")
    return "/" + "/".join(parts)


def _name_in_tmp(word: str) -> str:
    if "/" in word or word in {".", ".."} or not re.fullmatch(r"\.[\w.-]+", word):
        raise _BadValueError(f"{word!r} is not the name of a hidden directory in {_TMP}, such as .X11-unix")
    return word


def _user(word: str) -> str:
    # int() takes no more than 4300 digits
    too_large = word.isdecimal() and (len(word) > len(str(_UID_LAST)) or int(word) > _UID_LAST)
    if ":" in word or "/" in word or too_large:
        raise _BadValueError(f"{word!r} is neither a user's name nor a UID")
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
    """All settings are lists:

    the first assignment replaces the default, later ones add, an empty one empties.
    """
    check = _KEYS.get(setting.key)
    if check is None:
        known = ", ".join(f"{key}=" for key in _KEYS)
        problems.append(
            Problem(f"{setting.place}: unknown setting {setting.key}=; known are {known}", "ignoring")
        )
        return
    place_of[setting.key] = setting.place
    values = lists.setdefault(setting.key, [])
    if not setting.value:
        values.clear()
    for word in setting.value.split():
        try:
            value = check(word)
        except _BadValueError as error:
            problems.append(Problem(f"{setting.place}: {setting.key}=: {error}", "ignoring"))
            continue
        if value not in values:
            values.append(value)


def _assemble(
    lists: dict[str, list[str]], place_of: dict[str, str], uids: tuple[int, int], problems: list[Problem]
) -> Config:
    default = Config()
    paths = lists.get("Directories", [directory.path for directory in default.directories])
    if not paths:
        problems.append(
            Problem(
                f"{place_of['Directories']}: Directories= names no directory; name one, or disable "
                "polytmpd.service to have none",
                "using the default",
            )
        )
        paths = [directory.path for directory in default.directories]
    nested = [path for path in paths if any(path.startswith(other + "/") for other in paths)]
    for path in nested:
        problems.append(
            Problem(
                f"{place_of['Directories']}: {path} lies in another one of Directories=", f"ignoring {path}"
            )
        )
    paths = [path for path in paths if path not in nested]
    persistent = lists.get("PersistentDirectories", ["/var/tmp"])
    for path in persistent:
        if "PersistentDirectories" in place_of and path not in paths:
            problems.append(
                Problem(
                    f"{place_of['PersistentDirectories']}: {path} is not one of Directories=; add it there",
                    "ignoring",
                )
            )
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
    """UID_MIN and UID_MAX of login.defs(5); its defaults where they are missing or make no sense."""
    found = {"UID_MIN": UID_MIN_DEFAULT, "UID_MAX": UID_MAX_DEFAULT}
    default = dict(found)
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return default["UID_MIN"], default["UID_MAX"]
    except OSError as error:
        problems.append(
            Problem(f"{path}: cannot be read ({error.strerror})", "using UID_MIN 1000, UID_MAX 60000")
        )
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
            problems.append(
                Problem(f"{path}:{number}: {words[0]} {words[1]!r} is no UID", f"using {default[words[0]]}")
            )
    if found["UID_MIN"] > found["UID_MAX"]:
        problems.append(
            Problem(
                f"{path}: UID_MIN is above UID_MAX", f"using {default['UID_MIN']} and {default['UID_MAX']}"
            )
        )
        found = default
    return found["UID_MIN"], found["UID_MAX"]

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads polytmpd.conf and its drop-ins, in systemd's syntax.

A mistake is a Problem, which names the place and the remedy; all other lines still apply. The caller decides
whether to log it and go on (at start) or to refuse the whole configuration (on reload).
Not here: what the settings do, and what login.defs says (core/logindefs).
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from polytmpd.core import logindefs, places, sharing
from polytmpd.core.model import Directory, Lifetime
from polytmpd.core.policy import REGULAR_LAST, UID_LAST, UID_MIN_DEFAULT, Exemptions

SECTION: Final = "Polytmp"
SOCKET_DIRECTORIES: Final = (".X11-unix", ".ICE-unix", ".XIM-unix", ".font-unix")
_SEARCH: Final = ("etc", "run", "usr/lib")
_TMP: Final = "/tmp"


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
    shared_files: tuple[str, ...] = ()

    @property
    def sharing(self) -> sharing.Sharing:
        """The sockets and files of the host that instances share."""
        return sharing.Sharing(_TMP, self.shared_files, self.exemptions)

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


@dataclass(slots=True)
class _Assigned:
    """What the files assign. place_of: where each setting was last. spoilt: settings that do not count."""

    values: dict[str, list[str]] = field(default_factory=dict)
    place_of: dict[str, str] = field(default_factory=dict)
    spoilt: set[str] = field(default_factory=set)

    def get(self, key: str, default: Iterable[str] = ()) -> list[str]:
        return list(default) if key in self.spoilt else self.values.get(key, list(default))


class _BadValueError(ValueError):
    """(what is wrong, the remedy)"""


def load(root: Path = Path("/")) -> tuple[Config, list[Problem]]:
    """The configuration below that root directory, and the mistakes in it. Never raises."""
    problems: list[Problem] = []
    assigned = _Assigned()
    for path in _files(root, problems):
        for setting in _settings(path, problems):
            _collect(setting, assigned, problems)
    return _assemble(root, assigned, _uid_min(root / "etc/login.defs", problems), problems), problems


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
            return path.read_bytes().decode("utf-8-sig")  # some editors begin a file with a BOM
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


def _path_in_tmp(word: str) -> str:
    try:
        return sharing.parse(word, _TMP)
    except sharing.InvalidPathError as error:
        raise _BadValueError(*error.args) from None


def _number(word: str) -> int | None:
    """A word as a UID or GID, or None. int() accepts more."""
    digits = word.isascii() and word.isdecimal() and len(word) <= len(str(UID_LAST))
    return int(word) if digits and int(word) <= UID_LAST else None


def _user(word: str) -> str:
    if word.startswith("@"):
        return f"@{_group(word)}"
    return _name(word, "neither a user name nor a UID")


def _group(word: str) -> str:
    return _name(word.removeprefix("@"), "neither a group name nor a GID")


def _name(word: str, what: str) -> str:
    number = _number(word)
    if number is not None:
        return str(number)
    if not word or word.isdecimal() or word[0] in "@-" or re.search(r"[:/,\0-\x1f]", word):
        raise _BadValueError(f"{word!r} is {what}", "correct it, or remove it")
    return word


def _range(word: str) -> str:
    match = re.fullmatch(r"([0-9]+)(-([0-9]*))?", word, re.ASCII)
    if not match:
        raise _BadValueError(f"{word!r} is not a range of UIDs", "write 1000-60000, 200000- or 1500")
    first = _number(match[1])
    last = first if match[2] is None else _number(match[3]) if match[3] else UID_LAST
    if not first or last is None or last < first:
        remedy = f"write two UIDs of 1 to {UID_LAST}, the lower one first"
        raise _BadValueError(f"{word!r} is not a range of UIDs", remedy)
    return f"{first}-{last}"


_KEYS: Final[dict[str, Callable[[str], str]]] = {
    "Directories": _absolute,
    "PersistentDirectories": _absolute,
    "UncheckedDirectories": _absolute,
    "SharedPaths": _path_in_tmp,
    "RegularUIDs": _range,
    "ExemptUsers": _user,
    "ExemptGroups": _group,
    "OnlyGroups": _group,
}


_WHOLE_OR_NOT: Final = {"RegularUIDs", "OnlyGroups"}
"""Settings that exempt everyone they do not name: to drop one bad word would exempt more users."""


def _collect(setting: _Setting, assigned: _Assigned, problems: list[Problem]) -> None:
    """Add an assignment to the lists.

    The first one for a setting replaces the default, later ones append, an empty one clears the list.
    """
    check = _KEYS.get(setting.key)
    if check is None:
        remedy = f"the settings are {', '.join(f'{key}=' for key in _KEYS)}"
        problems.append(Problem(f"{setting.place}: Unknown setting {setting.key}=", "ignoring", remedy))
        return
    assigned.place_of[setting.key] = setting.place
    values = assigned.values.setdefault(setting.key, [])
    if not setting.value:
        values.clear()
    try:
        words = _words(setting)
    except _BadValueError as error:
        _complain(error, setting, assigned, problems)
        return
    for word in words:
        try:
            value = check(word)
        except _BadValueError as error:
            _complain(error, setting, assigned, problems)
            continue
        if value not in values:
            values.append(value)


def _complain(
    error: _BadValueError, setting: _Setting, assigned: _Assigned, problems: list[Problem]
) -> None:
    what, remedy = error.args
    instead = "ignoring"
    if setting.key in _WHOLE_OR_NOT:
        assigned.spoilt.add(setting.key)
        instead = "ignoring the setting"
    problems.append(Problem(f"{setting.place}: {setting.key}=: {what}", instead, remedy))


def _words(setting: _Setting) -> list[str]:
    """The words of a value; _BadValueError. Quotes keep blanks together, see systemd.syntax(7).

    A backslash stands for itself, as in DOM\\user: unlike in unit files, no name here needs an escape.
    """
    if not re.fullmatch(r"""(?:[^"']|"[^"]*"|'[^']*')*""", setting.value):
        raise _BadValueError(f"Unbalanced quotes in {setting.value!r}", "close the quotes")
    words = re.findall(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""", setting.value)
    parts = (re.findall(r"""([^"']+)|"([^"]*)"|'([^']*)'""", word) for word in words)
    return ["".join(map("".join, part)) for part in parts]


def _assemble(root: Path, assigned: _Assigned, uid_min: int, problems: list[Problem]) -> Config:
    default = Config()
    listed = paths = assigned.get("Directories", default.paths)
    unchecked = assigned.get("UncheckedDirectories")
    if place := assigned.place_of.get("Directories"):
        paths = _usable(root, listed, unchecked, place, problems)
        if not paths:
            what = f"{place}: Directories= names no directory"
            remedy = "name at least one, or disable polytmpd.service"
            problems.append(Problem(what, "using the default", remedy))
            paths = list(default.paths)
    for key in ("PersistentDirectories", "UncheckedDirectories"):
        for path in assigned.get(key):
            if path not in (listed or paths):
                what = f"{assigned.place_of[key]}: {key}=: {path} is not in Directories="
                problems.append(Problem(what, "ignoring", "add it there, too"))
    persistent = assigned.get("PersistentDirectories", ("/var/tmp",))
    shared, files = sharing.split(assigned.get("SharedPaths", SOCKET_DIRECTORIES))
    return Config(
        tuple(
            Directory(
                path,
                Lifetime.PERSISTENT if path in persistent else Lifetime.INSTANCE,
                shared if path == _TMP else (),
                path not in (*unchecked, *default.paths),
            )
            for path in paths
        ),
        _exemptions(assigned, uid_min, problems),
        files if _TMP in paths else (),
    )


def _exemptions(assigned: _Assigned, uid_min: int, problems: list[Problem]) -> Exemptions:
    users = assigned.get("ExemptUsers")
    groups = [user[1:] for user in users if user.startswith("@")]
    ranges = [word.split("-") for word in assigned.get("RegularUIDs")]
    if low := [int(first) for first, _ in ranges if int(first) < min(uid_min, REGULAR_LAST + 1)]:
        place = assigned.place_of["RegularUIDs"]
        what = f"{place}: RegularUIDs=: UID {min(low)} is below UID_MIN {uid_min} of /etc/login.defs"
        instead = "so pam_polytmp lets these users into the shared directories while polytmpd is down"
        problems.append(Problem(f"{what}, {instead}", "using it", f"set UID_MIN {min(low)} there"))
    return Exemptions(
        uid_min,
        frozenset(user for user in users if not user.startswith("@")),
        tuple((int(first), int(last)) for first, last in ranges),
        frozenset((*assigned.get("ExemptGroups"), *groups)),
        frozenset(assigned.get("OnlyGroups")),
    )


def _usable(
    root: Path, paths: list[str], unchecked: list[str], place: str, problems: list[Problem]
) -> list[str]:
    """Drop duplicates and directories that would break the system. Follows symbolic links."""
    real = {path: _real(root, path) for path in paths}
    objections = {path: _objection(path, real[path], checked=path not in unchecked) for path in paths}
    found: list[str] = []
    for path in paths:
        place_on_disk = real[path]
        same = [other for other in found if real[other] == place_on_disk]
        outer = [
            other for other in paths if not objections[other] and place_on_disk.startswith(f"{real[other]}/")
        ]
        if objections[path]:
            what, remedy = objections[path]
        elif same:
            what, remedy = f"is the same directory as {same[0]}", "remove one of the two"
        elif outer:
            what, remedy = "is inside another directory of the list", "remove one of the two"
        else:
            found.append(path)
            continue
        shown = path if path == place_on_disk else f"{path}, a link to {place_on_disk},"
        problems.append(Problem(f"{place}: Directories=: {shown} {what}", "ignoring", remedy))
    return found


def _objection(path: str, real: str, *, checked: bool) -> tuple[str, ...]:
    """(what is wrong with making that real path private, the remedy), or empty."""
    if places.is_kernels(real):
        return "is not a place for files of users", "remove it from the list"
    if checked and places.is_systems(real):
        what = "is a directory of the system, not one for temporary files"
        return what, f"remove it; if you mean it, add UncheckedDirectories={path}"
    return ()


def unfit(directories: Iterable[Directory], root: Path = Path("/")) -> list[Problem]:
    """The directories in which no instance can be made now. Blocks.

    At start they stay in the list and logins are refused, since a file system may come later. To leave them
    out would put users into shared directories that were private before.
    """
    found = []
    for directory in directories:
        path = directory.path
        try:
            mode = (root / path[1:]).stat().st_mode
        except OSError:
            mode = 0
        if not stat.S_ISDIR(mode):
            found.append(
                Problem(f"Directories=: {path} is not a directory", remedy="create it or name another one")
            )
        elif directory.must_be_sticky and not mode & stat.S_ISVTX:
            remedy = f"chmod +t {path}, or add UncheckedDirectories={path} if it is to be private as it is"
            what = f"Directories=: {path} is not sticky, so not a directory for temporary files"
            found.append(Problem(what, remedy=remedy))
    return found


def _real(root: Path, path: str) -> str:
    real, top = os.path.realpath(f"{root}/{path[1:]}"), os.path.realpath(root)
    return real if top == "/" or not real.startswith(f"{top}/") else real.removeprefix(top)


def _uid_min(path: Path, problems: list[Problem]) -> int:
    def complain(line: int, what: str, instead: str) -> None:
        place = f"{path}:{line}" if line else path
        problems.append(Problem(f"{place}: {what}", instead))

    try:
        return logindefs.uid_min(path.read_bytes().decode("latin-1"), complain)
    except FileNotFoundError:
        pass
    except OSError as error:
        complain(0, f"Failed to read: {error.strerror}", logindefs.INSTEAD)
    return UID_MIN_DEFAULT

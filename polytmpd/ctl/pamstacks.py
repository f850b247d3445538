# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads pam.d(5) as libpam does: the entries that a service runs, with everything it includes.

Not here: what libpam makes of the entries (pamdispatch.py), and whether that is good (pamcheck.py).

Hard facts (libpam/pam_handlers.c; tests/pamstacks.py asks the installed libpam):
- `other` serves a service that has no file, and each type of which the service's file has no entry. It is
  always read: if it cannot be, every session is refused.
- `@include` of a file that cannot be read refuses every session of the service. `include` and `substack` of
  such a file become an entry that fails. A file that includes itself crashes the service (libpam 1.5.2).
- A file whose last line is continued cannot be read. A comment ends a continued line in libpam 1.7, but not
  in 1.5: which of the two counts is not guessed.
- An entry without a module fails. An unknown type ends up among those of auth.
- Types and simple controls are case-insensitive; brackets around a simple control change nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

DIRECTORIES: Final = ("etc/pam.d", "usr/lib/pam.d")
OTHER: Final = "other"
SUBSTACK: Final = "substack"
_SUBSTACKS_AT_MOST: Final = 16
_INCLUDES_AT_MOST: Final = 100
_BAD: Final = "[default=bad]"


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a stack, in which included files are inlined.

    path: the module as written. depth: the number of substacks around it; a substack has an entry of its
    own, with the file as path. file: where the line stands. broken: libpam lets it fail in any case.
    """

    control: str
    path: str
    arguments: tuple[str, ...] = ()
    depth: int = 0
    file: str = ""
    broken: bool = False

    @property
    def module(self) -> str:
        """The name of the module without its directory."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Stack:
    """file: that of the service, or `other`. error: why libpam refuses to read it; empty if it does not.

    doubtful: whether it does depends on the version of libpam.
    """

    entries: tuple[Entry, ...]
    file: str
    error: str = ""
    doubtful: bool = False

    @property
    def is_others(self) -> bool:
        return self.file.endswith(f"/{OTHER}")


class _AbortError(Exception):
    """libpam gives up reading: PAM_ABORT. (why, the file)"""


class _DoubtError(Exception):
    """Versions of libpam read it differently. (why, the file)"""


class _LoopError(Exception):
    """libpam reads until its stack overflows. (why, the file)"""


def services(root: Path) -> list[str]:
    """The configured services, without the files that only others include."""
    names: set[str] = set()
    for directory in DIRECTORIES:
        try:
            names.update(path.name for path in (root / directory).iterdir() if path.is_file())
        except OSError:
            continue
    ignored = (".dpkg-", ".ucf-", ".rpm", "~", ".bak")
    return sorted(
        name for name in names if not name.startswith("common-") and not any(end in name for end in ignored)
    )


def stack(root: Path, service: str, kind: str = "session") -> Stack:
    """What libpam runs for a service. kind: session or account."""
    found: list[Stack] = []
    for name in (service, OTHER):
        if (opened := _open(root, name)) is None:
            continue
        file, text = opened
        try:
            found.append(Stack(tuple(_entries(root, file, text, kind, 0, 0, everything=True)), file))
        except (_AbortError, _LoopError, _DoubtError) as error:
            why, at = error.args
            return Stack((), at, why, doubtful=isinstance(error, _DoubtError))
    file = f"/{DIRECTORIES[0]}/{service}"
    nothing = Stack((), file, f"no {kind} line in it, and none in /etc/pam.d/{OTHER}")
    return next((each for each in found if each.entries), nothing)


def _open(root: Path, name: str) -> tuple[str, str] | None:
    """The path and text of a file of pam.d, or of an absolute path."""
    places = [name] if name.startswith("/") else [f"/{directory}/{name}" for directory in DIRECTORIES]
    for place in places:
        try:
            return place, (root / place.lstrip("/")).read_text(errors="replace")
        except OSError:
            continue
    return None


def _entries(
    root: Path, file: str, text: str, kind: str, level: int, depth: int, *, everything: bool
) -> Iterator[Entry]:
    """everything: the file is read for all types, so that a broken @include in it counts for each."""
    for words in _lines(file, text):
        given = words[0].lstrip("-").lower() if words[0] != "@include" else words[0]
        if given == "@include":
            yield from _included(root, file, words[1:2], kind, level, depth, everything=everything)
        elif given != kind:
            continue
        elif len(words) < 2:
            yield Entry(_BAD, "", depth=depth, file=file, broken=True)
        elif (control := words[1].strip("[]").lower()) in {"include", SUBSTACK}:
            if control == SUBSTACK:
                yield Entry(SUBSTACK, words[2] if len(words) > 2 else "", depth=depth, file=file)
            deeper = depth + (control == SUBSTACK)
            try:
                yield from _included(root, file, words[2:3], kind, level, deeper, everything=False)
            except _AbortError:
                yield Entry(_BAD, " ".join(words[2:3]), depth=depth, file=file, broken=True)
        else:
            path, *arguments = words[2:] or [""]
            yield Entry(words[1], path, tuple(arguments), depth, file, broken=not path)


def _included(
    root: Path, file: str, names: list[str], kind: str, level: int, depth: int, *, everything: bool
) -> Iterator[Entry]:
    if not names or (found := _open(root, names[0])) is None:
        raise _AbortError(f"it includes {' '.join(names) or 'nothing'}, which does not exist", file)
    if depth >= _SUBSTACKS_AT_MOST:
        raise _AbortError("it includes itself", file)
    if level >= _INCLUDES_AT_MOST:
        raise _LoopError("it includes itself", file)
    yield from _entries(root, *found, kind, level + 1, depth, everything=everything)


def _lines(file: str, text: str) -> Iterator[list[str]]:
    """The words of each line. A backslash continues a line, but not a comment.

    Raises _AbortError or _DoubtError.
    """
    pending: str | None = None
    for raw in text.splitlines():
        if raw.lstrip().startswith("#"):
            if pending is not None:
                raise _DoubtError("it has a comment inside a continued line", file)
            continue
        line, comment, _ = raw.partition("#")
        if not comment and line.endswith("\\"):
            pending = f"{pending or ''}{line[:-1]} "
            continue
        if words := _words(f"{pending or ''}{line}"):
            yield words
        pending = None
    if pending is not None:
        raise _AbortError("its last line is continued", file)


def _words(line: str) -> list[str]:
    """The words of a line. Brackets make one word, as in [success=1 default=ignore]."""
    words: list[str] = []
    line = line.replace("\t", " ").strip()
    while line:
        if line.startswith("["):
            word, _, line = line[1:].partition("]")
            words.append(f"[{word}]")
        else:
            word, _, line = line.partition(" ")
            words.append(word)
        line = line.strip()
    return words

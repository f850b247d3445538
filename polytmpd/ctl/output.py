# SPDX-License-Identifier: LGPL-2.1-or-later
"""How polytmpctl prints: colours, tables, sizes and times like systemd's tools, JSON, the pager.

Not here: what is printed.
"""

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, TextIO

from polytmpd.core.states import State

USEC: Final = 1_000_000
_UNITS: Final = "BKMGTPE"
_SPANS: Final = (
    ("y", 31_557_600),
    ("month", 2_629_800),
    ("w", 604_800),
    ("d", 86_400),
    ("h", 3600),
    ("min", 60),
    ("s", 1),
)
_ESCAPE: Final = re.compile(r"\x1b\[[0-9;]*m|\x1b\]8;;.*?\x1b\\")
_ASCII: Final = str.maketrans(dict(zip("●○×✓✗→│├└─…", "*ox+x>||`-~", strict=True)))  # noqa: RUF001
"""Each replacement is one column wide, to keep tables aligned."""
PAGER_OPTIONS: Final = "FRSXMK"
"""The value of LESS= for the pager, the same as systemctl's."""


class Style(NamedTuple):
    """Wraps text in escape sequences if coloured, else returns it unchanged."""

    coloured: bool = False

    def _wrap(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.coloured and text else text

    def good(self, text: str) -> str:
        return self._wrap("0;1;32", text)

    def bad(self, text: str) -> str:
        return self._wrap("0;1;31", text)

    def warning(self, text: str) -> str:
        return self._wrap("0;1;38;5;185", text)

    def bold(self, text: str) -> str:
        return self._wrap("0;1;39", text)

    def faint(self, text: str) -> str:
        return self._wrap("0;38;5;245", text)

    def heading(self, text: str) -> str:
        return self._wrap("0;4", text)

    def state(self, state: str, text: str | None = None) -> str:
        """An instance's state in its colour, or the given text instead."""
        text = state if text is None else text
        match state:
            case State.ACTIVE:
                return self.good(text)
            case State.FAILED:
                return self.bad(text)
            case State.PREPARING | State.REMOVING | State.DRAINING:
                return self.warning(text)
        return self.faint(text)


def wants_colour(environment: Mapping[str, str], is_terminal: bool) -> bool:
    """Decided by SYSTEMD_COLORS=, then NO_COLOR= (no-color.org), then by the terminal."""
    setting = environment.get("SYSTEMD_COLORS", "").lower()
    if setting in {"1", "yes", "y", "true", "t", "on", "16", "256", "24bit"}:
        return True
    if setting in {"0", "no", "n", "false", "f", "off"}:
        return False
    if environment.get("NO_COLOR") or environment.get("TERM", "dumb") == "dumb":
        return False
    return is_terminal


def width(text: str) -> int:
    """The columns that a text takes on a terminal."""
    plain = _ESCAPE.sub("", text)
    if plain.isascii():
        return len(plain)
    import unicodedata

    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in plain
    )


def clean(text: str) -> str:
    """Replace what would act on the terminal, in a text that others chose (file names, commands)."""
    return "".join(char if char.isprintable() else "?" for char in text)


def shorten(text: str, columns: int) -> str:
    """Shorten a text in the middle, as systemctl does."""
    if width(text) <= columns or columns < 2:
        return text
    left = columns // 2
    return f"{text[:left]}…{text[len(text) - (columns - left - 1) :]}"


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], style: Style, *, legend: bool, noun: str = ""
) -> str:
    """Rows under headings, each column as wide as its widest cell; '>' after a heading aligns it right.

    noun: what the last line counts. Without it there is no such line.
    """
    names = [column.rstrip(">") for column in columns]
    right = [column.endswith(">") for column in columns]
    lines: list[Sequence[str]] = [[style.heading(name) for name in names]] if legend else []
    lines += rows
    widths = [max((width(line[number]) for line in lines), default=0) for number in range(len(names))]
    text = []
    for line in lines:
        cells = []
        for number, cell in enumerate(line):
            padding = " " * (widths[number] - width(cell))
            cells.append(padding + cell if right[number] else cell + padding)
        text.append(" ".join(cells).rstrip())
    if legend and noun:
        text += ["", f"{len(rows)} {noun}{'' if len(rows) == 1 else 's'} listed."]
    return "\n".join(text)


def size(number: int) -> str:
    """Bytes in units of 1024 with one decimal, like systemd's format_bytes(): 12.5M."""
    unit = 0
    while number >= 1024 ** (unit + 1) and unit < len(_UNITS) - 1:
        unit += 1
    if unit == 0:
        return f"{number}B"
    tenths = number * 10 // 1024**unit
    return f"{tenths // 10}.{tenths % 10}{_UNITS[unit]}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def moment(usec: int) -> str:
    """A timestamp as in systemd.time(7)."""
    return time.strftime("%a %Y-%m-%d %H:%M:%S %Z", time.localtime(usec / USEC)) if usec else "-"


def age(usec: int, now_usec: int) -> str:
    """The time since then in the two largest units: 3min 2s ago."""
    if not usec:
        return "-"
    ahead = usec > now_usec
    left = abs(now_usec - usec) // USEC
    parts: list[str] = []
    for name, seconds in _SPANS:
        if left >= seconds and len(parts) < 2:
            number, left = divmod(left, seconds)
            plural = "s" if name == "month" and number != 1 else ""
            parts.append(f"{number}{' ' if name == 'month' else ''}{name}{plural}")
    if not parts:
        return "just now"
    return " ".join(parts) + (" left" if ahead else " ago")


def to_json(value: Any, mode: str) -> str:
    import json

    form: dict[str, Any] = {"indent": "\t"} if mode == "pretty" else {"separators": (",", ":")}
    text = json.dumps(value, ensure_ascii=False, **form)
    if text.isascii():
        return text
    try:
        text.encode(encoding())
    except UnicodeEncodeError:  # a '?' would change the name
        return json.dumps(value, **form)
    return text


def terminal_columns(stream: TextIO | None = None) -> int:
    """The terminal's width. Without a terminal, wide enough for anything."""
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"]) or 80
    try:
        return os.get_terminal_size((stream or sys.stdout).fileno()).columns or 80
    except (OSError, ValueError):
        return 1_000_000


def pager_command(environment: Mapping[str, str], *, foreign: bool) -> list[list[str]]:
    """The pagers to try, in order; none if no pager is wanted.

    foreign: polytmpctl has more privileges than the person at the terminal (sudo). Then it uses only less,
    in its secure mode: any other pager could start a shell.
    """
    setting = environment.get("SYSTEMD_PAGER", environment.get("PAGER"))
    if setting is not None and setting.strip() in {"", "cat"}:
        return []
    if environment.get("TERM", "dumb") == "dumb":
        return []
    default = [["less"]] if foreign else [["pager"], ["less"], ["more"]]
    if setting and not foreign:
        return [setting.split(), *default]
    return default


def pager_environment(environment: Mapping[str, str], *, foreign: bool) -> dict[str, str]:
    changed = {"LESS": environment.get("SYSTEMD_LESS", PAGER_OPTIONS)}
    if "SYSTEMD_LESSCHARSET" in environment:
        changed["LESSCHARSET"] = environment["SYSTEMD_LESSCHARSET"]
    secure = environment.get("SYSTEMD_PAGERSECURE", "").lower()
    if secure in {"1", "yes", "true", "on"} or (foreign and secure not in {"0", "no", "false", "off"}):
        changed["LESSSECURE"] = "1"
    return {**environment, **changed}


def encoding() -> str:
    """The character set of the locale, also in Python's UTF-8 mode, which LC_ALL=C turns on."""
    import locale

    return locale.getencoding()


def displayable(text: str, encoding: str) -> str:
    """Reduce a text to what the character set has. Our lines and marks become ASCII if necessary."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_ASCII)
    return text.encode(encoding, "replace").decode(encoding)


def show(text: str, *, pager: bool) -> None:
    """Print, on a terminal through a pager."""
    if not (pager and sys.stdout.isatty() and sys.stdin.isatty()) or not text:
        write(text + "\n" if text else "")
        return
    import subprocess

    foreign = os.geteuid() == 0 and "SUDO_UID" in os.environ
    for command in pager_command(os.environ, foreign=foreign):
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, env=pager_environment(os.environ, foreign=foreign)
            )
        except OSError:
            continue
        try:
            process.communicate(f"{displayable(text, encoding())}\n".encode(encoding()))
        except KeyboardInterrupt:
            process.wait()
        return
    write(text + "\n")


def write(text: str, *, exact: bool = False) -> None:
    """Write to standard output and flush. Raises Failure, and BrokenPipeError if the reader is gone.

    exact: print file names byte by byte unless to a terminal, so that scripts can use them.
    """
    try:
        if exact and not sys.stdout.isatty():
            sys.stdout.flush()
            sys.stdout.buffer.write(os.fsencode(text))
        else:
            if not text.isascii():
                text = displayable(displayable(text, encoding()), sys.stdout.encoding or "utf-8")
            sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard()
        raise Failure(f"Failed to write output: {error.strerror}") from None


def discard() -> None:
    """Drop unwritten output: flushing it when the program exits would fail again."""
    fd = os.open(os.devnull, os.O_WRONLY)
    os.dup2(fd, sys.stdout.fileno())
    os.close(fd)


def warn(text: str) -> None:
    sys.stderr.write(f"polytmpctl: {text}\n")


class Failure(Exception):
    """What is wrong, and a hint about what to do. Ends the program with status 1."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: options, which may stand anywhere but in the command of `enter`, and verbs with their
arguments.

Not argparse: importing it takes longer than the daemon takes to answer, and its messages are not those that
people know from systemd's tools. Not dataclasses either, in the modules that short commands need: importing
them and making one takes as long as a third of such a command.
Not here: what a verb does.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from polytmpd.ctl.output import Failure

HELP: Final = """\
polytmpctl [OPTIONS...] COMMAND ...

{bold}Show and manage the private /tmp and /var/tmp of this host's users.{reset}

{heading}Instances:{reset}
  list                       List instances (the default)
  status [USER...]           Show instances in full: sessions, processes,
                             directories, journal
  ps [USER...]               Show what keeps an instance alive, and how
  usage [USER...]            Show how much space instances take
  path FILE...               Show where a user's FILE is on the host, or whose
                             file a path on the host is
  enter USER [COMMAND...]    Run a shell or a command with the user's /tmp
  remove USER...             Remove a user's remaining files

{heading}Host:{reset}
  monitor                    Print a line whenever an instance changes
  check                      Examine the host and suggest a remedy for each
                             problem

{heading}Options:{reset}
  -h --help                  Show this help
     --version               Show package version
     --no-pager              Do not pipe output into a pager
     --no-legend             Do not show the headers and footers
     --no-ask-password       Do not prompt for password
     --json=pretty|short|off Generate JSON output
  -j                         Same as --json=pretty on a terminal, --json=short
                             otherwise
  -l --full                  Do not ellipsize output
  -n --lines=INTEGER         Number of journal entries to show
  -u --user=USER             path: the user whose FILE it is; by default the
                             caller, or under sudo, the user who ran it
     --as-user               enter: run the command as USER, not as root
     --persistent            remove: also remove what is kept between logins
                             (/var/tmp)
  -y --yes                   remove: do not ask for confirmation
     --probe[=USER]          check: also log USER in, and see if it is private
     --service=SERVICE       check: the PAM service to log in through; may be
                             given more than once
  -H --host=[USER@]HOST      Operate on remote host
  -M --machine=CONTAINER     Operate on local container

Without USER, root sees all instances, and other users see their own.

See the {bold}polytmpctl(1){reset} man page for details.
"""


class Options(NamedTuple):
    verb: str = "list"
    words: tuple[str, ...] = ()
    help: bool = False
    version: bool = False
    pager: bool = True
    legend: bool = True
    ask_password: bool = True
    json: str = "off"
    full: bool = False
    lines: int = 10
    user: str | None = None
    as_user: bool = False
    persistent: bool = False
    yes: bool = False
    probe: str | None = None
    """The user whose session check opens; empty for one of check's choice."""
    services: tuple[str, ...] = ()
    host: str | None = None
    machine: str | None = None
    passed_on: tuple[str, ...] = ()
    """The command line without --host= and --machine=, for polytmpctl on the other host."""


class _Verb(NamedTuple):
    least: int = 0
    most: int | None = 0
    takes: str = ""
    takes_command: bool = False


VERBS: Final[dict[str, _Verb]] = {
    "list": _Verb(),
    "status": _Verb(0, None, "USER"),
    "ps": _Verb(0, None, "USER"),
    "usage": _Verb(0, None, "USER"),
    "path": _Verb(1, None, "FILE"),
    "enter": _Verb(1, None, "USER", takes_command=True),
    "remove": _Verb(1, None, "USER"),
    "monitor": _Verb(),
    "check": _Verb(),
    "help": _Verb(0, None),
}

_FLAGS: Final[dict[str, dict[str, Any]]] = {
    "help": {"help": True},
    "version": {"version": True},
    "no-pager": {"pager": False},
    "no-legend": {"legend": False},
    "no-ask-password": {"ask_password": False},
    "full": {"full": True},
    "as-user": {"as_user": True},
    "persistent": {"persistent": True},
    "yes": {"yes": True},
}
_VALUES: Final = ("json", "lines", "user", "service", "host", "machine")
_OPTIONAL: Final = ("probe",)
"""Options whose value may be left out; it has to be attached."""
_SHORT: Final = {
    "h": "help",
    "l": "full",
    "y": "yes",
    "n": "lines",
    "u": "user",
    "H": "host",
    "M": "machine",
}
_OF_VERBS: Final = {
    "user": ("path",),
    "as_user": ("enter",),
    "persistent": ("remove",),
    "yes": ("remove",),
    "probe": ("check",),
    "services": ("check",),
}
"""Options that only these verbs accept: others would silently ignore them."""


def parse(arguments: Sequence[str]) -> Options:
    """Parse the command line. Raises Failure, with a text for the person who typed it."""
    options = Options()
    words: list[str] = []
    passed_on: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        if word == "--":
            words += left
            passed_on += [word, *left]
            break
        if word == "-" or not word.startswith("-"):
            words.append(word)
            passed_on.append(word)
            if len(words) == 3 and words[0] == "enter":  # the rest belongs to the command
                words += left
                passed_on[-1:] = ["--", word, *left]
                break
            continue
        before = list(left)
        name, options = _option(word, left, options)
        if name not in {"host", "machine"}:
            # Letters written together are passed on one by one: -jHbox
            passed_on += (
                [word[:2]] if len(left) > len(before) else [word, *before[: len(before) - len(left)]]
            )
    options = options._replace(passed_on=tuple(passed_on))
    if options.help or options.version:
        return options
    if words:
        options = options._replace(verb=words[0], words=tuple(words[1:]))
    if options.verb == "help":
        return options._replace(help=True)
    _check(options)
    return options


def _option(word: str, left: list[str], options: Options) -> tuple[str, Options]:
    """Parse one option: its name and the new options. Takes a value that is not attached from left."""
    if word.startswith("--"):
        given, equals, value = word[2:].partition("=")
        name = _long(given)
        if name in _FLAGS:
            if equals:
                raise Failure(f"option '--{name}' doesn't allow an argument")
            return name, options._replace(**_FLAGS[name])
        if name in _OPTIONAL:
            if equals and not value:
                raise Failure(f"option '--{name}=' requires a non-empty argument")
            changed: dict[str, Any] = {name: value}
            return name, options._replace(**changed)
        if not equals:
            if not left:
                raise Failure(f"option '--{name}' requires an argument")
            value = left.pop(0)
        return name, _valued(options, name, value)
    letter, rest = word[1], word[2:]
    if letter == "j":
        name, options = "json", options._replace(json="pretty" if sys.stdout.isatty() else "short")
    elif letter not in _SHORT:
        raise Failure(f"invalid option -- '{letter}'", "See: polytmpctl --help")
    elif (name := _SHORT[letter]) in _VALUES:
        if not rest and not left:
            raise Failure(f"option requires an argument -- '{letter}'")
        return name, _valued(options, name, rest or left.pop(0))
    else:
        options = options._replace(**_FLAGS[name])
    if rest:
        left.insert(0, f"-{rest}")
    return name, options


def _long(given: str) -> str:
    known = [*_FLAGS, *_VALUES, *_OPTIONAL]
    if given in known:
        return given
    found = [name for name in known if given and name.startswith(given)]
    if len(found) == 1:
        return found[0]
    if found:
        raise Failure(
            f"option '--{given}' is ambiguous; possibilities: {' '.join(f'--{name}' for name in found)}"
        )
    near = _nearest(given, known)
    raise Failure(
        f"unrecognized option '--{given}'",
        f"Did you mean --{near}?" if near else "See: polytmpctl --help",
    )


def _valued(options: Options, name: str, value: str) -> Options:
    if name == "json":
        if value not in {"pretty", "short", "off"}:
            raise Failure(
                f"Unknown argument to --json= switch: {value}", "Valid arguments are pretty, short and off"
            )
        return options._replace(json=value)
    if name == "lines":
        if not value.isdecimal() or not value.isascii() or len(value) > 9:
            raise Failure(f"Failed to parse lines '{value}'", "Expected a number, for example --lines=20")
        return options._replace(lines=int(value))
    if not value:
        raise Failure(f"option '--{name}' requires a non-empty argument")
    if name == "service":
        if "/" in value:
            raise Failure(f"Invalid PAM service '{value}'", "See: ls /etc/pam.d")
        return options._replace(services=(*options.services, value))
    if name == "machine" and value.endswith("@"):
        raise Failure(f"Invalid container '{value}'", "Expected CONTAINER or USER@CONTAINER")
    changes: dict[str, Any] = {name: value}
    return options._replace(**changes)


def _check(options: Options) -> None:
    verb = VERBS.get(options.verb)
    if verb is None:
        near = _nearest(options.verb, VERBS)
        raise Failure(
            f"Unknown command verb '{options.verb}'",
            f"Did you mean '{near}'?" if near else "See: polytmpctl --help",
        )
    if len(options.words) < verb.least:
        raise Failure("Too few arguments.", f"Usage: polytmpctl {usage(options.verb)}")
    if verb.most is not None and len(options.words) > verb.most:
        raise Failure("Too many arguments.", f"Usage: polytmpctl {usage(options.verb)}")
    for name, verbs in _OF_VERBS.items():
        if getattr(options, name) not in (None, False, ()) and options.verb not in verbs:
            option = name.replace("_", "-").replace("services", "service")
            raise Failure(f"--{option} is only valid with {' and '.join(verbs)}")
    if options.services and options.probe is None:
        raise Failure("--service is only valid with --probe", "Try: polytmpctl check --probe --service=…")
    if options.host and options.machine:
        raise Failure("--host= and --machine= cannot be combined")


def _nearest(word: str, known: Iterable[str]) -> str:
    """The known word that may have been meant."""
    import difflib

    return next(iter(difflib.get_close_matches(word, list(known), 1)), "")


def usage(verb: str) -> str:
    entry = VERBS[verb]
    if entry.takes_command:
        return f"{verb} {entry.takes} [COMMAND...]"
    if not entry.takes:
        return verb
    return f"{verb} {entry.takes}..." if entry.least else f"{verb} [{entry.takes}...]"

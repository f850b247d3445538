# SPDX-License-Identifier: LGPL-2.1-or-later
"""polytmpctl's command line: mistakes first, then valid arguments."""

import re
from pathlib import Path

import pytest

from polytmpd.ctl import arguments
from polytmpd.ctl.__main__ import main
from polytmpd.ctl.arguments import HELP, VERBS, Options, parse
from polytmpd.ctl.output import Failure

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("words", "text", "hint"),
    [
        (["lst"], "Unknown command verb 'lst'", "'list'"),
        (["frobnicate"], "Unknown command verb 'frobnicate'", "--help"),
        ([""], "Unknown command verb ''", "--help"),
        (["list", "x"], "Too many arguments.", "polytmpctl list"),
        (["check", "x"], "Too many arguments.", "polytmpctl check"),
        (["path"], "Too few arguments.", "path FILE..."),
        (["enter"], "Too few arguments.", "enter USER [COMMAND...]"),
        (["remove", "--yes"], "Too few arguments.", "remove USER..."),
        (["--jsn=short"], "unrecognized option '--jsn'", "--json"),
        (["--xyzzy"], "unrecognized option '--xyzzy'", "--help"),
        (["--no"], "ambiguous", ""),
        (["-Z"], "invalid option -- 'Z'", "--help"),
        (["--json=xml"], "Unknown argument to --json= switch: xml", "pretty, short and off"),
        (["--json"], "option '--json' requires an argument", ""),
        (["-n"], "option requires an argument -- 'n'", ""),
        (["-n", "x"], "Failed to parse lines 'x'", "number"),
        (["-n", "-1"], "Failed to parse lines '-1'", "number"),
        (["-n", "٣"], "Failed to parse lines '٣'", "number"),
        (["--help=x"], "option '--help' doesn't allow an argument", ""),
        (["--user=", "path", "x"], "non-empty", ""),
        (["list", "--persistent"], "--persistent is only valid with remove", ""),
        (["status", "--yes"], "--yes is only valid with remove", ""),
        (["remove", "--as-user", "x"], "--as-user is only valid with enter", ""),
        (["-Ha", "-Mb"], "cannot be combined", ""),
        (["list", "--probe"], "--probe is only valid with check", ""),
        (["check", "--probe="], "non-empty", ""),
        (["check", "--service=sshd"], "--service is only valid with --probe", "--probe"),
        (["list", "--service=sshd"], "--service is only valid with check", ""),
        (["check", "--probe", "--service=../x"], "Invalid PAM service", "pam.d"),
        (["-M", "alice@"], "Invalid container 'alice@'", "USER@CONTAINER"),
    ],
)
def test_errors_name_the_argument(
    words: list[str], text: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Failure) as failed:
        parse(words)
    assert text in str(failed.value)
    assert hint in failed.value.hint
    assert main(words) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("polytmpctl: ")
    assert text in shown.err


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], Options()),
        (["status", "alice", "bob"], Options("status", ("alice", "bob"))),
        (["--json=short", "list"], Options(json="short")),
        (["list", "--json", "short"], Options(json="short")),
        (["list", "-j"], Options(json="short")),
        (["-n5", "status"], Options("status", lines=5)),
        (["-lj"], Options(full=True, json="short")),
        (["-jn", "5", "status"], Options("status", json="short", lines=5)),
        (["status", "--no-leg", "--no-pag"], Options("status", legend=False, pager=False)),
        (["path", "-u", "alice", "/tmp/x"], Options("path", ("/tmp/x",), user="alice")),
        (["path", "--", "-x"], Options("path", ("-x",))),
        (["enter", "alice"], Options("enter", ("alice",))),
        (["enter", "alice", "ls", "-l", "--help"], Options("enter", ("alice", "ls", "-l", "--help"))),
        (["enter", "alice", "--", "ls", "--", "x"], Options("enter", ("alice", "ls", "--", "x"))),
        (["enter", "alice", "--as-user", "id", "-u"], Options("enter", ("alice", "id", "-u"), as_user=True)),
        (["remove", "-y", "--persistent", "x"], Options("remove", ("x",), yes=True, persistent=True)),
        (["check", "--probe"], Options("check", probe="")),
        (
            ["check", "--probe=ada", "--service=sshd", "--service", "cron"],
            Options("check", probe="ada", services=("sshd", "cron")),
        ),
        (["help"], Options("help", help=True)),
        (["nonsense", "-h"], Options(help=True)),
        (["--version", "nonsense"], Options(version=True)),
    ],
)
def test_valid_arguments(words: list[str], options: Options) -> None:
    found = parse(words)
    assert all(getattr(found, name) == getattr(options, name) for name in SHOWN), found


SHOWN = [name for name in Options._fields if name != "passed_on"]


@pytest.mark.parametrize(
    ("words", "passed_on"),
    [
        (["-H", "root@box", "list", "--json=short"], ("list", "--json=short")),
        (["list", "--machine=box", "-n", "5"], ("list", "-n", "5")),
        (["-M", "box", "enter", "alice", "ls", "-H"], ("enter", "alice", "--", "ls", "-H")),
        (["-jHbox", "list"], ("-j", "list")),
    ],
)
def test_commands_for_another_host(words: list[str], passed_on: tuple[str, ...]) -> None:
    assert parse(words).passed_on == passed_on


def test_help_and_completions_know_every_verb_and_option() -> None:
    options = [
        *(f"--{name}" for name in (*arguments._FLAGS, *arguments._VALUES, *arguments._OPTIONAL)),
        "-j",
    ]
    bash = (ROOT / "completions/polytmpctl.bash").read_text()
    zsh = (ROOT / "completions/_polytmpctl").read_text()
    for verb in VERBS:
        assert re.search(rf"(?m)^  {verb} ", HELP) or verb == "help"
        assert re.search(rf"local verbs='.*\b{verb}\b.*'", bash)
        assert re.search(rf"(?m)^        ['\"]{verb}:", zsh)
    for option in options:
        assert all(re.search(rf"(?<![\w-]){option}\b", text) for text in (HELP, bash, zsh)), option


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert "\x1b" not in help_text
    assert max(map(len, help_text.splitlines())) < 80
    assert main(["--version"]) == 0
    assert re.fullmatch(r"polytmp [\d.]+\n", capsys.readouterr().out)

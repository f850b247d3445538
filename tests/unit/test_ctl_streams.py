# SPDX-License-Identifier: LGPL-2.1-or-later
"""polytmpctl with standard streams that are closed, full or in another character set; any file name."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polytmpd.bus.client import Listed
from polytmpd.bus.connection import BusError
from polytmpd.ctl import commands
from polytmpd.ctl.arguments import Options
from polytmpd.ctl.commands import Context
from polytmpd.ctl.output import Style

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]


def shell(
    line: str, *code: str, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[bytes]":
    """line: a shell command line that may call polytmpctl. code: Python to run instead of its main()."""
    program = "\n".join(code) or "import sys; from polytmpd.ctl.__main__ import main; sys.exit(main())"
    return subprocess.run(
        ["/bin/sh", "-c", line.replace("polytmpctl", '"$0" -c "$1"'), sys.executable, program],
        capture_output=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **(environment or {})},
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("line", ["polytmpctl --version >&-", "polytmpctl --help >&- <&-"])
def test_closed_streams_are_like_dev_null(line: str) -> None:
    done = shell(line)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_files_opened_later_get_no_standard_descriptor() -> None:
    done = shell(
        "polytmpctl <&- 2>&-",
        "import os, sys",
        "from polytmpd.ctl.__main__ import main",
        "main(['--version'])",
        "print(sys.stdin.isatty(), os.dup(1), os.get_inheritable(0), os.get_inheritable(2), flush=True)",
    )
    assert done.stdout.splitlines()[1:] == [b"False 3 True True"]


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_a_full_disk_is_reported(word: str) -> None:
    done = shell(f"polytmpctl {word} >/dev/full")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"polytmpctl: Failed to write output: No space left on device\n"


@pytest.mark.parametrize(
    ("environment", "lines"),
    [
        ({"LC_ALL": "C"}, ["* >", '"\\u00e9"']),
        ({"LC_ALL": "POSIX", "LANG": "C.UTF-8"}, ["* >", '"\\u00e9"']),
        ({"LC_ALL": "C.UTF-8"}, ["● →", '"é"']),
        ({"LANG": "C.UTF-8"}, ["● →", '"é"']),
        ({}, ["● →", '"é"']),  # like systemctl: without a locale, assume UTF-8
    ],
)
def test_the_locale_decides_what_can_be_printed(environment: dict[str, str], lines: list[str]) -> None:
    code = "from polytmpd.ctl import output"
    shown = "output.show('● →', pager=False); output.show(output.to_json('é', 'short'), pager=False)"
    done = shell("polytmpctl", code, shown, environment=environment)
    assert done.stdout.decode().splitlines() == lines


BARRIER = f"polytmp-{'0' * 32}-1001-{'0' * 16}"


class NoBus:
    """Answers like a daemon with an instance of alice. Like a bus, it accepts only Unicode."""

    async def instances(self) -> list[Listed]:
        return [Listed(1001, "alice", "/org/polytmp1/instance/_1001")]

    async def properties(self, uid: int, *, quiet: bool) -> dict[str, Any]:
        if uid != 1001:
            raise BusError("org.freedesktop.DBus.Error.UnknownObject", "no object")
        return {"User": "alice", "Directories": [("/tmp", f"/tmp/{BARRIER}/tmp", "instance")]}

    async def directories(self) -> list[str]:
        return ["/tmp", "/var/tmp"]

    async def resolve(self, uid: int, path: str) -> str:
        path.encode()
        if uid == 1003:
            return path.replace("/var/tmp", "/var/tmp/polytmp-1003/tmp", 1)
        if not path.startswith("/tmp"):
            raise BusError("org.polytmp1.Error.NotPolyinstantiated", "the same on the host")
        return path.replace("/tmp", f"/tmp/{BARRIER}/tmp", 1)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (b"/tmp/\xff", f"/tmp/{BARRIER}/tmp/".encode() + b"\xff"),
        (b"/tmp/d/\xe9/x", f"/tmp/{BARRIER}/tmp/".encode() + b"d/\xe9/x"),
        ("/tmp/é".encode(), f"/tmp/{BARRIER}/tmp/é".encode()),
        (b"/\xff/x", b"/\xff/x"),
        (b"1003:/var/tmp/\xff", b"/var/tmp/polytmp-1003/tmp/\xff"),
    ],
)
async def test_a_file_name_is_bytes(there: bytes, here: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """UID 1003 is logged out and has kept files."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    async def path(word: bytes) -> bytes:
        options = Options(verb="path", words=(os.fsdecode(word),), user="alice")
        context = Context(NoBus(), None, options, Style())  # type: ignore[arg-type]  # what a path needs
        return os.fsencode((await commands.path(context)).text)

    if not there.startswith(b"1003:"):
        assert await path(there) == here
    if here != there:
        assert await path(here) == (there if there.startswith(b"1003:") else b"alice:" + there)


@pytest.mark.parametrize(
    ("line", "status", "out"),
    [
        ("polytmpctl --version", 0, b"polytmp "),
        ("polytmpctl --help | cat", 0, b"polytmpctl [OPTIONS...]"),
        ("polytmpctl bogus", 1, b""),
        ("polytmpctl --version >/dev/full", 1, b""),
        ("polytmpctl --version >&-", 0, b""),
    ],
)
def test_the_program_ends_with_all_that_it_wrote(line: str, status: int, out: bytes) -> None:
    done = shell(line, "from polytmpd.ctl.__main__ import program; program()")
    assert (done.returncode, done.stdout.startswith(out)) == (status, True)
    assert bool(done.stderr) == bool(status)


@pytest.mark.parametrize("environment", [{"LC_ALL": "C"}, {"LC_ALL": "C.UTF-8"}])
def test_a_path_is_printed_byte_by_byte(environment: dict[str, str]) -> None:
    code = "from polytmpd.ctl import output; output.write('a\\udcff/é\\n', exact=True)"
    assert shell("polytmpctl", code, environment=environment).stdout == b"a\xff/\xc3\xa9\n"
    code = "import json; from polytmpd.ctl import output; print(output.to_json('\\udcff', 'short'))"
    assert json.loads(shell("polytmpctl", code, environment=environment).stdout) == "\udcff"

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check finds in the configuration of sshd: whether it uses PAM at all, and which service.

Asks `sshd -T`, with the options of each sshd that is running. It reports the configuration as it would be
after a reload, for a connection from this host. Names of services in Match blocks are read from the files.
Not here: what the stack of the service does (pamcheck.py).
"""

import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from polytmpd.ctl.host import Result
from polytmpd.ctl.output import clean

SERVICE: Final = "sshd"
_PROGRAM: Final = "usr/sbin/sshd"
_CONFIGURATION: Final = "/etc/ssh/sshd_config"
_LISTENER: Final = re.compile(r"^sshd: (\S*sshd .*?) \[listener\]")
_SERVICE: Final = re.compile(r"(?mi)^\s*PAMServiceName[\s=]+\"?([^\s\"]+)")
_TIMEOUT: Final = 10.0

Run = Callable[[Sequence[str]], tuple[int, str, str]]
"""Runs a command: exit status, stdout, stderr."""


@dataclass(frozen=True, slots=True)
class Sshd:
    """What was found. services: those that sshd uses, for pamcheck."""

    results: tuple[Result, ...] = ()
    services: tuple[str, ...] = ()


def _run(argv: Sequence[str]) -> tuple[int, str, str]:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, "", str(error)
    return done.returncode, done.stdout, done.stderr


def judge(root: Path, user: str, *, is_root: bool, run: Run = _run) -> Sshd:
    """user: for whom Match blocks are evaluated."""
    if not (root / _PROGRAM).exists():
        return Sshd()
    if not is_root:
        skipped = Result("PAM", "sshd -T", "skip", "only root can check this", "run as root")
        return Sshd((skipped,), (SERVICE,))
    results: list[Result] = []
    services: list[str] = []
    for options in dict.fromkeys([*_listeners(root)] or [()]):
        connection = f"user={user},host=localhost,addr=127.0.0.1"
        status, out, err = run([f"/{_PROGRAM}", *options, "-T", "-C", connection])
        name = " ".join(["sshd", *options, "-T"])
        if status:
            text = f"failed, so it is not known whether sshd uses PAM: {_last(err)}"
            results.append(
                Result("PAM", name, "fail", text, f"run /{_PROGRAM} -t, and correct what it reports")
            )
            continue
        found = dict(line.lower().partition(" ")[::2] for line in out.splitlines())
        service = found.get("pamservicename", SERVICE)
        if found.get("usepam") != "yes":
            text = "UsePAM no: sessions of sshd get the shared /tmp"
            place = next((option for option in options if "usepam" in option.lower()), _CONFIGURATION)
            remedy = f"set UsePAM yes in {place}; then: systemctl reload ssh.service"
            results.append(Result("PAM", name, "fail", text, remedy))
        else:
            services += [service, *_in_match_blocks(root, options)]
            results.append(Result("PAM", name, "pass", f"UsePAM yes, service {service}"))
    return Sshd(tuple(results), tuple(dict.fromkeys(services)))


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return clean(lines[-1].strip()) if lines else "no reason given"


def _listeners(root: Path) -> Iterator[tuple[str, ...]]:
    """The options that change the configuration, of each sshd that waits for connections.

    It shows them in its title, joined by blanks.
    """
    for entry in (root / "proc").glob("[0-9]*"):
        try:
            title = (entry / "cmdline").read_bytes().decode(errors="replace")
            if entry.stat().st_uid == 0 and (match := _LISTENER.match(title.replace("\0", " "))):
                yield tuple(_options(match[1].split()[1:]))
        except OSError:
            continue


def _options(words: Sequence[str]) -> Iterator[str]:
    left = list(words)
    while left:
        word = left.pop(0)
        if word[:2] not in {"-o", "-f"}:
            continue
        yield word
        if word == "-f" and left:
            yield left.pop(0)
        elif word == "-o" and left:
            value = left.pop(0)
            yield value if "=" in value or not left else f"{value} {left.pop(0)}"


def _in_match_blocks(root: Path, options: Sequence[str]) -> list[str]:
    """All services that the files name: which Match block applies depends on the user and the address."""
    files = [root / _CONFIGURATION.lstrip("/"), *sorted((root / "etc/ssh/sshd_config.d").glob("*.conf"))]
    if "-f" in options[:-1]:
        files.append(root / options[options.index("-f") + 1].lstrip("/"))
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(errors="replace"))
        except OSError:
            continue
    return [match[1].lower() for text in texts for match in _SERVICE.finditer(text)]

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the PAM configuration says of polytmp: which services have the module, where, and beside what.

Reads pam.d(5) as libpam does: /etc/pam.d before /usr/lib/pam.d, `@include` (Debian's), include and substack.
Not here: how it is shown.

Hard facts (pam.conf(5), and libpam's pam_dispatch.c):
- What `done` (and so `sufficient`) ends is the stack, a substack's only where it stands in one.
- A number skips so many entries of its own stack; a substack counts as one, and is not left by it.
- In brackets `default` is for what is not named, wherever it stands; where there is none it is `bad`.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MODULE: Final = "pam_polytmp.so"
SYSTEMD: Final = "pam_systemd.so"
DIRECTORIES: Final = ("etc/pam.d", "usr/lib/pam.d", "usr/share/pam.d")
RIVALS: Final = {
    "pam_namespace.so": "makes another /tmp over ours, and takes the session out of the host's mounts",
    "pam_mktemp.so": "sets TMPDIR to a directory of its own",
    "pam_tmpdir.so": "sets TMPDIR to a directory of its own",
}
LOGINS: Final = (
    *("login", "sshd", "su", "su-l", "sudo", "sudo-i", "cron", "crond", "atd", "systemd-user", "doas"),
    *("gdm-password", "gdm-autologin", "gdm-fingerprint", "gdm-smartcard", "lightdm", "lightdm-autologin"),
    *(
        "sddm",
        "sddm-autologin",
        "greetd",
        "lxdm",
        "xdm",
        "kde",
        "xrdp-sesman",
        "cockpit",
        "remote",
        "vsftpd",
    ),
    *("slurm", "polkit-1", "runuser", "runuser-l", "machinectl", "systemd-run0"),
)
"""Services that start programs as a user who asked for it."""
ON_PURPOSE: Final = ("runuser", "runuser-l", "polkit-1", "systemd-run0")
"""Those that root uses to act for a user: without the module they see the host's /tmp, as root does."""
_GREETERS: Final = ("gdm-launch-environment", "lightdm-greeter", "sddm-greeter")
_DEPTH: Final = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a session stack, with the included ones in place.

    depth: in how many substacks it is. A substack has an entry too, whose module is the file.
    """

    control: str
    module: str
    arguments: tuple[str, ...] = ()
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """service: which. verdict: pass, warn or fail."""

    service: str
    verdict: str
    text: str
    remedy: str = ""


def services(root: Path) -> list[str]:
    """The services that are configured; not the parts that others include."""
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


def session_stack(root: Path, service: str, level: int = 0, depth: int = 0) -> list[Entry] | None:
    """None where the service has no file. level: of how many inclusions; depth: of substacks."""
    text = _read(root, service)
    if text is None or level > _DEPTH:
        return None
    return list(_entries(root, text, level, depth))


def _read(root: Path, service: str) -> str | None:
    for directory in DIRECTORIES:
        try:
            return (root / directory / service).read_text(errors="replace")
        except OSError:
            continue
    return None


def _entries(root: Path, text: str, level: int, depth: int) -> Iterator[Entry]:
    for line in text.replace("\\\n", " ").splitlines():
        words = _words(line)
        if len(words) >= 2 and words[0] == "@include":
            yield from session_stack(root, words[1], level + 1, depth) or ()
        elif len(words) >= 3 and words[0].lstrip("-") == "session":
            control, module, *arguments = words[1:]
            if control == "include":
                yield from session_stack(root, module, level + 1, depth) or ()
            elif control == "substack":
                yield Entry(control, module, depth=depth)
                yield from session_stack(root, module, level + 1, depth + 1) or ()
            else:
                yield Entry(control, module.rpartition("/")[2], tuple(arguments), depth)


def _words(line: str) -> list[str]:
    """Words of a line; what is in brackets is one, as in [success=1 default=ignore]."""
    line = line.partition("#")[0].strip()
    words: list[str] = []
    while line:
        if line.startswith("["):
            word, _, line = line[1:].partition("]")
            words.append(f"[{word}]")
        else:
            word, _, line = line.replace("\t", " ").partition(" ")
            words.append(word)
        line = line.strip()
    return words


def judge(root: Path) -> list[Finding]:
    """Every service that logs users in, and every one in which something is in the way."""
    found: list[Finding] = []
    for service in services(root):
        stack = session_stack(root, service) or []
        modules = [entry.module for entry in stack]
        if service not in LOGINS and SYSTEMD not in modules and MODULE not in modules:
            continue
        if service in _GREETERS or service in ON_PURPOSE or service == "other":
            continue
        found.append(_judge_one(service, stack, modules))
    return found


def _judge_one(service: str, stack: Sequence[Entry], modules: Sequence[str]) -> Finding:
    place = f"/etc/pam.d/{service}"
    if MODULE not in modules:
        return Finding(
            service,
            "fail",
            f"no {MODULE} in its session stack: users of {service} get the shared /tmp",
            'pam-auth-update --enable polytmp (if it says "Local modifications", nothing was changed: add '
            "the line by hand, or --force, which resets the local changes of /etc/pam.d/common-*); where "
            f"{place} includes no common-session: add 'session required {MODULE}' at its end",
        )
    number = modules.index(MODULE)
    passing = [
        (*found, stack[earlier])
        for earlier in range(number)
        if (found := _passes_over(stack, earlier, number))
    ]
    if passing:
        verdict, does, entry = min(passing, key=lambda each: each[0])  # a failure, if there is one
        return Finding(
            service,
            verdict,
            f"'{entry.control} {entry.module}' before {MODULE} {does}: whom it lets by gets the shared /tmp",
            f"move {MODULE} before that line, but after {SYSTEMD}; or make it 'required' or 'optional'",
        )
    # The user's manager is no session of its own: for it Debian has pam_systemd last, and that is all right.
    late = SYSTEMD in modules[number:] and SYSTEMD not in modules[:number]
    if late and service != "systemd-user":
        return Finding(
            service,
            "warn",
            f"{MODULE} stands before {SYSTEMD}: logind does not know the session yet",
            f"move {MODULE} after {SYSTEMD}, in {place} or in what it includes",
        )
    for rival, does in RIVALS.items():
        if rival in modules:
            return Finding(
                service,
                "warn",
                f"{rival} beside it {does}",
                f"take {rival} out of {place}, or what it includes",
            )
    entry = stack[number]
    if not _strict(entry.control):
        return Finding(
            service,
            "warn",
            f"'{entry.control}': where the daemon fails, the login goes on with the shared /tmp",
            "if that is not meant: 'required' instead",
        )
    return Finding(service, "pass", f"{MODULE} ({entry.control})")


def _passes_over(stack: Sequence[Entry], earlier: int, number: int) -> tuple[str, str] | None:
    """The verdict, and what the earlier entry does so that the one of that number may not be reached.

    None where it is reached. A jump may be meant, it spares somebody what it skips; an end rarely is.
    """
    entry = stack[earlier]
    actions = set(_actions(entry.control).values())
    rest = itertools.takewhile(lambda other: other.depth >= entry.depth, stack[earlier + 1 : number + 1])
    between = list(rest)
    if len(between) < number - earlier:
        return None  # it stands in a substack that ends before
    if "done" in actions:
        return "fail", "ends the stack"
    entries = sum(other.depth == entry.depth for other in between)
    if any(int(action) >= entries for action in actions if action.isdecimal() and action.isascii()):
        return "warn", "jumps over it"
    return None


def _actions(control: str) -> dict[str, str]:
    """What a control field does for each return value that it names."""
    if control == "sufficient":
        return {"success": "done", "default": "ignore"}
    if not control.startswith("["):
        return {}
    pairs = (word.partition("=") for word in control.strip("[]").split())
    return {value: action for value, _, action in pairs}


def _strict(control: str) -> bool:
    if control.startswith("["):
        actions = _actions(control)
        return actions.get("perm_denied", actions.get("default", "bad")) in {"bad", "die"}
    return control in {"required", "requisite"}


def worst(findings: Iterable[Finding]) -> str:
    verdicts = {finding.verdict for finding in findings}
    return next((verdict for verdict in ("fail", "warn") if verdict in verdicts), "pass")

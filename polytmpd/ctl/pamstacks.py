# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check finds in the PAM configuration: which services have the module, where in the stack, and with
which other modules.

Reads pam.d(5) like libpam: /etc/pam.d before /usr/lib/pam.d, `@include` (Debian's), include and substack.
Not here: how the findings are shown.

Hard facts (pam.conf(5), and libpam's pam_dispatch.c):
- `done` (and so `sufficient`) ends the stack, but in a substack only the substack.
- A number skips that many entries of its own stack. A substack counts as one entry, and a jump does not
  leave it.
- In brackets, `default` covers all values that are not named, wherever it stands. It defaults to `bad`.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MODULE: Final = "pam_polytmp.so"
SYSTEMD: Final = "pam_systemd.so"
DIRECTORIES: Final = ("etc/pam.d", "usr/lib/pam.d", "usr/share/pam.d")
RIVALS: Final = {
    "pam_namespace.so": "mounts another /tmp over polytmp's and cuts the session off from the host's mounts",
    "pam_mktemp.so": "sets TMPDIR to its own directory",
    "pam_tmpdir.so": "sets TMPDIR to its own directory",
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
"""Services that start programs for a user at the user's request."""
ON_PURPOSE: Final = ("runuser", "runuser-l", "polkit-1", "systemd-run0")
"""Services through which root acts for a user: without the module they see the host's /tmp, like root."""
_GREETERS: Final = ("gdm-launch-environment", "lightdm-greeter", "sddm-greeter")
_DEPTH: Final = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a session stack, in which included files are inlined.

    depth: the number of substacks around it. A substack has its own entry, with the file as module.
    """

    control: str
    module: str
    arguments: tuple[str, ...] = ()
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about a PAM service. verdict: pass, warn or fail."""

    service: str
    verdict: str
    text: str
    remedy: str = ""


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


def session_stack(root: Path, service: str, level: int = 0, depth: int = 0) -> list[Entry] | None:
    """The entries of a session stack; None if the service has no file.

    level: the number of inclusions so far; depth: of substacks among them.
    """
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
    """The words of a line. Brackets make one word, as in [success=1 default=ignore]."""
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
    """A finding for each service that logs users in or has one of our modules or systemd's."""
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
            'pam-auth-update --enable polytmp (if it reports "Local modifications", it changed nothing: add '
            "the line by hand, or use --force, which resets local changes in /etc/pam.d/common-*); if "
            f"{place} does not include common-session, add 'session required {MODULE}' at its end",
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
            f"'{entry.control} {entry.module}' before {MODULE} {does}: such a session gets the shared /tmp",
            f"move {MODULE} before that line, but after {SYSTEMD}; or make it 'required' or 'optional'",
        )
    # The user manager is not a separate session: on Debian its stack has pam_systemd last, which is fine.
    late = SYSTEMD in modules[number:] and SYSTEMD not in modules[:number]
    if late and service != "systemd-user":
        return Finding(
            service,
            "warn",
            f"{MODULE} comes before {SYSTEMD}: logind does not know the session yet",
            f"move {MODULE} after {SYSTEMD}, in {place} or a file it includes",
        )
    for rival, does in RIVALS.items():
        if rival in modules:
            return Finding(
                service,
                "warn",
                f"{rival}, also in the stack, {does}",
                f"remove {rival} from {place}, or from a file it includes",
            )
    entry = stack[number]
    if not _strict(entry.control):
        return Finding(
            service,
            "warn",
            f"'{entry.control}': if the daemon fails, the login continues with the shared /tmp",
            "unless this is intended, use 'required'",
        )
    return Finding(service, "pass", f"{MODULE} ({entry.control})")


def _passes_over(stack: Sequence[Entry], earlier: int, number: int) -> tuple[str, str] | None:
    """The verdict and how an earlier entry keeps entry number from being reached; None if it does not.

    A jump may be intended, to exempt some sessions. Ending the stack rarely is.
    """
    entry = stack[earlier]
    actions = set(_actions(entry.control).values())
    rest = itertools.takewhile(lambda other: other.depth >= entry.depth, stack[earlier + 1 : number + 1])
    between = list(rest)
    if len(between) < number - earlier:
        return None  # it is in a substack that ends earlier
    if "done" in actions:
        return "fail", "may end the stack"
    entries = sum(other.depth == entry.depth for other in between)
    if any(int(action) >= entries for action in actions if action.isdecimal() and action.isascii()):
        return "warn", "may jump over it"
    return None


def _actions(control: str) -> dict[str, str]:
    """The action of a control field for each return value that it names."""
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

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What PAM modules leave on the host because they run before the session is private: a program, with its
socket in /tmp, or a Kerberos ticket.

pam_mount is not among them: its mounts must be on the host to reach every session.
Not here: reading stacks (pamstacks.py), and whether the session becomes private at all (pamcheck.py).

Hard facts:
- pam_ssh_add and pam_ssh start ssh-agent, whose socket is in /tmp. OpenSSH 10.1 moves it to ~/.ssh/agent.
- The sockets of the keyring and wallet daemons are in /run/user, but the daemons see the /tmp of the host.
- pam_krb5(5) "does not use the default ticket cache location" of krb5.conf, but its own settings in
  [appdefaults], and writes to /tmp otherwise. Most programs call pam_setcred() before they open the session,
  so no order of the session's modules helps.
- pam_winbind(8) writes no ticket unless krb5_ccache_type= is set, as Debian's profile does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from polytmpd.ctl.pammodules import OURS
from polytmpd.ctl.pamstacks import Entry

_AGENT: Final = ("an ssh-agent", "do not find its socket, which is in the host's /tmp")
_SEES_THE_HOSTS: Final = "have one that sees the host's /tmp"
_PROGRAMS: Final = {
    "pam_ssh_add.so": _AGENT,
    "pam_ssh.so": _AGENT,
    "pam_gnome_keyring.so": ("a keyring daemon", _SEES_THE_HOSTS),
    "pam_kwallet.so": ("a wallet daemon", _SEES_THE_HOSTS),
    "pam_kwallet5.so": ("a wallet daemon", _SEES_THE_HOSTS),
}
"""Module → what it starts, and what the sessions make of that."""
_EARLY: Final = "pam-auth-update --enable polytmp-early"
_SETTING: Final = re.compile(r"(?m)^\s*(ccache|ccache_dir)\s*=\s*(\S+)")
_IN_TMP: Final = re.compile(r"(FILE:|DIR:)?/(var/)?tmp(/|$)")


@dataclass(frozen=True, slots=True)
class Left:
    """file: where the line stands. what: it leaves. effect: on the sessions of the services."""

    file: str
    what: str
    effect: str
    remedy: str


def program(entries: Sequence[Entry], file: str) -> Left | None:
    """The first module that starts a program before ours. entries: of a session. file: the service's."""
    number = next((n for n, entry in enumerate(entries) if entry.module == OURS), 0)
    for entry in entries[:number]:
        if entry.module not in _PROGRAMS:
            continue
        if entry.module == "pam_gnome_keyring.so" and "auto_start" not in entry.arguments:
            continue
        program, effect = _PROGRAMS[entry.module]
        line = f"'session {entry.control} {entry.module}'"
        common = entry.file.rpartition("/")[2].startswith("common-session")
        if entry.file == file:
            remedy = f"move that line to the end of {file}"
        elif common and sum(other.module == OURS for other in entries) == 1:
            remedy = _EARLY
        else:
            remedy = f"add 'session optional {OURS}' before that line in {entry.file}"
        return Left(entry.file, f"{line} starts {program} before {OURS}", effect, remedy)
    return None


def ticket(entries: Sequence[Entry], krb5_conf: str) -> Left | None:
    """The first module that writes tickets to the host's /tmp. entries: of auth and session."""
    for entry in entries:
        given = dict(argument.split("=", 1) for argument in entry.arguments if "=" in argument)
        if entry.module == "pam_krb5.so" and "no_ccache" not in entry.arguments:
            settings = {**dict(_SETTING.findall(krb5_conf)), **given}
            place = settings.get("ccache") or settings.get("ccache_dir") or "/tmp"
            remedy = "pam = { ccache = KEYRING:persistent:%u } in [appdefaults] of /etc/krb5.conf"
        elif entry.module == "pam_winbind.so" and given.get("krb5_ccache_type"):
            place = given["krb5_ccache_type"]
            place = "/tmp" if place == "FILE" else place
            remedy = f"krb5_ccache_type=KEYRING in {entry.file}"
        else:
            continue
        if _IN_TMP.match(place):
            what = f"{entry.module} writes tickets to /tmp before the session is private"
            return Left(entry.file, what, "do not find them", remedy)
    return None

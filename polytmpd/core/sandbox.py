# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which units cannot start in a user's directories, and which unit a cgroup belongs to.

A unit with User= and PAMName= opens its session first. systemd applies the sandbox and the working directory
afterwards, with the host's paths: below /tmp the user's directories do not have them.
Not here: asking systemd (bus/systemd1), and what follows (placement).

Hard facts
- exec_child() (exec_invoke() since systemd 255) calls PAM in the process that becomes the command, a child
  of PID 1. The mount namespace, WorkingDirectory= and the search for the program come after that; standard
  input and output, EnvironmentFile= and credentials come before it.
- PrivateTmp= of Debian 12 and 13 binds a directory that PID 1 made in the host's /tmp.
- A path in ReadWritePaths= and similar settings may begin with "-" (ignored if missing) and "+" (below
  RootDirectory=). WorkingDirectory= may begin with "-", which D-Bus shows as "!".
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

_PATHS: Final = ("RootDirectory", "RootImage", "WorkingDirectory")
_PATH_LISTS: Final = ("ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths")
_STRUCTS: Final = {
    "BindPaths": 2,
    "BindReadOnlyPaths": 2,
    "TemporaryFileSystem": 1,
    "MountImages": 2,
    "ExtensionImages": 1,
    "ExecCondition": 1,
    "ExecStartPre": 1,
    "ExecStart": 1,
    "ExecStartPost": 1,
}
"""How many fields of each entry, from the first one, are paths."""
PRIVATE: Final = "PrivateTmp=yes"
"""The only setting in conflicts() with which a unit does not see the host's directories."""
SETTINGS: Final = ("PrivateTmp", *_PATHS, *_PATH_LISTS, "ExtensionDirectories", *_STRUCTS)
"""The properties of a unit that conflicts() reads."""

LOGIN_SERVICES: Final = frozenset(
    (
        *("ssh", "sshd", "dropbear", "getty", "serial-getty", "console-getty", "container-getty", "telnetd"),
        *("cron", "crond", "cronie", "anacron", "atd", "slurmd", "xrdp-sesman", "vsftpd", "proftpd", "smbd"),
        *("gdm", "gdm3", "lightdm", "sddm", "xdm", "lxdm", "greetd", "ly", "nodm", "display-manager"),
        *("cockpit-session", "cockpit-wsinstance-http", "cockpit-wsinstance-https", "systemd-logind"),
    )
)
"""Services that run what their users like. In a sandbox they would run it in one /tmp for all of them."""
LOGIN_PROGRAMS: Final = frozenset(
    (
        *(
            "login",
            "su",
            "sudo",
            "sudo-rs",
            "runuser",
            "doas",
            "pkexec",
            "machinectl",
            "at",
            "atd",
            "cron",
            "crond",
        ),
        *(
            "sshd",
            "sshd-session",
            "dropbear",
            "systemd",
            "systemd-executor",
            "cockpit-session",
            "slurmstepd",
        ),
        *("gdm-session-worker", "lightdm", "sddm-helper", "lxdm-session", "greetd", "xdm", "xrdp-sesman"),
        *("xrdp-sesexec", "ly", "nodm", "smbd", "vsftpd", "proftpd"),
    )
)
"""Programs that run something as the user for whom they open a session."""
_USER_MANAGER: Final = re.compile(r"user@\d+\.service", re.ASCII)


def is_below(path: str, directories: Collection[str]) -> bool:
    """Whether path lies in one of the directories, and is not the directory itself."""
    while "//" in path:
        path = path.replace("//", "/")
    return any(
        path.startswith(f"{directory.rstrip('/')}/") and path.rstrip("/") != directory.rstrip("/")
        for directory in directories
    )


def conflicts(properties: Mapping[str, Any], directories: Collection[str]) -> list[str]:
    """The settings of a unit that need the host's directories, as in a unit file; empty if there are none.

    properties: SETTINGS, as D-Bus has them. directories: those that are private.
    """
    found = [PRIVATE] if properties.get("PrivateTmp") else []
    for name, path in _paths(properties):
        if is_below(path, directories) and (setting := f"{name}={path}") not in found:
            found.append(setting)
    return found


def _paths(properties: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in _PATHS:
        yield name, str(properties.get(name) or "").lstrip("-+!")
    for name in (*_PATH_LISTS, "ExtensionDirectories"):
        for entry in properties.get(name) or ():
            yield name, str(entry).lstrip("-+:")
    for name, count in _STRUCTS.items():
        for entry in properties.get(name) or ():
            for path in entry[:count]:
                yield name, str(path)


def unit_of(cgroup: str) -> str:
    """The system unit whose cgroup a process is in, from /proc/PID/cgroup; empty if there is none.

    What is below the unit's cgroup does not count: delegated units name their own cgroups. In a container,
    the process may be in / of the one hierarchy, of these two, that systemd does not use.
    """
    for line in cgroup.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number, controllers) == ("0", "") or controllers == "name=systemd":
            unit = next((part for part in path.split("/") if part and not part.endswith(".slice")), "")
            if unit:
                return unit.removeprefix("_") if unit.endswith((".service", ".scope")) else ""
    return ""


def is_user_manager(unit: str) -> bool:
    return _USER_MANAGER.fullmatch(unit) is not None


def is_login_program(program: str) -> bool:
    return program in LOGIN_PROGRAMS


def is_login_service(unit: str) -> bool:
    """Whether the unit is known to run programs of many users."""
    return unit.removesuffix(".service").partition("@")[0] in LOGIN_SERVICES

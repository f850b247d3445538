# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check finds in the units that open sessions: a sandbox in which no session can become private.

It examines the unit whose process opens the session, which may not be the one that users connect to.
Not here: the stacks of the services (pamcheck.py).
"""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

from polytmpd.bus import systemd1
from polytmpd.bus.protocol import Asker, BusError
from polytmpd.ctl import unitsandbox
from polytmpd.ctl.host import Result

_LOGIN_UNITS: Final = (
    *("ssh.service", "sshd.service", "ssh@.service", "sshd@.service"),
    *("cron.service", "crond.service", "atd.service", "getty@tty1.service"),
    *("gdm.service", "lightdm.service", "sddm.service", "xdm.service", "greetd.service"),
    *("xrdp-sesman.service", "dropbear.service", "vsftpd.service", "slurmd.service", "user@.service"),
    *("cockpit-session@.service", "cockpit-wsinstance-http.service", "cockpit-wsinstance-https@.service"),
)
_REPLACED: Final = {
    "cockpit-wsinstance-http.service": "cockpit-session@.service",
    "cockpit-wsinstance-https@.service": "cockpit-session@.service",
}
"""Units that no longer open sessions if the other one is installed."""
SANDBOX: Final = {
    **dict.fromkeys(("PrivateTmp", "PrivateMounts", "PrivateDevices", "DynamicUser"), "no"),
    **dict.fromkeys(("ProtectSystem", "ProtectHome", "ProtectKernelTunables", "ProtectKernelModules"), "no"),
    **dict.fromkeys(("ProtectKernelLogs", "ProtectControlGroups", "PrivateUsers"), "no"),
    **dict.fromkeys(("RootDirectory", "RootImage", "ReadWritePaths", "ReadOnlyPaths"), ""),
    **dict.fromkeys(("InaccessiblePaths", "BindPaths", "BindReadOnlyPaths"), ""),
    **dict.fromkeys(("TemporaryFileSystem", "MountImages", "ExecPaths", "NoExecPaths"), ""),
    "ProtectProc": "default",
    "ProcSubset": "all",
}
"""Settings that give a service its own mount namespace, and the value that resets each. An empty value
resets a list or path, but systemd cannot parse an empty boolean, systemd.exec(5).
"""
_FORBIDDING: Final = ("CapabilityBoundingSet", "RestrictNamespaces", "SystemCallFilter")
"""Settings that may forbid setns(2). An empty value resets them (for RestrictNamespaces=: no)."""
_CLONE_NEWNS: Final = 0x20000
_CAPABILITIES: Final = {18: "CAP_SYS_CHROOT", 21: "CAP_SYS_ADMIN"}
_CALLS: Final = ("setns", "unshare")


async def judge(connection: Asker, directories: Sequence[str]) -> AsyncIterator[Result]:
    """Logins are refused if the service has its own mount namespace, or may not call setns(2)."""
    names = ("Id", "ActiveState", "LoadState", "MainPID", "FragmentPath", *SANDBOX, *_FORBIDDING)
    loaded: dict[str, dict[str, Any]] = {}
    seen: set[Any] = set()
    for unit in _LOGIN_UNITS:
        try:
            found = await systemd1.unit_properties(connection, unit.replace("@.", "@0."), names)
        except BusError:
            continue
        if found.get("LoadState") == "loaded" and found.get("Id") not in seen:  # sshd.service is an alias
            seen.add(found.get("Id"))
            loaded[unit] = found
    for unit, found in loaded.items():
        if _REPLACED.get(unit) not in loaded and (result := _judge(unit, found)) is not None:
            yield result
    for unit in sorted(_with_libpam(Path("/")) - seen):
        text = "loads libpam in its own mount namespace: if it opens sessions of users, they are refused"
        if await _keeps_sessions(connection, unit, directories):
            places = " and ".join(directories)
            text = (
                f"loads libpam in its own mount namespace: sessions that it opens stay in its own {places}"
            )
        yield Result(
            "services", unit, "warn", text, f"if it does, see docs/containers.md and: systemctl cat {unit}"
        )


async def _keeps_sessions(connection: Asker, unit: str, directories: Sequence[str]) -> bool:
    try:
        found = await systemd1.unit_properties(connection, unit, ("MainPID",))
    except BusError:
        return False
    return unitsandbox.keeps_sessions(unit, int(found.get("MainPID", 0)), directories)


def _with_libpam(root: Path) -> set[str]:
    """The services, other than systemd's own, that have loaded libpam and live in a mount namespace of their
    own. Processes in containers and in users' slices are left out.
    """
    found: set[str] = set()
    own = [_link(root / "proc/1/ns" / kind) for kind in ("mnt", "pid")]
    for entry in (root / "proc").glob("[0-9]*"):
        namespaces = [_link(entry / "ns" / kind) for kind in ("mnt", "pid")]
        program = _link(entry / "exe")
        if not program or program.startswith("/usr/lib/systemd/") or "" in (*own, *namespaces):
            continue
        if namespaces[0] == own[0] or namespaces[1] != own[1]:
            continue
        try:
            group = (entry / "cgroup").read_text().strip().rpartition(":")[2]
            if not group.endswith(".service") or group.startswith(("/user.slice", "/machine.slice")):
                continue
            if "/libpam.so" in (entry / "maps").read_text(errors="replace"):
                found.add(group.rpartition("/")[2])
        except OSError:
            continue  # it has ended
    return found


def _link(path: Path) -> str:
    """Where a link leads; empty if it cannot be read."""
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _judge(unit: str, found: dict[str, Any]) -> Result | None:
    settings = [key for key in SANDBOX if _is_set(key, found.get(key))]
    forbidding = _forbidding(found)
    pid = int(found.get("MainPID", 0))
    inside = _same_namespace(pid) if pid else None
    if inside is False or (settings and inside is None):
        why = ", ".join(f"{key}=" for key in settings) or "no setting of its unit does this"
        remedy = undo(unit, settings) if settings else "find out what started it that way"
        text = f"has its own mount namespace ({why}): its logins are refused"
        return Result("services", unit, "fail", text, remedy)
    if forbidding:
        text = f"may not enter a namespace ({'; '.join(forbidding.values())}): its logins are refused"
        return Result("services", unit, "fail", text, undo(unit, list(forbidding)))
    if settings:
        text = f"will have its own mount namespace ({', '.join(f'{key}=' for key in settings)})"
        return Result("services", unit, "warn", f"{text} when it is restarted", undo(unit, settings))
    if found.get("ActiveState") == "active" or "@." in unit:
        return Result("services", unit, "pass", "in the host's mount namespace")
    return None


def _forbidding(found: dict[str, Any]) -> dict[str, str]:
    """The settings that forbid setns(2), each with what it takes away."""
    why: dict[str, str] = {}
    bounding = found.get("CapabilityBoundingSet")
    if isinstance(bounding, int):
        missing = [name for bit, name in _CAPABILITIES.items() if not bounding >> bit & 1]
        if missing:
            why["CapabilityBoundingSet"] = f"CapabilityBoundingSet= lacks {' and '.join(missing)}"
    allowed = found.get("RestrictNamespaces")
    if isinstance(allowed, int) and not allowed & _CLONE_NEWNS:
        why["RestrictNamespaces"] = "RestrictNamespaces= forbids mnt"
    match found.get("SystemCallFilter"):
        case [is_allow_list, [*calls]] if calls or is_allow_list:
            named = {str(call).partition(":")[0] for call in calls}
            blocked = [call for call in _CALLS if (call in named) != bool(is_allow_list)]
            if blocked:
                why["SystemCallFilter"] = f"SystemCallFilter= forbids {' and '.join(blocked)}"
    return why


def undo(unit: str, settings: Sequence[str]) -> str:
    resets = {**SANDBOX, **dict.fromkeys(_FORBIDDING, ""), "RestrictNamespaces": "no"}
    lines = " ".join(["[Service]", *(f"{key}={resets[key]}" for key in settings)])
    instances = unit.replace("@.", "@*.")  # a template itself cannot be restarted
    return f"systemctl edit {unit}: {lines} (one per line); then: systemctl restart {instances}"


def _is_set(key: str, value: Any) -> bool:
    return value not in (None, False, "", "no", 0, [], ["", False], SANDBOX[key])


def namespace(pid: str) -> int:
    """The inode of a process's mount namespace. Raises OSError."""
    return Path("/proc", pid, "ns/mnt").stat().st_ino


def _same_namespace(pid: int) -> bool | None:
    try:
        return namespace(str(pid)) == namespace("1")
    except OSError:
        return None

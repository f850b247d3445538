# SPDX-License-Identifier: LGPL-2.1-or-later
"""check: is every login on this host private, and if not, why not? A report that an auditor can file.

Only reads, changes nothing. Fails (exit status 1) if a user can end up in the shared /tmp or mounts do not
reach them; warns of what may surprise.
Not here: the facts about the host itself (host.py), its settings (settings.py) and PAM (pamstacks.py).
"""

import contextlib
import os
import platform
import textwrap
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

from polytmpd import __version__, config
from polytmpd.bus import logind, systemd1
from polytmpd.bus.connection import BusError
from polytmpd.bus.contract import InstanceProperty
from polytmpd.core.model import Lifetime, State
from polytmpd.ctl import host, output, pamstacks, settings, users
from polytmpd.ctl.commands import Answer, Context
from polytmpd.ctl.host import Result

_ROOT: Final = Path("/")
_LOGIN_UNITS: Final = (
    *("ssh.service", "sshd.service", "cron.service", "crond.service", "atd.service", "getty@tty1.service"),
    *(
        "gdm.service",
        "lightdm.service",
        "sddm.service",
        "xdm.service",
        "greetd.service",
        "xrdp-sesman.service",
    ),
    *("cockpit.service", "dropbear.service", "vsftpd.service", "slurmd.service", "user@.service"),
)
_SANDBOX: Final = {
    **dict.fromkeys(("PrivateTmp", "PrivateMounts", "PrivateDevices", "DynamicUser"), "no"),
    **dict.fromkeys(("ProtectSystem", "ProtectHome", "ProtectKernelTunables", "ProtectKernelModules"), "no"),
    **dict.fromkeys(("ProtectKernelLogs", "ProtectControlGroups"), "no"),
    **dict.fromkeys(("RootDirectory", "RootImage", "ReadWritePaths", "ReadOnlyPaths"), ""),
    **dict.fromkeys(("InaccessiblePaths", "BindPaths", "BindReadOnlyPaths"), ""),
    **dict.fromkeys(("TemporaryFileSystem", "MountImages"), ""),
}
"""Settings that give a service its own mount namespace, and the value that resets each. An empty value
resets a list or path, but systemd cannot parse an empty boolean, systemd.exec(5).
"""
_FD_STORE_PRESERVED_SINCE: Final = 254
_NAMED_AT_MOST: Final = 5
_MARKS: Final = {"pass": "✓", "warn": "!", "fail": "✗", "skip": "-"}


async def check(context: Context) -> Answer:
    results = [result async for result in _all(context)]
    failed = any(result.verdict == "fail" for result in results)
    counts = {
        verdict: sum(result.verdict == verdict for result in results)
        for verdict in ("pass", "warn", "fail", "skip")
    }
    about = {
        "host": platform.node(),
        "system": _system(),
        "kernel": platform.release(),
        "polytmp": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    value = {
        **about,
        "verdict": "fail" if failed else "pass",
        "counts": counts,
        "results": [
            {
                "topic": result.topic,
                "name": result.name,
                "verdict": result.verdict,
                "text": result.text,
                "remedy": result.remedy,
            }
            for result in results
        ],
    }
    return Answer(value, _page(context, about, results, counts), 1 if failed else 0)


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"


async def _all(context: Context) -> AsyncIterator[Result]:
    async for result in _daemon(context):
        yield result
    wanted, problems = config.load(_ROOT)
    configured = [directory.path for directory in wanted.directories]
    kept = [directory.path for directory in wanted.directories if directory.lifetime is Lifetime.PERSISTENT]
    in_force: list[str] | None = None
    listed: dict[int, str] = {}
    here: dict[int, str] = {}
    try:
        in_force = await context.client.directories()
        listed = {entry.uid: entry.user for entry in await context.client.instances()}
    except BusError:
        text = "polytmpd does not answer, checking the directories in polytmpd.conf"
        yield Result("mounts", "Directories=", "skip", text, "see the results for polytmpd.service")
    # Also directories that are configured but not yet in force: a problem with one may be the reason.
    directories = list(dict.fromkeys((*(in_force or ()), *configured)))
    with contextlib.suppress(BusError):
        here = {
            entry.session.user.uid: entry.session.user.name
            for entry in await logind.list_sessions(context.connection)
        }
    for result in settings.judge(_ROOT, wanted, problems, in_force):
        yield result
    yield settings.users_above(_ROOT, wanted, here, listed)
    for result in host.kernel():
        yield result
    for result in (
        *host.limits(_ROOT, len(listed)),
        *host.cgroups(_ROOT),
        *host.directories(_ROOT, directories, kept),
    ):
        yield result
    yield host.module(_ROOT)
    for finding in pamstacks.judge(_ROOT):
        yield Result("PAM", finding.service, finding.verdict, finding.text, finding.remedy)
    async for result in _units(context):
        yield result
    async for result in _logged_in(context, listed, wanted):
        yield result
    for result in (*host.cleaners(_ROOT), *host.kerberos(_ROOT), *host.containers(_ROOT)):
        yield result


async def _daemon(context: Context) -> AsyncIterator[Result]:
    unit = "polytmpd.service"
    try:
        version = await context.client.version()
    except BusError as error:
        yield Result("daemon", unit, "fail", f"does not answer: {error}", f"systemctl status {unit}")
    else:
        yield Result("daemon", unit, "pass", f"answers, version {version}")
    try:
        found = await systemd1.unit_properties(
            context.connection, unit, ("ActiveState", "UnitFileState", "NRestarts")
        )
    except BusError as error:
        yield Result("daemon", f"{unit} (unit)", "skip", f"systemd does not answer: {error}")
        return
    if found.get("UnitFileState") in {"enabled", "enabled-runtime"}:
        yield Result("daemon", f"{unit} (boot)", "pass", "starts at boot, before the first login")
    elif str(found.get("UnitFileState")).startswith("masked"):
        text, remedy = "masked: it cannot start, and logins are refused", f"systemctl unmask {unit}"
        yield Result("daemon", f"{unit} (boot)", "fail", text, remedy)
    else:
        state = found.get("UnitFileState") or "not installed"
        yield Result(
            "daemon",
            f"{unit} (boot)",
            "warn",
            f"{state}: starts at the first login",
            f"systemctl enable {unit}",
        )
    if restarts := int(found.get("NRestarts", 0)):
        yield Result(
            "daemon",
            f"{unit} (restarts)",
            "warn",
            f"restarted {output.count(restarts, 'time')} automatically",
            f"journalctl -u {unit}",
        )
    version = await systemd1.version(context.connection)
    number = int("".join(digit if digit.isdecimal() else " " for digit in version).split()[0])
    if number >= _FD_STORE_PRESERVED_SINCE:
        yield Result("daemon", "systemd", "pass", f"version {version}")
    else:
        text = "after a stop, polytmpd finds namespaces through their processes"
        yield Result("daemon", "systemd", "pass", f"version {version}: {text}")
    try:
        there = await context.connection.has_owner(logind.SERVICE)
    except BusError:
        there = False
    if there:
        yield Result("daemon", "systemd-logind", "pass", "running")
    else:
        remedy = "systemctl status systemd-logind.service"
        yield Result(
            "daemon", "systemd-logind", "fail", "not running: polytmpd does not hear of logins", remedy
        )


async def _units(context: Context) -> AsyncIterator[Result]:
    """Services that start sessions. Logins are refused if one has its own mount namespace."""
    names = ("Id", "ActiveState", "LoadState", "MainPID", "FragmentPath", *_SANDBOX)
    seen: set[Any] = set()
    for unit in _LOGIN_UNITS:
        name = "user@0.service" if unit == "user@.service" else unit
        try:
            found = await systemd1.unit_properties(context.connection, name, names)
        except BusError:
            continue
        if found.get("LoadState") != "loaded" or found.get("Id") in seen:  # sshd.service is an alias
            continue
        seen.add(found.get("Id"))
        settings = [key for key in _SANDBOX if _is_set(found.get(key))]
        pid = int(found.get("MainPID", 0))
        inside = _same_namespace(pid) if pid else None
        if inside is False or (settings and inside is None):
            why = ", ".join(f"{key}=" for key in settings) or "no setting of its unit does this"
            remedy = undo(unit, settings) if settings else "find out what started it that way"
            text = f"has its own mount namespace ({why}): its logins are refused"
            yield Result("services", unit, "fail", text, remedy)
        elif found.get("ActiveState") == "active" or unit == "user@.service":
            yield Result("services", unit, "pass", "in the host's mount namespace")


def undo(unit: str, settings: Sequence[str]) -> str:
    lines = " ".join(["[Service]", *(f"{key}={_SANDBOX[key]}" for key in settings)])
    instances = unit.replace("@.", "@*.")  # a template itself cannot be restarted
    return f"systemctl edit {unit}: {lines} (one per line); then: systemctl restart {instances}"


def _is_set(value: Any) -> bool:
    return value not in (None, False, "", "no", 0, [], ["", False])


def _namespace(pid: str) -> int:
    return Path("/proc", pid, "ns/mnt").stat().st_ino


def _same_namespace(pid: int) -> bool | None:
    try:
        return _namespace(str(pid)) == _namespace("1")
    except OSError:
        return None


def _named(pid: str) -> str:
    return f"{output.clean(Path('/proc', pid, 'comm').read_text(errors='replace').strip())} ({pid})"


async def _logged_in(
    context: Context, listed: dict[int, str], wanted: config.Config
) -> AsyncIterator[Result]:
    """Users in the shared /tmp, for example since before polytmp was installed, and failed instances."""
    if os.geteuid() != 0:
        yield Result("sessions", "in the shared /tmp", "skip", "only root can check this", "run as root")
        return
    shared: dict[int, list[str]] = {}
    try:
        host_namespace = _namespace("1")
        for entry in os.scandir("/proc"):
            if not entry.name.isdecimal():
                continue
            try:
                uid = entry.stat().st_uid
                if not (uid in listed or wanted.exemptions.reason(uid) is None):
                    continue
                if _namespace(entry.name) == host_namespace:
                    shared.setdefault(uid, []).append(_named(entry.name))
            except OSError:
                continue
    except OSError as error:
        yield Result("sessions", "in the shared /tmp", "skip", str(error))
        return
    users_of = {uid: listed.get(uid) or users.name_of(uid) for uid in shared}
    shared = {
        uid: names
        for uid, names in shared.items()
        if uid in listed or wanted.exemptions.reason(uid, users_of[uid]) is None
    }
    for uid, names in sorted(shared.items()):
        more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
        remedy = (
            "started before polytmp was installed, or without PAM; to end them: "
            f"loginctl terminate-user {users_of[uid]}"
        )
        text = f"in the shared /tmp: {', '.join(names[:_NAMED_AT_MOST])}{more}"
        yield Result("sessions", users_of[uid], "warn", text, remedy)
    if not shared:
        who = f"the processes of {output.count(len(listed), 'user')} with an instance"
        text = f"none of {who}" if listed else "no user has an instance"
        yield Result("sessions", "in the shared /tmp", "pass", text)
    try:
        states = {
            found[InstanceProperty.USER]: found[InstanceProperty.STATE]
            for found in (await context.client.all_properties()).values()
        }
    except BusError:
        return
    for user, state in states.items():
        if state == State.FAILED:
            remedy = f"journalctl -u polytmpd POLYTMP_USER={user}; when fixed: polytmpctl remove {user}"
            yield Result(
                "sessions", user, "fail", "the instance could not be created, or not be removed", remedy
            )


def _page(context: Context, about: dict[str, str], results: list[Result], counts: dict[str, int]) -> str:
    style = context.style
    paint = {"pass": style.good, "warn": style.warning, "fail": style.bad, "skip": style.faint}
    lines = []
    if context.options.legend:
        lines += [
            style.bold("Private temporary directories on this host"),
            f"{about['host']}, {about['system']}, Linux {about['kernel']}, polytmp {about['polytmp']}, "
            + about["time"],
            "",
        ]
    topic_width = max(len(result.topic) for result in results)
    name_width = max(len(result.name) for result in results)
    columns = 1_000_000 if context.options.full else output.terminal_columns()
    for result in results:
        mark = paint[result.verdict](f"{_MARKS[result.verdict]} {result.verdict}")
        head = f"{mark} {result.topic:<{topic_width}} {result.name:<{name_width}}"
        if output.width(head) + output.width(result.text) < columns:
            lines.append(f"{head} {result.text}")
        else:
            indent = " " * (7 + topic_width + 1)
            room = max(columns - len(indent), 20)
            parts = textwrap.wrap(result.text, room, break_long_words=False, break_on_hyphens=False)
            lines += [head.rstrip(), *(indent + part for part in parts)]
        if result.remedy and result.verdict != "pass":
            lines.append(f"{'':7}{'':{topic_width}}{style.faint('→ ' + result.remedy)}")
    if context.options.legend:
        parts = [f"{number} {verdict}" for verdict, number in counts.items() if number]
        lines += ["", f"{output.count(len(results), 'check')}: {', '.join(parts)}."]
    return "\n".join(lines)

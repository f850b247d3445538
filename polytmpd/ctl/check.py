# SPDX-License-Identifier: LGPL-2.1-or-later
"""check: is every login on this host private, and if not, why not? A report that an auditor can file.

Only reads; changes and starts nothing, unless it is told to open sessions (--probe). Fails (exit status 1)
if a user can end up in the shared /tmp, is refused, or mounts do not reach them; warns of what may surprise.
Not here: the facts about the host itself (host.py), its settings (settings.py), PAM (pamcheck.py, sshd.py),
units (units.py), and the sessions that are opened (probe.py).
"""

import contextlib
import functools
import os
import platform
import textwrap
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Final

from polytmpd import __version__, config
from polytmpd.bus import sessions, systemd1
from polytmpd.bus.client import Polytmp
from polytmpd.bus.contract import SERVICE, InstanceProperty
from polytmpd.bus.protocol import BusError
from polytmpd.core.model import Lifetime, State
from polytmpd.ctl import (
    host,
    output,
    pamcheck,
    pammodules,
    pamstacks,
    probe,
    regular,
    settings,
    sockets,
    sshd,
    units,
    unitsandbox,
    users,
)
from polytmpd.ctl.commands import Answer, Context
from polytmpd.ctl.host import Result
from polytmpd.ctl.regular import Person

_ROOT: Final = Path("/")
_FD_STORE_PRESERVED_SINCE: Final = 254
_NAMED_AT_MOST: Final = 5
_NOBODY: Final = ":0.0"
"""A unique name that no connection has."""
_RELOAD: Final = "systemctl reload polytmpd.service"
_MARKS: Final = {"pass": "✓", "warn": "!", "fail": "✗", "skip": "-"}


async def check(context: Context) -> Answer:
    # A call to a unique name starts nothing.
    owner = ""
    with contextlib.suppress(BusError):
        (owner,) = await context.connection.ask_bus("GetNameOwner", "s", SERVICE)
    context = context._replace(client=Polytmp(context.connection, service=owner or _NOBODY))
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
    yield await _socket(context)
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
        if await context.connection.has_owner(sessions.SERVICE):  # else it would be started
            here = {
                entry.session.user.uid: entry.session.user.name
                for entry in await sessions.list_sessions(context.connection)
            }
    people: list[Person] = []
    with contextlib.suppress(TimeoutError):  # settings.exempt_users() reports it
        people = users.in_time(lambda: regular.people(_ROOT, wanted))
    for result in settings.judge(_ROOT, wanted, problems, in_force):
        yield result
    yield settings.exempt_users(_ROOT, wanted, here, listed)
    for result in _everybody(people):
        yield result
    for result in host.kernel():
        yield result
    for result in (
        *host.limits(_ROOT, len(listed)),
        *host.cgroups(_ROOT),
        *host.directories(_ROOT, directories, kept),
    ):
        yield result
    of_sshd = sshd.judge(_ROOT, people[0].name if people else "root", is_root=os.geteuid() == 0)
    for result in (*of_sshd.results, *_pam(configured, of_sshd.services)):
        yield result
    async for result in units.judge(context.connection, directories):
        yield result
    exempt = functools.partial(users.exempt_reason, wanted.exemptions)
    async for result in unitsandbox.judge(context.connection, directories, exempt):
        yield result
    async for result in _logged_in(context, listed, wanted):
        yield result
    if context.options.probe is not None:
        async for result in _probe(context, people, wanted, of_sshd.services):
            yield result
    for result in (*host.cleaners(_ROOT), *host.kerberos(_ROOT), *host.containers(_ROOT)):
        yield result
    for result in sockets.judge(_ROOT, wanted):
        yield result


async def _socket(context: Context) -> Result:
    unit = "polytmpd.socket"
    try:
        found = await systemd1.unit_properties(context.connection, unit, ("ActiveState",))
    except BusError as error:
        return Result("daemon", unit, "skip", f"systemd does not answer: {error}")
    if found.get("ActiveState") == "active":
        return Result("daemon", unit, "pass", "waits for logins")
    text = f"does not wait for logins ({found.get('ActiveState', 'unknown')}): regular users are refused"
    return Result("daemon", unit, "fail", text, "systemctl restart polytmpd.service")


async def _daemon(context: Context) -> AsyncIterator[Result]:
    unit = "polytmpd.service"
    answers = ""
    with contextlib.suppress(BusError):
        answers = await context.client.version()
    try:
        found = await systemd1.unit_properties(
            context.connection, unit, ("ActiveState", "UnitFileState", "NRestarts")
        )
    except BusError as error:
        yield Result("daemon", f"{unit} (unit)", "skip", f"systemd does not answer: {error}")
        found = {}
    if answers:
        yield Result("daemon", unit, "pass", f"answers, version {answers}")
    elif found.get("ActiveState") == "active":
        yield Result("daemon", unit, "fail", "runs but does not answer", f"systemctl restart {unit}")
    else:
        text = f"not running ({found.get('ActiveState', 'unknown')}): it does not see who logs out"
        yield Result("daemon", unit, "fail", text, f"systemctl start {unit}")
    if not found:
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
        there = await context.connection.has_owner(sessions.SERVICE)
    except BusError:
        there = False
    if there:
        yield Result("daemon", "systemd-logind", "pass", "running")
    else:
        remedy = "systemctl status systemd-logind.service"
        yield Result(
            "daemon", "systemd-logind", "fail", "not running: polytmpd does not hear of logins", remedy
        )


def _everybody(people: Sequence[Person]) -> Iterator[Result]:
    """Whether there is anyone whose directories are private."""
    exempt = [person for person in people if person.exempt]
    if people and len(exempt) == len(people):
        names = ", ".join(output.clean(person.name) for person in exempt[:_NAMED_AT_MOST])
        text = f"no user in /etc/passwd gets private directories ({names}): {output.clean(exempt[0].exempt)}"
        remedy = (
            "correct RegularUIDs=, ExemptUsers=, ExemptGroups= and OnlyGroups= in polytmpd.conf, "
            f"or UID_MIN in login.defs; then: {_RELOAD}"
        )
        yield Result("settings", "/etc/passwd", "fail", text, remedy)
    elif people:
        text = f"{len(people) - len(exempt)} of {output.count(len(people), 'user')} with a login shell"
        yield Result("settings", "/etc/passwd", "pass", f"{text} get private directories")


def _pam(directories: Sequence[str], services: Sequence[str]) -> Iterator[Result]:
    """services: those that sshd uses."""
    try:
        ours = pammodules.load([pammodules.OURS])[pammodules.OURS]
        findings = pamcheck.judge(_ROOT, directories=directories, also=services, load=pammodules.load)
    except pammodules.LoadError as error:
        remedy = "python3 -c 'import ctypes; ctypes.CDLL(\"libpam.so.0\")' has to succeed"
        yield Result("PAM", "libpam", "fail", output.clean(str(error)), remedy)
        return
    if not ours.problem:
        yield Result("PAM", pammodules.OURS, "pass", ours.file)
    elif not any(ours.file in (finding.service, finding.text.partition(": ")[0]) for finding in findings):
        yield Result("PAM", ours.file, "fail", ours.problem, "apt install --reinstall polytmp")
    for finding in findings:
        yield Result("PAM", finding.service, finding.verdict, finding.text, finding.remedy)


async def _probe(
    context: Context, people: Sequence[Person], wanted: config.Config, services: Sequence[str]
) -> AsyncIterator[Result]:
    """A result for each service. services: those that sshd uses."""
    if os.geteuid() != 0:
        yield Result("probe", "sessions", "skip", "only root can open sessions of others", "run as root")
        return
    if context.options.probe:
        uid = users.uid_of(context.options.probe)
        name = users.name_of(uid)
        user = Person(uid, name, users.exempt_reason(wanted.exemptions, uid, name) or "")
    elif regulars := [person for person in people if not person.exempt]:
        user = regulars[0]
    else:
        yield Result("probe", "sessions", "fail", "no regular user in /etc/passwd", "name one: --probe=USER")
        return
    here = pamstacks.services(_ROOT)
    found = [name for name in pamcheck.TEXT_LOGINS if name in here and name != sshd.SERVICE]
    for service in context.options.services or (*services, *found):
        yield await probe.probe(context.connection, user, service, wanted.paths)


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
        host_namespace = units.namespace("1")
        for entry in os.scandir("/proc"):
            if not entry.name.isdecimal():
                continue
            try:
                uid = entry.stat().st_uid
                if units.namespace(entry.name) == host_namespace:
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
        if uid in listed or users.exempt_reason(wanted.exemptions, uid, users_of[uid]) is None
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

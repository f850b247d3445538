# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check finds in the PAM configuration: which services make their users' directories private, which do
not or refuse logins, and which file is at fault.

A stack is judged by what libpam makes of it, whatever its modules may return. A module that decides by user
or time may decide either way, and what it may do counts.
Not here: reading stacks (pamstacks.py), their outcome (pamdispatch.py), loading modules (pammodules.py).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from polytmpd.ctl import pamdispatch, pamearly, pammodules, pamstacks
from polytmpd.ctl.pamdispatch import VALUES, Ending, endings
from polytmpd.ctl.pammodules import OURS, Module
from polytmpd.ctl.pamstacks import SUBSTACK, Entry, Stack

SYSTEMD: Final = "pam_systemd.so"
NAMESPACE: Final = "pam_namespace.so"
_RIVALS: Final = {
    NAMESPACE: "cuts the session off from the host's mounts",
    "pam_mktemp.so": "sets TMPDIR to its own directory",
    "pam_tmpdir.so": "sets TMPDIR to its own directory",
}
COMMANDS: Final = ("sudo", "su", "runuser", "doas", "polkit-1", "pkexec")
"""COMMAND_SERVICES of pam_polytmp.c: what they start stays in the directories of whoever starts it."""
SERVERS: Final = ("dovecot", "ppp", "ocserv", "cups")
"""SERVER_SERVICES of pam_polytmp.c: servers that run nothing as their users."""
TEXT_LOGINS: Final = ("login", "sshd", "su-l", "sudo-i", "cron", "crond", "atd")
LOGINS: Final = (
    *TEXT_LOGINS,
    *("systemd-user", "gdm-password", "gdm-autologin", "gdm-fingerprint", "gdm-smartcard"),
    *("lightdm", "lightdm-autologin"),
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
    *("slurm", "runuser-l", "machinectl", "systemd-run0"),
)
"""Services that log users in."""
ON_PURPOSE: Final = ("runuser-l", "systemd-run0")
"""Services through which root acts for a user: without the module they see the host's /tmp, like root."""
_GREETERS: Final = ("gdm-launch-environment", "lightdm-greeter", "sddm-greeter")
_PROGRAMS: Final = {
    "login": "usr/bin/login",
    "su-l": "usr/bin/su",
    "sudo-i": "usr/bin/sudo",
    "cron": "usr/sbin/cron",
    "atd": "usr/sbin/atd",
    "systemd-user": "usr/lib/systemd/systemd",
}
"""Programs that ask for a service even if it has no file: `other` serves them."""
_DECIDING: Final = (
    *(
        "pam_access.so",
        "pam_exec.so",
        "pam_group.so",
        "pam_listfile.so",
        "pam_localuser.so",
        "pam_nologin.so",
    ),
    *(
        "pam_python.so",
        "pam_rhosts.so",
        "pam_rootok.so",
        "pam_script.so",
        "pam_securetty.so",
        "pam_shells.so",
    ),
    *("pam_succeed_if.so", "pam_time.so", "pam_usertype.so", "pam_wheel.so"),
)
"""Modules that succeed for some users and fail for others."""
_LINE: Final = f"session required {OURS}"
_ENABLE: Final = "pam-auth-update --enable polytmp"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about a PAM service, or about a file that several services use.

    service: its name, or the path of that file. verdict: pass, warn or fail.
    """

    service: str
    verdict: str
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class _Fault:
    """file: the one at fault. what: is wrong. effect: on the sessions of the services."""

    verdict: str
    file: str
    what: str
    effect: str
    remedy: str


_SHARED: Final = "get the shared /tmp"
_REFUSED: Final = "are refused"


def judge(
    root: Path,
    *,
    directories: Collection[str] = ("/tmp", "/var/tmp"),
    also: Collection[str] = (),
    load: pammodules.Load | None = None,
) -> list[Finding]:
    """A finding for each service that logs users in or has our module or systemd's; faults, grouped by file.

    directories: those that are private. also: further services that log users in. load: what examines the
    modules; without it, all are taken to be sound. Raises pammodules.LoadError.
    """
    stacks = {service: pamstacks.stack(root, service) for service in _services(root, also)}
    stacks = {name: stack for name, stack in stacks.items() if _matters(name, stack, also)}
    accounts = {name: pamstacks.stack(root, name, "account") for name in stacks}
    paths = {entry.path for stack in (*stacks.values(), *accounts.values()) for entry in _modules(stack)}
    modules = load(paths) if load is not None else {path: Module(path) for path in paths}
    rivals = _polyinstantiated(root)
    faults: dict[_Fault, list[str]] = {}
    found: list[Finding] = []
    for service, stack in stacks.items():
        judged = _Judge(service, stack, modules, is_login=service in LOGINS or service in also)
        fault = judged.account(accounts[service]) or judged.session(rivals & set(directories), bool(rivals))
        fault = fault or judged.early(pamstacks.stack(root, service, "auth"), _krb5_conf(root))
        if fault is not None:
            faults.setdefault(fault, []).append(service)
            continue
        entry = _ours(stack)
        by = f", by {stack.file}" if stack.is_others else ""
        stays = ""
        if _stays(service, entry):
            whose = "their caller's" if service in COMMANDS else "the server's"
            stays = f", leaves sessions in {whose} directories"
        found.append(Finding(service, "pass", f"{OURS} ({entry.control}){by}{stays}"))
    return sorted([*found, *(_finding(*pair) for pair in faults.items())], key=lambda each: each.service)


def _finding(fault: _Fault, services: Sequence[str]) -> Finding:
    name = services[0] if len(services) == 1 else fault.file
    place = "" if name == fault.file or fault.file.endswith(f"/{name}") else f"{fault.file}: "
    text = f"{place}{fault.what}: sessions of {', '.join(services)} {fault.effect}"
    return Finding(name, fault.verdict, text, fault.remedy)


def _services(root: Path, also: Collection[str]) -> list[str]:
    asked = [name for name, program in _PROGRAMS.items() if (root / program).exists()]
    skipped = {*_GREETERS, *ON_PURPOSE, pamstacks.OTHER}
    return sorted({*pamstacks.services(root), *asked, *also} - skipped)


def _matters(service: str, stack: Stack, also: Collection[str]) -> bool:
    if service in LOGINS or service in also:
        return True
    signs = {OURS} if service in (*COMMANDS, *SERVERS) else {SYSTEMD, OURS}
    return not stack.is_others and bool(signs & {entry.module for entry in stack.entries})


def _ours(stack: Stack) -> Entry:
    """The last line for our module: an early one comes in addition."""
    return next(entry for entry in reversed(stack.entries) if entry.module == OURS)


def _stays(service: str, entry: Entry) -> bool:
    """Whether our module leaves the session where it is, see pam_polytmp(8)."""
    for argument in reversed(entry.arguments):
        if argument in {"caller", "user"}:
            return argument == "caller"
    return service in (*COMMANDS, *SERVERS)


def _modules(stack: Stack) -> Iterator[Entry]:
    return (entry for entry in stack.entries if entry.control != SUBSTACK and not entry.broken)


def _polyinstantiated(root: Path) -> set[str]:
    """The directories that pam_namespace makes private, see namespace.conf(5)."""
    drop_ins = root / "etc/security/namespace.d"
    try:
        files = [root / "etc/security/namespace.conf", *sorted(drop_ins.glob("*.conf"))]
        texts = [file.read_text(errors="replace") for file in files if file.is_file()]
    except OSError:
        return set()
    lines = [line.partition("#")[0].split() for text in texts for line in text.splitlines()]
    return {words[0].rstrip("/") or "/" for words in lines if words}


def _krb5_conf(root: Path) -> str:
    try:
        return (root / "etc/krb5.conf").read_text(errors="replace")
    except OSError:
        return ""


class _Judge:
    """Judges one service."""

    def __init__(self, service: str, stack: Stack, modules: Mapping[str, Module], *, is_login: bool) -> None:
        self._service = service
        self._is_login = is_login
        self._stack = stack
        self._modules = modules
        self._place = stack.file if not stack.is_others else f"/etc/pam.d/{service}"

    def account(self, stack: Stack) -> _Fault | None:
        """A fault that refuses the session before it begins. Modules that decide may let users in."""
        if stack.error or not stack.entries or (stack.is_others and not self._stack.is_others):
            return None  # this program may not ask
        found = endings(stack.entries, self._usual("account"))
        return None if any(ending.opened for ending in found) else self._refusal(found, "account")

    def session(self, shared: Collection[str], has_rival: bool) -> _Fault | None:
        stack = self._stack
        if stack.error:
            return self._unreadable(stack)
        usual = endings(stack.entries, self._usual("session"), self._is_ours)
        if usual and not any(ending.opened for ending in usual):
            return self._refusal(usual, "session")
        if all(entry.module != OURS for entry in stack.entries):
            return self._missing()
        if _stays(self._service, ours := _ours(stack)):
            return self._caller(ours) if self._is_login else None
        if fault := self._passed_over(usual, "fail"):
            return fault
        if fault := self._passed_over(endings(stack.entries, self._any(), self._is_ours), "warn"):
            return fault
        return self._rival(shared, has_rival) or self._order() or self._lenient()

    def early(self, auth: Stack, krb5_conf: str) -> _Fault | None:
        """Whether modules leave something on the host before the session is private."""
        entries = self._stack.entries
        if all(entry.module != OURS for entry in entries) or _stays(self._service, _ours(self._stack)):
            return None
        here = [entry for entry in entries if entry.path in self._modules]
        here = [entry for entry in here if not self._problem(entry, "session")]
        left = pamearly.program(here, self._stack.file) or pamearly.ticket((*auth.entries, *here), krb5_conf)
        return None if left is None else _Fault("warn", left.file, left.what, left.effect, left.remedy)

    # What modules return

    def _problem(self, entry: Entry, kind: str) -> str:
        module = self._modules[entry.path]
        if not module.symbols:
            return module.problem or "it is no PAM module"
        function = pammodules.FUNCTIONS[kind]
        return "" if function in module.symbols else f"it has no {function}()"

    def _is_ours(self, entry: Entry) -> bool:
        if entry.broken or entry.module != OURS:
            return False
        return not self._modules[entry.path].problem and not self._problem(entry, "session")

    def _usual(self, kind: str) -> Callable[[Entry], Collection[str]]:
        def returned(entry: Entry) -> Collection[str]:
            if entry.broken:
                return ("perm_denied",)
            if self._problem(entry, kind):
                return ("module_unknown",)
            if entry.module == "pam_deny.so":
                return ("session_err" if kind == "session" else "acct_expired",)
            return ("success", "auth_err") if entry.module in _DECIDING else ("success",)

        return returned

    def _any(self) -> Callable[[Entry], Collection[str]]:
        """Each module may return anything, but for those of which it is known."""
        usual = self._usual("session")

        def returned(entry: Entry) -> Collection[str]:
            known = usual(entry)
            if known != ("success",) or entry.module == "pam_permit.so" or self._is_ours(entry):
                return known
            one_each = {
                (pamdispatch.action(entry.control, value), value == "success"): value for value in VALUES
            }
            return one_each.values()

        return returned

    # Faults

    def _unreadable(self, stack: Stack) -> _Fault:
        effect = "may be refused, depending on the version of libpam" if stack.doubtful else _REFUSED
        return _Fault("fail", stack.file, stack.error, effect, f"correct {stack.file}")

    def _refusal(self, found: Collection[Ending], kind: str) -> _Fault:
        entry = next((ending.by for ending in found if ending.by is not None), None)
        if entry is None:
            file = self._stack.file
            return _Fault("fail", file, f"no {kind} module decides", _REFUSED, f"correct {file}")
        line = f"'{kind} {entry.control} {entry.path}'"
        if entry.broken:
            what, remedy = f"an {kind} line that libpam cannot use ({line})", f"correct {entry.file}"
        elif problem := self._problem(entry, kind):
            return self._bad_module(entry, problem, _REFUSED)
        elif pamdispatch.actions(entry.control) == {"default": "bad"}:
            what, remedy = f"{line} has an unknown control", f"correct it in {entry.file}"
        else:
            what, remedy = f"{line} refuses", f"remove or correct it in {entry.file}"
        return _Fault("fail", entry.file, what, _REFUSED, remedy)

    def _bad_module(self, entry: Entry, problem: str, effect: str) -> _Fault:
        file = self._modules[entry.path].file
        if entry.module == OURS and not entry.path.startswith("/"):
            remedy = "apt install --reinstall polytmp"
        elif entry.module == OURS:
            remedy = f"write '{OURS}' without a directory in {entry.file}"
        else:
            remedy = f"install {entry.module}, or remove it from {entry.file}"
        return _Fault("fail", file, problem, effect, remedy)

    def _missing(self) -> _Fault:
        what = f"no {OURS} in its session stack"
        included = [entry.file for entry in self._stack.entries if entry.file != self._stack.file]
        file = included[-1] if included else self._stack.file
        if Path(file).name.startswith("common-session"):
            remedy = (
                f"{_ENABLE}; if it reports \"Local modifications\": add '{_LINE}' to {file} (or use --force)"
            )
        elif self._stack.is_others:
            remedy = f"create {self._place}, with '{_LINE}' at its end"
            what = f"no session stack of its own, and no {OURS} in {self._stack.file}"
        else:
            remedy = f"add '{_LINE}' at the end of {file}"
        return _Fault("fail", file, what, _SHARED, remedy)

    def _caller(self, entry: Entry) -> _Fault:
        what = f"'{entry.control} {OURS}' has the argument 'caller'"
        effect = "stay in the directories of the program that opens them"
        return _Fault("fail", entry.file, what, effect, f"remove 'caller' from {entry.file}")

    def _passed_over(self, found: Collection[Ending], verdict: str) -> _Fault | None:
        passing = [ending for ending in found if ending.opened and not ending.reached]
        if not passing:
            return None
        entries = [entry for entry in self._stack.entries if any(ending.by == entry for ending in passing)]
        if not entries:
            entry = _ours(self._stack)
            problem = self._modules[entry.path].problem or self._problem(entry, "session")
            if not problem:
                return None
            return self._bad_module(entry, problem, _SHARED)
        entry = entries[0]
        may = "skips" if verdict == "fail" and entry.module not in _DECIDING else "may skip"
        what = f"'{entry.control} {entry.module}' {may} {OURS}"
        remedy = f"move {OURS} before that line, but after {SYSTEMD}"
        if entry.module in _DECIDING:
            remedy += "; to exempt users, use ExemptUsers= of polytmpd.conf(5)"
        return _Fault(verdict, entry.file, what, _SHARED, remedy)

    def _rival(self, shared: Collection[str], has_any: bool) -> _Fault | None:
        for entry in self._stack.entries:
            if entry.broken or entry.module not in _RIVALS:
                continue
            remedy = f"remove {entry.module} from {entry.file}"
            if entry.module == NAMESPACE and shared:
                what = f"{NAMESPACE} mounts {', '.join(sorted(shared))} too (/etc/security/namespace.conf)"
                return _Fault("fail", entry.file, what, "do not get polytmp's directories", remedy)
            what = f"{entry.module}, also in the stack, {_RIVALS[entry.module]}"
            effect = "are private all the same" if entry.module != NAMESPACE or has_any else "may differ"
            return _Fault("warn", entry.file, what, effect, remedy)
        return None

    def _order(self) -> _Fault | None:
        names = [entry.module for entry in self._stack.entries]
        number = max(n for n, name in enumerate(names) if name == OURS)  # an early one comes in addition
        # The user manager is not a separate session: on Debian its stack has pam_systemd last.
        if SYSTEMD not in names[number:] or SYSTEMD in names[:number] or self._service == "systemd-user":
            return None
        file = self._stack.entries[number].file
        what = f"{OURS} comes before {SYSTEMD}"
        return _Fault(
            "warn", file, what, "are not known to logind yet", f"move {OURS} after {SYSTEMD} in {file}"
        )

    def _lenient(self) -> _Fault | None:
        """Whether the session continues if our module refuses."""
        entries = self._stack.entries
        usual = self._usual("session")
        refusing = endings(entries, lambda entry: ("perm_denied",) if self._is_ours(entry) else usual(entry))
        if not any(ending.opened for ending in refusing):
            return None
        entry = _ours(self._stack)
        what = f"'{entry.control} {OURS}': if the daemon fails, the login continues with the shared /tmp"
        remedy = f"unless this is intended, use 'required' in {entry.file}"
        return _Fault("warn", entry.file, what, "are not refused then", remedy)

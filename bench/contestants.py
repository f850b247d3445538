# SPDX-License-Identifier: LGPL-2.1-or-later
"""The machines that are compared: the same Debian without anything, with pam_namespace, with polytmp.

They run at the same time, so that they take turns at every login. A second machine without anything shows
how much two equal ones differ.
Not here: what is measured in them.
"""

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from tests import observe
from tests.bed import BedError, Machine, build, eventually

PROJECT: Final = Path(__file__).resolve().parents[1]
PLAIN: Final = "plain"
AGAIN: Final = "plain again"
PEER: Final = "pam_namespace"
OURS: Final = "polytmp"
RUNS_NOTHING: Final = (PLAIN, AGAIN)
NAMES: Final = (PLAIN, AGAIN, PEER, OURS)

INSIDE: Final = "/opt/bench"
LOGIND: Final = "bench-logind"
"""PAM service: pam_systemd alone."""
MODULE: Final = "bench-module"
"""PAM service: the contestant's module alone."""
STACK: Final = "bench-stack"
"""PAM service: the session modules that Debian configures, and the contestant's."""

_MODULES: Final = {PEER: "pam_namespace.so", OURS: "pam_polytmp.so"}
FIRST_UID: Final = 2001
CROWD: Final = 10_000
"""Users u2001 and so on, if the machine is made for a crowd."""


def prepare(root: Path, name: str) -> None:
    observe.quick_logouts(root)
    module = _MODULES.get(name, "pam_permit.so")
    if name == PEER:
        for directory in ("tmp-inst", "var/tmp/tmp-inst"):
            (root / directory).mkdir(mode=0o000)
        lines = "/tmp /tmp-inst/ user root\n/var/tmp /var/tmp/tmp-inst/ user root\n"  # namespace.conf(5)
        observe.write(root, "etc/security/namespace.conf", lines)
        for stack in ("common-session", "common-session-noninteractive"):
            with (root / "etc/pam.d" / stack).open("a") as file:
                file.write(f"session required {module}\n")
    services = {
        LOGIND: "session required pam_systemd.so\n",
        MODULE: f"session required {module}\n",
        STACK: "@include common-session\n",
    }
    for service, text in services.items():
        observe.write(root, f"etc/pam.d/{service}", text)
    for program in (PROJECT / "bench/inside").glob("*.py"):
        observe.write(root, f"{INSIDE}/{program.name}".lstrip("/"), program.read_text())


def add_crowd(root: Path) -> None:
    """Users for instances in numbers, and the program that their processes run."""
    uids = range(FIRST_UID, FIRST_UID + CROWD)
    with (root / "etc/passwd").open("a") as passwd, (root / "etc/group").open("a") as group:
        passwd.writelines(f"u{uid}:x:{uid}:{uid}::/:/bin/sh\n" for uid in uids)
        group.writelines(f"u{uid}:x:{uid}:\n" for uid in uids)
    waiter = root / INSIDE.lstrip("/") / "waiter"
    waiter.parent.mkdir(parents=True, exist_ok=True)
    source = PROJECT / "bench/inside/waiter.c"
    subprocess.run(["cc", "-O2", "-static", "-o", str(waiter), str(source)], check=True)


class Contestant:
    """A booted machine under its name in the tables."""

    def __init__(self, name: str, machine: Machine) -> None:
        self.name = name
        self.machine = machine
        self.root = Path("/proc", str(machine.leader), "root")
        self.host = machine.run("readlink", "/proc/1/ns/mnt").stdout.strip()

    def is_quiet(self) -> bool:
        """Whether nobody is logged in, and nothing is left of those who were."""
        left = [self.root / "run/systemd/users", self.root / "run/polytmpd/instances"]
        return not any(directory.exists() and any(directory.iterdir()) for directory in left)

    def wait_until_quiet(self) -> None:
        eventually(self.is_quiet, 60, f"everybody has left {self.name}")

    def sessions(self) -> int:
        directory = self.root / "run/systemd/sessions"
        return len([entry for entry in directory.iterdir() if not entry.name.endswith(".ref")])

    def cpu(self) -> float:
        """Milliseconds of CPU time that polytmpd has used since it started."""
        path = self.root / "sys/fs/cgroup/system.slice/polytmpd.service/cpu.stat"
        return int(path.read_text().split()[1]) / 1000

    def python(self, program: str, *words: str, timeout: float = 600) -> Any:
        """Run a program of bench/inside and return its output, which is JSON."""
        return json.loads(self.machine.run("python3", f"{INSIDE}/{program}", *words, timeout=timeout).stdout)

    @contextlib.contextmanager
    def pam(self) -> Iterator["Pam"]:
        """sessions.py, running in the machine."""
        process = self.machine.popen("python3", f"{INSIDE}/sessions.py")
        try:
            yield Pam(process, self.name)
        finally:
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
            process.kill()
            process.wait()

    def require_module(self) -> None:
        """Raise BedError if PAM does not run what the name says."""
        with self.machine.session("alice") as session:
            moved = session.run("readlink /proc/self/ns/mnt").strip() != self.host
        if moved == (self.name in RUNS_NOTHING):
            raise BedError(f"PAM does not run {self.name}")
        self.wait_until_quiet()


class Pam:
    """Talks to sessions.py. slow: called with the users whose session takes over five seconds to open."""

    def __init__(self, process: "subprocess.Popen[bytes]", name: str) -> None:
        self._process = process
        self._name = name
        self.slow: Callable[[list[str]], None] = lambda _: None

    def time(self, services: list[str], user: str, count: int) -> list[float]:
        """Milliseconds that the last of the services took, for each of so many sessions."""
        return [spent[-1] for spent in self.times(services, user, count)]

    def times(self, services: list[str], user: str, count: int) -> list[list[float]]:
        """Milliseconds that each of the services took, for each of so many sessions."""
        found: list[list[float]] = self._ask(do="time", service=services, user=user, count=count)["ms"]
        return found

    def open(self, services: list[str], users: list[str], at_once: int = 1) -> list[float]:
        """Milliseconds that the last of them took, for a session of each user, which stays open."""
        answer = self._ask(do="open", service=services, users=users, at_once=at_once)
        return [spent[-1] for spent in answer["ms"]]

    def look(self, users: list[str]) -> dict[str, list[str]]:
        """User → [their namespace, what is in their file]."""
        found: dict[str, list[str]] = self._ask(do="look", users=users)["found"]
        return found

    def close(self, users: list[str]) -> None:
        self._ask(do="close", users=users)

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        while True:
            line = self._process.stdout.readline()
            answer: dict[str, Any] = json.loads(line) if line else {"failed": self._error()}
            if "failed" in answer:
                raise BedError(f"{self._name}: {answer['failed']}")
            if "slow" not in answer:
                return answer
            self.slow(answer["slow"])

    def _error(self) -> str:
        assert self._process.stderr is not None
        return self._process.stderr.read().decode(errors="replace")[-2000:]


def settled(contestant: Contestant) -> float:
    """cpu(), when polytmpd has nothing more to do."""
    last = contestant.cpu()
    while True:
        time.sleep(0.3)  # how quiet it is shows only in time
        now = contestant.cpu()
        if now - last < 0.05:
            return now
        last = now


@contextlib.contextmanager
def booted(release: str, names: tuple[str, ...], *, crowd: bool = False) -> Iterator[list[Contestant]]:
    """Boot the contestants, one machine each. Raises BedError."""

    def prepared(name: str) -> Callable[[Path], None]:
        def work(root: Path) -> None:
            prepare(root, name)
            if crowd:
                add_crowd(root)

        return work

    with contextlib.ExitStack() as stack:
        found = []
        for name in names:
            deb = build(release) if name == OURS else None
            machine = stack.enter_context(Machine(release, deb, prepare=prepared(name)))
            found.append(Contestant(name, machine))
        for contestant in found:
            contestant.require_module()
        yield found

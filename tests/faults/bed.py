# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine whose polytmpd runs under the launcher, and cheap looks at what is left of an instance.

The tests wait for hundreds of faults, so most looks go through /proc/LEADER/root, which starts no process in
the machine.

Not here: what should be seen (tests/e2e/test_faults*.py).
"""

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import observe
from tests.bed import Machine, Result, Session, eventually
from tests.faults import launcher
from tests.faults.launcher import Plan

LAUNCHER = "/usr/local/lib/polytmp-faults/launcher.py"
DROP_IN = f"""[Service]
ExecStart=
ExecStart=/usr/bin/python3 -I {LAUNCHER}
RuntimeDirectory=polytmp-faults
RestartSec=50ms
"""
LOGIN_AT_MOST = 60.0


def prepare(root: Path) -> None:
    """For Machine(prepare=…): run the launcher instead of the daemon, and make logouts quick."""
    observe.quick_logouts(root)
    target = root / LAUNCHER.removeprefix("/")
    target.parent.mkdir(parents=True)
    shutil.copyfile(launcher.__file__, target)
    observe.write(root, "etc/systemd/system/polytmpd.service.d/faults.conf", DROP_IN)


@dataclasses.dataclass(frozen=True, slots=True)
class Traces:
    """Everything that a machine has of polytmp, except what persists."""

    instances: dict[int, str]
    on_disk: tuple[str, ...]
    states: tuple[str, ...]
    held: int
    watches: int
    stored: int


NOTHING = Traces({}, (), (), 0, 0, 1)
"""The traces when there is no instance: the FD store contains the inotify instance only."""


class Host:
    """A machine, with looks at it, faults and logins."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._begin = machine.now()

    @property
    def root(self) -> Path:
        """The machine's mounts as its PID 1 sees them."""
        return Path(f"/proc/{self.machine.leader}/root")

    # Looks

    def service(self) -> dict[str, str]:
        names = ("MainPID", "ActiveState", "SubState", "NFileDescriptorStore", "NRestarts")
        options = [f"--property={name}" for name in names]
        lines = self.machine.run("systemctl", "show", *options, "polytmpd").stdout.splitlines()
        return dict(line.split("=", 1) for line in lines)

    def pid(self) -> int:
        return int(self.service()["MainPID"])

    def running(self) -> int:
        """Return the PID of the daemon if it is ready, 0 otherwise."""
        service = self.service()
        return int(service["MainPID"]) if service["ActiveState"] == "active" else 0

    def instances(self) -> dict[int, str]:
        """Return UID → state of all instances."""
        call = ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
        argv = ["busctl", "--json=short", "--timeout=20", "call", "org.polytmp1", "/org/polytmp1", *call]
        reply: dict[str, Any] = json.loads(self.machine.run(*argv).stdout)
        found = {}
        for interfaces in reply["data"][0].values():
            properties = interfaces.get("org.polytmp1.Instance")
            if properties is not None:
                found[int(properties["UID"]["data"])] = str(properties["State"]["data"])
        return found

    def state(self, uid: int) -> str | None:
        return self.instances().get(uid)

    def on_disk(self) -> tuple[str, ...]:
        found = [path for base in ("tmp", "var/tmp") for path in (self.root / base).glob("polytmp-*")]
        return tuple(
            sorted(
                "/" + str(path.relative_to(self.root))
                for path in found
                if not re.fullmatch(r"polytmp-\d+", path.name)
            )
        )

    def states(self) -> tuple[str, ...]:
        with contextlib.suppress(FileNotFoundError):
            return tuple(sorted(path.name for path in (self.root / "run/polytmpd/instances").iterdir()))
        return ()

    def traces(self) -> Traces:
        service = self.service()
        process = self.root / "proc" / service["MainPID"]
        held = watches = 0
        for fd in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                target = str(fd.readlink())
                held += target.startswith("mnt:[")
                if target == "anon_inode:inotify":
                    # Sentinels are watched for IN_DELETE_SELF alone. So are the mount points in an instance,
                    # with the barrier beside them, which is watched for IN_DELETE, too.
                    text = (process / "fdinfo" / fd.name).read_text()
                    watches += 0 if "mask:600 " in text else text.count("mask:400 ")
        stored = int(service["NFileDescriptorStore"])
        return Traces(self.instances(), self.on_disk(), self.states(), held, watches, stored)

    def host_namespace(self) -> str:
        return str(Path(f"/proc/{self.machine.leader}/ns/mnt").readlink())

    def journal_of(self, *words: str) -> bool:
        """Whether polytmpd has logged a line with all the words since this object was made."""
        since = f"--since={self._begin}"
        lines = self.machine.journal("-u", "polytmpd", "--output=cat", since).splitlines()
        return any(all(word in line for word in words) for line in lines)

    # Waiting

    def wait_gone(self, what: str = "nothing is left of any instance", timeout: float = 60) -> None:
        self.wait_for(NOTHING, what, timeout)

    def wait_for(self, wanted: Traces, what: str, timeout: float = 60) -> None:
        seen: list[Traces] = []

        def same() -> bool:
            seen[:] = [self.traces()]
            return seen[0] == wanted

        try:
            eventually(same, timeout, what)
        except AssertionError as error:
            raise AssertionError(f"{error}: {seen} instead of {wanted}") from None

    # Faults

    def plan(self, plan: Plan) -> None:
        directory = self.root / "run/polytmp-faults"
        for name in ("fired", "trace"):
            (directory / name).unlink(missing_ok=True)
        temporary = directory / "plan.new"
        temporary.write_text(json.dumps(dataclasses.asdict(plan)))
        temporary.replace(directory / "plan")

    def unplan(self) -> None:
        (self.root / "run/polytmp-faults/plan").unlink(missing_ok=True)

    def fired(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.root / "run/polytmp-faults/fired").read_text()
        return ""

    def trace(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return (self.root / "run/polytmp-faults/trace").read_text().splitlines()
        return []

    def watchdog(self) -> contextlib.AbstractContextManager[None]:
        """Give polytmpd a watchdog timeout of four seconds."""
        return self.setting("WatchdogSec=4s")

    @contextlib.contextmanager
    def setting(self, line: str) -> Iterator[None]:
        """Restart polytmpd with another line in the unit's [Service]."""
        drop_in = "/run/systemd/system/polytmpd.service.d/setting.conf"
        self.machine.write(drop_in, f"[Service]\n{line}\n")
        self.machine.sh("systemctl daemon-reload && systemctl restart polytmpd")
        try:
            yield
        finally:
            self.machine.sh(f"rm {drop_in}; systemctl daemon-reload; systemctl restart polytmpd")

    @contextlib.contextmanager
    def fault(self, plan: Plan) -> Iterator[None]:
        """Plan a fault, and withdraw it at the end."""
        self.plan(plan)
        try:
            yield
        finally:
            self.unplan()

    # Logins

    def login(self, user: str, command: str, *, check: bool = True) -> Result:
        return self.machine.ssh(user, command, check=check, timeout=LOGIN_AT_MOST)


class Resident:
    """A user who stays logged in, and must not notice anything."""

    def __init__(self, session: Session) -> None:
        self._session = session
        session.run("echo mine > /tmp/mine; echo mine > /var/tmp/mine")
        self.namespace = self._look()[-1]

    def _look(self) -> list[str]:
        return self._session.run(f"cat /tmp/mine /var/tmp/mine; {observe.NAMESPACE}").split()

    def check(self) -> None:
        assert self._look() == ["mine", "mine", self.namespace]


@contextlib.contextmanager
def resident(machine: Machine, user: str = "bob") -> Iterator[Resident]:
    with machine.session(user) as session:
        yield Resident(session)

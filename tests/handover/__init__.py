# SPDX-License-Identifier: LGPL-2.1-or-later
"""A command that has root record where it and all processes are, and the rule that holds for each of them.

Not here: the programs that hand over between users (tests/e2e/test_handover.py).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests import observe
from tests.bed import Machine, eventually

WITNESS: Final = "/usr/local/bin/witness"
RECORDS: Final = "/run/witness"


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    name: str
    uid: int
    namespace: str


@dataclass(frozen=True, slots=True)
class Record:
    """All processes at the moment in which the witness called."""

    witness: Process
    processes: dict[int, Process]

    def ancestors(self, process: Process) -> list[Process]:
        found = []
        while (parent := self.processes.get(process.parent)) is not None:
            found.append(parent)
            process = parent
        return found


def install(root: Path) -> None:
    """For Machine(prepare=…): put the command in place."""
    program = root / WITNESS.removeprefix("/")
    program.write_text((Path(__file__).parent / "witness.py").read_text())
    program.chmod(0o755)


def start(machine: Machine) -> None:
    """Start the recorder."""
    machine.run("systemd-run", "--quiet", "--unit=witness", WITNESS, "--serve")
    eventually(lambda: machine.run("test", "-S", "/run/witness.sock", check=False).returncode == 0, 10)


def record(machine: Machine, label: str, timeout: float = 20) -> Record:
    """Wait until the witness has called, and return what was seen; the next call needs a new record."""
    path = f"{RECORDS}/{label}.json"
    present = ("test", "-e", path)
    eventually(lambda: machine.run(*present, check=False).returncode == 0, timeout, f"witness {label}")
    found = json.loads(machine.read(path))
    machine.run("rm", path)
    processes = {entry["pid"]: Process(**entry) for entry in found["processes"]}
    return Record(processes[found["pid"]], processes)


def places(machine: Machine, users: dict[str, int]) -> dict[str, str]:
    """Return "host" and each user's name → their mount namespace; users without an instance are missing."""
    host = machine.run("readlink", "/proc/1/ns/mnt").stdout.strip()
    instances = observe.instances(machine)
    found = {
        user: f"mnt:[{observe.status(machine, user)['namespace']}]" for user in users if user in instances
    }
    return {"host": host} | found


def strangers(record: Record, places: dict[str, str], users: dict[str, int]) -> list[str]:
    """Return the processes that break the rule.

    No process comes to be in a user's namespace under another regular user's UID unless that user's own
    session started it.
    """
    owners = {namespace: place for place, namespace in places.items() if place != "host"}
    found = []
    for process in record.processes.values():
        owner = owners.get(process.namespace)
        if owner is None or process.uid not in users.values() or process.uid == users[owner]:
            continue
        started = any(
            parent.uid == users[owner] and parent.namespace == process.namespace
            for parent in record.ancestors(process)
        )
        if not started:
            found.append(f"{process.name} of UID {process.uid} in the namespace of {owner}")
    return found

# SPDX-License-Identifier: LGPL-2.1-or-later
"""polytmpd from outside: its process, its descriptors, and what it reports on the bus and in the journal.

Not here: what is right (checker.py).
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from tests.bed import Machine

from . import proc

_CALL = ("busctl", "--json=short", "--timeout=10", "call", "org.polytmp1", "/org/polytmp1")
TROUBLE = (
    "Internal error",
    "IllegalEvent",
    "Failed to delete",
    "Cannot determine whether the instance",
    "Cannot yet determine whether the instance",
    "Failed to watch for the end",
)
"""What polytmpd must not log."""
_PYTHON_TROUBLE = ("Traceback", "never retrieved")


class Daemon:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.listed: dict[int, dict[str, Any]] = {}
        """What instances() returned last."""
        self.at_rest = self.descriptors()[0]
        """How many descriptors it has open, besides namespaces, when no user is logged in."""

    def pid(self) -> int | None:
        for pid in proc.pids():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"/usr/libexec/polytmpd" not in command:
                    continue
                groups = Path(f"/proc/{pid}/cgroup").read_text()
                if self._machine.name in groups and "/polytmpd.service" in groups:
                    return pid
        return None

    def descriptors(self) -> tuple[int, list[int]]:
        """Return (the number of descriptors that are no namespaces, the namespaces)."""
        pid = self.pid()
        if pid is None:
            return 0, []
        namespaces = proc.namespaces_of(pid)
        return len(proc.scan(Path(f"/proc/{pid}/fd"))) - len(namespaces), namespaces

    def instances(self) -> dict[int, dict[str, Any]]:
        """Return UID → properties, as the bus has the instances. Raises CommandError and ValueError."""
        method = ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
        answer = json.loads(self._machine.run(*_CALL, *method, timeout=15).stdout)
        found = {}
        for interfaces in answer["data"][0].values():
            properties = {
                name: value["data"] for name, value in interfaces.get("org.polytmp1.Instance", {}).items()
            }
            if properties:
                found[int(properties["UID"])] = properties
        self.listed = found
        return found

    def stored(self) -> int:
        """Count the descriptors in the FD store. Raises CommandError and ValueError."""
        return int(self._machine.run("systemctl", "show", "-P", "NFileDescriptorStore", "polytmpd").stdout)

    def trouble(self) -> list[str]:
        """Return the lines of the journal that must not be there."""
        lines = self._machine.journal("-u", "polytmpd").splitlines()
        return [line for line in lines if any(text in line for text in (*TROUBLE, *_PYTHON_TROUBLE))]

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an administrator can see of polytmp on a booted system: for tests, demo and soak.

Not its business: what should be seen.
"""

import json
from typing import Any

from tests.bed import Machine, eventually

NAMESPACE = "readlink /proc/self/ns/mnt"
QUICK_LOGOUT = "[Login]\nUserStopDelaySec=0\n"
"""logind keeps a user's manager for 10 s after his last session; tests need not wait for that."""


def instances(machine: Machine) -> dict[str, str]:
    """User → state, as polytmpctl lists them."""
    rows: list[dict[str, Any]] = json.loads(
        machine.run("polytmpctl", "--json=short", "list", timeout=20).stdout
    )
    return {row["user"]: row["state"] for row in rows}


def state(machine: Machine, user: str) -> str | None:
    return instances(machine).get(user)


def status(machine: Machine, user: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(machine.run("polytmpctl", "--json=short", "status", user).stdout)
    return found


def on_disk(machine: Machine) -> list[str]:
    """Everything of ours in the host's /tmp and /var/tmp but what persists."""
    script = "find /tmp /var/tmp -maxdepth 1 -name 'polytmp-*' ! -regex '/var/tmp/polytmp-[0-9]+' | sort"
    return machine.sh(script).stdout.splitlines()


def held(machine: Machine) -> list[str]:
    """The mount namespaces that the daemon holds open."""
    script = "find /proc/$(systemctl show -P MainPID polytmpd)/fd -lname 'mnt:*' -printf '%l\\n' | sort"
    return machine.sh(script).stdout.split()


def instances_made(machine: Machine) -> int:
    """How often the journal has a new instance."""
    return machine.journal("-u", "polytmpd", "--output=cat").count("New instance of user")


def daemon_fds(machine: Machine) -> int:
    script = "ls /proc/$(systemctl show -P MainPID polytmpd)/fd | wc -l"
    return int(machine.sh(script).stdout)


def stored(machine: Machine) -> int:
    """Descriptors in the FD store."""
    return int(machine.run("systemctl", "show", "-P", "NFileDescriptorStore", "polytmpd").stdout)


def mounts(machine: Machine) -> list[str]:
    """The host's mount points, without those that logind makes and unmakes in its own time."""
    found = machine.sh("cut -d' ' -f5 /proc/1/mountinfo").stdout.splitlines()
    return sorted(path for path in found if not path.startswith("/run/user/"))


def namespaces(machine: Machine) -> set[str]:
    """The mount namespaces that any process lives in."""
    return set(machine.sh("readlink /proc/*/ns/mnt 2>/dev/null | sort -u || true").stdout.split())


def gone(machine: Machine, user: str) -> bool:
    """Nothing is left of the user's instance: on the bus, on disk, in the daemon, in the FD store."""
    uid = machine.run("id", "-u", user).stdout.strip()
    return (
        user not in instances(machine)
        and not [path for path in on_disk(machine) if f"-{uid}-" in path or "removing" in path]
        and not [line for line in machine.sh("ls /run/polytmpd/instances").stdout.split() if line == uid]
        and not held(machine)
    )


def log_everybody_out(machine: Machine) -> None:
    """Back to a quiet system: no sessions, no instances, no linger."""
    machine.sh(
        "for user in alice bob; do loginctl disable-linger $user; loginctl terminate-user $user; pkill "
        "-KILL -u $user; "
        "done; true",
        check=False,
    )
    eventually(lambda: not instances(machine) and not on_disk(machine), 30, "all instances are gone")

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an administrator can see of polytmp on a booted system, for tests, demo and soak; and how to get back
to a quiet system.

Not here: what should be seen.
"""

import json
import re
from pathlib import Path
from typing import Any

from tests.bed import Machine, eventually

NAMESPACE = "readlink /proc/self/ns/mnt"
QUICK_LOGOUT = "[Login]\nUserStopDelaySec=0\n"
"""logind keeps a user's manager for 10 s after their last session; tests need not wait for that."""


def quick_logouts(root: Path) -> None:
    """For Machine(prepare=…): configure logind for QUICK_LOGOUT."""
    write(root, "etc/systemd/logind.conf.d/quick.conf", QUICK_LOGOUT)


def write(root: Path, name: str, text: str) -> None:
    """Write a file into a machine that is not booted yet; missing directories are made."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def instances(machine: Machine) -> dict[str, str]:
    """Return user → state, as polytmpctl lists them."""
    rows: list[dict[str, Any]] = json.loads(
        machine.run("polytmpctl", "--json=short", "list", timeout=20).stdout
    )
    return {row["user"]: row["state"] for row in rows}


def state(machine: Machine, user: str) -> str | None:
    return instances(machine).get(user)


def status(machine: Machine, user: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(machine.run("polytmpctl", "--json=short", "status", user).stdout)
    return found


def directories(machine: Machine, user: str) -> dict[str, str]:
    """Return directory, as the user sees it → its path on the host."""
    return {entry["directory"]: entry["path"] for entry in status(machine, user)["directories"]}


def on_disk(machine: Machine) -> list[str]:
    """Return everything of polytmp in the host's /tmp and /var/tmp except what persists."""
    script = "find /tmp /var/tmp -maxdepth 1 -name 'polytmp-*' ! -regex '/var/tmp/polytmp-[0-9]+' | sort"
    return machine.sh(script).stdout.splitlines()


def held(machine: Machine) -> list[str]:
    """Return the mount namespaces that the daemon holds open."""
    script = "find /proc/$(systemctl show -P MainPID polytmpd)/fd -lname 'mnt:*' -printf '%l\\n' | sort"
    return machine.sh(script).stdout.split()


def instances_made(machine: Machine) -> int:
    """Count the new instances that the journal reports."""
    return machine.journal("-u", "polytmpd", "--output=cat").count("New instance of user")


def daemon_fds(machine: Machine) -> int:
    script = "ls /proc/$(systemctl show -P MainPID polytmpd)/fd | wc -l"
    return int(machine.sh(script).stdout)


def daemon_memory(machine: Machine, field: str = "VmRSS") -> int:
    """Return a field of the daemon's /proc/PID/status in KiB: VmRSS, or VmHWM for the peak."""
    text = machine.sh("cat /proc/$(systemctl show -P MainPID polytmpd)/status").stdout
    return int(re.search(rf"{field}:\s*(\d+)", text)[1])  # type: ignore[index]  # the line is always there


def restarts(machine: Machine) -> int:
    """Count how often systemd has restarted the daemon because it failed."""
    return int(machine.run("systemctl", "show", "-P", "NRestarts", "polytmpd").stdout)


def stored(machine: Machine) -> int:
    """Count the descriptors in the FD store."""
    return int(machine.run("systemctl", "show", "-P", "NFileDescriptorStore", "polytmpd").stdout)


def mounts(machine: Machine) -> list[str]:
    """Return the host's mount points, except those that logind mounts and unmounts in its own time."""
    found = machine.sh("cut -d' ' -f5 /proc/1/mountinfo").stdout.splitlines()
    return sorted(path for path in found if not path.startswith("/run/user/"))


def namespaces(machine: Machine) -> set[str]:
    """Return the mount namespaces that processes live in."""
    return set(machine.sh("readlink /proc/*/ns/mnt 2>/dev/null | sort -u || true").stdout.split())


def gone(machine: Machine, user: str) -> bool:
    """Whether nothing is left of the user's instance on the bus, on disk, or as a state file.

    The daemon must not hold any namespace either, so no other user may be logged in.
    """
    uid = machine.run("id", "-u", user).stdout.strip()
    return (
        user not in instances(machine)
        and not [path for path in on_disk(machine) if f"-{uid}-" in path or "removing" in path]
        and not [line for line in machine.sh("ls /run/polytmpd/instances").stdout.split() if line == uid]
        and not held(machine)
    )


def processes(machine: Machine, command: str) -> list[str]:
    """Return the PIDs of the processes whose command line contains that."""
    return machine.run("pgrep", "-f", "--", command, check=False).stdout.split()


def log_everybody_out(machine: Machine) -> None:
    """Return to a quiet system: no sessions, no instances, no lingering."""
    machine.sh(
        "for user in alice bob; do loginctl disable-linger $user; loginctl terminate-user $user; "
        "pkill -KILL -u $user; done; true",
        check=False,
    )
    eventually(lambda: not instances(machine) and not on_disk(machine), 30, "all instances are gone")


def opens_by_id(machine: Machine) -> bool:
    """Whether the daemon opens namespaces by their ID: Linux 6.18, in a container before 6.18.50."""
    script = "import sys; from polytmpd.kernel import nsfs; sys.exit(not nsfs.finds_all())"
    return machine.run("unshare", "--mount", "python3", "-I", "-c", script, check=False).returncode == 0

# SPDX-License-Identifier: LGPL-2.1-or-later
"""python -m bench: prints tables; --write also writes them to bench/results.md.

Measures logins on one machine. The three PAM configurations take turns, login after login, so that other
load affects all of them equally.
Not here: assertions; how namespaces are measured (namespaces.py).
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from tests.bed import RELEASES, BedError, Machine, build, eventually
from tests.bed.nspawn import require_tools

PROJECT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = PROJECT / "bench" / "results.md"
_STACKS: Final = "/etc/pam.d/common-session /etc/pam.d/common-session-noninteractive"
_OFF: Final = f"sed -i '/pam_polytmp.so/d; /pam_namespace.so/d' {_STACKS}"

# as in namespace.conf(5), with one instance per user
_INSTANCES: Final = r"""
mkdir -p -m 000 /tmp-inst /var/tmp/tmp-inst
printf '%s\n' '/tmp /tmp-inst/ user root' '/var/tmp /var/tmp/tmp-inst/ user root' \
    > /etc/security/namespace.conf
"""
# Without the daemon, which reacts to logind's signals even if PAM does not call it
_NOT: Final = f"systemctl mask --quiet --runtime --now polytmpd; {_OFF}"
CONFIGURATIONS: Final = {
    "plain": _NOT,
    "pam_namespace": f"{_NOT}; for f in {_STACKS}; do echo 'session required pam_namespace.so' >> $f; done",
    "polytmp": (
        f"systemctl unmask --quiet --runtime polytmpd; systemctl start polytmpd; {_OFF}; "
        f"for f in {_STACKS}; do echo 'session required pam_polytmp.so' >> $f; done"
    ),
}
"""Name in the table → script that makes it the last module in the session stacks."""


def _login(machine: Machine) -> float:
    command = [*machine.ssh_command("alice"), "true"]
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return (time.perf_counter() - begin) * 1000


def _alone(machine: Machine) -> None:
    def nobody() -> bool:
        found = machine.sh(
            "loginctl list-users --no-legend; pgrep -u alice; ls /run/polytmpd/instances", check=False
        )
        return not found.stdout.strip()

    machine.run("loginctl", "terminate-user", "alice", check=False)
    eventually(nobody, 30, "alice is gone")


def logins(machine: Machine, repeat: int) -> dict[str, dict[str, float]]:
    """Kind of login → configuration → median, ms."""
    machine.sh(_INSTANCES)
    host = machine.run("readlink", "/proc/1/ns/mnt").stdout
    times: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in CONFIGURATIONS} for kind in ("first session", "a session open")
    }
    for number in range(repeat + 1):
        for name, script in CONFIGURATIONS.items():
            _alone(machine)  # first: a stopped daemon removes nothing
            machine.sh(script)
            first = _login(machine)
            _alone(machine)
            with machine.session("alice") as session:
                if (session.run("readlink /proc/self/ns/mnt") == host) != (name == "plain"):
                    raise BedError(f"PAM does not run {name}")
                second = statistics.median(_login(machine) for _ in range(3))
            if number:  # the first round warms up
                times["first session"][name].append(first)
                times["a session open"][name].append(second)
    _alone(machine)
    return {
        kind: {name: statistics.median(values) for name, values in found.items()}
        for kind, found in times.items()
    }


_CLIENT: Final = """
import asyncio, os, sys, time
from dbus_next import BusType, Message
from dbus_next.aio import MessageBus

async def main(number, at_once):
    bus = await MessageBus(bus_type=BusType.SYSTEM, negotiate_unix_fd=True).connect()
    async def one():
        reply = await bus.call(Message(destination="org.polytmp1", path="/org/polytmp1",
            interface="org.polytmp1.Manager", member="AcquireNamespace", signature="u", body=[1001]))
        for fd in reply.unix_fds:
            os.close(fd)
    await one()
    begin = time.perf_counter()
    for _ in range(number // at_once):
        await asyncio.gather(*(one() for _ in range(at_once)))
    print(number / (time.perf_counter() - begin))

asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
"""


def calls(machine: Machine) -> dict[str, float]:
    """AcquireNamespace calls per second, on one connection, for an existing instance."""
    result = {}
    with machine.session("alice"):
        for at_once in (1, 8):
            output = machine.run("python3", "-c", _CLIENT, "400", str(at_once)).stdout
            result[f"{at_once} at once"] = float(output)
    return result


_COMMANDS: Final = """
import statistics, subprocess, time

def once(command):
    begin = time.perf_counter()
    subprocess.run(command.split(), stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - begin) * 1000

for command in ("polytmpctl list", "loginctl list-users"):
    print(statistics.median(once(command) for _ in range(15)), command)
"""


def commands(machine: Machine) -> dict[str, float]:
    """Command → median, ms."""
    with machine.session("alice"):
        lines = machine.run("python3", "-c", _COMMANDS).stdout.splitlines()
    return {command: float(spent) for spent, _, command in (line.partition(" ") for line in lines)}


def namespaces() -> dict[str, float]:
    argv = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--mount-proc",
        sys.executable,
        "-m",
        "bench.namespaces",
    ]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, cwd=PROJECT, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def table(release: str, repeat: int) -> str:
    def prepare(root: Path) -> None:
        drop_in = root / "etc/systemd/logind.conf.d/quick.conf"
        drop_in.parent.mkdir(parents=True, exist_ok=True)
        drop_in.write_text("[Login]\nUserStopDelaySec=0\n")

    with Machine(release, build(release), prepare=prepare) as machine:
        measured = logins(machine, repeat)
        machine.sh(CONFIGURATIONS["polytmp"])
        rates = calls(machine)
        spent = commands(machine)
    day = datetime.datetime.now(tz=datetime.UTC)
    where = f"{release}, Linux {platform.release()}, {os.cpu_count()} CPUs"
    lines = [
        f"## {where}, {day:%Y-%m-%d}, load average {os.getloadavg()[1]:.1f}",
        "",
        f"ssh login (`ssh alice true`), median of {repeat}, ms:",
        "",
        "| | " + " | ".join(f"{name} | ratio" for name in CONFIGURATIONS) + " |",
        "|---|" + "---|---|" * len(CONFIGURATIONS),
    ]
    for kind, found in measured.items():
        cells = (f"{found[name]:.0f} | {found[name] / found['plain']:.2f}" for name in CONFIGURATIONS)
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines += ["", "| polytmp | |", "|---|---|"]
    lines += [f"| AcquireNamespace, calls/s, {kind} | {rate:.0f} |" for kind, rate in rates.items()]
    lines += [f"| {command}, ms | {median:.0f} |" for command, median in spent.items()]
    return "\n".join(lines)


def namespace_table() -> str:
    found = namespaces()
    head = f"## Namespaces, Linux {platform.release()}, {found.pop('mounts'):.0f} mounts"
    return "\n".join([head, "", "| | |", "|---|---|", *(f"| {k} | {v:.3g} |" for k, v in found.items())])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of polytmp.")
    parser.add_argument("--release", choices=RELEASES, action="append")
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--write", action="store_true", help=f"also write {RESULTS.relative_to(PROJECT)}")
    arguments = parser.parse_args()
    try:
        require_tools()
        parts = [table(release, arguments.repeat) for release in arguments.release or RELEASES]
        parts.append(namespace_table())
    except BedError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    text = "\n\n".join(parts) + "\n"
    print(text)  # noqa: T201
    if arguments.write:
        RESULTS.write_text(f"# Benchmarks\n\nWritten by `python -m bench --write`.\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tools of attackers in a machine under test, and a sentinel that must stay unchanged.

Not here: what polytmp should do about an attack.
"""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from tests import observe
from tests.bed import Machine, eventually

HERE = "/usr/local/share/attacks"
SENTINEL = "/srv/sentinel"
_MAKE_SENTINEL = f"""
set -eu
mkdir -p {SENTINEL}/directory/below
echo secret >{SENTINEL}/file; echo more >{SENTINEL}/directory/below/file; ln -s file {SENTINEL}/link
mkfifo {SENTINEL}/fifo
setfattr -n user.mark -v sentinel {SENTINEL}/file
chown -R 1002:1002 {SENTINEL}/directory; chown -h 1002:1002 {SENTINEL}/link
chmod 2751 {SENTINEL}/directory; chmod 0604 {SENTINEL}/file; chmod 0755 {SENTINEL}
find {SENTINEL} -depth -exec touch -h -d '2001-02-03 04:05:06' {{}} +
"""
_FACTS = f"""
find {SENTINEL} -printf '%p %y %U %G %m %i %n %T@ %C@ %l\\n' | sort
getfattr -Rdm- {SENTINEL} 2>/dev/null; find {SENTINEL} -type f -exec sha256sum {{}} + | sort
"""
_numbers = itertools.count(1)


def prepare(root: Path) -> None:
    """For Machine(prepare=…): install the tools, and make logouts quick."""
    observe.quick_logouts(root)
    target = root / HERE[1:]
    target.mkdir(parents=True)
    for program in Path(__file__).parent.glob("*"):
        if program.suffix in {".py", ".sh"} and program.name != "__init__.py":
            (target / program.name).write_bytes(program.read_bytes())


def program(name: str, *arguments: str) -> str:
    """Return the line of shell that runs one of the tools."""
    shell = "bash" if name.endswith(".sh") else "python3"
    return " ".join((shell, f"{HERE}/{name}", *arguments))


class Attack:
    """A transient unit: a process that runs in the host's namespace, as the daemon does."""

    def __init__(self, machine: Machine, unit: str) -> None:
        self._machine = machine
        self.unit = unit

    @property
    def output(self) -> str:
        return self._machine.read(f"/run/{self.unit}.out").decode(errors="replace")

    def stop(self) -> str:
        """End it with SIGTERM and return what it wrote."""
        self._machine.run("systemctl", "stop", self.unit, check=False)
        return self.output


@contextlib.contextmanager
def attack(machine: Machine, user: str, command: str, until: str = "") -> Iterator[Attack]:
    """Run a command while the context lasts, and enter the context when the output contains `until`."""
    running = Attack(machine, f"attack-{next(_numbers)}")
    output = f"/run/{running.unit}.out"
    machine.run(
        "systemd-run",
        "--quiet",
        "--collect",
        f"--unit={running.unit}",
        f"--uid={user}",
        f"--property=StandardOutput=file:{output}",
        f"--property=StandardError=file:{output}",
        "--property=TimeoutStopSec=5",
        "bash",
        "-c",
        f"exec {command}",
    )
    try:
        eventually(lambda: until in running.output, 20, f"{command} works")
        yield running
    finally:
        machine.run("systemctl", "stop", running.unit, check=False)


@contextlib.contextmanager
def untouched(machine: Machine) -> Iterator[None]:
    """Check that the sentinel is unchanged afterwards: names, contents, owners, modes, times, attributes."""
    machine.sh(f"rm -rf {SENTINEL}\n{_MAKE_SENTINEL}")
    before = machine.sh(_FACTS).stdout
    assert before.count("\n") > 8, before
    yield
    assert machine.sh(_FACTS).stdout == before


def wait_until_gone(machine: Machine, user: str = "alice", timeout: float = 30) -> None:
    """Return when the user's instance and its files are gone; others may stay. timeout is in seconds."""
    eventually(lambda: observe.state(machine, user) is None, timeout, f"{user}'s instance is gone")
    uid = machine.run("id", "-u", user).stdout.strip()
    eventually(
        lambda: not [path for path in observe.on_disk(machine) if f"-{uid}-" in path or "removing" in path],
        timeout,
        "and its files",
    )

# SPDX-License-Identifier: LGPL-2.1-or-later
"""A booted systemd-nspawn container: its leader, its power, and the way into it.

Not here: where its root comes from (disk.py), what runs in it (machine.py).

Hard facts:
- nsenter joins namespaces, not cgroups. A command that enters from outside would be in no cgroup of the
  machine ("/../.." in its /proc/PID/cgroup), which logind and systemd inside cannot make sense of. So it is
  moved first.
- nsenter forks for a PID namespace, and its child outlives it: the command gets a PR_SET_PDEATHSIG.
- The leader's PID is found among systemd-nspawn's children by NSpid: the intermediate process has ended by
  then.
- /proc/PID/net/tcp shows PID's network namespace, so "does sshd listen" costs no process.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import command, nspawn
from .tree import BedError
from .waiting import eventually

BOOT_TIMEOUT = 120.0
_SIGRTMIN_PLUS_4 = signal.SIGRTMIN + 4  # systemd(1): power off


class Container:
    """A root directory that systemd boots from. It can boot again after it has powered off."""

    def __init__(self, name: str, root: Path, console: Path) -> None:
        """console: the file that the console's output is appended to."""
        self.name = name
        self.root = root
        self.leader = 0
        """The PID, seen from outside, of the container's PID 1; 0 if it does not run."""
        self._console = console
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._cgroup: nspawn.Cgroup | None = None
        self._running = contextlib.ExitStack()

    @property
    def console(self) -> str:
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def boot(self) -> None:
        """Boot, and return when systemd is up and sshd listens. Raises BedError."""
        nspawn.make_room()
        group = self._cgroup = self._running.enter_context(nspawn.cgroup(self.name))
        options = ["--boot", "--hostname=bed", "--capability=all", "--console=read-only"]
        devices = [path for path in ("/dev/fuse", "/dev/loop-control") if Path(path).exists()]
        options += [f"--bind={device}" for device in devices]
        with self._console.open("ab") as console:
            self._nspawn = subprocess.Popen(
                group.enter(nspawn.command(self.name, self.root, options)),
                env=nspawn.NSPAWN_ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )
        try:
            self.leader = eventually(self._find_leader, 30, "systemd-nspawn started the machine")
            eventually(self._is_up, BOOT_TIMEOUT, "systemd is up")
            eventually(self._sshd_listens, 30, "sshd listens")
        except AssertionError as error:
            raise BedError(f"{self.name} does not boot: {error}\n{self.console[-4000:]}") from error

    def _find_leader(self) -> int:
        nspawn_process = self._nspawn
        assert nspawn_process is not None
        if nspawn_process.poll() is not None:
            status = nspawn_process.returncode
            raise BedError(f"systemd-nspawn: exit status {status}\n{self.console[-4000:]}")
        pid = nspawn_process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            lines = Path("/proc", child, "status").read_text().splitlines()
            ids = next(line.split()[1:] for line in lines if line.startswith("NSpid:"))
            # before the exec it is still systemd-nspawn's own code
            if len(ids) > 1 and ids[-1] == "1" and Path("/proc", child, "comm").read_text() == "systemd\n":
                return int(child)
        return 0

    def _is_up(self) -> bool:
        if not Path("/proc", str(self.leader)).exists():
            raise BedError("the machine went down")
        argv = ["systemctl", "is-system-running", "--wait"]
        state = command.run(" ".join(argv), self.enter(argv), False, None, BOOT_TIMEOUT)
        return state.stdout.strip() in ("running", "degraded")

    def _sshd_listens(self) -> bool:
        lines = Path("/proc", str(self.leader), "net/tcp").read_text().splitlines()[1:]
        return any(fields[1].endswith(":0016") and fields[3] == "0A" for fields in map(str.split, lines))

    def power_off(self, timeout: float) -> bool:
        """Take the container down: cleanly within timeout (seconds), then by force.

        Returns whether it went down cleanly.
        """
        down = True
        process = self._nspawn
        if process is not None:
            if timeout > 0 and self.leader:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.leader, _SIGRTMIN_PLUS_4)
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                down = False
                process.kill()  # the leader dies with it: PR_SET_PDEATHSIG
                process.wait()
        self._nspawn = None
        self.leader = 0
        self._running.close()
        return down

    def enter(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs argv inside as root."""
        group = self._cgroup
        assert group is not None, "the machine is not up"
        places = [directory / "payload" for directory in group.directories]
        # neither an inner node, which may hold no process, nor a cgroup that systemd takes for its own
        places[0] = places[0] / "system.slice" / "bed.service"
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            places[0].mkdir()
        existing = [place for place in places if place.exists()]  # early in a boot there is no slice
        nsenter = ["nsenter", f"--target={self.leader}", "--all", "--root", "--wd", "--"]
        nsenter += ["setpriv", "--pdeathsig=KILL", "--", *argv]
        return nspawn.enter_cgroups(existing, nsenter)

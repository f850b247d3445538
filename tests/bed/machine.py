# SPDX-License-Identifier: LGPL-2.1-or-later
"""A booted Debian: commands in it, logins to it, and nothing left of it afterwards.

Not here: making the trees (tree.py) and the package (package.py), booting (container.py), what is tested.
"""

import contextlib
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from . import command, nspawn
from .command import Result
from .container import Container
from .disk import machine_directory, mounted_copy
from .session import Session
from .tree import BedError, cache_directory, ssh_key, tree

POWEROFF_TIMEOUT = 90.0
LOOP_DEVICES = 16


class Machine:
    """A context manager: a private copy of the release's image, with the packages given, booted.

    `prepare` gets the root of the copy after the packages are installed and before the machine boots.
    """

    def __init__(
        self,
        release: str,
        deb: Path | Sequence[Path] | None = None,
        *,
        prepare: Callable[[Path], None] | None = None,
    ) -> None:
        self.release = release
        self.name = f"{release}-{os.getpid()}-{secrets.token_hex(3)}"
        self.boot_seconds = 0.0
        self._debs = [] if deb is None else [deb] if isinstance(deb, Path) else list(deb)
        self._prepare = prepare
        self._directory = cache_directory() / "machines" / self.name
        self._container = Container(self.name, self.root, self._directory / "console")
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        nspawn.require_tools()
        source = tree("host", self.release)
        try:
            self._stack.enter_context(machine_directory(self._directory))
            self._stack.enter_context(mounted_copy(source, self.root))
            (self.root / "etc/machine-id").write_text(f"{secrets.token_hex(16)}\n")
            self.install(*self._debs)
            if self._prepare:
                self._prepare(self.root)
            self._boot()
        except BaseException:
            self.close(clean=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Machine {self.name}>"

    @property
    def root(self) -> Path:
        """The machine's root file system, seen from outside. It shows no mounts: use run() and read()."""
        return self._directory / "root"

    @property
    def console(self) -> str:
        return self._container.console

    @property
    def leader(self) -> int:
        """The PID, seen from outside, of the machine's PID 1; 0 if it is down."""
        return self._container.leader

    def install(self, *debs: Path) -> None:
        """Install packages, as apt would, before the machine boots; no service starts."""
        for deb in debs:
            name = f"{self.name}-dpkg"
            bind = f"--bind-ro={deb.resolve()}:/run/package.deb"
            options = [bind, "--setenv=DEBIAN_FRONTEND=noninteractive"]
            nspawn.run(name, self.root, options, ["dpkg", "--install", "/run/package.deb"], 120)

    def install_kept(self, directory: str) -> None:
        """Install the packages that tree.py keeps in /var/lib/bed/directory, while the machine runs."""
        script = "DEBIAN_FRONTEND=noninteractive dpkg --install"
        self.sh(f"{script} /var/lib/bed/{directory}/*.deb", timeout=120)

    # Boot and power

    def _boot(self) -> None:
        begin = time.monotonic()
        self._container.boot()
        self._make_loop_devices()
        self.boot_seconds = time.monotonic() - begin

    def _make_loop_devices(self) -> None:
        """Make the loop devices' nodes: /dev inside is a plain tmpfs, where nothing else does."""
        if Path("/dev/loop-control").exists():
            self.sh(f"for n in $(seq 0 {LOOP_DEVICES - 1}); do mknod -m 0660 /dev/loop$n b 7 $n; done")

    def reboot(self) -> None:
        """Power off cleanly and boot again: the same root directory, a new boot id, a new leader."""
        if not self._container.power_off(POWEROFF_TIMEOUT):
            seconds = f"{POWEROFF_TIMEOUT:g} s"
            raise BedError(f"{self.name} did not power off within {seconds}\n{self.console[-4000:]}")
        self._boot()

    def close(self, *, clean: bool = True) -> None:
        try:
            self._container.power_off(POWEROFF_TIMEOUT if clean else 0)
        finally:
            self._stack.close()

    # Commands

    def run(
        self,
        *argv: str,
        check: bool = True,
        input: str | bytes | None = None,  # noqa: A002  (as subprocess.run has it)
        timeout: float = 60,
    ) -> Result:
        """Run a command as root, in the namespaces of the machine's PID 1.

        timeout is in seconds. Raises CommandTimeout and, if check is set, CommandError.
        """
        return command.run(shlex.join(argv), self._container.enter(argv), check, input, timeout)

    def sh(self, script: str, *, check: bool = True, timeout: float = 60) -> Result:
        """Run lines of shell as run() does."""
        argv = self._container.enter(["bash", "-c", script])
        return command.run(script, argv, check, None, timeout)

    def popen(self, *argv: str) -> "subprocess.Popen[bytes]":
        """Start a command that keeps running; stdin, stdout and stderr are pipes. The caller ends it."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self._container.enter(argv),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=nspawn.ENVIRONMENT,
            cwd="/",
        )

    def shell(self) -> int:
        """Run an interactive root shell on the terminal and return its exit status."""
        environment = nspawn.ENVIRONMENT | {"TERM": os.environ.get("TERM", "linux")}
        argv = ["bash", "-l"]
        if sys.stdin.isatty():
            # a terminal inside: the PID namespace has no process groups of the outer one
            argv = ["script", "--quiet", "--return", "--command", "bash -l", "/dev/null"]
        return subprocess.run(self._container.enter(argv), env=environment, cwd="/", check=False).returncode

    def ssh_command(self, user: str, *options: str) -> list[str]:
        """Return the command of an ssh client that runs outside, in the machine's network namespace only."""
        settings = (
            *("BatchMode=yes", "ConnectTimeout=30", "IdentitiesOnly=yes", "IdentityAgent=none"),
            *("LogLevel=ERROR", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"),
        )
        nsenter = ["nsenter", f"--target={self.leader}", "--net", "--"]
        ssh = ["ssh", "-F", "none", "-i", str(ssh_key()), *(f"-o{setting}" for setting in settings)]
        return [*nsenter, *ssh, *options, f"{user}@127.0.0.1"]

    def ssh(
        self,
        user: str,
        line: str,
        *,
        check: bool = True,
        input: str | bytes | None = None,  # noqa: A002
        timeout: float = 60,
        tty: bool = False,
    ) -> Result:
        """Log in, run one line of shell and log out."""
        argv = [*self.ssh_command(user, *(["-tt"] if tty else [])), line]
        return command.run(f"ssh {user}: {line}", argv, check, input, timeout)

    def session(self, user: str, *, timeout: float = 30) -> Session:
        """Log in; the caller closes the session, which is a context manager."""
        return Session(self, user, timeout=timeout)

    def write(self, path: str, data: bytes | str, mode: int = 0o644, owner: str = "root:root") -> None:
        """Write a file as root; a missing directory is made."""
        script = """
            set -eu; mkdir -p "${1%/*}/"; rm -f "$1"; umask 077; cat >"$1"; chown "$2" "$1"; chmod "$3" "$1"
        """
        self.run("sh", "-c", script, "sh", path, owner, f"{mode:o}", input=data)

    def read(self, path: str) -> bytes:
        argv = self._container.enter(["cat", "--", path])
        return command.execute(f"read {path}", argv, True, None, 60)[1]

    def journal(self, *args: str) -> str:
        """Return journalctl's output; by default of this boot, with monotonic times.

        It is complete: journald has written everything that was logged before.
        """
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--boot", "--output=short-monotonic", *args).stdout

    def now(self) -> str:
        """Return a time for journalctl's --since.

        A cursor does not do: with --unit, systemd 252 leaves out the first line after it.
        """
        return "@" + self.run("date", "+%s.%6N").stdout.strip()

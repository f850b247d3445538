# SPDX-License-Identifier: LGPL-2.1-or-later
"""An ssh login to a machine with a shell that takes one command after the other.

Not here: single commands (Machine.ssh).
"""

import contextlib
import os
import secrets
import selectors
import shlex
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from . import nspawn
from .command import CommandError, CommandTimeout, Result, decode
from .waiting import eventually

if TYPE_CHECKING:
    from .machine import Machine


class Session:
    """A login, as a context manager.

    Commands share the shell's state (working directory, variables, jobs); their stdin is empty.
    """

    def __init__(self, machine: "Machine", user: str, *, timeout: float = 30) -> None:
        self.user = user
        self._machine = machine
        self._process = subprocess.Popen(
            [*machine.ssh_command(user, "-T"), "exec bash --norc --noprofile"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=nspawn.ENVIRONMENT,
            cwd="/",
            bufsize=0,
        )
        try:
            self.pid = int(self.run("echo $$", timeout=timeout))
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.kill()

    def run(self, command: str, *, check: bool = True, timeout: float = 60) -> str:
        """Run a command and return its stdout."""
        return self.result(command, check=check, timeout=timeout).stdout

    def result(self, command: str, *, check: bool = True, timeout: float = 60) -> Result:
        """Run a command. Raises CommandError or CommandTimeout, as Machine.run does."""
        process = self._process
        assert process.stdin is not None
        marker = secrets.token_hex(12)
        line = f"eval {shlex.quote(command)} </dev/null; printf '{marker}%d\\n' $? | tee /dev/stderr\n"
        shown = f"session of {self.user}: {command}"
        with contextlib.suppress(BrokenPipeError):  # reading then shows what happened
            process.stdin.write(line.encode())
        stdout, stderr, status = self._read_until(marker.encode(), time.monotonic() + timeout)
        if status is None:
            ended = process.poll()
            why = f"no end within {timeout:g} s" if ended is None else "the session ended"
            result = Result(f"{shown}: {why}", -1 if ended is None else ended, stdout, stderr)
            raise CommandTimeout(result) if ended is None else CommandError(result)
        result = Result(shown, status, stdout, stderr)
        if check and status:
            raise CommandError(result)
        return result

    def _read_until(self, marker: bytes, deadline: float) -> tuple[str, str, int | None]:
        process = self._process
        assert process.stdout is not None
        assert process.stderr is not None
        output = {process.stdout.fileno(): b"", process.stderr.fileno(): b""}
        found: dict[int, int] = {}
        with selectors.DefaultSelector() as selector:
            for fd in output:
                selector.register(fd, selectors.EVENT_READ)
            while selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    data = os.read(key.fd, 65536)
                    output[key.fd] += data
                    text, mark, status = output[key.fd].partition(marker)
                    if mark and status.endswith(b"\n"):
                        output[key.fd] = text
                        found[key.fd] = int(status.split()[0])
                    if not data or key.fd in found:
                        selector.unregister(key.fd)
        if len(found) < 2:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5 if not found and deadline > time.monotonic() else 0)
        status_value = next(iter(found.values())) if len(found) == 2 else None
        stdout, stderr = (decode(data) for data in output.values())
        return stdout, stderr, status_value

    def close(self, timeout: float = 20) -> None:
        """Log out, and return when the shell has ended.

        Jobs that the shell left behind keep the connection open; it is then broken off.
        """
        process = self._process
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        # PIDs in the leader's own /proc are the machine's
        shell = Path("/proc", str(self._machine.leader), "root/proc", str(self.pid))
        eventually(lambda: process.poll() is not None or not shell.exists(), timeout, "the shell ends")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.25)
        self.kill()

    def kill(self) -> None:
        """Break the connection off, as a failing network does."""
        process = self._process
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

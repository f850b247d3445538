# SPDX-License-Identifier: LGPL-2.1-or-later
"""A booted Debian: commands in it, logins to it, and nothing left of it afterwards.

Not its business: making the trees (tree.py) and the package (package.py), and what is tested.

Hard facts:
- nsenter joins namespaces, not cgroups: a command run from outside would be in no cgroup of the machine
  ("/../.." in its /proc/PID/cgroup), of which logind and systemd inside make nothing. So it is moved first.
- nsenter forks for a pid namespace, and its child outlives it: the command gets a PR_SET_PDEATHSIG.
- The leader's PID is found among systemd-nspawn's children by NSpid: the intermediate one has gone by then.
- /proc/PID/net/tcp shows PID's network namespace, so "does sshd listen" costs no process.
"""

import contextlib
import fcntl
import os
import secrets
import selectors
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from . import nspawn
from .tree import BedError, cache_directory, ssh_key, tree

T = TypeVar("T")

BOOT_TIMEOUT = 120.0
POWEROFF_TIMEOUT = 90.0
LOOP_DEVICES = 16
_SIGRTMIN_PLUS_4 = signal.SIGRTMIN + 4  # systemd(1): power off


@dataclass(frozen=True, slots=True)
class Result:
    command: str
    returncode: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        parts = [f"{self.command}: exit status {self.returncode}"]
        parts += [f"--- {name}\n{text.rstrip()}" for name, text in self._streams() if text.strip()]
        return "\n".join(parts)

    def _streams(self) -> list[tuple[str, str]]:
        return [("stdout", self.stdout), ("stderr", self.stderr)]


class CommandError(Exception):
    """A command failed; the message shows all there is to know of it."""

    def __init__(self, result: Result) -> None:
        super().__init__(str(result))
        self.result = result


class CommandTimeout(CommandError):
    """A command did not end in time. It was killed; what it started was not."""


def eventually(condition: Callable[[], T], timeout: float = 60, what: str = "condition") -> T:
    """The first true value of condition(); an exception it raises counts as not yet."""
    deadline = time.monotonic() + timeout
    delay = 0.02
    while True:
        cause: Exception | None = None
        try:
            value = condition()
        except Exception as error:
            cause = error
            last = f"{type(error).__name__}: {error}"
        else:
            if value:
                return value
            last = repr(value)
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}; the last was {last}") from cause
        time.sleep(delay)
        delay = min(delay * 1.5, 0.05)


class Machine:
    """A context manager: a private copy of the release's image, with the package if one is given, booted.

    `prepare` gets the copy's root before the boot, after the package was installed.
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
        self.leader = 0
        self.boot_seconds = 0.0
        self._debs = [] if deb is None else [deb] if isinstance(deb, Path) else list(deb)
        self._prepare = prepare
        self._directory = cache_directory() / "machines" / self.name
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._cgroup: nspawn.Cgroup | None = None
        self._running = contextlib.ExitStack()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        nspawn.require_tools()
        source = tree("host", self.release)
        try:
            self._stack.enter_context(_machine_directory(self._directory))
            self._stack.enter_context(_mounted_copy(source, self.root))
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
        """The machine's root file system, seen from outside. To look into mounts, use run() and read()."""
        return self._directory / "root"

    @property
    def console(self) -> str:
        path = self._directory / "console"
        return path.read_text(errors="replace") if path.exists() else ""

    def install(self, *debs: Path) -> None:
        """Install packages into the machine before it boots (no service starts), as a user's apt would."""
        for deb in debs:
            name = f"{self.name}-dpkg"
            bind = f"--bind-ro={deb.resolve()}:/run/package.deb"
            options = [bind, "--setenv=DEBIAN_FRONTEND=noninteractive"]
            nspawn.run(name, self.root, options, ["dpkg", "--install", "/run/package.deb"], 120)

    # Boot and power

    def _boot(self) -> None:
        begin = time.monotonic()
        group = self._cgroup = self._running.enter_context(nspawn.cgroup(self.name))
        options = ["--boot", "--hostname=bed", "--capability=all", "--console=read-only"]
        devices = [path for path in ("/dev/fuse", "/dev/loop-control") if Path(path).exists()]
        options += [f"--bind={device}" for device in devices]
        with (self._directory / "console").open("ab") as console:
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
        self._make_loop_devices()
        self.boot_seconds = time.monotonic() - begin

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
            # before that it is still systemd-nspawn's own code, on its way to the exec
            if len(ids) > 1 and ids[-1] == "1" and Path("/proc", child, "comm").read_text() == "systemd\n":
                return int(child)
        return 0

    def _is_up(self) -> bool:
        if not Path("/proc", str(self.leader)).exists():
            raise BedError("the machine went down")
        state = self.run("systemctl", "is-system-running", "--wait", check=False, timeout=BOOT_TIMEOUT)
        return state.stdout.strip() in ("running", "degraded")

    def _sshd_listens(self) -> bool:
        lines = Path("/proc", str(self.leader), "net/tcp").read_text().splitlines()[1:]
        return any(fields[1].endswith(":0016") and fields[3] == "0A" for fields in map(str.split, lines))

    def _make_loop_devices(self) -> None:
        """/dev is a plain tmpfs inside: nobody makes the nodes for /dev/loop-control's devices."""
        if Path("/dev/loop-control").exists():
            self.sh(f"for n in $(seq 0 {LOOP_DEVICES - 1}); do mknod -m 0660 /dev/loop$n b 7 $n; done")

    def reboot(self) -> None:
        """Power off cleanly and boot again: the same root directory, a new boot id, a new leader."""
        if not self._power_off(POWEROFF_TIMEOUT):
            seconds = f"{POWEROFF_TIMEOUT:g} s"
            raise BedError(f"{self.name} did not power off within {seconds}\n{self.console[-4000:]}")
        self._boot()

    def close(self, *, clean: bool = True) -> None:
        try:
            self._power_off(POWEROFF_TIMEOUT if clean else 0)
        finally:
            self._stack.close()

    def _power_off(self, timeout: float) -> bool:
        """Whether it went down by itself; it is down in any case."""
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
                process.kill()  # and with it the leader: PR_SET_PDEATHSIG
                process.wait()
        self._nspawn = None
        self.leader = 0
        self._running.close()
        return down

    # Commands

    def run(
        self,
        *argv: str,
        check: bool = True,
        input: str | bytes | None = None,  # noqa: A002  (as subprocess.run has it)
        timeout: float = 60,
    ) -> Result:
        """Run a command as the machine's root, in the host's own namespaces there."""
        return self._result(shlex.join(argv), self._enter(argv), check, input, timeout)

    def sh(self, script: str, *, check: bool = True, timeout: float = 60) -> Result:
        """run(), for lines of shell."""
        return self._result(script, self._enter(["bash", "-c", script]), check, None, timeout)

    def popen(self, *argv: str) -> "subprocess.Popen[bytes]":
        """run() for what stays; stdin, stdout and stderr are pipes. The caller ends it."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self._enter(argv), stdin=pipe, stdout=pipe, stderr=pipe, env=nspawn.ENVIRONMENT, cwd="/"
        )

    def shell(self) -> int:
        """An interactive root shell on the terminal; its exit status."""
        environment = nspawn.ENVIRONMENT | {"TERM": os.environ.get("TERM", "linux")}
        argv = ["bash", "-l"]
        if sys.stdin.isatty():
            # one of the machine's own: its pid namespace has no process groups of the outer terminal
            argv = ["script", "--quiet", "--return", "--command", "bash -l", "/dev/null"]
        return subprocess.run(self._enter(argv), env=environment, cwd="/", check=False).returncode

    def _enter(self, argv: Sequence[str]) -> list[str]:
        group = self._cgroup
        assert group is not None, "the machine is not up"
        places = [directory / "payload" for directory in group.directories]
        # not where processes may not be (an inner node), not where systemd would find it its own
        places[0] = places[0] / "system.slice" / "bed.service"
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            places[0].mkdir()
        existing = [place for place in places if place.exists()]  # no slice in the first moments of a boot
        nsenter = ["nsenter", f"--target={self.leader}", "--all", "--root", "--wd", "--"]
        nsenter += ["setpriv", "--pdeathsig=KILL", "--", *argv]
        return nspawn.enter_cgroups(existing, nsenter)

    def ssh_command(self, user: str, *options: str) -> list[str]:
        """The ssh client: an outer process in the machine's network namespace, which sees nothing of it."""
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
        command: str,
        *,
        check: bool = True,
        input: str | bytes | None = None,  # noqa: A002
        timeout: float = 60,
        tty: bool = False,
    ) -> Result:
        """One login: a line of shell as that user."""
        argv = [*self.ssh_command(user, *(["-tt"] if tty else [])), command]
        return self._result(f"ssh {user}: {command}", argv, check, input, timeout)

    def session(self, user: str, *, timeout: float = 30) -> "Session":
        """A login that stays: a context manager."""
        return Session(self, user, timeout=timeout)

    def write(self, path: str, data: bytes | str, mode: int = 0o644, owner: str = "root:root") -> None:
        """Write a file as root; its directory is made if it is not there."""
        script = """
            set -eu; mkdir -p "${1%/*}/"; rm -f "$1"; umask 077; cat >"$1"; chown "$2" "$1"; chmod "$3" "$1"
        """
        self.run("sh", "-c", script, "sh", path, owner, f"{mode:o}", input=data)

    def read(self, path: str) -> bytes:
        return self._execute(f"read {path}", self._enter(["cat", "--", path]), True, None, 60)[1]

    def journal(self, *args: str) -> str:
        """journalctl's output: of this boot, monotonic times, unless args say otherwise.

        With all that was logged before: journald writes when it comes to it.
        """
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--boot", "--output=short-monotonic", *args).stdout

    def now(self) -> str:
        """A time for journal(): "--since" what comes from here on. With a unit, systemd 252 leaves out the
        first line after a cursor.
        """
        return "@" + self.run("date", "+%s.%6N").stdout.strip()

    def _result(
        self, shown: str, argv: Sequence[str], check: bool, data: str | bytes | None, timeout: float
    ) -> Result:
        returncode, stdout, stderr = self._execute(shown, argv, check, data, timeout)
        return Result(shown, returncode, _text(stdout), _text(stderr))

    def _execute(
        self, shown: str, argv: Sequence[str], check: bool, data: str | bytes | None, timeout: float
    ) -> tuple[int, bytes, bytes]:
        stdin = data.encode() if isinstance(data, str) else data or b""
        try:
            done = subprocess.run(
                argv,
                input=stdin,
                capture_output=True,
                timeout=timeout,
                env=nspawn.ENVIRONMENT,
                cwd="/",
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            shown = f"{shown}: no end within {timeout:g} s"
            raise CommandTimeout(Result(shown, -1, _text(error.stdout), _text(error.stderr))) from None
        if check and done.returncode:
            raise CommandError(Result(shown, done.returncode, _text(done.stdout), _text(done.stderr)))
        return done.returncode, done.stdout, done.stderr


class Session:
    """An ssh login with a shell in it that takes one command after the other.

    Commands share the shell's state (cd, variables, jobs); their stdin is empty.
    """

    def __init__(self, machine: Machine, user: str, *, timeout: float = 30) -> None:
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
        """A command's stdout."""
        return self.result(command, check=check, timeout=timeout).stdout

    def result(self, command: str, *, check: bool = True, timeout: float = 60) -> Result:
        """As run(), with the exit status and stderr."""
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
        stdout, stderr = (_text(data) for data in output.values())
        return stdout, stderr, status_value

    def close(self, timeout: float = 20) -> None:
        """Log out: returns when the shell is gone. Jobs it left keep the connection: it is broken off."""
        process = self._process
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        # the leader's own /proc: pids there are the machine's
        shell = Path("/proc", str(self._machine.leader), "root/proc", str(self.pid))
        eventually(lambda: process.poll() is not None or not shell.exists(), timeout, "the shell ends")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.25)
        self.kill()

    def kill(self) -> None:
        """Break the connection off, as a network does."""
        process = self._process
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _text(data: bytes | None) -> str:
    return (data or b"").decode(errors="surrogateescape")


@contextlib.contextmanager
def _machine_directory(path: Path) -> Iterator[None]:
    """The directory of a machine, locked while it lives, so that a killed run's can be told and removed."""
    path.parent.mkdir(exist_ok=True)
    _remove_abandoned(path.parent)
    path.mkdir(mode=0o755)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        shutil.rmtree(path)
        os.close(fd)


@contextlib.contextmanager
def _mounted_copy(image: Path, target: Path) -> Iterator[None]:
    copy = target.with_suffix(".img")
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", "--", str(image), str(copy)], check=True)
    target.mkdir()
    subprocess.run(["mount", "-o", "loop", "--", str(copy), str(target)], check=True)
    try:
        yield
    finally:
        _unmount(target)


def _unmount(target: Path) -> None:
    """The loop device goes with it."""
    done = subprocess.run(["umount", "--", str(target)], capture_output=True, text=True, check=False)
    if done.returncode:
        # not ours to wait for: some other process looks into it
        subprocess.run(["umount", "--lazy", "--", str(target)], check=True)


def _remove_abandoned(parent: Path) -> None:
    for path in parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # others remove theirs meanwhile
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or time.time() - found.st_ctime < 60:
                continue  # perhaps another run makes it just now
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                nspawn.remove_leftovers(path.name)
                if (path / "root").is_mount():
                    _unmount(path / "root")
                shutil.rmtree(path)
            except BlockingIOError:
                pass
            finally:
                os.close(fd)

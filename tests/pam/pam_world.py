# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small host to open sessions in: mount and PID namespaces with their own /dev/log, users and pam.d.

It is invisible outside. /run is shared with the host, so that the sockets and files in the test's directory
have the same path on both sides.
"""

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

# PAM return codes: <security/_pam_types.h>
PAM_SUCCESS = 0
PAM_SYSTEM_ERR = 4
PAM_BUF_ERR = 5
PAM_AUTH_ERR = 7
PAM_USER_UNKNOWN = 10
PAM_PERM_DENIED = 6
PAM_IGNORE = 25
PAM_ERROR_MSG = 3

LOG_LEVELS = ("EMERG", "ALERT", "CRIT", "ERR", "WARNING", "NOTICE", "INFO", "DEBUG")

HERE = Path(__file__).parent

# For tests that take away what the sanitizers need: /proc, malloc()
plain_build = pytest.mark.parametrize("build", ["plain"], indirect=True)

USERS = {"root": 0, "toor": 0, "cronuser": 500, "alice": 1500, "bob": 1501, "high": 70000}

SETUP = """
set -eu
base=$1
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs "$base/dev"
for node in null zero full random urandom tty; do
    touch "$base/dev/$node"
    mount --bind "/dev/$node" "$base/dev/$node"
done
mount --move "$base/dev" /dev
mount --bind "$base/passwd" /etc/passwd
mount --bind "$base/login.defs" /etc/login.defs
mount --bind "$base/pam.d" /etc/pam.d
mount --bind "$base/polytmpd" /run/polytmpd
echo ready
exec sleep infinity
"""

NAMESPACE = """
set -eu
mount -t tmpfs -o mode=1777 tmpfs /tmp
touch /tmp/marker
eval "$1"
echo $$
exec sleep infinity
"""


CHROOT = """
mkdir -p /tmp/chroot; cd /tmp/chroot
mkdir usr etc run dev proc
for d in usr etc run dev; do mount --rbind /$d $d; done
ln -s usr/lib usr/lib64 usr/bin usr/sbin .
"""


class SystemLog:
    """/dev/log. A thread drains it, because a full socket would block the writer."""

    def __init__(self, path: str) -> None:
        self._lines: list[tuple[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.bind(path)
        Path(path).chmod(0o666)
        self._path = path
        self._marks: dict[bytes, threading.Event] = {}
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        while data := self._socket.recv(65536):
            if data in self._marks:
                self._marks[data].set()
                continue
            priority, _, text = data.decode().partition(">")
            _, found, message = text.partition("pam_polytmp(")
            if found:
                _, _, message = message.partition(":session): ")
                self._lines.append((LOG_LEVELS[int(priority[1:]) & 7], message.rstrip("\0")))

    def take(self) -> list[tuple[str, str]]:
        """(level, text) of each line of pam_polytmp since the last call."""
        mark = uuid.uuid4().bytes
        self._marks[mark] = done = threading.Event()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(mark, self._path)
        assert done.wait(10), "the log is not read"
        lines, self._lines = self._lines, []
        return lines


@dataclass(frozen=True, slots=True)
class Namespace:
    process: subprocess.Popen[str]
    path: str  # of its ns/mnt, as seen on the host
    inner_path: str  # the same in the world

    @property
    def inode(self) -> int:
        return Path(self.path).stat().st_ino


@dataclass(frozen=True, slots=True)
class Session:
    """What the harness reports: while the session is open, and after it was closed or refused."""

    results: list[int]
    closed: int
    namespace_before: int
    directory_before: int
    leader: int
    fds_before: int
    environment: int
    seconds: float
    allocations: int
    namespace: int
    directory: int
    fds: int
    seen: int
    cwd: str
    after_namespace: int
    after_directory: int
    after_fds: int
    after_seen: int
    after_cwd: str
    messages: list[tuple[int, str]]
    log: list[tuple[str, str]]

    @property
    def result(self) -> int:
        assert len(set(self.results)) == 1, self.results
        return self.results[0]

    @property
    def moved(self) -> bool:
        return self.namespace != self.namespace_before

    @property
    def same_directory(self) -> bool:
        return self.directory == self.directory_before


@dataclass(frozen=True, slots=True)
class Step:
    """Where the harness is after one step."""

    step: str
    namespace: int
    directory: int
    fds: int
    seen: int
    cwd: str
    result: int


class World:
    def __init__(self, base: Path, build: Path) -> None:
        self.base = base
        self.build = build
        self.environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
        self._children: list[subprocess.Popen[str]] = []
        self._listening: socket.socket | None = None

    def __enter__(self) -> Self:
        for name in ("dev", "pam.d", "polytmpd"):
            (self.base / name).mkdir()
        lines = [f"{user}:x:{uid}:{uid}::/:/bin/sh" for user, uid in USERS.items()]
        (self.base / "passwd").write_text("\n".join(lines) + "\n")
        self.login_defs("UID_MIN 1000\nUID_MAX 60000\n")
        self.module()
        self._unshare = self.spawn(
            [
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
            ],
            ["sh", "-c", SETUP, "sh", str(self.base)],
        )
        assert self._unshare.stdout is not None
        assert self._unshare.stdout.readline() == "ready\n"
        pid = self._unshare.pid
        self.init = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        self.log = SystemLog(f"/proc/{self.init}/root/dev/log")
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._listening:
            self._listening.close()
        os.kill(self.init, signal.SIGKILL)  # PID 1 of the world: every process in it ends
        for child in self._children:
            child.kill()
            child.wait(10)
            for stream in (child.stdin, child.stdout):
                if stream:
                    stream.close()

    def spawn(self, *commands: list[str], **kwargs: Any) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [word for command in commands for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **kwargs,
        )
        self._children.append(child)
        return child

    def module(self, *arguments: str, service: str = "polytmp-test") -> None:
        """Configure a service's stack so that each return value of pam_polytmp.so has a different effect."""
        lines = [
            f"[success=1 ignore=ignore default=die] {self.build}/pam_polytmp.so {' '.join(arguments)}",
            "[default=die] pam_succeed_if.so quiet uid = 4294967294",  # libpam never returns PAM_IGNORE
            "required pam_permit.so",
        ]
        (self.base / "pam.d" / service).write_text("".join(f"session {line}\n" for line in lines))

    @property
    def socket_path(self) -> str:
        """What the world sees as /run/polytmpd/login."""
        return f"{self.base}/polytmpd/login"

    def listen(self, backlog: int = 64) -> socket.socket:
        """The socket of polytmpd.socket, open as long as the world."""
        if self._listening is None:
            self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._listening.bind(self.socket_path)
            self._listening.listen(backlog)
        return self._listening

    def stop_listening(self) -> None:
        """Close the socket; the file stays."""
        if self._listening:
            self._listening.close()

    def login_defs(self, text: str) -> None:
        (self.base / "login.defs").write_text(text)

    @property
    def inside(self) -> list[str]:
        return ["nsenter", f"--mount=/proc/{self.init}/ns/mnt", f"--pid=/proc/{self.init}/ns/pid", "--"]

    def shell(self, command: str) -> None:
        subprocess.run([*self.inside, "sh", "-euc", command], check=True, timeout=20)

    def make_namespace(self, command: str = ":", *options: str) -> Namespace:
        """A namespace with its own /tmp, which contains /tmp/marker. It lives as long as the world."""
        unshare = ["unshare", "--mount", "--propagation", "private", *options]
        child = self.spawn(self.inside, unshare, ["sh", "-c", NAMESPACE, "sh", command])
        assert child.stdout is not None
        pid = child.stdout.readline().strip()
        assert pid, "the namespace could not be made"
        return Namespace(child, f"/proc/{self.init}/root/proc/{pid}/ns/mnt", f"/proc/{pid}/ns/mnt")

    def open_session(self, *arguments: str, bound: float = 30) -> Session:
        self.log.take()
        seen = json.loads(self.harness(*arguments, bound=bound))
        seen["results"] = [PAM_IGNORE if result == PAM_AUTH_ERR else result for result in seen["results"]]
        seen["messages"] = [(style, text) for style, text in seen["messages"]]
        return Session(**seen, log=self.log.take())

    def steps(self, steps: str, *arguments: str) -> list[Step]:
        """Take the steps in one process: "+alice,-alice"; the harness explains them."""
        lines = self.harness("-S", steps, *arguments, bound=30).splitlines()
        return [Step(**json.loads(line)) for line in lines]

    @contextlib.contextmanager
    def opening(self, *arguments: str, bound: float = 30) -> Iterator[Callable[[], Session]]:
        """Open a session beside what the test does; the function waits for its end."""
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            session = pool.submit(self.open_session, *arguments, bound=bound)
            yield session.result

    def harness(self, *arguments: str, bound: float) -> str:
        done = subprocess.run(
            [*self.inside, str(self.build / "harness"), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=bound,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout


class Daemon:
    """The fake polytmpd. It takes the logins that wait at the world's socket."""

    def __init__(self, world: World, **script: object) -> None:
        listening = world.listen().fileno()
        command = [sys.executable, str(HERE / "fake_polytmpd.py"), str(listening), json.dumps(script)]
        self._process = world.spawn(command, pass_fds=[listening])
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def ended(self) -> list[str]:
        """Wait until it ends by itself; returns the requests that it received."""
        self._process.wait(10)
        return self.stop()

    def stop(self) -> list[str]:
        """Stop it; returns the requests that it received."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        out: str = self._process.stdout.read()  # communicate() would miss what readline() has buffered
        return out.splitlines()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Users: they log in over ssh, work, become each other, mount, leave processes behind and log out.

Each user is a thread with its own random sequence, which depends on the seed and the name only; how the
threads interleave is up to the machine. What a user can see themselves is checked here. Sessions that
others kill are counted and are no violation.

Not here: what shows from outside only (checker.py).
"""

import random
import re
import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.bed import CommandError, CommandTimeout, Machine, Session, eventually

from . import proc
from .record import Record, Violation

LOGIN_TIMEOUT = 150.0
"""Seconds: more than all timeouts on the way in total (PAM 20 s, the bus 25 s, logind 25 s)."""
RECOVERY = 30.0
WHERE = "stat -c '%d:%i' /tmp /var/tmp; readlink /proc/self/ns/mnt"
_POLYTMP = re.compile(
    r"polytmp: cannot give you a private /tmp: (.*?)(; ask your administrator|$)", re.MULTILINE
)


class Person(threading.Thread):
    def __init__(self, machine: Machine, user: str, others: list[str], record: Record) -> None:
        super().__init__(name=user)
        self.user = user
        self._machine = machine
        self._others = others
        self._record = record
        self._random = random.Random(f"{record.seed} {user}")
        self._sessions: list[Session] = []
        self._mounted: list[str] = []
        root = Path("/proc", str(machine.leader), "root")
        self._root = root
        self._host = {proc.ident(str(root / "tmp")), proc.ident(str(root / "var/tmp"))}

    def run(self) -> None:
        # (weight, action, whether it needs a session)
        table: list[tuple[int, Callable[[], None], bool]] = [
            (12, self._login, False),
            (6, self._short_login, False),
            (7, self._logout, True),
            (3, self._break_off, True),
            (10, self._work, True),
            (4, self._socket, True),
            (5, self._mount, True),
            (3, self._mount_privately, True),
            (6, self._become_another, True),
            (3, self._become_root, True),
            (8, self._leave_process, True),
            (2, self._job, False),
        ]
        try:
            while not self._record.stop.is_set():
                possible = [entry for entry in table if self._sessions or not entry[2]]
                (action,) = self._random.choices(
                    [entry[1] for entry in possible], [entry[0] for entry in possible]
                )
                self._do(action)
                self._record.stop.wait(self._random.choice((0, 0.2, 0.5, 1, 2, 4)))
        finally:
            for session in self._sessions:
                session.kill()

    def _do(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Violation as violation:
            self._record.violate(str(violation))
        except Exception as error:
            if not self._record.stop.is_set():
                self._record.violate(f"{self.user}: the soak itself failed: {type(error).__name__}: {error}")
                raise

    def _act(self, what: str) -> None:
        self._record.act(self.user, what)

    def _token(self) -> str:
        return f"{self._random.getrandbits(40):010x}"

    # Logins

    def _login(self) -> None:
        if len(self._sessions) >= 3:
            self._logout()
            return
        begin = time.monotonic()
        self._act("login")
        try:
            session = Session(self._machine, self.user, timeout=LOGIN_TIMEOUT)
        except CommandError as error:
            self._refused(error, begin)
            return
        self._record.count("logins")
        self._sessions.append(session)
        token = self._token()
        where = self._in(session, f"{WHERE}; echo > /tmp/mark-{token}; echo > /var/tmp/mark-{token}")
        if where is not None:
            self._act(f"in, shell {session.pid}, {' '.join(where.split())}")
            self._check_place(where)

    def _short_login(self) -> None:
        begin = time.monotonic()
        self._act("ssh")
        try:
            result = self._machine.ssh(self.user, WHERE, timeout=LOGIN_TIMEOUT)
        except CommandError as error:
            self._refused(error, begin)
            return
        self._record.count("logins")
        self._check_place(result.stdout)

    def _check_place(self, where: str) -> set[proc.Ident]:
        """Check the last three lines of WHERE's output; return the two directories. Raises Violation."""
        found = {
            (int(device), int(inode))
            for device, _, inode in (line.partition(":") for line in where.split()[-3:-1])
        }
        if len(found) != 2 or found & self._host:
            raise Violation(f"{self.user} landed in the shared directories: {where.split()}")
        return found

    def _refused(self, error: CommandError, begin: float) -> None:
        result = error.result
        said = _POLYTMP.search(result.stderr + result.stdout)
        text = said[0] if said else " ".join((result.stderr + result.stdout).split()) or "no message"
        if isinstance(error, CommandTimeout):
            text = f"timed out: {text}"
        self._act(f"refused after {time.monotonic() - begin:.1f} s: {text[:200]}")
        self._excuse(begin, f"a login of {self.user}: {text}")
        self._record.refuse(re.sub(r"\d{2,}", "N", text)[:110])

    def _excuse(self, begin: float, what: str) -> None:
        """Something has failed since begin: raise Violation unless there is a reason."""

        def reason() -> str:
            if self._record.stop.is_set() or self._record.killed_since(self.user, begin - 5):
                return "of them killed"
            return "disturbed" if self._record.steady() < time.monotonic() - begin + RECOVERY else ""

        try:
            found = eventually(reason, 1)  # the killer may report only afterwards
        except AssertionError:
            raise Violation(f"refused although nothing was disturbed: {what}") from None
        if found != "disturbed":
            self._record.count(found)

    def _logout(self) -> None:
        session = self._drop()
        self._act(f"logout {session.pid}")
        try:
            session.close(5)
        except AssertionError:
            session.kill()
        self._record.count("logouts")

    def _break_off(self) -> None:
        session = self._drop()
        self._act(f"break off {session.pid}")
        session.kill()
        self._record.count("broken off")

    def _drop(self) -> Session:
        return self._sessions.pop(self._random.randrange(len(self._sessions)))

    # In a session

    def _in(self, session: Session, command: str, timeout: float = 60) -> str | None:
        """Return stdout, or None if the session has ended or the command has failed for a reason."""
        begin = time.monotonic()
        try:
            result = session.result(command, check=False, timeout=timeout)
        except CommandTimeout as error:
            self._excuse(begin, str(error))
        except CommandError:
            self._record.count("sessions that ended")
        else:
            if result.returncode == 0:
                return result.stdout
            if "polytmp" in result.stderr or "session" in result.stderr or "sudo" in result.stderr:
                self._refused(CommandError(result), begin)
                return None
            self._act(f"failed: {result}")
            self._excuse(begin, str(result))
            return None
        if session in self._sessions:
            self._sessions.remove(session)
        session.kill()
        return None

    def _any(self, command: str) -> str | None:
        session = self._random.choice(self._sessions)
        self._act(f"in {session.pid}: {command}")
        return self._in(session, command)

    def _work(self) -> None:
        token = self._token()
        work = self._random.choice(
            (
                "for n in $(seq 200); do echo $n > /tmp/{0}-$n; done",
                "mkdir -p /tmp/{0}; (cd /tmp/{0}; for n in $(seq 80); do mkdir d; cd d; done; echo > deep)",
                "ln -s /etc/passwd /tmp/{0}-link; ln -s / /var/tmp/{0}-root; mkfifo /tmp/{0}-fifo",
                "head -c 3000000 /dev/zero > /tmp/{0}-large; cp /tmp/{0}-large /var/tmp/{0}-large",
                "mkdir -m 0 /tmp/{0}-closed; touch $'/tmp/{0} \\n\\t*'; echo > /tmp/mark-{0}",
                "d=$(mktemp -d); echo > $d/x; sudo chown root $d/x; sudo chattr +i $d/x; :",
                "rm -rf /tmp/[0-9a-f]*-[0-9]*; rm -f /var/tmp/*-large; :",
                "ls -la /tmp /var/tmp | wc -l; df /tmp > /dev/null; findmnt -T /tmp > /dev/null",
            )
        )
        self._any(work.format(token))
        self._record.count("work")

    def _socket(self) -> None:
        """Make a socket as an X server does: everybody sees it."""
        name = f"/tmp/.X11-unix/X{self._random.randrange(10_000, 60_000)}"
        code = f"import socket; socket.socket(socket.AF_UNIX).bind({name!r})"
        if self._any(f"rm -f {name}; python3 -c {shlex.quote(code)}") is None:
            return
        if not (self._root / name[1:]).is_socket():
            raise Violation(f"{self.user}'s {name} is not on the host")
        self._any_quietly(f"rm -f {name}")
        self._record.count("sockets")

    def _any_quietly(self, command: str) -> None:
        if self._sessions:
            self._any(command)

    def _mount(self) -> None:
        """Mount something in the host's mount table, or unmount it from another session or from the host."""
        if self._mounted and self._random.random() < 0.6:
            point = self._mounted.pop(self._random.randrange(len(self._mounted)))
            if self._random.random() < 0.5:
                self._any(f"sudo umount {point} && sudo rmdir {point}")
            else:
                self._act(f"the host unmounts {point}")
                self._machine.sh(f"umount {point}; rmdir {point}", check=False)
            return
        point = f"/mnt/soak-{self._token()}"
        if self._any(f"sudo mkdir {point} && sudo mount -t tmpfs soak {point}") is not None:
            self._mounted.append(point)
            if not any(mount.point == point for mount in proc.mounts(self._machine.leader)):
                raise Violation(f"{self.user} mounted {point}, and the host does not see it")
            self._record.count("mounts")

    def _mount_privately(self) -> None:
        point = f"/tmp/mnt-{self._token()}"
        leave = self._random.random() < 0.5
        end = ":" if leave else f"sudo umount {point}"
        self._any(f"mkdir {point} && sudo mount -t tmpfs own {point} && echo > {point}/x && {end}")
        self._record.count("mounts in /tmp")

    def _become_another(self) -> None:
        other = self._random.choice(self._others)
        how = self._random.choice(("sudo su - {0} -c {1}", "sudo -i -u {0} sh -c {1}"))
        token = self._token()
        script = f"{WHERE}; echo > /tmp/mark-{token}"
        stay = self._random.random() < 0.3
        if stay:
            seconds = self._random.randrange(2, 15)
            line = how.format(other, shlex.quote(f"echo > /tmp/mark-{token}; exec sleep {seconds}"))
            self._any(f"{line} > /dev/null 2>&1 < /dev/null &")
        else:
            where = self._any(f"{how.format(other, shlex.quote(script))} && ({WHERE})")
            if where is None:
                return
            lines = where.split()
            theirs = self._check_place(" ".join(lines[-6:-3]))
            own = self._check_place(where)
            if theirs & own or lines[-4] == lines[-1]:
                raise Violation(f"{self.user} became {other} and still has the same /tmp: {lines}")
        self._record.count("su and sudo")

    def _become_root(self) -> None:
        where = self._any("sudo readlink /proc/self/ns/mnt && readlink /proc/self/ns/mnt")
        if where is not None and len(set(where.split()[-2:])) != 1:
            raise Violation(f"root has another view than {self.user}: {where.split()}")
        self._record.count("su and sudo")

    # What stays behind

    def _leave_process(self) -> None:
        token, seconds = self._token(), self._random.randrange(3, 25)  # the processes live that long
        way, command = self._random.choice(
            (
                ("nohup", "(nohup sleep {1} > /dev/null 2>&1 &)"),
                ("setsid", "setsid -f sleep {1} > /dev/null 2>&1"),
                ("double fork", "(sleep {1} > /dev/null 2>&1 &)"),
                ("systemd-run", "systemd-run --user --quiet sleep {1}"),
                ("at", "echo 'echo > /tmp/mark-at-{0}; sleep {1}' | at -q a now 2> /dev/null"),
                ("unshare", "setsid -f unshare -Urm sleep {1} > /dev/null 2>&1"),
                (
                    "reveal",
                    (
                        "setsid -f unshare -Urm sh -c 'umount /tmp; umount -l /var/tmp; exec sleep {1}' "
                        "> /dev/null 2>&1"
                    ),
                ),
                ("root's unshare", "sudo setsid -f unshare -m sudo -u $USER sleep {1} > /dev/null 2>&1"),
                ("bwrap", "setsid -f bwrap --dev-bind / / sleep {1} > /dev/null 2>&1"),
                ("bwrap tmpfs", "setsid -f bwrap --dev-bind / / --tmpfs /tmp sleep {1} > /dev/null 2>&1"),
                (
                    "bwrap of /tmp alone",
                    (
                        "setsid -f bwrap --ro-bind /usr /usr --symlink usr/lib64 /lib64 --symlink usr/lib "
                        "/lib --bind /tmp /tmp --unshare-pid sleep {1} > /dev/null 2>&1"
                    ),
                ),
                (
                    "a descriptor",
                    "sudo setsid -f sh -c 'exec sleep {1} 9< /proc/self/ns/mnt' > /dev/null 2>&1",
                ),
            )
        )
        line = f"echo > /tmp/mark-{token}; " + command.format(token, seconds)
        if self._random.random() < 0.35:
            # Most have started after 0.2 s; the others are moved on their way. The slice then does not know
            # of the process.
            line += (
                "; sleep 0.2; sudo sh -c 'mkdir -p /sys/fs/cgroup/elsewhere; for pid in "
                f'$(pgrep -f "sleep {seconds}"); do echo $pid > /sys/fs/cgroup/elsewhere/cgroup.procs; '
                "done' 2> /dev/null; :"
            )
            way += ", moved"
        if self._random.random() < 0.2:
            line = f"sudo loginctl enable-linger $USER; {line}"
            way += ", linger"
        self._act(f"leave ({way})")
        self._any(line)
        self._record.count("left behind")

    def _job(self) -> None:
        """Leave a cron job, which runs in no session and no slice."""
        token, seconds = self._token(), self._random.randrange(3, 20)  # the job runs that long
        self._act("cron")
        self._machine.write(
            f"/etc/cron.d/soak-{self.user}",
            f"* * * * * {self.user} echo > /tmp/mark-cron-{token}; sleep {seconds}\n",
        )
        self._record.count("cron jobs")

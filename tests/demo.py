# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make demo`: boots a disposable Debian with polytmp installed, logs users in, and shows what each of them
sees and how it ends.

All output is what commands print there. Each observation is compared with what it should be; if one differs,
the demo reports it, goes on, and exits with status 1.

Not here: tests (tests/e2e).
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Callable

from tests import observe
from tests.bed import RELEASES, Machine, Session, build, eventually

WIDTH = 100


class Narrator:
    """Prints the transcript and counts the observations."""

    def __init__(self, colour: bool) -> None:
        self._colour = colour
        self.seen = 0
        self.wrong = 0

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colour else text

    def chapter(self, title: str, quote: str = "") -> None:
        print(f"\n{self._paint('1;36', title)}")  # noqa: T201
        if quote:
            text = textwrap.fill(f"“{quote}”", WIDTH, initial_indent="  ", subsequent_indent="  ")
            print(self._paint("2;3", text))  # noqa: T201

    def say(self, text: str) -> None:
        print(textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="  "))  # noqa: T201

    def command(self, who: str, command: str, output: str) -> None:
        sign = "#" if who in {"root", "host"} else "$"
        print(f"  {self._paint('33', f'{who}{sign}')} {command}")  # noqa: T201
        for line in output.rstrip("\n").splitlines():
            print(f"      {line}")  # noqa: T201

    def check(self, what: str, holds: bool) -> None:
        self.seen += 1
        self.wrong += not holds
        mark = self._paint("1;32", "✓") if holds else self._paint("1;31", "✗ FALSE:")
        print(f"  {mark} {what}")  # noqa: T201

    def check_soon(self, what: str, condition: Callable[[], object], timeout: float = 30) -> None:
        """Check what the kernel or logind does in its own time. timeout is in seconds."""
        try:
            eventually(condition, timeout, what)
        except AssertionError as error:
            self.check(f"{what} ({error})", False)
        else:
            self.check(what, True)


class Demo:
    def __init__(self, machine: Machine, tell: Narrator) -> None:
        self._machine = machine
        self._tell = tell

    def _as(self, session: Session, command: str) -> str:
        result = session.result(command, check=False)
        self._tell.command(session.user, command, result.stdout + result.stderr)
        return result.stdout

    def _host(self, command: str) -> str:
        result = self._machine.sh(command, check=False)
        self._tell.command("host", command, result.stdout + result.stderr)
        return result.stdout

    def run(self) -> None:
        tell = self._tell
        tell.chapter("A Debian system with polytmp installed")
        self._host(
            "grep PRETTY_NAME /etc/os-release; systemctl is-active polytmpd; findmnt -no FSTYPE -T /tmp"
        )
        with self._machine.session("alice") as alice, self._machine.session("bob") as bob:
            self.private(alice, bob)
            self.sockets(alice, bob)
            self.mounts(alice, bob)
            self.place(alice)
            self.admin(alice)
        self.end()

    def private(self, alice: Session, bob: Session) -> None:
        tell = self._tell
        tell.chapter("Each user has their own /tmp and /var/tmp")
        self._host("touch /tmp/hosts-own")
        self._as(alice, "echo secret > /tmp/plan; touch /var/tmp/draft")
        seen = self._as(bob, "ls -A /tmp /var/tmp")
        tell.check(
            "bob sees neither alice's files nor the host's", "plan" not in seen and "hosts-own" not in seen
        )
        again = self._machine.session("alice")
        with again:
            tell.check("alice's second session sees them", "plan" in self._as(again, "ls /tmp"))
            tell.check(
                "both sessions and her systemd --user live in one mount namespace",
                len(
                    {
                        self._as(alice, observe.NAMESPACE),
                        self._as(again, observe.NAMESPACE),
                        self._as(again, f"systemd-run --user --quiet --wait --pipe {observe.NAMESPACE}"),
                    }
                )
                == 1,
            )
        tell.check("root sees the host's /tmp", "hosts-own" in self._machine.ssh("root", "ls /tmp").stdout)

    def sockets(self, alice: Session, bob: Session) -> None:
        tell = self._tell
        tell.chapter(
            "1. X11",
            "/tmp is used by X11 among other for IPC across user boundaries. [...] You are breaking X11 "
            "this",
        )
        self._as(alice, "Xvfb :7 -ac -nolisten tcp -nolisten local >/dev/null 2>&1 &")
        tell.check_soon(
            "alice's X server, a real one, listens in /tmp/.X11-unix",
            lambda: (
                self._machine.run("test", "-S", "/tmp/.X11-unix/X7", check=False).returncode == 0
                and self._machine.run("test", "-e", "/tmp/.X7-lock", check=False).returncode == 0
            ),
        )
        listening = self._host(
            "ss --numeric --listening --tcp --unix | grep -E 'X11-unix|:6007'"
        ).splitlines()
        tell.check(
            "and nowhere else: no TCP and no abstract socket (with an @), which no directory can hide",
            len(listening) == 1 and " /tmp/.X11-unix/X7 " in listening[0],
        )
        line = "DISPLAY=:7 xdpyinfo | grep -E 'name of display|vendor string|dimensions'"
        tell.check("bob's client talks to it", "dimensions" in self._as(bob, line))
        tell.check("so does a client on the host", "dimensions" in self._host(line))
        second = "Xvfb :7 -nolisten tcp -nolisten local 2>&1 | grep -A1 already"
        tell.check(
            "its lock, /tmp/.X7-lock, holds in bob's /tmp too: bob's own server finds :7 taken",
            "Server is already active for display 7" in self._as(bob, second),
        )
        self._as(alice, "kill %1; wait 2>/dev/null")
        tell.check_soon(
            "her server ends, and the lock disappears from bob's /tmp",
            lambda: bob.result("test -e /tmp/.X7-lock", check=False).returncode != 0,
        )

    def mounts(self, alice: Session, bob: Session) -> None:
        tell = self._tell
        tell.chapter(
            "2. Mounts",
            "if the user later-on invokes /bin/mount or /bin/umount on any subdir of / the commands have "
            "will have "
            "zero effect for the rest of the system.",
        )
        self._host("mkdir -p /mnt/usb")
        self._as(alice, "sudo mount -t tmpfs usb-stick /mnt/usb && touch /mnt/usb/photo")
        tell.check("the host has alice's mount", "photo" in self._host("ls /mnt/usb"))
        tell.check("and so has bob's session", "photo" in self._as(bob, "ls /mnt/usb"))
        self._host("umount /mnt/usb")
        tell.check("the host's umount reaches alice", "photo" not in self._as(alice, "ls /mnt/usb"))
        self._as(alice, "mkdir /tmp/mine; sudo mount -t tmpfs mine /tmp/mine; touch /tmp/mine/x")
        tell.check(
            "what she mounts under her own /tmp stays private",
            "/tmp/mine" not in observe.mounts(self._machine),
        )
        self._as(alice, "sudo umount /tmp/mine")

    def place(self, alice: Session) -> None:
        tell = self._tell
        tell.chapter(
            "3. No new directory, no other file system",
            'introducing "/tmp-inst" sounds really wrong to me [...] PrivateTmp= works by mounting /tmp '
            "over with a "
            "subdir of /tmp, so that things stay on the same file system.",
        )
        for directory, path in observe.directories(self._machine, "alice").items():
            same = f"stat -fc '%T %i' {directory}"
            tell.check(
                f"alice's {directory} is {path}: below {directory}, on the same file system",
                path.startswith(f"{directory}/polytmp-")
                and self._as(alice, same) == self._host(f"stat -fc '%T %i' {directory}"),
            )

    def admin(self, alice: Session) -> None:
        tell = self._tell
        tell.chapter("5. The administrator", "It's not compatible with admin workflows, at all.")
        self._host("polytmpctl list")
        page = self._host("polytmpctl status alice")
        tell.check("the instance has a page, a path and a process list", "/tmp/polytmp-" in page)
        path = observe.directories(self._machine, "alice")["/tmp"]
        tell.check("root reads her file at that path", self._host(f"cat {path}/plan").strip() == "secret")
        tell.check(
            "sudo in her session finds it as /tmp/plan",
            self._as(alice, "sudo cat /tmp/plan").strip() == "secret",
        )
        self._host("busctl tree org.polytmp1")

    def end(self) -> None:
        tell, machine = self._tell, self._machine
        tell.chapter(
            "4. The end of an instance",
            "When is the private /tmp instance removed? On logout? [...] the user might have processes "
            "running that "
            "are not attached to any session, and you shouldn't remove the private /tmp before those "
            "processes are "
            "dead too.",
        )
        with machine.session("bob") as bob:
            self._as(
                bob,
                "sudo -iu alice sh -c 'echo still here > /tmp/note; exec sleep infinity' >/dev/null 2>&1 &",
            )
            tell.check_soon(
                "alice has logged out; a login of hers, which bob made with sudo -i, is left behind",
                lambda: (
                    machine.sh("pgrep -f -x 'sleep infinity'", check=False).stdout
                    and observe.state(machine, "alice") == "draining"
                ),
            )
            self._host("polytmpctl list; polytmpctl status alice")
            path = observe.directories(machine, "alice")["/tmp"]
            tell.check("her files are still there", self._host(f"cat {path}/note").strip() == "still here")
            self._host("pkill -f -x 'sleep infinity'")
            tell.check_soon(
                "it ends, and the instance with it", lambda: observe.state(machine, "alice") is None
            )
        machine.run("loginctl", "terminate-user", "bob", check=False)  # logind may have removed bob already
        tell.check_soon("bob logs out, and bob's instance ends", lambda: not observe.instances(machine))
        self._host("polytmpctl list; ls -A /tmp | grep polytmp; ls -d /var/tmp/polytmp-*")
        tell.check("nothing is left in /tmp", not observe.on_disk(machine))
        tell.say(
            "The FHS preserves /var/tmp between reboots: each user's /var/tmp stays until they or "
            "systemd-tmpfiles clean it."
        )
        tell.check("the daemon no longer holds any namespace", observe.held(machine) == [])
        self._host("journalctl -b -u polytmpd --no-pager -o cat | tail -n 6")


def main() -> int:
    parser = argparse.ArgumentParser(description="Five objections, one after the other, on a booted Debian.")
    parser.add_argument("--release", choices=RELEASES, default="trixie")
    release = parser.parse_args().release
    tell = Narrator(colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    tell.say(
        f"Building the package and booting a disposable Debian ({release}) with it. The first time takes "
        "minutes."
    )
    sys.stdout.flush()
    with Machine(release, build(release), prepare=observe.quick_logouts) as machine:
        Demo(machine, tell).run()
    print(f"\n{tell.seen} observations, {tell.wrong} of them false.")  # noqa: T201
    return 1 if tell.wrong else 0


if __name__ == "__main__":
    sys.exit(main())

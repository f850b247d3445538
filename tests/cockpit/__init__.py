# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cockpit on a machine, and commands in its sessions.

Not here: the browser's part (browser.py), and what is tested (tests/e2e/test_early_modules.py).
"""

from pathlib import Path
from typing import Final

from tests.bed import Machine, eventually

BROWSER: Final = "/usr/local/bin/browser"
STACK: Final = "/etc/pam.d/cockpit"
PASSWORD: Final = "secret"


def install(root: Path) -> None:
    """For Machine(prepare=…): put the browser in place, and what the tree's recipe has put aside."""
    program = root / BROWSER.removeprefix("/")
    program.write_text((Path(__file__).parent / "browser.py").read_text())
    program.chmod(0o755)
    (root / "usr/share/cockpit/pam").rename(root / STACK.removeprefix("/"))
    for mask in (root / "etc/systemd/system").glob("cockpit*"):
        mask.unlink()


def start(machine: Machine, *users: str) -> None:
    """Give the users a password, and return when Cockpit listens."""
    machine.run("chpasswd", input="".join(f"{user}:{PASSWORD}\n" for user in users))
    machine.run("systemctl", "start", "cockpit.socket")
    active = ("systemctl", "is-active", "--quiet", "cockpit.socket")
    eventually(lambda: machine.run(*active, check=False).returncode == 0, 30, "Cockpit listens")


def run(machine: Machine, user: str, command: str) -> str:
    """Log in over HTTP, run a line of shell in the session, and return its output."""
    return machine.run(BROWSER, user, PASSWORD, command).stdout

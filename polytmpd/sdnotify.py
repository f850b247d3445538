# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service manager's protocol: readiness, watchdog, and the FD store, see sd_notify(3), sd_listen_fds(3).

Not here: what the descriptors mean. Without a service manager everything here does nothing.

Hard facts
- FDPOLL=0 (systemd 246): PID 1 would otherwise drop a descriptor that polls as hung up.
- FDSTOREREMOVE=1 removes all descriptors of that name, in the order in which the messages were sent.
- listen_fds_with_names() leaves LISTEN_* in the environment; children must not inherit it.
"""

import contextlib
import logging
import os
from collections.abc import Sequence

from systemd import daemon

log = logging.getLogger(__name__)


def _notify(state: str, fds: Sequence[int] = ()) -> None:
    try:
        daemon.notify(state, **({"fds": list(fds)} if fds else {}))  # fds=None is a TypeError
    except OSError as error:
        log.warning("The service manager cannot be told %r: %s, ignoring", state.split("\n")[0], error)


def ready(status: str) -> None:
    """Type=notify: the service has started."""
    _notify(f"READY=1\nSTATUS={status}")


def stopping() -> None:
    _notify("STOPPING=1")


def status(text: str) -> None:
    """One line for `systemctl status`."""
    _notify(f"STATUS={text}")


def watchdog() -> None:
    _notify("WATCHDOG=1")


def watchdog_interval() -> float | None:
    """Seconds between two watchdog() calls: half of WatchdogSec=. None where it is not set."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / 2_000_000 if usec.isdecimal() and int(usec) > 0 else None


def store(name: str, fd: int) -> None:
    """Put a copy of the descriptor into the FD store, in place of an older one of that name.

    fd stays the caller's.
    """
    remove(name)
    _notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd])


def remove(name: str) -> None:
    """Let PID 1 close its copy."""
    _notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def take_stored() -> list[tuple[str, int]]:
    """(name, descriptor) of what PID 1 kept for us; they are the caller's now.

    To be called once, at start.
    """
    try:
        found = daemon.listen_fds_with_names()
    except OSError as error:
        log.warning("The FD store cannot be read: %s, ignoring", error)
        return []
    finally:
        for variable in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
            os.environ.pop(variable, None)
    stored = []
    for fd, name in found.items():
        with contextlib.suppress(OSError):
            os.set_inheritable(fd, False)
            stored.append((name, fd))
    return stored

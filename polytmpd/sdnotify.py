# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service manager's protocol: readiness, watchdog, sockets, and the FD store.

See sd_notify(3), sd_listen_fds(3).

Without a service manager, these functions do nothing.
Not here: what the descriptors mean.

Hard facts
- Without FDPOLL=0 (systemd 246), PID 1 drops a descriptor that polls as hung up.
- FDSTOREREMOVE=1 removes all descriptors of that name. PID 1 processes messages in the order they were sent.
- To start a service, PID 1 duplicates all descriptors that it passes (systemd >= 255). If its limit of
  open files is too low for that, the service can never be started again ("Failed to serialize parameters:
  Too many open files"). On most hosts the limit is a million and more; in containers it may be 20,000.
- $FDSTORE has FileDescriptorStoreMax= (systemd >= 254).
- listen_fds_with_names() leaves LISTEN_* in the environment; children must not inherit it.
"""

import contextlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from systemd import daemon

from polytmpd.kernel.descriptor import Descriptor

log = logging.getLogger(__name__)

_MANAGER_LIMITS: Final = Path("/proc/1/limits")
_LIMIT: Final = re.compile(r"^Max open files +(\d+)", re.MULTILINE)
_MANAGERS_OWN: Final = 1024
"""Descriptors that PID 1 needs for itself."""
_UNIT_HAS: Final = 16384
"""FileDescriptorStoreMax= of the unit, for a systemd that does not say what is configured."""


def _notify(state: str, fds: Sequence[int] = ()) -> None:
    try:
        daemon.notify(state, **({"fds": list(fds)} if fds else {}))  # fds=None is a TypeError
    except OSError as error:
        log.warning("Failed to notify the service manager of %s, ignoring: %s", state.split("\n")[0], error)


def ready(status: str) -> None:
    """Report that the service has started (Type=notify), with a line for `systemctl status`."""
    _notify(f"READY=1\nSTATUS={status}")


def stopping() -> None:
    _notify("STOPPING=1")


def watchdog() -> None:
    _notify("WATCHDOG=1")


def watchdog_interval() -> float | None:
    """Seconds between two watchdog() calls: half of WatchdogSec=. None if it is not set."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    return int(usec) / 2_000_000 if usec.isdecimal() and int(usec) > 0 else None


def store(name: str, fd: int) -> None:
    """Put a copy of the descriptor into the FD store, replacing any of that name.

    The caller still closes fd.
    """
    remove(name)
    _notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd])


def remove(name: str) -> None:
    """Remove the descriptors of that name from the FD store."""
    _notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def store_capacity() -> int:
    """How many descriptors may be in the FD store so that the service can still be started."""
    value = os.environ.get("FDSTORE", "")
    configured = int(value) if value.isdecimal() else _UNIT_HAS
    found = _LIMIT.search(_MANAGER_LIMITS.read_text(encoding="ascii"))
    limit = int(found[1]) if found else 2 * (configured + _MANAGERS_OWN)
    return max(0, min(configured, (limit - _MANAGERS_OWN) // 2))


def take_passed() -> list[tuple[str, Descriptor]]:
    """(name, descriptor) of each socket and of each descriptor in the FD store; the caller closes them.

    Call this once, at start.
    """
    try:
        found = daemon.listen_fds_with_names()
    except OSError as error:
        log.warning("Failed to take the sockets and the FD store, ignoring: %s", error)
        return []
    finally:
        for variable in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
            os.environ.pop(variable, None)
    passed = []
    for fd, name in found.items():
        with contextlib.suppress(OSError):
            os.set_inheritable(fd, False)
            passed.append((name, Descriptor(fd)))
    return passed

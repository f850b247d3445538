# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of systemd-machined, org.freedesktop.machine1(5): whether a local container runs.

Not here: reaching it (polytmpctl runs systemd-run(1)).
"""

from typing import Final

from polytmpd.bus.protocol import Asker

SERVICE: Final = "org.freedesktop.machine1"
PATH: Final = "/org/freedesktop/machine1"
MANAGER: Final = "org.freedesktop.machine1.Manager"


async def require_machine(connection: Asker, name: str) -> None:
    """Return if the container is running. Raises BusError if it is not, or if machined is not installed."""
    await connection.ask(SERVICE, PATH, MANAGER, "GetMachine", "s", (name,))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waits for the end of a process that is not a child, with pidfd_open(2).

Not here: which process, and for how long.
"""

import asyncio
import os

from polytmpd.kernel.descriptor import Descriptor


async def wait_for_exit(pid: int) -> None:
    """Return when the process that has that pid now has ended. Raises OSError (EMFILE)."""
    try:
        fd = Descriptor(os.pidfd_open(pid))
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    with fd:
        loop.add_reader(fd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(fd)

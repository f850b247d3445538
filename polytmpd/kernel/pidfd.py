# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waits for the end of a process that is not a child, pidfd_open(2)."""

import asyncio
import os


async def wait_for_exit(pid: int) -> None:
    """Returns when the process with that pid now has ended, or is gone already."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)

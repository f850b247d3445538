# SPDX-License-Identifier: LGPL-2.1-or-later
"""The process at the other end of a Unix socket, as it was when it connected.

Not here: what it asks for, and whether it may.

Hard facts
- SO_PEERCRED has the effective UID. It shows the pid as 0 if the process is not in our PID namespace.
- The kernel may give a pid to another process while we examine it. SO_PEERPIDFD (Linux 6.5, ENOPROTOOPT
  before) shows whether the process still lives: if so, what we found about the pid is about the process.
"""

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from polytmpd.kernel import abi
from polytmpd.kernel.descriptor import Descriptor

SO_PEERPIDFD: Final = abi.HERE.peerpidfd


@dataclass(frozen=True, slots=True)
class Peer:
    """pidfd: None if the kernel has none."""

    uid: int
    pid: int
    pidfd: Descriptor | None = None

    def has_ended(self) -> bool:
        """Whether the process is gone, as far as the kernel can tell: if so, its pid may be another's."""
        if self.pidfd is None:
            return False
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))


@contextlib.contextmanager
def peer(connection: socket.socket) -> Iterator[Peer]:
    """Hold the process while the context lasts. Raises OSError; ProcessLookupError if it has ended."""
    size = struct.calcsize("=iII")
    pid, uid, _ = struct.unpack("=iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    pidfd = _pidfd(connection)
    try:
        yield Peer(uid, pid, pidfd)
    finally:
        if pidfd is not None:
            pidfd.close()


def _pidfd(connection: socket.socket) -> Descriptor | None:
    try:
        fd = Descriptor(connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
    except OSError as error:
        if error.errno in {errno.ENOPROTOOPT, errno.EOPNOTSUPP}:
            return None
        if error.errno in {errno.ESRCH, errno.EINVAL, errno.ENODATA}:
            raise ProcessLookupError(error.errno, os.strerror(errno.ESRCH)) from None
        raise
    return fd

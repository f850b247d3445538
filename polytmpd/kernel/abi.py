# SPDX-License-Identifier: LGPL-2.1-or-later
"""Numbers of the kernel that are not the same on all architectures: <asm/socket.h> and <asm/ioctl.h>.

Python has SO_PEERCRED from the headers that it was built with, and it shows whose numbers apply. uname(2)
may not: see personality(2).
Not here: what the numbers are for (syscalls, peers), and those of system calls, which are others on mips and
alpha only.
"""

import socket
import struct
from typing import Final, NamedTuple


class Abi(NamedTuple):
    """none, read, write: the directions of an ioctl(2), as bits of its number."""

    peerpidfd: int = 77
    none: int = 0
    read: int = 2 << 30
    write: int = 1 << 30

    def io(self, kind: int, number: int) -> int:
        """_IO() of <linux/ioctl.h>."""
        return self.none | kind << 8 | number

    def ior(self, kind: int, number: int, size: int) -> int:
        """_IOR()."""
        return self.read | size << 16 | kind << 8 | number

    def iow(self, kind: int, number: int, size: int) -> int:
        """_IOW()."""
        return self.write | size << 16 | kind << 8 | number


GENERIC: Final = Abi()
_THREE_BITS: Final = GENERIC._replace(none=1 << 29, read=2 << 29, write=4 << 29)
BY_PEERCRED: Final = {
    18: _THREE_BITS,  # mips, alpha
    21: _THREE_BITS,  # powerpc
    0x0040: _THREE_BITS._replace(peerpidfd=0x0056),  # sparc
    0x4011: GENERIC._replace(peerpidfd=0x404B, read=1 << 30, write=2 << 30),  # parisc
}
HERE: Final = BY_PEERCRED.get(socket.SO_PEERCRED, GENERIC)
LONG: Final = struct.calcsize("l")

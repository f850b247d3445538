# SPDX-License-Identifier: LGPL-2.1-or-later
"""A socket filter for the kernel's uevents: lets only devices through that go away and may be block devices.

Not here: reading uevents (devices).

Hard facts
- A uevent of the kernel begins with `ACTION@DEVPATH` and a null byte. Its subsystem comes later, where a
  classic BPF program (Documentation/networking/filter.rst) cannot find it: it has no loops.
- Each mount of many file systems makes a device /devices/virtual/bdi/MAJOR:MINOR and removes it at the end,
  in all containers of the host as well. Block devices without hardware, such as loop devices, are in
  /devices/virtual/block.
- libudev filters by subsystem in the kernel only what udevd sends, which has a header for that.
- A load beyond the end of the packet drops it.
"""

import ctypes
import socket
import struct
from typing import Final

_SO_ATTACH_FILTER: Final = 26
_LOAD_WORD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_NEXT, _DROP, _PASS = 0, -1, -2

_TESTS: Final = (
    # offset, word, if equal, if not
    (0, b"remo", _NEXT, _DROP),
    (4, b"ve@/", _NEXT, _DROP),
    (8, b"devi", _NEXT, _DROP),
    (16, b"virt", _NEXT, _PASS),
    (20, b"ual/", _NEXT, _PASS),
    (24, b"bloc", _PASS, _DROP),
)


def only_removals(fd: int) -> None:
    """Have the kernel drop all other uevents of its own before they reach the socket. Raises OSError."""
    program = _assemble()
    code = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    sock = socket.socket(fileno=fd)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
    finally:
        sock.detach()


def _assemble() -> bytes:
    """The array of struct sock_filter."""
    end = 2 * len(_TESTS)
    lines = []
    for index, (offset, word, *targets) in enumerate(_TESTS):
        here = 2 * index + 2
        where = {_NEXT: 0, _PASS: end - here, _DROP: end + 1 - here}
        lines.append((_LOAD_WORD, 0, 0, offset))
        lines.append((_JUMP_IF_EQUAL, where[targets[0]], where[targets[1]], int.from_bytes(word, "big")))
    lines += [(_RETURN, 0, 0, 0xFFFFFFFF), (_RETURN, 0, 0, 0)]
    return b"".join(struct.pack("@HBBI", *line) for line in lines)

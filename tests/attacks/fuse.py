#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hostile FUSE file systems, with the bare protocol (fuse(4)) and fusermount3.

Runs in a machine under test until it is killed, with Python's standard library only.

fuse.py hung DIRECTORY     never answers anything
fuse.py trap DIRECTORY     the same, and other users may enter it (user_allow_other in /etc/fuse.conf)
fuse.py files DIRECTORY    has a file `file` and a directory `sub`; reading the file never ends
fuse.py stuck DIRECTORY    as `files`; a process of it then hangs in mmap(2) with its memory map locked, so
                           that reading its /proc/PID/cmdline never ends; prints that process's PID
fuse.py storm DIRECTORY    has 990 that never answer, and unmounts and mounts them in three loops
"""

import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import threading

LOOKUP, FORGET, GETATTR, OPEN, READ, INIT, OPENDIR, READDIR, INTERRUPT, BATCH_FORGET = (
    1, 2, 3, 14, 15, 26, 27, 28, 36, 42,
)  # fmt: skip
FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE = 1, 2
ROOT, FILE, SUB = 1, 2, 3
ENOENT, ENOSYS = 2, 38


def mount(directory: str, options: str = "fsname=attack") -> int:
    """Mount a FUSE and return its descriptor of /dev/fuse, which the caller owns."""
    ours, theirs = socket.socketpair()
    environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}
    argv = ["fusermount3", "-o", options, "--", directory]
    subprocess.run(argv, env=environment, pass_fds=[theirs.fileno()], check=True)
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    return fds[0]


def attributes(node: int) -> bytes:
    mode = 0o100644 if node == FILE else 0o40755
    times = struct.pack("<3Q3I", 0, 0, 0, 0, 0, 0)
    return (
        struct.pack("<3Q", node, 8192, 16)
        + times
        + struct.pack("<7I", mode, 1, os.getuid(), os.getgid(), 0, 4096, 0)
    )


class Server:
    def __init__(self, device: int) -> None:
        self.device = device
        self.opened = 0
        self.reading = threading.Event()

    def run(self) -> None:
        while True:
            try:
                data = os.read(self.device, 1 << 18)
            except OSError:
                return
            _, opcode, unique, node = struct.unpack("<IIQQ", data[:24])
            if opcode in {FORGET, BATCH_FORGET, INTERRUPT}:
                continue
            if opcode == READ:
                self.reading.set()
                continue
            error, body = self.answer(opcode, node, data[40:])
            os.write(self.device, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)

    def answer(self, opcode: int, node: int, data: bytes) -> tuple[int, bytes]:
        match opcode:
            case 26:
                return 0, struct.pack("<IIIIHHIIHHI28x", 7, 31, 0, 0, 0, 0, 4096, 1, 0, 0, 0)
            case 1:
                found = {b"file\0": FILE, b"sub\0": SUB}.get(data)
                if found is None or node != ROOT:
                    return ENOENT, b""
                return 0, struct.pack("<4Q2I", found, 0, 100, 100, 0, 0) + attributes(found)
            case 3:
                return 0, struct.pack("<QII", 100, 0, 0) + attributes(node)
            case 14:
                self.opened += 1
                flags = FOPEN_KEEP_CACHE | (FOPEN_DIRECT_IO if self.opened > 1 else 0)
                return 0, struct.pack("<QII", 0, flags, 0)
            case 27:
                return 0, struct.pack("<QII", 0, 0, 0)
            case 28:
                return 0, b""
            case _:
                return ENOSYS, b""


def stuck(directory: str) -> None:
    """Hang with the memory map locked.

    One reader waits for an answer with the page locked; mmap(2) of a direct_io descriptor waits for the page
    with the map locked.
    """
    first = os.open(f"{directory}/file", os.O_RDONLY)
    threading.Thread(target=os.read, args=(first, 4096), daemon=True).start()
    second = os.open(f"{directory}/file", os.O_RDONLY)
    libc = ctypes.CDLL(None)
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *([ctypes.c_int] * 3), ctypes.c_long]
    threading.Timer(0.5, libc.mmap, (None, 4096, 1, 2, second, 0)).start()
    signal.pause()


STORM, LOOPS = 990, 3


def storm(directory: str) -> None:
    """fuse.conf allows 1000 at most. Each loop comes round after a while: most mounts stay for seconds."""
    places = [f"{directory}/{number}" for number in range(STORM)]
    for place in places:
        os.makedirs(place, exist_ok=True)
    devices = {place: mount(place) for place in places}
    print("mounted", flush=True)

    def loop(first: int) -> None:
        while True:
            for place in places[first::LOOPS]:
                subprocess.run(["fusermount3", "-uz", "--", place], check=True)
                os.close(devices[place])
                devices[place] = mount(place)

    for first in range(LOOPS):
        threading.Thread(target=loop, args=(first,), daemon=True).start()
    signal.pause()


def main() -> None:
    kind, directory = sys.argv[1:]
    if kind == "storm":
        storm(directory)
    device = mount(directory, *(["allow_other,fsname=attack"] if kind == "trap" else []))
    if kind not in {"hung", "trap"}:
        server = Server(device)
        if kind == "stuck":
            pid = os.fork()
            if pid == 0:  # this process hangs; its server, the parent, must not
                os.close(device)
                stuck(directory)
            print(pid, flush=True)
        else:
            print("mounted", flush=True)
        threading.Thread(target=server.run, daemon=True).start()
    else:
        print("mounted", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()

#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""An attacker that keeps descriptors open and passes them on.

Runs in a machine under test, with Python's standard library only. The first three print "ready" and stay
until they are killed.

hold.py flight PATH             keeps a descriptor of PATH in flight in a socket pair, and nowhere else
hold.py give NAME PATH          sends a descriptor of PATH to the process that connects to the abstract
                                socket NAME
hold.py create NAME             receives a directory from there, and creates entries in it without end
hold.py handle PATH             prints the file handle of PATH, name_to_handle_at(2)
hold.py open HANDLE PATH...     opens it with open_by_handle_at(2) and a descriptor of each PATH; prints the
                                content of the file
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys

LIBC = ctypes.CDLL(None, use_errno=True)


def say_ready() -> None:
    print("ready", flush=True)


def flight(path: str) -> None:
    one, other = socket.socketpair()
    fd = os.open(path, os.O_RDONLY)
    socket.send_fds(one, [b"x"], [fd])
    os.close(fd)
    say_ready()
    signal.pause()
    other.close()


def give(name: str, path: str) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"\0{name}")
    server.listen()
    say_ready()
    connection, _ = server.accept()
    socket.send_fds(connection, [b"x"], [os.open(path, os.O_RDONLY)])
    signal.pause()


def create(name: str) -> None:
    client = socket.socket(socket.AF_UNIX)
    client.connect(f"\0{name}")
    _, fds, _, _ = socket.recv_fds(client, 1, 1)
    (directory,) = fds
    say_ready()
    number = 0
    while True:
        number += 1
        with contextlib.suppress(OSError):
            os.mkdir(f"d{number}", dir_fd=directory)
            os.symlink("/srv/sentinel", f"d{number}/link", dir_fd=directory)
        with contextlib.suppress(OSError):
            os.symlink("/srv/sentinel", f"l{number}", dir_fd=directory)


class Handle(ctypes.Structure):
    _fields_ = (("size", ctypes.c_uint), ("type", ctypes.c_int), ("data", ctypes.c_ubyte * 128))


def handle(path: str) -> None:
    found = Handle(size=128)
    mount = ctypes.c_int()
    if LIBC.name_to_handle_at(-100, os.fsencode(path), ctypes.byref(found), ctypes.byref(mount), 0):
        raise OSError(ctypes.get_errno(), "name_to_handle_at")
    print(f"{found.type}:{bytes(found.data[: found.size]).hex()}")


def open_handle(text: str, paths: list[str]) -> None:
    kind, _, data = text.partition(":")
    raw = bytes.fromhex(data)
    found = Handle(size=len(raw), type=int(kind))
    found.data[: len(raw)] = raw
    for path in paths:
        place = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fd = LIBC.open_by_handle_at(place, ctypes.byref(found), os.O_RDONLY)
        if fd >= 0:
            print(f"{path}: {os.read(fd, 100)!r}")
        else:
            print(f"{path}: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    match sys.argv[1:]:
        case ["flight", path]:
            flight(path)
        case ["give", name, path]:
            give(name, path)
        case ["create", name]:
            create(name)
        case ["handle", path]:
            handle(path)
        case ["open", text, *paths]:
            open_handle(text, paths)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()

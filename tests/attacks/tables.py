#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""An attacker that makes its own entries in /proc as long as it can.

Runs in a machine under test, with Python's standard library only. Prints "ready" and stays until it is
killed.

tables.py mounts DEPTH COUNT      makes COUNT mounts in its own namespace, in a directory DEPTH names deep;
                                  the names are spaces, which the kernel escapes with four characters each
tables.py endless DEPTH           makes one mount of a directory in /tmp that is DEPTH names deep
tables.py descriptors PROCESSES   starts that many processes with as many open files as the limit allows
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys

CLONE_NEWNS, CLONE_NEWUSER, MS_BIND = 0x20000, 0x10000000, 0x1000
LIBC = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def say_ready() -> None:
    print("ready", flush=True)


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def become_alone() -> None:
    uid, gid = os.getuid(), os.getgid()
    check(LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNS))
    write("/proc/self/setgroups", "deny")
    write("/proc/self/uid_map", f"0 {uid} 1")
    write("/proc/self/gid_map", f"0 {gid} 1")


def mounts(depth: int, count: int) -> None:
    become_alone()
    check(LIBC.mount(b"deep", b"/mnt", b"tmpfs", 0, None))
    os.chdir("/mnt")
    for _ in range(depth):
        os.mkdir(" " * 255)
        os.chdir(" " * 255)
    os.mkdir("from")
    os.mkdir("to")
    for _ in range(count):
        check(LIBC.mount(b"from", b"to", None, MS_BIND, None))
    say_ready()
    signal.pause()


def endless(depth: int) -> None:
    os.makedirs("/tmp/endless", exist_ok=True)
    os.chdir("/tmp/endless")
    for _ in range(depth):
        os.mkdir("d" * 255)
        os.chdir("d" * 255)
    become_alone()
    check(LIBC.mount(b".", b"/mnt", None, MS_BIND, None))
    say_ready()
    signal.pause()


def descriptors(processes: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with contextlib.suppress(OSError):
        while True:
            os.dup(0)
    for _ in range(processes - 1):
        if os.fork() == 0:
            signal.pause()
    say_ready()
    signal.pause()


def main() -> None:
    kind, *arguments = sys.argv[1:]
    match kind, [int(argument) for argument in arguments]:
        case "mounts", [depth, count]:
            mounts(depth, count)
        case "endless", [depth]:
            endless(depth)
        case "descriptors", [processes]:
            descriptors(processes)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes instances in numbers: a process in each user's slice asks polytmpd's socket, as pam_polytmp does.

    crowd.py more FIRST LAST   makes those of the UIDs; prints the milliseconds of each request, as JSON
    crowd.py look              prints UID → [namespace, content of a file in /tmp]
    crowd.py acquire UID       prints the milliseconds of one request
    crowd.py end               ends the processes

The processes are small: they share nothing with Python, and only wait for a signal.
Not here: sessions of logind, which take 100 times as long (sessions.py).
"""

import ctypes
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

SOCKET = "/run/polytmpd/login"
WAITER = "/opt/bench/waiter"
SLICES = Path("/sys/fs/cgroup/user.slice")
KNOWN = Path("/run/bench-crowd")
CLONE_NEWNS = 0x00020000


def acquire(uid: int) -> tuple[int, float]:
    """(descriptor of the namespace, milliseconds)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asked:
        begin = time.perf_counter()
        asked.connect(SOCKET)
        asked.send(b"acquire %d" % uid)
        text, fds, _, _ = socket.recv_fds(asked, 4096, 4)
        spent = (time.perf_counter() - begin) * 1000
    if len(fds) != 1:
        raise SystemExit(f"UID {uid}: {text.decode()}")
    return fds[0], spent


def setns(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "setns")


def more(first: int, last: int) -> list[float]:
    found = []
    with KNOWN.open("a") as known:
        for uid in range(first, last + 1):
            group = SLICES / f"user-{uid}.slice"
            group.mkdir()
            results, result = os.pipe()
            process = os.fork()
            if process == 0:
                try:
                    (group / "cgroup.procs").write_text("0")
                    fd, spent = acquire(uid)
                    setns(fd)
                    os.close(fd)
                    Path("/tmp/mark").write_text(str(uid))
                    os.write(result, repr(spent).encode())
                    os.closerange(0, 64)
                    os.execv(WAITER, [WAITER])
                except BaseException as error:
                    os.write(result, f"failed: {error!r}".encode())
                finally:
                    os._exit(1)
            os.close(result)
            text = os.read(results, 4096).decode()
            os.close(results)
            if not text or text.startswith("failed"):
                raise SystemExit(f"UID {uid}: {text}")
            found.append(float(text))
            known.write(f"{uid} {process}\n")
    return found


def crowd() -> list[tuple[int, int]]:
    if not KNOWN.exists():
        return []
    return [(int(uid), int(process)) for uid, process in map(str.split, KNOWN.read_text().splitlines())]


def look() -> dict[int, tuple[str, str]]:
    found = {}
    for uid, process in crowd():
        try:
            text = Path(f"/proc/{process}/root/tmp/mark").read_text()
            found[uid] = os.readlink(f"/proc/{process}/ns/mnt"), text  # noqa: PTH115
        except OSError as error:
            found[uid] = str(error), ""
    return found


def end() -> None:
    """The slices' cgroups go when the processes are gone."""
    known = crowd()
    for _, process in known:
        os.kill(process, signal.SIGKILL)
    for uid, _ in known:
        group = SLICES / f"user-{uid}.slice"
        while "populated 1" in (group / "cgroup.events").read_text():
            time.sleep(0.005)
        group.rmdir()
    KNOWN.unlink(missing_ok=True)


def main() -> None:
    match sys.argv[1:]:
        case ["more", first, last]:
            print(json.dumps(more(int(first), int(last))))  # noqa: T201
        case ["look"]:
            print(json.dumps(look()))  # noqa: T201
        case ["acquire", uid]:
            fd, spent = acquire(int(uid))
            os.close(fd)
            print(json.dumps(spent))  # noqa: T201
        case ["end"]:
            end()


if __name__ == "__main__":
    main()

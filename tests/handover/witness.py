#!/usr/bin/python3 -IS
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs in a machine: "witness LABEL [FILE]" has root record where it and all other processes are.

The recorder ("witness --serve", as root on the host) takes the caller's PID from the kernel, and answers
when it has written the record. Meanwhile the caller is there, with all programs between it and its session.
A FILE gets a line, as from an editor.

Not here: who should be where (tests/handover/__init__.py).
"""

import json
import os
import socket
import struct
import sys

SOCKET = "/run/witness.sock"
RECORDS = "/run/witness"


def process(pid: int) -> dict[str, object]:
    """Return what the rule is about. Raises OSError if the process is gone."""
    with open(f"/proc/{pid}/status") as file:  # noqa: PTH123  (-S: quick to start)
        fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    return {
        "pid": pid,
        "parent": int(fields["PPid"]),
        "name": fields["Name"],
        "uid": int(fields["Uid"].split()[1]),  # the effective one: a set-user-ID program's is its owner
        "namespace": os.readlink(f"/proc/{pid}/ns/mnt"),  # noqa: PTH115
    }


def serve() -> None:
    os.makedirs(RECORDS, exist_ok=True)  # noqa: PTH103
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(SOCKET)
    os.chmod(SOCKET, 0o666)  # noqa: PTH101
    listening.listen(64)
    while True:
        connection, _ = listening.accept()
        with connection:
            pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            label = connection.recv(256).decode()
            seen = []
            for name in os.listdir("/proc"):  # noqa: PTH208
                if name.isdigit():
                    try:
                        seen.append(process(int(name)))
                    except OSError:
                        continue
            with open(f"{RECORDS}/new", "w") as file:  # noqa: PTH123
                json.dump({"pid": pid, "processes": seen}, file)
            os.rename(f"{RECORDS}/new", f"{RECORDS}/{label}.json")  # noqa: PTH104
            connection.sendall(b"seen")


def main() -> None:
    if sys.argv[1] == "--serve":
        serve()
    if len(sys.argv) > 2:
        with open(sys.argv[2], "a") as file:  # noqa: PTH123
            file.write(f"edited by {os.geteuid()}\n")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(SOCKET)
        connection.sendall(sys.argv[1].encode())
        connection.recv(16)


if __name__ == "__main__":
    main()

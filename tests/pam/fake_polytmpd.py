#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A polytmpd that replies to requests on its socket as its last argument (JSON) says, even if that is wrong.

The first argument is the descriptor of the socket. It writes "ready" and a line for each request to standard
output, and exits at the end of standard input.
"""

import contextlib
import json
import os
import select
import socket
import sys
from typing import Any


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def answer(connection: socket.socket, request: str, script: dict[str, Any]) -> None:
    if script.get("die"):
        os._exit(0)
    if script.get("hang_up"):
        return
    if "error" in script:
        kind = "exempt" if script["error"] == "exempt" else f"refused {script['error']}"
        connection.send(f"{kind} {script['text']}".rstrip(" ").encode())
        return
    users = script.get("users")
    uid = request.removeprefix("acquire ")
    if users is not None and uid not in users:
        connection.send(f"{script['others']} not for them".encode())
        return
    paths = users[uid] if users else script.get("open", [])
    fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]
    if script.get("pipe"):
        reader, writer = os.pipe()
        os.close(writer)
        fds.append(reader)
    text = script.get("reply", "namespace").encode("latin-1") * script.get("times", 1)
    socket.send_fds(connection, [text], fds)
    for fd in fds:
        os.close(fd)


def main() -> None:
    listening = socket.socket(fileno=int(sys.argv[1]))
    script = json.loads(sys.argv[2])
    kept = []
    say("ready")
    while True:
        readable, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in readable:
            return
        connection, _ = listening.accept()
        request = connection.recv(4096).decode()
        say(request)
        if script.get("silent"):
            kept.append(connection)
            continue
        with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it waits no longer
            answer(connection, request, script)


if __name__ == "__main__":
    main()

#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The browser's part of Cockpit: "browser USER PASSWORD COMMAND" logs in over HTTP and has the bridge of the
session run a line of shell, whose output it prints.

It runs inside the machine, without the modules of the tests. Not here: TLS, and anything that the pages do.
"""

import base64
import http.client
import json
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import IO, Any

HOST = "127.0.0.1"
PORT = 9090
TIMEOUT = 60  # seconds
TEXT, CLOSE = 1, 8  # RFC 6455


def log_in(user: str, password: str) -> str:
    """Return the cookie of the session."""
    connection = http.client.HTTPConnection(HOST, PORT, timeout=TIMEOUT)
    credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
    connection.request("GET", "/cockpit/login", headers={"Authorization": f"Basic {credentials}"})
    response = connection.getresponse()
    if response.status != 200:
        sys.exit(f"{response.status} {response.reason}")
    return (response.getheader("Set-Cookie") or "").partition(";")[0]


class Channels:
    """The WebSocket to a session: each message is the name of a channel, a newline, and what is in it."""

    def __init__(self, cookie: str) -> None:
        self._socket = socket.create_connection((HOST, PORT), TIMEOUT)
        lines = (
            *("GET /cockpit/socket HTTP/1.1", f"Host: {HOST}:{PORT}", f"Origin: http://{HOST}:{PORT}"),
            *("Connection: Upgrade", "Upgrade: websocket", f"Cookie: {cookie}"),
            *("Sec-WebSocket-Version: 13", "Sec-WebSocket-Protocol: cockpit1"),
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
        )
        self._socket.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode())
        self._file: IO[bytes] = self._socket.makefile("rb")
        status = self._file.readline().decode()
        if " 101 " not in status:
            sys.exit(status)
        while self._file.readline().strip():
            pass

    def control(self, **message: Any) -> None:
        data = b"\n" + json.dumps(message).encode()
        mask = os.urandom(4)
        length = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack(">H", len(data))
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))
        self._socket.sendall(bytes([0x80 | TEXT]) + length + mask + masked)

    def messages(self) -> Iterator[tuple[str, bytes]]:
        """Yield channel and content; a control message has no channel."""
        while True:
            kind, length = self._file.read(2)
            if length == 126:
                (length,) = struct.unpack(">H", self._file.read(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", self._file.read(8))
            data = self._file.read(length)
            if kind & 15 == CLOSE:
                return
            channel, _, content = data.partition(b"\n")
            yield channel.decode(), content


def main() -> None:
    user, password, command = sys.argv[1:]
    channels = Channels(log_in(user, password))
    channels.control(command="init", version=1)
    channels.control(
        command="open", channel="1:1", payload="stream", host="localhost", spawn=["sh", "-c", command]
    )
    for channel, content in channels.messages():
        if channel == "1:1":
            sys.stdout.buffer.write(content)
        elif not channel and (message := json.loads(content)).get("command") == "close":
            sys.exit(message.get("problem") or message.get("exit-status", 0))
    sys.exit("the session ended")


if __name__ == "__main__":
    main()

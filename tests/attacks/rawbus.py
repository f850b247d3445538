#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""An attacker on the system bus: speaks D-Bus on the bare socket, so that no library prevents nonsense.

Runs in a machine under test, with Python's standard library only.

rawbus.py flood SECONDS [CONNECTIONS]   sends calls without reply as fast as it can; prints how many
rawbus.py big COUNT BYTES               sends calls whose body is an array of empty arrays
rawbus.py fds COUNT                     sends calls and signals with 16 descriptors each
rawbus.py pile CONNECTIONS              sends as many calls with 16 descriptors each as the bus accepts
rawbus.py signatures COUNT              sends calls with a variant whose signature is new each time
rawbus.py forge UID                     sends logind's signals, as broadcasts and to polytmpd alone
rawbus.py ask CONNECTIONS UID MEMBER    calls an instance's method 64 times on each, then waits
rawbus.py leave CONNECTIONS UID MEMBER  the same, but disconnects without waiting
rawbus.py pids CONNECTIONS PID          asks 64 times on each for the process's instance, then waits
rawbus.py owner                         prints the unique name of polytmpd
"""

import contextlib
import itertools
import os
import signal
import socket
import struct
import sys
import time

BUS = "/run/dbus/system_bus_socket"
CALL, RETURN, SIGNAL = 1, 2, 4
NO_REPLY = 1
NAME = "org.polytmp1"
PATH = "/org/polytmp1"
MANAGER = "org.polytmp1.Manager"
PEER = "org.freedesktop.DBus.Peer"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
PROPERTIES = "org.freedesktop.DBus.Properties"
LOGIN = "org.freedesktop.login1.Manager"


def pad(data: bytes, to: int) -> bytes:
    return data + bytes(-len(data) % to)


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data + b"\0"


def signature(text: str) -> bytes:
    return bytes([len(text)]) + text.encode() + b"\0"


def message(
    kind: int,
    serial: int,
    fields: dict[int, tuple[str, str | int]],
    body: bytes = b"",
    flags: int = 0,
) -> bytes:
    """fields: D-Bus header field → (signature, value)."""
    header = b""
    for code, (kind_of, value) in fields.items():
        header = pad(header, 8) + bytes([code]) + signature(kind_of)
        if kind_of == "g":
            header += signature(str(value))
        elif kind_of == "u":
            header = pad(header, 4) + struct.pack("<I", int(value))
        else:
            header = pad(header, 4) + string(str(value))
    fixed = struct.pack("<cBBBII", b"l", kind, flags, 1, len(body), serial)
    return pad(fixed + struct.pack("<I", len(header)) + header, 8) + body


def call(
    serial: int,
    interface: str,
    member: str,
    of: str = "",
    body: bytes = b"",
    *,
    flags: int = NO_REPLY,
    to: str = NAME,
    path: str = PATH,
    fds: int = 0,
) -> bytes:
    fields: dict[int, tuple[str, str | int]] = {
        1: ("o", path),
        2: ("s", interface),
        3: ("s", member),
        6: ("s", to),
    }
    if of:
        fields[8] = ("g", of)
    if fds:
        fields[9] = ("u", fds)
    return message(CALL, serial, fields, body, flags)


def emit(
    serial: int, interface: str, member: str, of: str, body: bytes, to: str = "", fds: int = 0
) -> bytes:
    fields: dict[int, tuple[str, str | int]] = {
        1: ("o", "/org/freedesktop/login1"),
        2: ("s", interface),
        3: ("s", member),
        8: ("g", of),
    }
    if to:
        fields[6] = ("s", to)
    if fds:
        fields[9] = ("u", fds)
    return message(SIGNAL, serial, fields, body, NO_REPLY)


class Bus:
    def __init__(self) -> None:
        self.serials = itertools.count(2)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(BUS)
        uid = str(os.getuid()).encode().hex().encode()
        self.socket.sendall(b"\0AUTH EXTERNAL " + uid + b"\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n")
        lines = b""
        while lines.count(b"\r\n") < 2:
            lines += self._receive()
        if b"AGREE_UNIX_FD" not in lines:
            raise SystemExit(f"the bus answers {lines!r}")
        self.ask("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "Hello")

    def _receive(self) -> bytes:
        data = self.socket.recv(1 << 16)
        if not data:
            raise SystemExit("the bus closed the connection")
        return data

    def ask(
        self, to: str, path: str, interface: str, member: str, of: str = "", body: bytes = b""
    ) -> tuple[int, bytes]:
        """Call a method and return (message type, the message after its fixed part) of the reply."""
        serial = next(self.serials)
        self.socket.sendall(call(serial, interface, member, of, body, flags=0, to=to, path=path))
        data = b""
        while True:
            while len(data) < 16:
                data += self._receive()
            _, kind, _, _, length, _, fields = struct.unpack("<cBBBIII", data[:16])
            size = 16 + fields + -fields % 8 + length
            while len(data) < size:
                data += self._receive()
            found, data = data[:size], data[size:]
            # REPLY_SERIAL, the only field of type u that replies have
            if kind in {RETURN, 3} and b"\x05\x01u\0" + struct.pack("<I", serial) in found:
                return kind, found[16:]

    def sync(self) -> None:
        """Return when polytmpd has read everything that was sent before."""
        self.ask(NAME, PATH, PEER, "Ping")

    def owner(self) -> str:
        _, data = self.ask(
            "org.freedesktop.DBus",
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus",
            "GetNameOwner",
            "s",
            string(NAME),
        )
        return data.rstrip(b"\0").rpartition(b":")[2].decode().join([":", ""])


def flood(seconds: float, connections: int) -> None:
    buses = [Bus() for _ in range(connections)]
    end = time.monotonic() + seconds
    sent = 0
    while time.monotonic() < end:
        for bus in buses:
            block = b"".join(call(next(bus.serials), INTROSPECTABLE, "Introspect") for _ in range(100))
            bus.socket.sendall(block)
            sent += 100
    print(sent, flush=True)


def big(count: int, size: int) -> None:
    bus = Bus()
    body = struct.pack("<I", size) + bytes(size)
    for _ in range(count):
        bus.socket.sendall(call(next(bus.serials), PROPERTIES, "GetAll", "aai", body))
    bus.sync()


SIXTEEN = struct.pack("<16I", *range(16))


def sixteen() -> list[tuple[int, int, bytes]]:
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(16)]
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("<16i", *fds))]


def pile(connections: int) -> None:
    buses, ancillary = [Bus() for _ in range(connections)], sixteen()
    for bus in buses:
        bus.socket.settimeout(1)  # the bus stops reading from a connection with 64 descriptors on their way
        with contextlib.suppress(OSError):
            for _ in range(100):
                data = call(next(bus.serials), PEER, "Ping", "h" * 16, SIXTEEN, fds=16)
                bus.socket.sendmsg([data], ancillary)
    print("sent", flush=True)
    signal.pause()


def descriptors(count: int) -> None:
    bus, ancillary, body = Bus(), sixteen(), SIXTEEN
    owner = bus.owner()
    for _ in range(count):
        for data in (
            call(next(bus.serials), INTROSPECTABLE, "Introspect", "h" * 16, body, fds=16),
            call(next(bus.serials), MANAGER, "GetInstance", "h" * 16, body, fds=16),
            call(next(bus.serials), PROPERTIES, "GetAll", "h" * 16, body, to=owner, fds=16),
            call(next(bus.serials), MANAGER, "NoSuch", "h" * 16, body, fds=16),
            emit(next(bus.serials), LOGIN, "UserNew", "h" * 16, body, to=owner, fds=16),
        ):
            bus.socket.sendmsg([data], ancillary)
        bus.sync()  # the kernel limits how many are in flight, see ETOOMANYREFS in unix(7)


def signatures(count: int) -> None:
    bus = Bus()
    for number in range(count):
        inner = "".join("yg"[int(digit)] for digit in f"1{number:b}")  # neither is aligned
        of = f"({inner})"
        body = pad(signature(of), 8) + bytes(len(inner) + inner.count("g"))
        bus.socket.sendall(call(next(bus.serials), PROPERTIES, "GetAll", "v", body))
    bus.sync()


def forge(uid: int) -> None:
    bus = Bus()
    owner = bus.owner()
    session = f"/org/freedesktop/login1/session/_3{uid}"
    user = f"/org/freedesktop/login1/user/_{uid}"
    for to in ("", owner):
        for member, of, body in (
            ("UserRemoved", "uo", struct.pack("<I", uid) + string(user)),
            ("SessionRemoved", "so", pad(string("1"), 4) + string(session)),
            ("UserNew", "uo", struct.pack("<I", uid + 1000) + string(user)),
        ):
            for interface in (LOGIN, "org.freedesktop.DBus", "org.freedesktop.systemd1.Manager"):
                bus.socket.sendall(emit(next(bus.serials), interface, member, of, body, to))
        gone = pad(pad(string("org.freedesktop.login1"), 4) + string(":1.1"), 4) + string("")
        bus.socket.sendall(
            emit(next(bus.serials), "org.freedesktop.DBus", "NameOwnerChanged", "sss", gone, to)
        )
    bus.sync()


def ask(connections: int, uid: int, member: str, *, leave: bool = False) -> None:
    buses = [Bus() for _ in range(connections)]
    for bus in buses:
        for _ in range(64):
            data = call(
                next(bus.serials), "org.polytmp1.Instance", member, path=f"{PATH}/instance/_{uid}", flags=0
            )
            bus.socket.sendall(data)
    print("sent", flush=True)
    while not leave:
        for bus in buses:
            bus.socket.recv(1 << 16)


def pids(connections: int, pid: int) -> None:
    buses = [Bus() for _ in range(connections)]
    body = struct.pack("<I", pid)
    for bus in buses:
        for _ in range(64):
            bus.socket.sendall(call(next(bus.serials), MANAGER, "GetInstanceByPID", "u", body, flags=0))
    print("sent", flush=True)
    while True:
        for bus in buses:
            bus.socket.recv(1 << 16)


def main() -> None:
    match sys.argv[1:]:
        case ["flood", seconds, *rest]:
            flood(float(seconds), int(rest[0]) if rest else 1)
        case ["big", count, size]:
            big(int(count), int(size))
        case ["fds", count]:
            descriptors(int(count))
        case ["pile", connections]:
            pile(int(connections))
        case ["signatures", count]:
            signatures(int(count))
        case ["forge", uid]:
            forge(int(uid))
        case ["ask", connections, uid, member]:
            ask(int(connections), int(uid), member)
        case ["leave", connections, uid, member]:
            ask(int(connections), int(uid), member, leave=True)
        case ["pids", connections, pid]:
            pids(int(connections), int(pid))
        case ["owner"]:
            print(Bus().owner())
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()

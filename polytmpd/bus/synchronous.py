# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection to the system bus for one call after the other, for programs that run for milliseconds.

Its coroutines never wait for an event loop: run() needs none. Over it nobody can pass descriptors, since it
does not negotiate them.
Not here: signals, descriptors, calls at the same time (connection.py).
"""

import os
import socket
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Final, TypeVar

from polytmpd.bus import wire
from polytmpd.bus.protocol import DBUS, TIMEOUT, Asker, BusError

_SYSTEM_BUS: Final = "unix:path=/var/run/dbus/system_bus_socket"
_LINE_AT_MOST: Final = 16 * 1024

T = TypeVar("T")


class SynchronousConnection(Asker):
    """Owns one connection, until close()."""

    def __init__(self, stream: socket.socket) -> None:
        self._socket = stream
        self._received = bytearray()
        self._serial = 0

    @classmethod
    def open(cls, name: str) -> "SynchronousConnection":
        """Connect to the bus behind a Unix socket, see socket_name(). Raises OSError or BusError."""
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self = cls(stream)
        try:
            stream.settimeout(TIMEOUT)
            stream.connect(name)
            self._authenticate()
            run(self.ask_bus("Hello"))
        except TimeoutError:
            stream.close()
            raise BusError(f"{DBUS}.Error.Timeout", "the bus does not answer") from None
        except BaseException:
            stream.close()
            raise
        return self

    def close(self) -> None:
        self._socket.close()

    def _authenticate(self) -> None:
        uid = str(os.geteuid()).encode().hex()
        self._socket.sendall(f"\0AUTH EXTERNAL {uid}\r\nBEGIN\r\n".encode())
        answer = b""
        while not answer.endswith(b"\r\n"):
            got = self._socket.recv(1)  # what follows belongs to the first message
            if not got or len(answer) > _LINE_AT_MOST:
                raise BusError(f"{DBUS}.Error.Failed", "cannot use the bus: it closed the connection")
            answer += got
        if not answer.startswith(b"OK "):
            text = answer.decode(errors="replace").strip()
            raise BusError(f"{DBUS}.Error.Failed", f"cannot use the bus: authentication failed: {text}")

    async def ask(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        timeout: float | None = TIMEOUT,  # noqa: ASYNC109
        interactive: bool = False,
        keep_fds: bool = False,
    ) -> list[Any]:
        """See Asker. An answer that comes after the timeout is dropped."""
        if keep_fds:
            raise ValueError("this connection has no descriptors")
        what = f"{interface}.{member}"
        self._serial += 1
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            message = wire.method_call(
                self._serial, destination, path, interface, member, signature, body, interactive=interactive
            )
            self._wait(deadline)
            self._socket.sendall(message)
            reply = self._receive(deadline)
            while reply.serial != self._serial or reply.kind not in {wire.METHOD_RETURN, wire.ERROR}:
                reply = self._receive(deadline)
        except TimeoutError:
            text = f"no answer from {destination} to {what}"
            raise BusError(f"{DBUS}.Error.Timeout", text) from None
        except OSError:
            text = f"no answer from {destination} to {what}"
            raise BusError(f"{DBUS}.Error.Disconnected", text) from None
        except (ValueError, OverflowError, wire.WireError) as error:
            raise BusError(f"{DBUS}.Error.Failed", f"{what} failed: {error!r}") from error
        if reply.kind == wire.ERROR:
            text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else reply.error_name
            raise BusError(reply.error_name, text)
        return reply.body

    def _wait(self, deadline: float | None) -> None:
        """Let the next operation of the socket wait until then. Raises TimeoutError."""
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _receive(self, deadline: float | None) -> wire.Reply:
        """The next message. After a timeout, what has arrived of it is kept."""
        self._fill(wire.PREFIX, deadline)
        size = wire.PREFIX + wire.length(bytes(self._received[: wire.PREFIX]))
        self._fill(size, deadline)
        message = bytes(self._received[:size])
        del self._received[:size]
        return wire.reply(message)

    def _fill(self, size: int, deadline: float | None) -> None:
        while len(self._received) < size:
            self._wait(deadline)
            part = self._socket.recv(64 * 1024)
            if not part:
                raise ConnectionError
            self._received += part


def run(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that waits for nothing but a SynchronousConnection."""
    try:
        work.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    work.close()
    raise RuntimeError("the coroutine needs an event loop")


def socket_name(address: str | None = None) -> str | None:
    """The Unix socket of the system bus, or of address; None if only the D-Bus library can connect."""
    address = address or os.environ.get("DBUS_SYSTEM_BUS_ADDRESS") or _SYSTEM_BUS
    transport, _, rest = address.partition(":")
    values = dict(pair.partition("=")[::2] for pair in rest.split(","))
    if transport != "unix" or ";" in address or "%" in address:
        return None
    if "abstract" in values:
        return "\0" + values["abstract"]
    return values.get("path")

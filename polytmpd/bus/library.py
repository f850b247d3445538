# SPDX-License-Identifier: LGPL-2.1-or-later
"""The only module that imports the D-Bus library: dbus-next, or its maintained fork dbus-fast.

dbus-next cannot be imported on Python 3.15 and later (typing.no_type_check_decorator is gone). dbus-fast has
nearly the same interface. We use only what both have: MessageBus, Message and Variant, but not their object
servers, for the reasons in server.py. Types come from dbus-fast, since dbus-next has none.

Not here: how the bus is used (connection.py, server.py).
"""

import select
import socket
import struct
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from dbus_fast import BusType, DBusError, Message, MessageFlag, MessageType, Variant
    from dbus_fast.aio import MessageBus
else:
    # If PyGObject is installed, dbus-next imports its GLib flavour too, 3 MB for nothing: keep it out.
    _gi = sys.modules.get("gi")
    sys.modules["gi"] = None
    try:
        from dbus_next import BusType, DBusError, Message, MessageFlag, MessageType, Variant
        from dbus_next.aio import MessageBus
    except ImportError:
        from dbus_fast import BusType, DBusError, Message, MessageFlag, MessageType, Variant
        from dbus_fast.aio import MessageBus
    finally:
        if _gi is None:
            del sys.modules["gi"]
        else:
            sys.modules["gi"] = _gi

__all__ = [
    "BODY_AT_MOST",
    "LIBRARY",
    "SIGNATURES_AT_MOST",
    "UNREAD",
    "BusType",
    "DBusError",
    "Message",
    "MessageBus",
    "MessageFlag",
    "MessageType",
    "Variant",
    "signatures",
]

LIBRARY: Final = Message.__module__.partition(".")[0]
"""dbus_next or dbus_fast."""

SIGNATURES_AT_MOST: Final = 1000
BODY_AT_MOST: Final = 64 * 1024
"""Bytes in the body of a call or signal. No message that we understand holds more than a path."""
MESSAGES_AT_ONCE: Final = 8
"""Messages that are read before everything else has its turn, above all logins."""
UNREAD: Final = "too large to be read"
"""The signature given to a call or signal with a larger body: it matches no method."""


class _BoundedCache(dict[str, Any]):
    """A cache that empties itself when it is full."""

    def __setitem__(self, signature: str, tree: Any) -> None:
        if len(self) >= SIGNATURES_AT_MOST:
            self.clear()
        super().__setitem__(signature, tree)


def signatures() -> int:
    """The number of parsed signatures that the library has cached."""
    module: Any = sys.modules[f"{LIBRARY}.signature"]
    if LIBRARY == "dbus_next":
        return len(module.SignatureTree._cache)
    return int(module.get_signature_tree.cache_info().currsize)


_aio: Any = sys.modules[f"{LIBRARY}.aio.message_bus"]


class _PatientSocket:
    """A socket that hides EAGAIN, which the writer of both libraries takes for the end of the connection."""

    def __init__(self, wrapped: socket.socket) -> None:
        self._socket = wrapped
        # Not select(2), which cannot handle descriptors above 1023: those of the FD store come first.
        self._writable = select.poll()
        self._writable.register(wrapped, select.POLLOUT)

    def send(self, data: bytes) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    def sendmsg(self, buffers: Sequence[bytes], ancillary: Any) -> int:
        while True:
            try:
                return self._socket.sendmsg(buffers, ancillary)
            except BlockingIOError:  # the writer forgets the descriptors after the first call
                self._writable.poll(1000)


class _PatientWriter(_aio._MessageWriter):  # type: ignore[misc]  # also of type Any
    def __init__(self, bus: Any) -> None:
        super().__init__(bus)
        self.sock: Any = _PatientSocket(bus._sock)


_aio._MessageWriter = _PatientWriter

if LIBRARY == "dbus_next":
    # Its cache is global and unbounded, and every variant in every caller's messages feeds it: 45 KiB for
    # each new signature. The cache of dbus-fast is bounded.
    _signature: Any = sys.modules["dbus_next.signature"]
    _signature.SignatureTree._cache = _BoundedCache()

    _unmarshaller: Any = sys.modules["dbus_next._private.unmarshaller"]

    class _BoundedUnmarshaller(_unmarshaller.Unmarshaller):  # type: ignore[misc]  # a base class of type Any
        """Skips the body of a large call or signal: such a message arrives with the signature UNREAD.

        The bus lets 32 MiB through. If they are all empty arrays, parsing takes 10 s and half a GiB.
        """

        def _unmarshall(self) -> None:
            self.offset = 0
            self.read(16, prefetch=True)
            order = "<" if self.buf[:1] == b"l" else ">"
            length, _, fields = struct.unpack_from(f"{order}III", self.buf, 4)
            if self.buf[1] not in {1, 4} or length <= BODY_AT_MOST:
                super()._unmarshall()
                return
            end = 16 + fields + -fields % 8
            self.offset = 0
            self.read(end + length, prefetch=True)  # raises until all of it has arrived, and is called again
            struct.pack_into(f"{order}I", self.buf, 4, 0)
            del self.buf[end:]
            super()._unmarshall()
            self.message.signature = UNREAD

    _aio.Unmarshaller = _BoundedUnmarshaller

    def _read_some(bus: Any) -> None:
        """Read a few messages. The library reads until none is left, which in a flood is never.

        The event loop calls this again while there is more: a connection that takes descriptors reads from
        the socket itself, without a buffer.
        """
        try:
            for _ in range(MESSAGES_AT_ONCE):
                if not bus._unmarshaller.unmarshall():
                    return
                bus._on_message(bus._unmarshaller.message)
                bus._unmarshaller = bus._create_unmarshaller()
        except Exception as error:
            bus._finalize(error)

    _aio.MessageBus._message_reader = _read_some

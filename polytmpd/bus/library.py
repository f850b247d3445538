# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one place that imports the D-Bus library: dbus-next, or its maintained fork where that cannot be
imported.

dbus-next fails to import from Python 3.15 on (typing.no_type_check_decorator is gone); dbus-fast has nearly
the same interface, and is sound from 5.0.22 on. Only what both have is used: MessageBus, Message, Variant.
Their object server is not, for the reasons in server.py. The types are dbus-fast's, the only one of the two
that has them.
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
    # dbus-next's GLib flavour is imported with the rest where PyGObject is installed, 3 MB for nothing: keep
    # it out.
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
"""Bytes of a call's or signal's body; no message that we understand has more than a path in it."""
UNREAD: Final = "too large to be read"
"""The signature of a call or signal with a larger body: fits no method."""


class _BoundedCache(dict[str, Any]):
    """Empties itself when it is full."""

    def __setitem__(self, signature: str, tree: Any) -> None:
        if len(self) >= SIGNATURES_AT_MOST:
            self.clear()
        super().__setitem__(signature, tree)


def signatures() -> int:
    """How many parsed signatures the library remembers."""
    module: Any = sys.modules[f"{LIBRARY}.signature"]
    if LIBRARY == "dbus_next":
        return len(module.SignatureTree._cache)
    return int(module.get_signature_tree.cache_info().currsize)


if LIBRARY == "dbus_next":
    # Its cache is global, without bound, and fed by every variant in every message of every caller: 45 KiB
    # for each novel signature. dbus-fast's has a bound.
    _signature: Any = sys.modules["dbus_next.signature"]
    _signature.SignatureTree._cache = _BoundedCache()

    _unmarshaller: Any = sys.modules["dbus_next._private.unmarshaller"]
    _aio: Any = sys.modules["dbus_next.aio.message_bus"]

    class _BoundedUnmarshaller(_unmarshaller.Unmarshaller):  # type: ignore[misc]  # a base class of type Any
        """Parses no large body of a call or signal: such a message arrives with the signature UNREAD.

        The bus lets 32 MiB through, of empty arrays if the sender likes: 10 s of parsing, and half a GiB.
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
            self.read(end + length, prefetch=True)  # not there yet: this raises, and comes again
            struct.pack_into(f"{order}I", self.buf, 4, 0)
            del self.buf[end:]
            super()._unmarshall()
            self.message.signature = UNREAD

    _aio.Unmarshaller = _BoundedUnmarshaller

    class _PatientSocket:
        """Its writer takes a full socket, EAGAIN, for the end of the connection."""

        def __init__(self, wrapped: socket.socket) -> None:
            self._socket = wrapped
            # Not select(2), which knows no descriptor above 1023: the FD store's come before this one.
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
                except BlockingIOError:  # the writer forgets the descriptors once it was called
                    self._writable.poll(1000)

    class _PatientWriter(_aio._MessageWriter):  # type: ignore[misc]  # likewise
        def __init__(self, bus: Any) -> None:
            super().__init__(bus)
            self.sock: Any = _PatientSocket(bus._sock)

    _aio._MessageWriter = _PatientWriter

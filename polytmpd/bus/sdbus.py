# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection to the system bus for one call after the other, for programs that run for milliseconds.

It is sd-bus(3): importing asyncio and the D-Bus library takes longer than all else that a short command of
polytmpctl does. Its coroutines never wait for an event loop: run() needs none.
Not here: signals, descriptors, calls at the same time (connection.py).

Hard facts
- sd_bus_call(3) goes on waiting after a signal (systemd 257, not 252): Ctrl-C would do nothing. In
  select.poll(), Python's handler runs.
- sd_bus_flush_close_unref(3) waits for a bus that does not answer. sd_bus_close_unref(3) does not.
"""

import ctypes
import errno
import select
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from ctypes import byref, c_void_p
from typing import Any, Final, NamedTuple, TypeVar

from polytmpd import libsystemd
from polytmpd.bus.protocol import DBUS, TIMEOUT, Asker, BusError

_BASIC: Final[dict[bytes, tuple[Any, Callable[[Any], Any]]]] = {
    b"y": (ctypes.c_uint8, int),
    b"b": (ctypes.c_int, bool),
    b"n": (ctypes.c_int16, int),
    b"q": (ctypes.c_uint16, int),
    b"i": (ctypes.c_int32, int),
    b"u": (ctypes.c_uint32, int),
    b"x": (ctypes.c_int64, int),
    b"t": (ctypes.c_uint64, int),
    b"d": (ctypes.c_double, float),
    b"h": (ctypes.c_int, int),
    b"s": (ctypes.c_char_p, bytes.decode),
    b"o": (ctypes.c_char_p, bytes.decode),
    b"g": (ctypes.c_char_p, bytes.decode),
}
"""What sd_bus_message_read(3) stores for a basic type, and what becomes of it."""
_BASICS: Final = b"".join(_BASIC)
_NUMBERS: Final = {"u": 4, "t": 8}
"""Numbers that can be sent, and their bytes."""
_GONE: Final = {errno.ECONNRESET, errno.ENOTCONN}

T = TypeVar("T")


class Variant(NamedTuple):
    signature: str
    value: Any


class SdBus(Asker):
    """Owns one connection, until close()."""

    def __init__(self) -> None:
        """Raises OSError if libsystemd is not installed."""
        self._library = libsystemd.load()
        self._bus = c_void_p()

    def open(self) -> None:
        """Connect to the system bus, or to $DBUS_SYSTEM_BUS_ADDRESS. Raises OSError or BusError."""
        deadline = time.monotonic() + TIMEOUT
        try:
            self._library.sd_bus_open_system(byref(self._bus))
            while not self._library.sd_bus_is_ready(self._bus):
                self._library.sd_bus_message_unref(self._next(deadline))
        except TimeoutError:
            raise BusError(f"{DBUS}.Error.Timeout", "the bus does not answer") from None

    def close(self) -> None:
        """Disconnect, also after open() failed."""
        self._library.sd_bus_close_unref(self._bus)
        self._bus = c_void_p()

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
        """See Asker. Arguments are strings and unsigned numbers. An answer after the timeout is dropped."""
        if keep_fds:
            raise ValueError("this connection has no descriptors")
        deadline = None if timeout is None else time.monotonic() + timeout
        call, answer = c_void_p(), c_void_p()
        names = (_text(name) for name in (destination, path, interface, member))
        try:
            self._library.sd_bus_message_new_method_call(self._bus, byref(call), *names)
            self._library.sd_bus_message_set_allow_interactive_authorization(call, interactive)
            for kind, value in zip(signature, body, strict=True):
                data = value.to_bytes(_NUMBERS[kind], sys.byteorder) if kind in _NUMBERS else _text(value)
                self._library.sd_bus_message_append_basic(call, kind.encode(), data)
            answer = self._answer(call, deadline)
            if error := self._library.sd_bus_message_get_error(answer):
                name, text = error.contents.name.decode(), error.contents.message
                raise BusError(name, text.decode() if text else name)
            return self._values(answer)
        except (OSError, ValueError, OverflowError) as error:
            raise _bus_error(error, destination, f"{interface}.{member}") from error
        finally:
            self._library.sd_bus_message_unref(call)
            self._library.sd_bus_message_unref(answer)

    def _answer(self, call: c_void_p, deadline: float | None) -> c_void_p:
        """Send a call and wait for its answer, which the caller releases. Raises OSError."""
        sent, answered = ctypes.c_uint64(), ctypes.c_uint64()
        self._library.sd_bus_send(self._bus, call, byref(sent))
        while True:
            message = self._next(deadline)
            if message:
                self._library.sd_bus_message_get_reply_cookie(message, byref(answered))
                if answered.value == sent.value:
                    return message
                self._library.sd_bus_message_unref(message)

    def _next(self, deadline: float | None) -> c_void_p:
        """The next message, which the caller releases; or null: then call it again. Raises OSError."""
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        message = c_void_p()
        if not self._library.sd_bus_process(self._bus, byref(message)):
            waiting = select.poll()
            fd, events = self._library.sd_bus_get_fd(self._bus), self._library.sd_bus_get_events(self._bus)
            waiting.register(fd, events)
            waiting.poll(None if left is None else left * 1000)
        return message

    def _values(self, message: c_void_p) -> list[Any]:
        """All values from here to the end of the message, or of the container that was entered."""
        kind, contents = ctypes.c_char(), ctypes.c_char_p()
        found: list[Any] = []
        while self._library.sd_bus_message_peek_type(message, byref(kind), byref(contents)):
            if kind.value in _BASIC:
                cell, convert = _BASIC[kind.value]
                place = cell()
                self._library.sd_bus_message_read(message, kind.value, byref(place))
                found.append(convert(place.value))
            else:
                found.append(self._container(message, kind.value, contents.value or b""))
        return found

    def _container(self, message: c_void_p, kind: bytes, inside: bytes) -> Any:
        self._library.sd_bus_message_enter_container(message, kind, inside)
        is_table = kind == b"a" and inside[:1] == b"(" and not inside[1:-1].translate(None, _BASICS)
        found = self._rows(message, inside) if is_table else self._values(message)
        self._library.sd_bus_message_exit_container(message)
        if kind == b"v":
            return Variant(inside.decode(), found[0])
        return dict(found) if kind == b"a" and inside[:1] == b"{" else found

    def _rows(self, message: c_void_p, struct: bytes) -> list[Any]:
        """The rows of an array of structs, with one call for each: there may be thousands."""
        columns = [_BASIC[struct[at : at + 1]] for at in range(1, len(struct) - 1)]
        cells = [(cell(), convert) for cell, convert in columns]
        places = [byref(cell) for cell, _ in cells]
        found = []
        while self._library.sd_bus_message_read(message, struct, *places):
            found.append([convert(cell.value) for cell, convert in cells])
        return found


def _text(value: str) -> bytes:
    """Raises ValueError for what D-Bus cannot carry, and a C function would shorten."""
    data = value.encode()
    if b"\0" in data:
        raise ValueError("a string contains a NUL")
    return data


def _bus_error(error: Exception, destination: str, what: str) -> BusError:
    if isinstance(error, OSError) and error.errno in _GONE:
        return BusError(f"{DBUS}.Error.Disconnected", f"no answer from {destination} to {what}")
    if isinstance(error, TimeoutError):
        return BusError(f"{DBUS}.Error.Timeout", f"no answer from {destination} to {what}")
    return BusError(f"{DBUS}.Error.Failed", f"{what} failed: {error}")


def run(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that waits for nothing but an SdBus."""
    try:
        work.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    work.close()
    raise RuntimeError("the coroutine needs an event loop")

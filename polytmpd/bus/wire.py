# SPDX-License-Identifier: LGPL-2.1-or-later
"""The D-Bus wire format, as much of it as a client without descriptors needs: method calls out, answers in.

Importing asyncio and the D-Bus library takes longer than all else that a short command of polytmpctl does.
See the section "Message Protocol" of the D-Bus specification.
Not here: the socket (synchronous.py); the daemon's messages (library.py).
"""

from collections.abc import Callable, Sequence
from struct import Struct
from struct import error as StructError
from typing import Any, Final, NamedTuple

METHOD_RETURN: Final = 2
ERROR: Final = 3
PREFIX: Final = 16
"""Bytes of a message that say how long the rest is."""
MESSAGE_AT_MOST: Final = 128 * 1024 * 1024
_METHOD_CALL: Final = 1
_ALLOW_INTERACTIVE_AUTHORIZATION: Final = 4
_DEPTH_AT_MOST: Final = 64
_PATH, _INTERFACE, _MEMBER, _ERROR_NAME, _REPLY_SERIAL, _DESTINATION, _SIGNATURE = 1, 2, 3, 4, 5, 6, 8
_FIXED: Final = {"y": "B", "n": "h", "q": "H", "i": "i", "u": "I", "x": "q", "t": "Q", "d": "d", "h": "I"}
_ALIGNMENT: Final = {**dict.fromkeys("ygv", 1), **dict.fromkeys("nq", 2), **dict.fromkeys("xtd({", 8)}
"""Of all other types: 4."""

Reader = Callable[[bytes, int], tuple[Any, int]]
"""Takes a buffer and an offset, and returns a value and the offset after it."""


class WireError(Exception):
    """A message that cannot be read."""


class Variant(NamedTuple):
    signature: str
    value: Any


class Reply(NamedTuple):
    """kind: METHOD_RETURN, ERROR or something else. serial: of the call that it answers."""

    kind: int
    serial: int
    error_name: str
    body: list[Any]


def method_call(
    serial: int,
    destination: str,
    path: str,
    interface: str,
    member: str,
    signature: str = "",
    body: Sequence[Any] = (),
    *,
    interactive: bool = False,
) -> bytes:
    """A message that calls a method. Its arguments are strings and unsigned numbers."""
    arguments = bytearray()
    for kind, value in zip(signature, body, strict=True):
        _write(arguments, kind, value)
    fields = bytearray()
    for code, kind, value in (
        (_PATH, "o", path),
        (_INTERFACE, "s", interface),
        (_MEMBER, "s", member),
        (_DESTINATION, "s", destination),
        (_SIGNATURE, "g", signature),
    ):
        fields += bytes(-len(fields) % 8)
        fields += bytes((code, 1, ord(kind), 0))
        _write(fields, kind, value)
    flags = _ALLOW_INTERACTIVE_AUTHORIZATION if interactive else 0
    head = Struct("<cBBBIII").pack(b"l", _METHOD_CALL, flags, 1, len(arguments), serial, len(fields))
    return head + fields + bytes(-len(fields) % 8) + arguments


def _write(buffer: bytearray, kind: str, value: Any) -> None:
    if kind == "g":
        text = value.encode("ascii")
        buffer += bytes((len(text),)) + text + b"\0"
        return
    buffer += bytes(-len(buffer) % _ALIGNMENT.get(kind, 4))
    if kind in "so":
        text = value.encode()
        if b"\0" in text:
            raise ValueError("a string contains a NUL")
        buffer += len(text).to_bytes(4, "little") + text + b"\0"
    elif kind in "ut":
        buffer += value.to_bytes(4 if kind == "u" else 8, "little")
    else:
        raise ValueError(f"cannot send a value of type {kind}")


def length(prefix: bytes) -> int:
    """The bytes of a message after its prefix. Raises WireError."""
    if prefix[:1] not in {b"l", b"B"} or prefix[3] != 1:
        raise WireError("not a D-Bus message")
    body, _, fields = Struct(("<" if prefix[:1] == b"l" else ">") + "III").unpack_from(prefix, 4)
    found = int(fields + -fields % 8 + body)
    if found > MESSAGE_AT_MOST:
        raise WireError(f"a message of {found} bytes")
    return found


def reply(message: bytes) -> Reply:
    """A whole message. The body of what is no answer is not read. Raises WireError."""
    try:
        return _reply(message)
    except (ValueError, TypeError, IndexError, RecursionError, StructError) as error:
        raise WireError(f"a message that cannot be read: {error}") from error


def _reply(message: bytes) -> Reply:
    order = "<" if message[:1] == b"l" else ">"
    fields, start = _reader("a(yv)", order)[0](message, 12)
    values = {code: variant.value for code, variant in fields}
    kind = message[1]
    body = []
    if kind in {METHOD_RETURN, ERROR}:
        offset = start + -start % 8
        for read in _reader(values.get(_SIGNATURE, ""), order):
            value, offset = read(message, offset)
            body.append(value)
    return Reply(kind, values.get(_REPLY_SERIAL, 0), values.get(_ERROR_NAME, ""), body)


# Readers are made from a signature once, and then read a thousand rows.


def _reader(signature: str, order: str, depth: int = 0) -> list[Reader]:
    """A reader for each complete type of a signature."""
    found, rest = [], signature
    while rest:
        one, rest = _one(rest, order, depth)
        found.append(one)
    return found


def _one(signature: str, order: str, depth: int) -> tuple[Reader, str]:
    """A reader for the first complete type of a signature, and the rest of the signature."""
    if depth > _DEPTH_AT_MOST:
        raise WireError("a type that is nested too deeply")
    kind, rest = signature[0], signature[1:]
    if kind in "sog":
        return _text_reader(order, short=kind == "g"), rest
    if kind == "v":
        return _variant_reader(order, depth), rest
    if kind == "b":
        return _fixed_reader(order, "I", bool), rest
    if kind in _FIXED:
        return _fixed_reader(order, _FIXED[kind], None), rest
    if kind == "a":
        read, end = _one(rest, order, depth + 1)
        return _array_reader(read, order, rest[0]), end
    if kind in "({":
        readers = []
        while rest[0] not in ")}":
            read, rest = _one(rest, order, depth + 1)
            readers.append(read)
        if not readers:  # an array of them would have no end
            raise WireError("an empty struct")
        return _struct_reader(readers), rest[1:]
    raise WireError(f"a value of the unknown type {kind}")


def _fixed_reader(order: str, code: str, convert: Callable[[Any], Any] | None) -> Reader:
    form = Struct(order + code)
    unpack, size = form.unpack_from, form.size

    def read(buffer: bytes, offset: int) -> tuple[Any, int]:
        offset += -offset % size
        (value,) = unpack(buffer, offset)
        return (value if convert is None else convert(value)), offset + size

    return read


def _text_reader(order: str, *, short: bool) -> Reader:
    form = Struct(order + ("B" if short else "I"))
    unpack, size = form.unpack_from, form.size

    def read(buffer: bytes, offset: int) -> tuple[Any, int]:
        offset += -offset % size
        start = offset + size
        end = start + unpack(buffer, offset)[0]
        if end >= len(buffer):
            raise WireError("a string that ends after its message")
        return buffer[start:end].decode(), end + 1

    return read


def _variant_reader(order: str, depth: int) -> Reader:
    text = _text_reader(order, short=True)

    def read(buffer: bytes, offset: int) -> tuple[Any, int]:
        signature, offset = text(buffer, offset)
        inner, rest = _one(signature, order, depth + 1)
        if rest:
            raise WireError("a variant of several values")
        value, offset = inner(buffer, offset)
        return Variant(signature, value), offset

    return read


def _array_reader(one: Reader, order: str, kind: str) -> Reader:
    unpack = Struct(order + "I").unpack_from
    alignment = _ALIGNMENT.get(kind, 4)

    def read(buffer: bytes, offset: int) -> tuple[Any, int]:
        offset += -offset % 4
        (size,) = unpack(buffer, offset)
        offset += 4
        offset += -offset % alignment
        end = offset + size
        if end > len(buffer):
            raise WireError("an array that ends after its message")
        if kind == "y":
            return buffer[offset:end], end
        found = []
        while offset < end:
            value, offset = one(buffer, offset)
            found.append(value)
        return (dict(found) if kind == "{" else found), offset

    return read


def _struct_reader(readers: list[Reader]) -> Reader:
    def read(buffer: bytes, offset: int) -> tuple[Any, int]:
        offset += -offset % 8
        found = []
        for one in readers:
            value, offset = one(buffer, offset)
            found.append(value)
        return found, offset

    return read

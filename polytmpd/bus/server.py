# SPDX-License-Identifier: LGPL-2.1-or-later
"""An object server on the library's messages: dispatch, introspection, properties, ObjectManager.

The library has an object server too, but it does not tell methods who calls them, sends tracebacks to the
caller, and never closes descriptors that it sent. Its introspection lacks EmitsChangedSignal and shows
children that do not exist, and InterfacesAdded comes from the wrong path. Each of these would have to be
patched from outside, once for each of the two libraries. This module is shorter.
Not here: what org.polytmp1 offers (service).
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from polytmpd.bus.connection import Connection, expects_reply
from polytmpd.bus.library import Message, Variant
from polytmpd.bus.protocol import OBJECT_MANAGER, PROPERTIES
from polytmpd.errors import ErrorName, PolytmpError

if TYPE_CHECKING:
    from xml.etree import ElementTree

log = logging.getLogger(__name__)

DBUS_ERROR: Final = "org.freedesktop.DBus.Error"
INTROSPECTABLE: Final = "org.freedesktop.DBus.Introspectable"
PEER: Final = "org.freedesktop.DBus.Peer"
_DOCTYPE: Final = (
    '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
    ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
)
_INTERNAL: Final = "internal error, see: journalctl -u polytmpd.service"
CALLS_AT_MOST: Final = 64
"""How many calls of one sender may be in progress; one more is refused."""

Arguments = tuple[tuple[str, str], ...]
"""(name, signature) of each."""


class Call(NamedTuple):
    """A method call: the unique name of its sender, set by the bus, the object's path, and the arguments."""

    sender: str
    path: str
    arguments: list[Any]
    interactive: bool = False


class Method(NamedTuple):
    """answer returns the values of outs.

    A value of signature h is a descriptor that the server closes after sending it.
    """

    name: str
    answer: Callable[[Call], Awaitable[Sequence[Any]]]
    ins: Arguments = ()
    outs: Arguments = ()


Emits = Literal["true", "invalidates", "const", "false"]
"""What a change emits, see the EmitsChangedSignal annotation in the D-Bus specification."""


class Property(NamedTuple):
    """get(path) returns the value for the object at path. It must not raise or block.

    A private property is left out of signals, which every user can see.
    """

    name: str
    signature: str
    get: Callable[[str], Any]
    emits: Emits = "true"
    private: bool = False


class Signal(NamedTuple):
    name: str
    arguments: Arguments


class Interface(NamedTuple):
    """What objects of one kind offer. It knows no object, so that thousands of them can share it."""

    name: str
    methods: tuple[Method, ...] = ()
    properties: tuple[Property, ...] = ()
    signals: tuple[Signal, ...] = ()

    def values(self, path: str, *, private: bool = True) -> dict[str, Variant]:
        """The values of all properties of an object, or only of those that every user may see."""
        return {
            str(entry.name): Variant(entry.signature, entry.get(path))
            for entry in self.properties
            if private or not entry.private
        }


async def _never(_: Call) -> Sequence[Any]:
    raise AssertionError("answered by the server itself")


_STANDARD: Final = (
    Interface(
        PROPERTIES,
        (
            Method("Get", _never, (("interface_name", "s"), ("property_name", "s")), (("value", "v"),)),
            Method("GetAll", _never, (("interface_name", "s"),), (("props", "a{sv}"),)),
            Method("Set", _never, (("interface_name", "s"), ("property_name", "s"), ("value", "v"))),
        ),
        signals=(
            Signal(
                "PropertiesChanged",
                (("interface_name", "s"), ("changed_properties", "a{sv}"), ("invalidated_properties", "as")),
            ),
        ),
    ),
    Interface(INTROSPECTABLE, (Method("Introspect", _never, (), (("xml_data", "s"),)),)),
    Interface(PEER, (Method("Ping", _never), Method("GetMachineId", _never, (), (("machine_uuid", "s"),)))),
)
_MANAGED: Final = "a{oa{sa{sv}}}"
_OBJECT_MANAGER: Final = Interface(
    OBJECT_MANAGER,
    (Method("GetManagedObjects", _never, (), (("objects", _MANAGED),)),),
    signals=(
        Signal("InterfacesAdded", (("object_path", "o"), ("interfaces_and_properties", "a{sa{sv}}"))),
        Signal("InterfacesRemoved", (("object_path", "o"), ("interfaces", "as"))),
    ),
)


class _AnswerError(Exception):
    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


class Server:
    """Serves objects on a connection. The object at root has the ObjectManager of all others."""

    def __init__(
        self,
        connection: Connection,
        root: str,
        may_list: Callable[[str], Awaitable[Callable[[str], bool]]],
        require_read: Callable[[Call], Awaitable[None]],
    ) -> None:
        """may_list(sender) returns a function that says of a path whether GetManagedObjects shows it.

        require_read(call) raises PolytmpError if the caller may not read an object's properties. It may take
        as long as a person needs to type a password.
        """
        self._connection = connection
        self._may_list = may_list
        self._require_read = require_read
        self._root = root
        self._objects: dict[str, tuple[Interface, ...]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._under_way: dict[str, int] = {}
        connection.serve(self._on_call)

    # Objects

    def show(self, path: str, interfaces: tuple[Interface, ...]) -> None:
        """Show an object, without a signal."""
        self._objects[path] = interfaces

    def add(self, path: str, interfaces: tuple[Interface, ...]) -> None:
        """Show an object, and emit InterfacesAdded."""
        self.show(path, interfaces)
        values = {interface.name: interface.values(path, private=False) for interface in interfaces}
        self.emit(self._root, OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}", [path, values])

    def remove(self, path: str) -> None:
        """Stop showing an object, and emit InterfacesRemoved."""
        interfaces = self._objects.pop(path, ())
        names = [interface.name for interface in interfaces]
        self.emit(self._root, OBJECT_MANAGER, "InterfacesRemoved", "oas", [path, names])

    def changed(self, path: str, interface: str, names: Iterable[str]) -> None:
        """Emit PropertiesChanged.

        Raises KeyError for a property that is not declared; the library would ignore it.
        """
        declared = {entry.name: entry for entry in self._find(path, interface).properties}
        values, invalidated = {}, []
        for name in names:
            entry = declared[name]
            if entry.emits == "true" and not entry.private:
                values[str(name)] = Variant(entry.signature, entry.get(path))
            elif entry.emits in {"true", "invalidates"}:
                invalidated.append(str(name))
        self.emit(path, PROPERTIES, "PropertiesChanged", "sa{sv}as", [interface, values, invalidated])

    def emit(self, path: str, interface: str, member: str, signature: str, body: list[Any]) -> None:
        """Emit a signal to all listeners."""
        self._connection.send(Message.new_signal(path, interface, str(member), signature, body))

    # Calls

    def _on_call(self, message: Message) -> bool:
        sender = message.sender or ""
        if self._under_way.get(sender, 0) >= CALLS_AT_MOST:
            self._send_error(
                message, f"{DBUS_ERROR}.LimitsExceeded", "too many calls from this sender are in progress"
            )
            return True
        self._under_way[sender] = self._under_way.get(sender, 0) + 1
        task = asyncio.get_running_loop().create_task(self._answer(message))
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._done(done, sender))
        return True

    def _done(self, task: "asyncio.Task[None]", sender: str) -> None:
        self._tasks.discard(task)
        self._under_way[sender] -= 1
        if not self._under_way[sender]:
            del self._under_way[sender]

    async def _answer(self, message: Message) -> None:
        """The one boundary: whatever happens becomes an answer, never a traceback to the caller."""
        try:
            signature, values = await self._dispatch(message)
        except PolytmpError as error:
            self._send_error(message, error.name.value, str(error))
        except _AnswerError as error:
            self._send_error(message, error.name, str(error))
        except Exception:
            log.exception("Failed to answer a call of %s.%s", message.interface, message.member)
            self._send_error(message, ErrorName.FAILED.value, _INTERNAL)
        else:
            self._send_answer(message, signature, values)

    async def _dispatch(self, message: Message) -> tuple[str, Sequence[Any]]:
        path, member = message.path or "", message.member or ""
        if path not in self._objects and not self._has_children(path):
            raise _AnswerError(f"{DBUS_ERROR}.UnknownObject", f"no object at {path}")
        candidates = [
            (interface, method)
            for interface in self._interfaces(path)
            for method in interface.methods
            if method.name == member and message.interface in {None, "", interface.name}
        ]
        if not candidates:
            raise _AnswerError(
                f"{DBUS_ERROR}.UnknownMethod", f"no method {message.interface or ''}.{member} at {path}"
            )
        interface, method = candidates[0]
        expected = "".join(signature for _, signature in method.ins)
        if message.signature != expected:
            raise _AnswerError(
                f"{DBUS_ERROR}.InvalidArgs",
                f"{interface.name}.{member} takes the signature {expected!r}, not {message.signature!r}",
            )
        outs = "".join(signature for _, signature in method.outs)
        interactive = bool(int(message.flags.value) & 4)  # ALLOW_INTERACTIVE_AUTHORIZATION
        call = Call(message.sender or "", path, list(message.body), interactive)
        if interface in _STANDARD or interface is _OBJECT_MANAGER:
            return outs, await self._standard(call, member)
        return outs, await method.answer(call)

    def _interfaces(self, path: str) -> list[Interface]:
        found = [*_STANDARD, *self._objects.get(path, ())]
        if path == self._root:
            found.append(_OBJECT_MANAGER)
        return found

    def _find(self, path: str, name: str) -> Interface:
        for interface in self._interfaces(path):
            if interface.name == name:
                return interface
        raise _AnswerError(f"{DBUS_ERROR}.UnknownInterface", f"no interface {name} at {path}")

    async def _standard(self, call: Call, member: str) -> Sequence[Any]:
        path, body = call.path, call.arguments
        match member:
            case "Introspect":
                return [self.introspect(path)]
            case "Ping":
                return []
            case "GetMachineId":
                return [_machine_id()]
            case "GetManagedObjects":
                may_list = await self._may_list(call.sender)
                return [
                    {
                        child: {entry.name: entry.values(child) for entry in interfaces}
                        for child, interfaces in self._objects.items()
                        if child != self._root and may_list(child)
                    }
                ]
        await self._require_read(call)
        if path not in self._objects:
            raise _AnswerError(f"{DBUS_ERROR}.UnknownObject", f"no object at {path}")
        if not body[0]:
            return self._any_interface(path, member, body)
        if member == "GetAll":
            return [self._find(path, body[0]).values(path)]
        for entry in self._find(path, body[0]).properties:
            if entry.name == body[1]:
                if member == "Set":
                    raise _AnswerError(
                        f"{DBUS_ERROR}.PropertyReadOnly", f"property {entry.name} is read-only"
                    )
                return [Variant(entry.signature, entry.get(path))]
        raise _AnswerError(f"{DBUS_ERROR}.UnknownProperty", f"no property {body[1]} in {body[0]}")

    def _any_interface(self, path: str, member: str, body: list[Any]) -> Sequence[Any]:
        """An empty interface name is allowed: no two interfaces of an object share a property."""
        values = {name: value for entry in self._objects[path] for name, value in entry.values(path).items()}
        if member == "GetAll":
            return [values]
        if body[1] not in values:
            raise _AnswerError(f"{DBUS_ERROR}.UnknownProperty", f"no property {body[1]} at {path}")
        if member == "Set":
            raise _AnswerError(f"{DBUS_ERROR}.PropertyReadOnly", f"property {body[1]} is read-only")
        return [values[body[1]]]

    def _has_children(self, path: str) -> bool:
        prefix = path.rstrip("/") + "/"
        return any(other.startswith(prefix) for other in self._objects)

    def _children(self, path: str) -> list[str]:
        prefix = path.rstrip("/") + "/"
        return sorted({p[len(prefix) :].split("/")[0] for p in self._objects if p.startswith(prefix)})

    def introspect(self, path: str) -> str:
        """The introspection XML of the object at path."""
        from xml.etree import ElementTree

        node = ElementTree.Element("node")
        for interface in self._interfaces(path) if path in self._objects else _STANDARD:
            node.append(_interface_xml(interface))
        for child in self._children(path):
            ElementTree.SubElement(node, "node", name=child)
        ElementTree.indent(node, " ")
        return _DOCTYPE + ElementTree.tostring(node, encoding="unicode") + "\n"

    # Answers

    def _send_error(self, message: Message, name: str, text: str) -> None:
        if expects_reply(message):
            # A NUL or a lone surrogate in a message would end the whole connection, or the answer.
            clean = text.encode(errors="replace").decode().replace("\0", "?")
            self._connection.send(Message.new_error(message, name, clean))

    def _send_answer(self, message: Message, signature: str, values: Sequence[Any]) -> None:
        fds = (
            [value for value, code in zip(values, signature, strict=False) if code == "h"]
            if signature == "h"
            else []
        )
        if not expects_reply(message):
            _close(fds)
            return
        body = list(range(len(fds))) if fds else list(values)
        try:
            for fd in fds:  # a closed descriptor in a message would end the whole connection
                os.fstat(fd)
            reply = Message.new_method_return(message, signature, body, fds)
            self._connection.send(reply, lambda: _close(fds))
        except Exception:
            _close(fds)
            log.exception("Failed to send the answer to %s.%s", message.interface, message.member)
            self._send_error(message, ErrorName.FAILED.value, _INTERNAL)


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _machine_id() -> str:
    try:
        return Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except OSError as error:
        raise _AnswerError(
            f"{DBUS_ERROR}.Failed", f"failed to read /etc/machine-id: {error.strerror}"
        ) from None


def _interface_xml(interface: Interface) -> "ElementTree.Element":
    from xml.etree import ElementTree

    element = ElementTree.Element("interface", name=interface.name)
    for method in interface.methods:
        child = ElementTree.SubElement(element, "method", name=method.name)
        for direction, arguments in (("in", method.ins), ("out", method.outs)):
            for name, signature in arguments:
                ElementTree.SubElement(child, "arg", name=name, type=signature, direction=direction)
    for signal in interface.signals:
        child = ElementTree.SubElement(element, "signal", name=signal.name)
        for name, signature in signal.arguments:
            ElementTree.SubElement(child, "arg", name=name, type=signature)
    for entry in interface.properties:
        child = ElementTree.SubElement(
            element, "property", name=entry.name, type=entry.signature, access="read"
        )
        if entry.emits != "true":
            name = "org.freedesktop.DBus.Property.EmitsChangedSignal"
            ElementTree.SubElement(child, "annotation", name=name, value=entry.emits)
    return element

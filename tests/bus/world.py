# SPDX-License-Identifier: LGPL-2.1-or-later
"""The other side of the service: a backend that does nothing, callers of all kinds, a small logind."""

import asyncio
import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from polytmpd.bus.contract import MANAGER, PATH, SERVICE
from polytmpd.bus.library import Message, MessageBus, MessageFlag, MessageType, Variant
from polytmpd.core.model import Directory, InstanceDirectory, Lifetime, State, View
from polytmpd.core.views import Views
from polytmpd.errors import ExemptError, NotPolyinstantiatedError
from polytmpd.kernel.descriptor import Descriptor

log = logging.getLogger(__name__)

STRANGER = 65534
"""The UID of nobody. The bus refuses a UID without a name."""

LOGIN1 = "org.freedesktop.login1"
LOGIN1_PATH = "/org/freedesktop/login1"
LOGIN1_MANAGER = "org.freedesktop.login1.Manager"
PROPERTIES = "org.freedesktop.DBus.Properties"
BUS = "org.freedesktop.DBus"


def view(uid: int, user: str = "alice", state: State = State.ACTIVE) -> View:
    directories = (
        InstanceDirectory(
            Directory("/tmp", Lifetime.INSTANCE, (".X11-unix",)), f"polytmp-{'a' * 32}-{uid}-{'b' * 16}"
        ),
        InstanceDirectory(Directory("/var/tmp", Lifetime.PERSISTENT), f"polytmp-{uid}"),
    )
    return View(uid, user, state, 11, 22, f"/user.slice/user-{uid}.slice", 4026532000, directories)


class Backend:
    """Answers as the test says."""

    def __init__(self) -> None:
        self.views = Views(("/tmp", "/var/tmp"))
        self.fd = Descriptor.open("/proc/self/ns/mnt", os.O_RDONLY)
        self.acquired: list[int] = []
        self.callers: list[int] = []
        self.in_instance = False
        self.exempt: str | None = None
        self.acquire_with: Callable[[], Descriptor] | None = None
        self.error: Exception | None = None
        self.refusal: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.reloads = 0
        self.removed: list[tuple[int, bool]] = []

    def close(self) -> None:
        self.fd.close()

    async def _may_fail(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error

    def is_in_instance(self, pid: int) -> bool:
        return self.in_instance

    async def require_movable(self, uid: int, pid: int) -> None:
        self.callers.append(pid)

    async def admit(self, uid: int) -> str:
        if self.exempt is not None:
            raise ExemptError(self.exempt)
        return f"user{uid}"

    async def acquire(self, uid: int, user: str) -> Descriptor:
        self.acquired.append(uid)
        await self._may_fail()
        return self.fd.dup() if self.acquire_with is None else self.acquire_with()

    async def reload(self) -> None:
        await self._may_fail()
        self.reloads += 1

    async def remove(self, uid: int, *, persistent: bool = False) -> None:
        if self.refusal is not None:
            raise self.refusal
        await self._may_fail()
        self.removed.append((uid, persistent))

    def removed_entries(self, uid: int) -> int:
        return 2048

    async def holders(self, uid: int) -> list[tuple[int, str, str, str]]:
        await self._may_fail()
        return [(17, "sleep 1", "/user.slice", "mount namespace")]

    async def processes(self, uid: int) -> list[tuple[int, str]]:
        await self._may_fail()
        return [(17, "sleep 1"), (18, "[x]")]

    async def usage(self, uid: int) -> list[tuple[str, int, int]]:
        await self._may_fail()
        return [("/tmp", 1 << 40, 3)]

    async def uid_of_process(self, pid: int) -> int:
        await self._may_fail()
        shown = [view.uid for view in self.views]
        if pid == os.getpid() and shown:
            return shown[0]
        raise NotPolyinstantiatedError(f"process {pid} lives in no instance")

    async def resolve(self, uid: int, path: str) -> str:
        if self.error is not None:
            raise self.error
        return f"/host{path}"


def lists(value: Any) -> Any:
    """Structs are lists with one library, tuples with the other."""
    if isinstance(value, (list, tuple)):
        return [lists(entry) for entry in value]
    if isinstance(value, dict):
        return {key: lists(entry) for key, entry in value.items()}
    if isinstance(value, Variant):
        value.value = lists(value.value)
    return value


async def close(bus: MessageBus) -> None:
    """Disconnect, and close what dbus-next would leave open until the program ends."""
    if bus.connected:
        bus.disconnect()
    try:
        await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]  # dbus-fast says no type
    except Exception as error:
        log.info("%s was closed by the bus: %r", bus.unique_name, error)
    library: Any = bus
    library._stream.close()
    library._sock.close()


class Client:
    """A caller that uses the bare library, so that it can send anything."""

    def __init__(self, bus: MessageBus) -> None:
        self.bus = bus
        self.signals: list[Message] = []
        bus.add_message_handler(self._on_message)

    @classmethod
    async def open(cls, address: str) -> "Client":
        return cls(await MessageBus(bus_address=address, negotiate_unix_fd=True).connect())

    async def close(self) -> None:
        await close(self.bus)

    @property
    def name(self) -> str:
        return self.bus.unique_name or ""

    def _on_message(self, message: Message) -> bool:
        if message.message_type is MessageType.SIGNAL:
            self.signals.append(message)
        return False

    def named(self, member: str) -> list[Message]:
        return [signal for signal in self.signals if signal.member == member]

    async def call(
        self,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        path: str = PATH,
        interface: str | None = MANAGER,
        to: str = SERVICE,
        fds: Sequence[int] = (),
        flags: MessageFlag = MessageFlag.NONE,
    ) -> Message:
        """The reply, even if it is an error."""
        message = Message(
            destination=to,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
            unix_fds=list(fds),
            flags=flags,
        )
        reply = await asyncio.wait_for(self.bus.call(message), 10)
        assert reply is not None
        return reply

    async def result(self, member: str, signature: str = "", body: Sequence[Any] = (), **more: Any) -> Any:
        """The only value of a reply that must not be an error."""
        reply = await self.call(member, signature, body, **more)
        assert reply.message_type is MessageType.METHOD_RETURN, (reply.error_name, reply.body)
        return lists(reply.body[0]) if reply.body else None

    async def error(
        self, member: str, signature: str = "", body: Sequence[Any] = (), **more: Any
    ) -> tuple[str, str]:
        """Name and text of a reply that must be an error."""
        reply = await self.call(member, signature, body, **more)
        assert reply.message_type is MessageType.ERROR, reply.body
        assert reply.error_name
        return reply.error_name, reply.body[0]

    async def listen(self, rule: str = "type='signal'") -> None:
        await self.result("AddMatch", "s", [rule], to=BUS, path="/org/freedesktop/DBus", interface=BUS)

    async def own(self, name: str) -> None:
        got = await self.result(
            "RequestName", "su", [name, 4], to=BUS, path="/org/freedesktop/DBus", interface=BUS
        )
        assert got == 1

    async def disown(self, name: str) -> None:
        await self.result("ReleaseName", "s", [name], to=BUS, path="/org/freedesktop/DBus", interface=BUS)

    def send_signal(
        self,
        member: str,
        signature: str,
        body: Sequence[Any],
        *,
        to: str | None = None,
        path: str = LOGIN1_PATH,
        interface: str = LOGIN1_MANAGER,
        fds: Sequence[int] = (),
    ) -> None:
        self.bus.send(
            Message(
                message_type=MessageType.SIGNAL,
                destination=to,
                path=path,
                interface=interface,
                member=member,
                signature=signature,
                body=list(body),
                unix_fds=list(fds),
            )
        )


class FakeLogind:
    """Ten lines of logind: users and sessions, their properties, the signals."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.users: dict[int, str] = {}
        self.sessions: dict[str, int] = {}
        self.classes: dict[str, str] = {}
        self.closing: set[str] = set()
        self.silent = False
        client.bus.add_message_handler(self._on_message)

    async def start(self) -> None:
        await self.client.own(LOGIN1)

    async def stop(self) -> None:
        await self.client.disown(LOGIN1)

    def _on_message(self, message: Message) -> bool:
        path = message.path or ""
        if message.message_type is not MessageType.METHOD_CALL or not path.startswith(LOGIN1_PATH):
            return False
        if not self.silent:
            self.client.bus.send(self._answer(message))
        return True

    def _answer(self, message: Message) -> Message:
        path = message.path or ""
        kind, _, name = path.removeprefix(f"{LOGIN1_PATH}/").partition("/_")
        if message.member == "ListUsers":
            users = [[uid, user, self.user_path(uid)] for uid, user in self.users.items()]
            return Message.new_method_return(message, "a(uso)", [users])
        if message.member == "ListSessions":
            sessions = [
                [session, uid, self.users.get(uid, "?"), "seat0", self.session_path(session)]
                for session, uid in self.sessions.items()
            ]
            return Message.new_method_return(message, "a(susso)", [sessions])
        if kind == "user" and int(name) in self.users:
            return Message.new_method_return(message, "v", [Variant("s", self.users[int(name)])])
        if message.member == "GetSession" and message.body[0] in self.sessions:
            return Message.new_method_return(message, "o", [self.session_path(message.body[0])])
        if kind == "session" and name in self.sessions:
            uid = self.sessions[name]
            values = {
                "User": Variant("(uo)", [uid, self.user_path(uid)]),
                "Name": Variant("s", self.users.get(uid, "?")),
                "Class": Variant("s", self.classes.get(name, "user")),
                "State": Variant("s", "closing" if name in self.closing else "active"),
            }
            return Message.new_method_return(message, "a{sv}", [values])
        return Message.new_error(message, "org.freedesktop.DBus.Error.UnknownObject", "no such object")

    @staticmethod
    def user_path(uid: int) -> str:
        return f"{LOGIN1_PATH}/user/_{uid}"

    @staticmethod
    def session_path(session: str) -> str:
        return f"{LOGIN1_PATH}/session/_{session}"

    def user_new(self, uid: int, name: str) -> None:
        self.users[uid] = name
        self.client.send_signal("UserNew", "uo", [uid, self.user_path(uid)])

    def user_removed(self, uid: int) -> None:
        del self.users[uid]
        self.client.send_signal("UserRemoved", "uo", [uid, self.user_path(uid)])

    def session_new(self, session: str, uid: int) -> None:
        self.sessions[session] = uid
        self.client.send_signal("SessionNew", "so", [session, self.session_path(session)])

    def session_removed(self, session: str) -> None:
        del self.sessions[session]
        self.client.send_signal("SessionRemoved", "so", [session, self.session_path(session)])


async def run(*argv: str) -> "subprocess.CompletedProcess[str]":
    """Run a program without blocking the loop."""
    return await asyncio.to_thread(
        subprocess.run, argv, capture_output=True, text=True, timeout=20, check=False
    )


async def as_stranger(address: str, path: str, method: str, *arguments: str) -> str:
    """The output of dbus-send, run by an unprivileged user."""
    done = await run(
        *("setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"),
        *("dbus-send", f"--bus={address}", "--print-reply", f"--dest={SERVICE}", path, method, *arguments),
    )
    return done.stdout + done.stderr

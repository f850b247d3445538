# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection to the system bus: calls with a timeout, signals only from the right sender, unwanted
descriptors closed.

Not here: the interface of any service; answering calls (server.py).

Hard facts
- Under the stock bus policy any process may send us a *unicast* signal that looks like logind's, and needs
  no match rule for it. So a signal counts only if its sender, which the bus fills in, is the unique owner of
  the well-known name.
- Any process can attach descriptors to any message. Those we did not ask for are closed at once.
- The library's call() never times out by itself, and hangs forever after a disconnect.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple

from polytmpd.bus.library import (
    BusType,
    Message,
    MessageBus,
    MessageFlag,
    MessageType,
)
from polytmpd.bus.protocol import DBUS, TIMEOUT, Asker
from polytmpd.bus.protocol import BusError as BusError

log = logging.getLogger(__name__)

PRIMARY_OWNER: Final = 1


class _Subscription(NamedTuple):
    service: str
    interface: str
    member: str
    handler: Callable[[str, list[Any]], None]


class Connection(Asker):
    """Owns one connection. Created by open() in a running loop; cannot be reopened."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus
        self._subscriptions: list[_Subscription] = []
        self._owners: dict[str, str | None] = {}
        self._owner_handlers: dict[str, list[Callable[[str | None], None]]] = {}
        self._call_handler: Callable[[Message], bool] | None = None
        self._kept: dict[int, list[int]] = {}
        self._expected: set[int] = set()
        self._asking_owner: set[str] = set()
        self._departures: dict[str, list[asyncio.Future[None]]] = {}
        bus.add_message_handler(self._on_message)
        # One task, never cancelled: the library has a single future, which a cancelled waiter would cancel.
        self._closed = asyncio.ensure_future(self._wait_for_disconnect())

    @classmethod
    async def open(cls, address: str | None = None) -> "Connection":
        """Connect to the system bus, or to address. Raises OSError or BusError."""
        try:
            bus = MessageBus(bus_address=address, bus_type=BusType.SYSTEM, negotiate_unix_fd=True)
            await asyncio.wait_for(bus.connect(), TIMEOUT)
        except TimeoutError:
            raise BusError(f"{DBUS}.Error.Timeout", "the bus does not answer") from None
        except OSError:
            raise
        except Exception as error:  # the library's own: a bad address, a refused authentication
            raise BusError(f"{DBUS}.Error.Failed", f"cannot use the bus: {error}") from error
        return cls(bus)

    @property
    def unique_name(self) -> str:
        return self._bus.unique_name or ""

    @property
    def connected(self) -> bool:
        return bool(self._bus.connected)

    async def wait_closed(self) -> None:
        """Wait until the connection is gone, for whatever reason."""
        await asyncio.wait((self._closed,))

    async def _wait_for_disconnect(self) -> None:
        with contextlib.suppress(Exception):
            await self._bus.wait_for_disconnect()  # type: ignore[no-untyped-call]  # untyped in dbus-fast

    def close(self) -> None:
        self._bus.disconnect()

    # Calls

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
        """See Asker."""
        if not self.connected:
            raise BusError(f"{DBUS}.Error.Disconnected", "not connected to the bus")
        message = Message(
            destination=destination,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=list(body),
            flags=MessageFlag.ALLOW_INTERACTIVE_AUTHORIZATION if interactive else MessageFlag.NONE,
            serial=self._bus.next_serial(),
        )
        if keep_fds:
            self._kept[message.serial] = []
        call = asyncio.ensure_future(self._bus.call(message))
        try:
            await asyncio.wait((call, self._closed), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                name = "Disconnected" if self._closed.done() else "Timeout"
                raise BusError(
                    f"{DBUS}.Error.{name}", f"no answer from {destination} to {interface}.{member}"
                )
            reply = call.result()
            fds = self._kept.pop(message.serial, [])
        except (BusError, asyncio.CancelledError):
            raise
        except (
            Exception
        ) as error:  # the library's own: a broken connection, a body that does not match the signature
            raise BusError(f"{DBUS}.Error.Failed", f"{interface}.{member} failed: {error!r}") from error
        finally:
            call.cancel()
            _close_all(self._kept.pop(message.serial, []))
        if reply is None:
            raise BusError(f"{DBUS}.Error.NoReply", f"no answer from {destination} to {interface}.{member}")
        if reply.message_type is MessageType.ERROR:
            text = reply.body[0] if reply.body and isinstance(reply.body[0], str) else str(reply.error_name)
            raise BusError(str(reply.error_name), text)
        return fds if keep_fds else list(reply.body)

    # Who is behind a connection, as the bus read it from the socket when the connection was made.
    #
    # Not GetConnectionCredentials: since D-Bus 1.15.8 each answer carries a descriptor (ProcessFD). While 64
    # of them wait for a connection (max_outgoing_unix_fds), the bus refuses all messages to it: one user who
    # makes many calls at once would lock everyone out.

    async def uid_of(self, sender: str) -> int:
        """The UID of a sender. Raises BusError if the sender is gone."""
        return int((await self.ask_bus("GetConnectionUnixUser", "s", sender))[0])

    async def pid_of(self, sender: str) -> int:
        """The PID of a sender. Raises BusError if the sender is gone."""
        return int((await self.ask_bus("GetConnectionUnixProcessID", "s", sender))[0])

    async def own_name(self, name: str) -> None:
        """Acquire a well-known name. Raises BusError if another connection owns it."""
        (reply,) = await self.ask_bus("RequestName", "su", name, 4)  # DBUS_NAME_FLAG_DO_NOT_QUEUE
        if reply != PRIMARY_OWNER:
            raise BusError(
                f"{DBUS}.Error.Failed", f"another process owns {name} on the bus, is polytmpd running twice?"
            )

    # Signals

    async def subscribe(
        self,
        service: str,
        interface: str,
        member: str,
        handler: Callable[[str, list[Any]], None],
        only: str = "",
    ) -> None:
        """Call handler(path, body) for each such signal from the owner of the well-known name service.

        only: a further condition for the match rule, such as arg0='x'. It saves messages, but protects from
        nothing.
        """
        self._subscriptions.append(_Subscription(service, interface, member, handler))
        rule = f"type='signal',sender='{service}',interface='{interface}',member='{member}'"
        await asyncio.gather(
            self.follow_owner(service, None),
            self.ask_bus("AddMatch", "s", f"{rule},{only}" if only else rule),
        )

    async def follow_owner(self, service: str, handler: Callable[[str | None], None] | None) -> None:
        """Keep track of a name's owner. handler gets the new unique name, or None, on every change."""
        if handler is not None:
            self._owner_handlers.setdefault(service, []).append(handler)
        if service in self._owners:
            return
        self._owners[service] = None
        self._asking_owner.add(service)
        rule = f"type='signal',sender='{DBUS}',interface='{DBUS}',member='NameOwnerChanged',arg0='{service}'"
        # Both at once: the bus answers in order.
        await asyncio.gather(self.ask_bus("AddMatch", "s", rule), self._ask_owner(service))

    async def _ask_owner(self, service: str) -> None:
        with contextlib.suppress(BusError):
            (owner,) = await self.ask_bus("GetNameOwner", "s", service)
            if service in self._asking_owner:  # else NameOwnerChanged came first, and is newer
                self._owners[service] = owner
        self._asking_owner.discard(service)

    @contextlib.asynccontextmanager
    async def departure(self, name: str) -> AsyncIterator["asyncio.Future[None]"]:
        """A future that is done when a caller's unique name leaves the bus. Valid within the context.

        Raises BusError.
        """
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._departures.setdefault(name, [])
        waiting.append(gone)
        rule = f"type='signal',sender='{DBUS}',interface='{DBUS}',member='NameOwnerChanged',arg0='{name}'"
        try:
            if len(waiting) == 1:
                await self.ask_bus("AddMatch", "s", rule)
            if not await self.has_owner(name) and not gone.done():
                gone.set_result(None)
            yield gone
        finally:
            gone.cancel()
            waiting.remove(gone)
            if not waiting:
                self._departures.pop(name, None)
                if self.connected:
                    with contextlib.suppress(BusError):
                        await self.ask_bus("RemoveMatch", "s", rule)

    def owner(self, service: str) -> str:
        """The unique name that owns a followed name now. Raises BusError if it has no owner.

        A call to a unique name activates nothing. For a well-known name, the bus would wait 25 s for a
        logind that runs but has lost its connection.
        """
        owner = self._owners.get(service)
        if owner is None:
            raise BusError(f"{DBUS}.Error.NameHasNoOwner", f"{service} is not on the bus")
        return owner

    # Serving

    def serve(self, handler: Callable[[Message], bool]) -> None:
        """Pass every method call to handler, which returns whether it has handled the call."""
        self._call_handler = handler

    def send(self, message: Message, on_sent: Callable[[], None] | None = None) -> None:
        """Send a message that needs no answer. on_sent runs once it is written or has failed."""
        if not self.connected:
            if on_sent is not None:
                on_sent()
            return
        sent: Awaitable[Any] | None = self._bus.send(message)
        if isinstance(sent, asyncio.Future):
            sent.add_done_callback(lambda future: _sent(future, on_sent))

    def _on_message(self, message: Message) -> bool:
        # Right here, not later: dbus-fast shares one list between messages and refills it.
        if message.message_type is MessageType.METHOD_RETURN and message.reply_serial in self._kept:
            self._kept[message.reply_serial] = list(message.unix_fds)
        else:
            _close_all(message.unix_fds)
        if message.message_type in {MessageType.METHOD_RETURN, MessageType.ERROR}:
            return False  # the library finds the call that it answers
        if message.message_type is MessageType.SIGNAL:
            self._on_signal(message)
            return True
        if self._call_handler is not None:
            return self._call_handler(message)
        return False

    def _on_signal(self, message: Message) -> None:
        if message.sender == DBUS and message.member == "NameOwnerChanged" and message.signature == "sss":
            name, _, owner = message.body
            for gone in self._departures.get(name, []):
                if not owner and not gone.done():
                    gone.set_result(None)
            if name in self._owners:
                self._asking_owner.discard(name)
                self._owners[name] = owner or None
                for follow in self._owner_handlers.get(name, []):
                    follow(owner or None)
            return
        for subscription in self._subscriptions:
            if (message.interface, message.member) != (subscription.interface, subscription.member):
                continue
            if message.sender != self._owners.get(subscription.service):
                log.warning(
                    "Received signal %s.%s from %s, which does not own %s, ignoring",
                    message.interface,
                    message.member,
                    message.sender,
                    subscription.service,
                )
                continue
            subscription.handler(message.path or "", message.body)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _sent(future: "asyncio.Future[Any]", on_sent: Callable[[], None] | None) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.debug("Failed to send message, ignoring: %s", error)
    if on_sent is not None:
        on_sent()


def expects_reply(message: Message) -> bool:
    """Whether the caller waits for an answer."""
    return not message.flags & MessageFlag.NO_REPLY_EXPECTED

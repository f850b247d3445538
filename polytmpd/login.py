# SPDX-License-Identifier: LGPL-2.1-or-later
"""The socket that pam_polytmp asks for a user's namespace: /run/polytmpd/login, see pam_polytmp(8).

One request and one reply for each connection. Logins that cannot be answered yet wait in the kernel's queue,
also while the daemon is down: the socket belongs to systemd (polytmpd.socket).
Not here: which namespace it is (acquisition), and the same question on the bus, for scripts (bus/service).

Hard facts
- The socket is root's alone, by its mode. SO_PEERCRED is a second lock on the same door.
- recv(2) cuts a packet that is too long. No request that was cut matches REQUEST.
- If a connection is closed before everything is read from it, the peer gets ECONNRESET, not our reply.
"""

import asyncio
import logging
import re
import select
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from polytmpd.errors import AccessDeniedError, ExemptError, InvalidArgsError, PolytmpError
from polytmpd.kernel import peers
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.host import in_words
from polytmpd.tasks import Tasks

log = logging.getLogger(__name__)

NAME: Final = "login"
"""FileDescriptorName= of polytmpd.socket."""
REQUEST: Final = re.compile(rb"acquire (0|[1-9][0-9]{0,9})")
AT_ONCE: Final = 1024
"""Logins that are being answered. Further ones wait in the kernel's queue."""
OF_ONE_USER: Final = AT_ONCE // 2
"""Logins of one user among them. Further ones are refused, so that they do not hold up all others."""
REQUEST_TIMEOUT: Final = 5.0
"""Seconds that a caller may take to send the request. pam_polytmp sends it before it is accepted."""
_PAUSE: Final = 1.0
"""Seconds to wait if no connection can be accepted (EMFILE)."""
_REQUEST_SIZE: Final = 64
_REPLY_SIZE: Final = 2048


def take_socket(passed: list[tuple[str, Descriptor]]) -> socket.socket | None:
    """Take the socket out of what PID 1 passed; the caller closes it. None if it is not there."""
    found = None
    for entry in [entry for entry in passed if entry[0] == NAME]:
        if found is None and _is_ours(entry[1]):
            found = socket.socket(fileno=entry[1].detach())
            passed.remove(entry)
    return found


def _is_gone(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN | select.POLLRDHUP)
    return bool(poll.poll(0))


async def _receive(connection: socket.socket) -> bytes:
    """The request; empty if the caller has hung up. Raises OSError, TimeoutError."""
    try:
        return connection.recv(_REQUEST_SIZE)
    except (BlockingIOError, InterruptedError):
        async with asyncio.timeout(REQUEST_TIMEOUT):
            return await asyncio.get_running_loop().sock_recv(connection, _REQUEST_SIZE)


def _is_ours(fd: Descriptor) -> bool:
    with fd.dup() as duplicate:
        try:
            found = socket.socket(fileno=duplicate)
        except OSError:
            return False
        duplicate.detach()
    with found:
        return (found.family, found.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET) and bool(
            found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        )


class Logins:
    """Answers on the socket, which belongs to this object from now on.

    namespace(uid, pid) returns a descriptor, which this object closes, or raises PolytmpError. If the caller
    hangs up, it is cancelled.
    """

    def __init__(
        self,
        listening: socket.socket,
        namespace: Callable[[int, int], Awaitable[Descriptor]],
        *,
        at_once: int = AT_ONCE,
        of_one_user: int = OF_ONE_USER,
    ) -> None:
        self._listening = listening
        self._namespace = namespace
        self._at_once = at_once
        self._of_one_user = of_one_user
        self._open = 0
        self._users: Counter[int] = Counter()
        self._tasks = Tasks()
        self._pause: asyncio.TimerHandle | None = None
        self._closed = False

    def start(self) -> None:
        """Answer the logins that wait, and all that follow."""
        self._listening.setblocking(False)
        self._listen()

    async def close(self) -> None:
        """Stop answering. Callers without a reply ask again, and wait for the next daemon."""
        self._closed = True
        asyncio.get_running_loop().remove_reader(self._listening)
        if self._pause is not None:
            self._pause.cancel()
        await self._tasks.close()
        self._listening.close()

    def _listen(self) -> None:
        self._pause = None
        if not self._closed and self._open < self._at_once:
            asyncio.get_running_loop().add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while self._open < self._at_once:
            try:
                connection, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("Failed to accept a login, retrying: %s", in_words(error))
                loop.remove_reader(self._listening)
                self._pause = loop.call_later(_PAUSE, self._listen)
                return
            connection.setblocking(False)
            self._open += 1
            self._tasks.start_here(self._serve(connection)).add_done_callback(lambda _: self._ended())
        loop.remove_reader(self._listening)  # until one has ended

    def _ended(self) -> None:
        self._open -= 1
        if self._pause is None:
            self._listen()

    async def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, peers.peer(connection) as peer:
                if request := await _receive(connection):
                    await self._answer(connection, peer, request)
        except TimeoutError:
            log.warning("A process connected to the socket of pam_polytmp and sent nothing, ignoring it")
        except (ConnectionError, ProcessLookupError) as error:
            log.debug("A login has ended before it was answered: %s", in_words(error))
        except OSError as error:
            log.error("Failed to answer a login, closing the connection: %s", in_words(error))

    async def _answer(self, connection: socket.socket, peer: peers.Peer, request: bytes) -> None:
        try:
            with await self._find(connection, peer, request) as fd:
                if not peer.has_ended():  # so what was found about the pid was about the process
                    socket.send_fds(connection, [b"namespace"], [fd], socket.MSG_NOSIGNAL)
            return
        except ExemptError as error:
            reply = f"exempt {error}"
        except PolytmpError as error:
            reply = f"refused {error.name} {error}"
        except OSError:
            raise
        except Exception as error:
            log.error("Internal error: %r", error, exc_info=error)
            reply = f"refused {PolytmpError.name} internal error, see the journal of polytmpd"
        connection.send(reply.encode(errors="replace")[:_REPLY_SIZE], socket.MSG_NOSIGNAL)

    async def _find(self, connection: socket.socket, peer: peers.Peer, request: bytes) -> Descriptor:
        """What the request asks for. Cancels the task if the caller hangs up."""
        asked = REQUEST.fullmatch(request)
        if peer.uid != 0 or peer.pid == 0:
            raise AccessDeniedError("only root may ask for a namespace")
        if asked is None or int(asked[1]) >= 2**32 - 1:
            raise InvalidArgsError("this version of polytmpd does not understand the request of pam_polytmp")
        if _is_gone(connection):  # it waited in the queue for as long as it wanted to
            raise ConnectionResetError("the caller no longer waits")
        uid = int(asked[1])
        if self._users[uid] >= self._of_one_user:
            raise PolytmpError("too many logins of this user are waiting, try again later")
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def hung_up() -> None:
            loop.remove_reader(connection)  # once: a second one would interrupt the cleaning up
            if task is not None:
                task.cancel()

        self._users[uid] += 1
        # Only if it takes longer than this turn of the event loop.
        watch = loop.call_soon(loop.add_reader, connection, hung_up)
        try:
            return await self._namespace(uid, peer.pid)
        finally:
            watch.cancel()
            loop.remove_reader(connection)
            self._users[uid] -= 1
            if not self._users[uid]:
                del self._users[uid]

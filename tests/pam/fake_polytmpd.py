#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""A polytmpd that replies to AcquireNamespace as its argument (JSON) says, even if that is wrong.

It writes "ready" and a line for each call to standard output, and exits at the end of standard input.
"""

import asyncio
import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # as in polytmpd.bus.library, which the fake does not import
    from dbus_fast import Message, MessageType
    from dbus_fast.aio import MessageBus
else:
    try:
        from dbus_next import Message, MessageType
        from dbus_next.aio import MessageBus
    except ImportError:
        from dbus_fast import Message, MessageType
        from dbus_fast.aio import MessageBus


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def answer(message: Message, script: dict[str, Any]) -> Message | bool:
    for pid in script.get("kill", []):
        os.kill(pid, signal.SIGKILL)
    if script.get("die"):
        os._exit(0)
    if script.get("silent"):
        return True
    if "error" in script and script.setdefault(
        "errors", -1
    ):  # that many times; without "errors", every time
        script["errors"] -= 1
        return Message.new_error(message, script["error"], script["text"])
    users = script.get("users")
    if users is not None and str(message.body[0]) not in users:
        return Message.new_error(message, script["others"], "not for them")
    paths = users[str(message.body[0])] if users else script.get("open", [])
    fds = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]
    if script.get("pipe"):
        reader, writer = os.pipe()
        os.close(writer)
        fds.append(reader)
    body = script.get("body", [0])
    return Message.new_method_return(message, script.get("signature", "h"), body, unix_fds=fds)


async def main() -> None:
    script = json.loads(sys.argv[1])
    address = os.environ["DBUS_SYSTEM_BUS_ADDRESS"]
    bus = await MessageBus(bus_address=address, negotiate_unix_fd=True).connect()

    def handle(message: Message) -> Message | bool | None:
        if message.message_type != MessageType.METHOD_CALL or message.member != "AcquireNamespace":
            return None
        say(f"call {message.interface} {message.path} {message.signature} {message.body[0]}")
        return answer(message, script)

    bus.add_message_handler(handle)
    await bus.request_name("org.polytmp1")
    say("ready")
    end = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, end.set)
    await end.wait()


if __name__ == "__main__":
    asyncio.run(main())

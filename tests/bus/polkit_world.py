# SPDX-License-Identifier: LGPL-2.1-or-later
"""A polkit that replies as the test says, and callers whom only polkit can authorize."""

import asyncio
import os
import subprocess
from collections.abc import Callable
from typing import Any

from polytmpd.bus import polkit
from polytmpd.bus.contract import SERVICE
from polytmpd.bus.library import Message, MessageType
from tests.bus.world import STRANGER, Client

ALLOWED, DENIED, CHALLENGE = (True, False), (False, False), (False, True)


class FakePolkit:
    """Replies as the test says, or not at all if answer is None."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.answer: tuple[bool, bool] | None = DENIED
        self.asked: list[list[Any]] = []
        self.withdrawn: list[str] = []
        client.bus.add_message_handler(self._on_message)

    def _on_message(self, message: Message) -> bool:
        if message.message_type is not MessageType.METHOD_CALL or message.path != polkit.PATH:
            return False
        if message.member == "CancelCheckAuthorization":
            self.withdrawn.append(message.body[0])
            self.client.bus.send(Message.new_method_return(message))
            return True
        self.asked.append(message.body)
        if self.answer is not None:
            reply = Message.new_method_return(message, "(bba{ss})", [[*self.answer, {}]])
            self.client.bus.send(reply)
        return True


class Stranger:
    """busctl run by the user nobody, whom only polkit can authorize."""

    def __init__(self, bus: str) -> None:
        self.bus = bus
        self.processes: list[asyncio.subprocess.Process] = []

    async def start(
        self, path: str, method: str, *arguments: str, interactive: bool = False
    ) -> asyncio.subprocess.Process:
        flag = [f"--allow-interactive-authorization={'yes' if interactive else 'no'}"]
        process = await asyncio.create_subprocess_exec(
            *("setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"),
            *("busctl", f"--address={self.bus}", *flag, "--timeout=15", "call", SERVICE, path),
            *(method.rpartition(".")[0], method.rpartition(".")[2], *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.processes.append(process)
        return process

    async def call(self, path: str, method: str, *arguments: str, interactive: bool = False) -> str:
        process = await self.start(path, method, *arguments, interactive=interactive)
        stdout, _ = await asyncio.wait_for(process.communicate(), 20)
        return stdout.decode()

    async def close(self) -> None:
        for process in self.processes:
            if process.returncode is None:
                process.kill()
            await process.communicate()


async def as_nobody(new_client: Callable[[], Any]) -> Client:
    """A connection of another user. The bus reads the UID when the connection is made."""
    os.setresuid(STRANGER, STRANGER, 0)
    try:
        made: Client = await new_client()
    finally:
        os.setresuid(0, 0, 0)
    return made

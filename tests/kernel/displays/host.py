# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files as X servers make them, and a host with instances and display locks."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from polytmpd.core.model import Directory, Instance, InstanceDirectory, Lifetime
from polytmpd.displays.displaylocks import DisplayLocks
from polytmpd.displays.lockfiles import SOCKETS, make_copy, publish, read_lock, withdraw
from tests.unit.settled import eventually

ALICE, BOB, CAROL = 1001, 1002, 1003


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def make_lock(directory: Path, display: int, owner: int, content: str = f"{4711:10}\n") -> Path:
    path = directory / f".X{display}-lock"
    path.write_text(content)
    os.chown(path, owner, owner)
    return path


def make_socket(directory: Path, display: int, owner: int) -> Path:
    path = directory / SOCKETS / f"X{display}"
    bound = directory / "bound"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(bound))
    os.chown(bound, owner, owner)
    return bound.rename(path)  # so it never has another owner


def put_copy(directory: Path, display: int, pid: int = 4711) -> bool:
    with opened(directory) as fd, make_copy(fd, pid) as copy:
        return publish(copy, fd, display)


def read(directory: Path, display: int, owner: int) -> int | None:
    with opened(directory) as fd:
        return read_lock(fd, display, owner)


def take_away(directory: Path, display: int) -> bool:
    with opened(directory) as fd:
        return withdraw(fd, display)


class Host:
    """A host of the test: a base directory, instances in it, and the display locks."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.shared_again = 0
        self.updates = 0
        self.failures: list[Exception] = []
        self.locks = self._locks()
        self.directory = Directory(str(base), Lifetime.INSTANCE, (SOCKETS,))

    def _locks(self) -> DisplayLocks:
        locks = DisplayLocks()
        locks.follow(self._share_again)
        return locks

    async def _share_again(self, base: str) -> None:
        assert base == str(self.base)
        if self.failures:
            raise self.failures.pop()
        self.shared_again += 1

    def instance(self, uid: int, name: str = "") -> Instance:
        entry = InstanceDirectory(self.directory, f"polytmp-{uid}{name}")
        Path(entry.host_path).mkdir(parents=True, exist_ok=True)
        Path(entry.host_path).chmod(0o1777)
        return Instance(uid, str(uid), 0, 0, (entry,))

    def tmp(self, uid: int, name: str = "") -> Path:
        return self.base / f"polytmp-{uid}{name}/tmp"

    async def start(self, *uids: int) -> None:
        await self.locks.start([self.directory], [self.instance(uid) for uid in uids])

    async def again(self, *uids: int) -> None:
        """Start another daemon. The former one is closed already."""
        self.locks = self._locks()
        await self.start(*uids)

    async def updated(self, times: int) -> None:
        """Wait for so many further updates."""
        wanted = self.updates + times
        await eventually(lambda: self.updates >= wanted)

    def shown(self, display: int = 7) -> list[str]:
        """The places that have the lock or a copy of it."""
        places = {"host": self.base, **{path.parent.name[8:]: path for path in self.base.glob("*/tmp")}}
        return sorted(name for name, path in places.items() if (path / f".X{display}-lock").is_file())

    async def shows(self, places: Sequence[str | int], display: int = 7) -> None:
        wanted = sorted(map(str, places))
        await eventually(lambda: self.shown(display) == wanted)


def serve(host: Host, uid: int, display: int = 7, where: Path | None = None) -> Path:
    make_lock(where or host.tmp(uid), display, uid)
    return make_socket(host.base, display, uid)

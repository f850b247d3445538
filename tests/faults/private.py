# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes instances with the real executor while each step fails once, as PID 1 of a private PID and mount
namespace. Prints the outcomes, one JSON object per line:
  unshare --mount --pid --fork python -m tests.faults.private OPERATION

Not here: what the outcome should be (tests/kernel/test_create_faults.py).

Hard facts
- The namespace begins with copies of all mounts of the host. When the host removes a directory on which one
  of them is mounted, the kernel detaches the copy here, although the mounts are private (Linux 3.18). So a
  machine of the test bed that ends takes mounts of this namespace along.
"""

import asyncio
import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from polytmpd.blocking.state import StateDirectory
from polytmpd.core.model import Directory, Instance, Lifetime
from polytmpd.executor.actions import Executor
from polytmpd.executor.fdstore import Stored
from polytmpd.kernel import mountinfo
from polytmpd.kernel.inotify import Inotify
from polytmpd.kernel.mountinfo import Mount
from polytmpd.kernel.syscalls import MNT_DETACH, MS_PRIVATE, MS_REC, mount, umount2
from tests.bed.tree import cache_directory
from tests.faults.launcher import CHANGES, Faults, Plan, install

if TYPE_CHECKING:
    from polytmpd.displays.displaylocks import DisplayLocks

UID: Final = 1001
PLACE: Final = Path("/mnt")
DIRECTORIES: Final = (
    Directory(f"{PLACE}/tmp", Lifetime.INSTANCE, (".X11-unix", ".ICE-unix")),  # a mount point
    Directory(f"{PLACE}/var-tmp", Lifetime.PERSISTENT),  # a directory of another mount
)
NEVER_FAILS: Final = ("sdnotify.store", "sdnotify.remove")
"""They log failures and go on, see polytmpd/sdnotify.py."""
PATIENCE: Final = 30.0
USER_LIMITS: Final = Path("/proc/sys/user")
"""The limits of the user namespace; its parents have the same limits, or those in fs.inotify."""
MOUNT_MAX: Final = Path("/proc/sys/fs/mount-max")
FILL: Final = PLACE / "fill"
MS_BIND: Final = 0x1000
_CHANGES: Final = {function for _, _, functions in CHANGES for function in functions}


def set_up() -> None:
    if os.getpid() != 1:
        raise RuntimeError("not PID 1: see the docstring")
    for command in (
        "mount --make-rprivate /",
        "mount -t proc proc /proc",
    ):
        subprocess.run(command.split(), check=True)
    _detach_machines()
    for command in (
        f"mount -t tmpfs -o mode=0755 tmpfs {PLACE}",
        f"mkdir -m 1777 {PLACE}/tmp {PLACE}/var-tmp",
        f"mount -t tmpfs -o mode=1777 tmpfs {PLACE}/tmp",
        f"mkdir -m 1777 {PLACE}/tmp/.X11-unix {PLACE}/tmp/.ICE-unix",
        "mount --make-rshared /",
    ):
        subprocess.run(command.split(), check=True)


def _detach_machines() -> None:
    """Detach what other machines of the test bed have mounted: their end would make room for new mounts."""
    for entry in reversed(mountinfo.read("1")):
        if mountinfo.is_below(entry.mount_point, str(cache_directory())):
            with contextlib.suppress(OSError):  # it has just ended, or a user namespace locks it
                umount2(entry.mount_point, MNT_DETACH)


class NoDisplays:
    """Display locks never fail a login; their own faults are tested in tests/kernel/displays."""

    def follow(self, share_again: object) -> None:
        pass

    async def start(self, directories: object, instances: object) -> None:
        pass

    async def instance_came(self, instance: Instance) -> None:
        pass

    def instance_gone(self, uid: int) -> None:
        pass


class World:
    """One executor, with looks at what it has made."""

    def __init__(self) -> None:
        self._foreign = {mount for mount in mountinfo.read("1") if not _is_in_place(mount)}
        self.faults = Faults()
        self.ended = asyncio.Event()
        state, displays = StateDirectory(PLACE / "state"), cast("DisplayLocks", NoDisplays())
        self.executor = Executor(state, "0" * 32, Stored(), displays)
        self.executor.follow(lambda _: self.ended.set(), lambda _: None)
        # These work in the background, where a fault would hit them instead of the operation.
        setattr(self.executor._losses, "look", lambda *_, **__: None)  # noqa: B010  # mypy: not a method
        setattr(self.executor._shares, "add", lambda _: None)  # noqa: B010

    async def start(self) -> None:
        await self.executor.restore(())
        self.executor.start()

    def look(self) -> dict[str, object]:
        """Return everything that may be left."""
        return {
            "fds": _descriptors(),
            "watches": len(self.executor._sentinels.living()),
            "mounts": [mount.mount_point for mount in mountinfo.read("1") if self._may_be_ours(mount)],
            "disk": sorted(str(path) for path in PLACE.rglob("*")),
            "namespaces": len(_namespaces()),
            "threads": sorted(thread.name for thread in threading.enumerate() if thread.name == "mountns"),
        }

    def _may_be_ours(self, mount: Mount) -> bool:
        """Whether the executor may have made it. A mount that the host had at start may also vanish."""
        return _is_in_place(mount) or mount not in self._foreign

    async def create(self) -> Instance:
        return await self.executor.prepare(UID, "alice", DIRECTORIES, _is_former)

    async def end(self) -> None:
        """End the namespace of the instance; its files stay."""
        self.ended.clear()
        self.executor.let_go(UID)
        await asyncio.wait_for(self.ended.wait(), 60)

    async def remove(self, instance: Instance) -> None:
        await self.executor.remove(instance)
        await self.executor.remove_persistent(UID, DIRECTORIES)


async def _is_former(_: str) -> bool:
    return False


def _is_in_place(mount: Mount) -> bool:
    return mountinfo.is_below(mount.mount_point, str(PLACE))


def _descriptors() -> list[str]:
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the directory
            links.append(str(entry.readlink()))
    return sorted(link for link in links if link != f"/proc/{os.getpid()}/fd")


def _namespaces() -> set[Path]:
    found = set()
    for path in Path("/proc/self/task").glob("*/ns/mnt"):
        with contextlib.suppress(FileNotFoundError):  # the thread ended meanwhile
            found.add(path.readlink())
    return found


def _highest_descriptor() -> int:
    return max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())


Work = Callable[[], Awaitable[Instance]]
Undo = Callable[[Instance], Awaitable[None]]


def tell(step: str, number: int, result: dict[str, object]) -> None:
    print(json.dumps({"step": step, "number": number, **result}))  # noqa: T201


async def outcome(world: World, work: Work, undo: Undo, plan: Plan | None = None) -> dict[str, object]:
    """Do the work under the fault, and return its error and what is left of it, which should be nothing.

    If the work succeeds in spite of the fault, it is undone.
    """
    before = world.look()
    world.faults.set(plan)
    made: Instance | None = None
    error: OSError | None = None
    try:
        made = await work()
    except OSError as caught:
        error = caught
    fired = world.faults.fired
    world.faults.set(None)
    if made is not None:
        await undo(made)
    left: dict[str, object] = {"": None}
    deadline = time.monotonic() + PATIENCE
    while left and time.monotonic() < deadline:  # a joined thread may take a moment to end
        after = world.look()
        left = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
    return {"error": error and str(error), "errno": error and error.errno, "fired": fired, "left": left}


async def each_step(world: World, work: Work, undo: Undo) -> None:
    install(world.faults, reads=True)
    world.faults.set(Plan())
    await undo(await work())  # the first one makes things that stay
    world.faults.set(Plan())
    made = await work()
    names = list(world.faults.names)
    world.faults.set(None)
    await undo(made)
    counted: Counter[str] = Counter()
    for name in names:
        if name in NEVER_FAILS:
            continue
        counted[name] += 1
        how = "ENOSPC" if name.rpartition(".")[2] in _CHANGES else "EIO"
        tell(name, counted[name], await outcome(world, work, undo, Plan(counted[name], how, name)))


def _undo(world: World) -> Undo:
    async def undo(instance: Instance) -> None:
        await world.end()
        await world.remove(instance)

    return undo


async def create(world: World) -> None:
    await each_step(world, world.create, _undo(world))


async def rebuild(world: World) -> None:
    """A login that finds the files, but no process in the namespace."""
    made = await world.create()
    await world.end()

    async def undo(_: Instance) -> None:
        await world.end()

    await each_step(world, lambda: world.executor.rejoin(made), undo)


async def no_descriptors(world: World) -> None:
    """A real limit, at the n-th descriptor from now."""
    undo = _undo(world)
    await undo(await world.create())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def work() -> Instance:
        highest = _highest_descriptor()
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + number, hard))
        try:
            return await world.create()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    for number in range(100):
        result = await outcome(world, work, undo)
        tell("descriptors", number, result)
        if result["error"] is None:
            return


async def no_namespaces(world: World) -> None:
    """A real limit, of this user namespace."""
    await _limited(world, USER_LIMITS / "max_mnt_namespaces")


async def no_watches(world: World) -> None:
    """A real limit of this user namespace; fs.inotify.max_user_watches limits the whole system."""
    await _limited(world, USER_LIMITS / "max_inotify_watches")


async def no_inotify(world: World) -> None:
    (USER_LIMITS / "max_inotify_instances").write_text("1")
    try:
        Inotify().close()
    except OSError as error:
        tell("limited", 1, {"error": str(error), "errno": error.errno, "fired": "", "left": {}})


def _set(limit: Path, value: str) -> str:
    """Set a limit and return its former value."""
    before = limit.read_text()
    limit.write_text(value)
    return before


async def _limited(world: World, limit: Path) -> None:
    undo = _undo(world)
    await undo(await world.create())
    before = _set(limit, "1" if "namespaces" in limit.name else "0")
    tell("limited", 1, await outcome(world, world.create, undo))
    _set(limit, before)
    tell("again", 1, await outcome(world, world.create, undo))


def _fill_up() -> None:
    """Make as many mounts as this namespace may have, with copies of trees that double in size."""
    mount("fill", str(FILL), "tmpfs", 0)
    mount("none", str(FILL), None, MS_PRIVATE)
    trees = [f"{FILL}/0"]
    Path(trees[0]).mkdir()
    mount("fill", trees[0], "tmpfs", 0)
    left = int(MOUNT_MAX.read_text()) - len(mountinfo.read("1"))
    size = 1
    while left > 2 * (2 * size + 1):
        tree = f"{FILL}/{len(trees)}"
        Path(tree).mkdir()
        mount("fill", tree, "tmpfs", 0)
        for name in "ab":
            Path(tree, name).mkdir()
            mount(trees[-1], f"{tree}/{name}", None, MS_BIND | MS_REC)
        trees.append(tree)
        size = 2 * size + 1
        left -= size
    for number, tree in enumerate([*reversed(trees), *trees[:1] * len(trees)]):
        for again in range(2):
            place = f"{FILL}/more-{number}-{again}"
            Path(place).mkdir()
            try:
                mount(tree, place, None, MS_BIND | MS_REC)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                break
    try:
        mount("fill", str(FILL), "tmpfs", 0)
    except OSError as error:
        tell("filled", 1, {"error": str(error), "errno": error.errno, "fired": "", "left": {}})


async def no_mounts(world: World) -> None:
    """A real limit: this namespace is full. fs.mount-max is for the whole system and stays as it is."""
    undo = _undo(world)
    FILL.mkdir()
    await undo(await world.create())
    _fill_up()
    tell("limited", 1, await outcome(world, world.create, undo))
    umount2(str(FILL), MNT_DETACH)
    tell("again", 1, await outcome(world, world.create, undo))


OPERATIONS: Final = {
    work.__name__: work
    for work in (create, rebuild, no_descriptors, no_namespaces, no_watches, no_inotify, no_mounts)
}


async def main() -> None:
    world = World()
    await world.start()
    await OPERATIONS[sys.argv[1]](world)


if __name__ == "__main__":
    set_up()
    asyncio.run(main())

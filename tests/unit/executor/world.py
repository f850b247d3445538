# SPDX-License-Identifier: LGPL-2.1-or-later
"""An executor whose kernel answers as the test says.

Not here: the fixtures that put it in place (conftest).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from polytmpd.blocking.instances import Mended
from polytmpd.blocking.state import StateDirectory
from polytmpd.core.model import Directory, Instance, InstanceDirectory, Lifetime
from polytmpd.executor.actions import Executor
from polytmpd.executor.fdstore import Stored
from polytmpd.kernel.descriptor import Descriptor

if TYPE_CHECKING:
    from polytmpd.displays.displaylocks import DisplayLocks

UID = 1000
NOBODY = 2**22  # above the largest PID
BARRIER = f"polytmp-{'a' * 32}-{UID}-{'b' * 16}"
TMP = Directory("/tmp", Lifetime.INSTANCE)
INSTANCE = Instance(UID, "alice", 0, 0, (InstanceDirectory(TMP, BARRIER),), namespace=42)


def namespace(*_: object) -> Descriptor:
    """A stand-in for a descriptor of the instance's namespace."""
    return Descriptor.open("/dev/null", os.O_RDONLY)


def mend(instance: Instance, held: Descriptor | None, *_: object) -> Mended:
    """Nothing was removed on the host."""
    if held is not None:
        held.close()
    return Mended(instance.directories)


class FakeDisplays:
    """Remembers the users whose instances get displays."""

    def __init__(self) -> None:
        self.shown: set[int] = set()

    def follow(self, share_again: object) -> None:
        pass

    async def start(self, directories: Sequence[Directory], instances: Sequence[Instance]) -> None:
        self.shown = {instance.uid for instance in instances}

    async def instance_came(self, instance: Instance) -> None:
        self.shown.add(instance.uid)

    def instance_gone(self, uid: int) -> None:
        self.shown.discard(uid)

    async def close(self) -> None:
        pass


class World:
    """An executor whose kernel is what the test says."""

    def __init__(self, state: Path) -> None:
        self.state = StateDirectory(state)
        self.ended: list[int] = []
        self.changed: list[Instance] = []
        self.mounted: dict[str, int] = {}
        self.looks = 0
        self.failures: list[Exception] = []
        self.displays = FakeDisplays()
        self.executor = self.start()

    def start(self, stored: Stored = Stored()) -> Executor:  # noqa: B008  # it is frozen
        """Start another daemon, which gets this from the FD store."""
        self.executor = Executor(self.state, "a" * 32, stored, cast("DisplayLocks", self.displays))
        self.executor.follow(self.ended.append, self.changed.append)
        return self.executor

    def mounted_barriers(self, *_: object) -> dict[str, int]:
        self.looks += 1
        if self.failures:
            raise self.failures.pop()
        return dict(self.mounted)

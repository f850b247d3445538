# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which namespace a process gets for a user, and whether it gets one: the answer to a login.

Not here: how it is asked (login, bus/service), who is exempt (admission), which processes may move
(placement), how an instance is made (daemon).
"""

from typing import Protocol

from polytmpd.errors import ExemptError, PolytmpError
from polytmpd.kernel import host
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.host import in_words


class Instances(Protocol):
    """The daemon. Each method raises PolytmpError."""

    async def admit(self, uid: int) -> str:
        """The user's name. Raises ExemptError if they keep the host's directories."""
        ...

    async def acquire(self, uid: int, user: str) -> Descriptor:
        """A descriptor of the user's namespace; the caller closes it. May be cancelled."""
        ...


class Place(Protocol):
    """Where a process is. Each method raises PolytmpError."""

    def is_in_instance(self, pid: int) -> bool: ...

    async def require_movable(self, uid: int, pid: int) -> None:
        """Raise ExemptError if the process stays where it is."""
        ...


class Acquisition:
    """Answers for processes of root, whoever asks."""

    def __init__(self, instances: Instances, placement: Place) -> None:
        self._instances = instances
        self._placement = placement

    async def namespace(self, uid: int, pid: int) -> Descriptor:
        """A descriptor of the namespace that the process moves to; the caller closes it.

        Raises ExemptError if the process stays where it is, PolytmpError if it gets none.
        """
        try:
            user = await self._instances.admit(uid)
        except ExemptError:
            if not self._placement.is_in_instance(pid):
                raise
            return _hosts_namespace()  # an exempt user's directories
        await self._placement.require_movable(uid, pid)
        return await self._instances.acquire(uid, user)


def _hosts_namespace() -> Descriptor:
    try:
        return host.open_namespace()
    except OSError as error:
        raise PolytmpError(f"failed to open the host's mount namespace: {in_words(error)}") from error

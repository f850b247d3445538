# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether the process that opens a session may leave the mount namespace that it is in.

It may if it is in the host's or in an instance. Two kinds of sessions stay where they are, with a line in
the journal: that of a unit which cannot start in a user's directories, and those of a sandboxed service that
has its own directories. Every other mount namespace is refused.
Not here: who gets an instance (daemon), and the settings of units (core/sandbox).

Hard facts
- pam_systemd has logind move the process to a session's scope. So the cgroup does not always lead to the
  service, but PID 1 knows each service's main process.
- Users get mount namespaces of their own with set-user-ID programs (firejail), and start programs in the
  cgroups of services too, for example in cron.service. So a service's own namespace is that of its main
  process, which belongs to root.
- What users run in a service's private /tmp shares it with what other users run there. So the sessions of
  programs that run something for users do not stay in a sandbox.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Final

from polytmpd.bus import systemd1
from polytmpd.bus.connection import BusError, Connection
from polytmpd.core import sandbox
from polytmpd.core.views import Views
from polytmpd.errors import ExemptError, NotPolyinstantiatedError, PolytmpError
from polytmpd.journal import fields
from polytmpd.kernel import host, origin, processes
from polytmpd.kernel.host import in_words

log = logging.getLogger(__name__)

_PROPERTIES: Final = ("Id", "User", "PAMName", "MainPID", "ControlPID", *sandbox.SETTINGS)


class Placement:
    """Decides for processes that log a user in. Asks systemd over a connection that the caller owns."""

    def __init__(self, connection: Connection, views: Views) -> None:
        self._connection = connection
        self._views = views
        self._named: set[str] = set()

    def is_in_instance(self, pid: int) -> bool:
        """Whether the process is in an instance now. Raises PolytmpError."""
        with _about(pid):
            return self._is_an_instances(processes.namespaces(pid))

    async def require_movable(self, uid: int, pid: int) -> None:
        """Return if the process may move into the directories of a user who is not exempt.

        Raises ExemptError if it stays where it is, NotPolyinstantiatedError if it may not.
        """
        with _about(pid):
            here = processes.namespaces(pid)
            if host.namespace_inode() in here:
                await self._require_unit_that_starts(uid, pid)
                return
        if self._is_an_instances(here):
            return
        await self._require_private(uid, pid, here)
        raise NotPolyinstantiatedError(
            f"process {pid} has its own mount namespace; see PrivateTmp=, ProtectSystem= and similar "
            "settings of its service"
        )

    def _is_an_instances(self, namespaces: set[int]) -> bool:
        return not namespaces.isdisjoint(view.namespace for view in self._views if view.namespace)

    async def _require_unit_that_starts(self, uid: int, pid: int) -> None:
        """Raise ExemptError for the process of a unit that needs the host's directories.

        Whatever is not known to be one moves. Raises OSError.
        """
        if not origin.is_started_by_systemd(pid):
            return
        unit = sandbox.unit_of(origin.cgroup(pid))
        try:
            if not unit.endswith(".service"):
                unit = await self._service_of(pid)
            if not unit or sandbox.is_user_manager(unit):
                return
            found = await self._properties(unit)
        except BusError as error:
            log.warning("Failed to determine the unit of process %d, moving it: %s", pid, error)
            return
        if pid not in {found.get("MainPID"), found.get("ControlPID")} or not found.get("PAMName"):
            return
        if why := sandbox.conflicts(found, self._directories(uid)):
            log.info(
                "%s of user %s stays in the host's mount namespace, because of %s. "
                "To give it the user's directories, remove this from the unit",
                unit,
                found.get("User"),
                ", ".join(why),
                extra=fields(uid=uid),
            )
            raise ExemptError(f"{unit} needs the host's directories: {', '.join(why)}")

    async def _require_private(self, uid: int, pid: int, here: set[int]) -> None:
        """Raise ExemptError if the process is in a service's own mount namespace, with its own directories.

        Whatever is not known to be private is not.
        """
        try:
            if len(here) != 1 or sandbox.is_login_program(origin.program(pid)):
                return
            if any(origin.has_the_hosts(pid, directory) for directory in self._directories(uid)):
                return
            unit = await self._service_in(here)
            if not unit or sandbox.is_user_manager(unit) or sandbox.is_login_service(unit):
                return
        except (OSError, BusError) as error:
            log.warning("Failed to determine what process %d sees, refusing: %s", pid, in_words(error))
            return
        if unit not in self._named:
            self._named.add(unit)
            log.warning(
                "%s opens sessions in its own mount namespace, which has its own %s: they stay there. See: "
                "systemctl show -p PrivateTmp %s",
                unit,
                " and ".join(self._views.directories),
                unit,
                extra=fields(uid=uid),
            )
        raise ExemptError(f"{unit} has its own directories")

    async def _service_in(self, namespaces: set[int]) -> str:
        """The service whose main process, one of root's, lives in these mount namespaces; or empty."""
        async for service in systemd1.services(self._connection):
            with contextlib.suppress(OSError):  # the process has ended
                if (
                    service.main
                    and processes.namespaces(service.main) == namespaces
                    and origin.real_uid(service.main) == 0
                ):
                    return service.name
        return ""

    async def _service_of(self, pid: int) -> str:
        """The service that has this main or control process; empty if there is none."""
        async for service in systemd1.services(self._connection):
            if pid in {service.main, service.control}:
                return service.name
        return ""

    async def _properties(self, unit: str) -> dict[str, Any]:
        return await systemd1.unit_properties(self._connection, unit, _PROPERTIES)

    def _directories(self, uid: int) -> set[str]:
        view = self._views.get(uid)
        existing = (entry.directory.path for entry in view.directories) if view else ()
        return {*self._views.directories, *existing}


@contextlib.contextmanager
def _about(pid: int) -> Iterator[None]:
    """Turn an OSError about a process into PolytmpError."""
    try:
        yield
    except OSError as error:
        text = f"failed to determine the mount namespace of process {pid}: {in_words(error)}"
        raise PolytmpError(text) from error

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events in, actions out: feeds what logind, the slices and the kernel report to the lifecycle, and has its
actions done.

Not here: how anything is done (executor), what follows from what (core/lifecycle), the bus (bus/).
"""

import asyncio
import logging
import os
import pwd
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol, TypeVar

from polytmpd import devices
from polytmpd.blocking import usage
from polytmpd.bus.connection import BusError
from polytmpd.bus.logind import Logind, Session, User
from polytmpd.bus.service import QUESTIONS_AT_ONCE
from polytmpd.bus.systemd1 import Systemd
from polytmpd.config import Config, Problem
from polytmpd.core.lifecycle import Action, Event, Standing, advance, visible_state
from polytmpd.core.model import Instance, Lifetime, State, View
from polytmpd.core.policy import Claims
from polytmpd.devices import BlockDevice
from polytmpd.displays.displaylocks import DisplayLocks
from polytmpd.errors import (
    BusyError,
    ExemptError,
    InvalidArgsError,
    NoSuchInstanceError,
    NotPolyinstantiatedError,
    PolytmpError,
)
from polytmpd.executor import Executor
from polytmpd.journal import MessageId, fields
from polytmpd.kernel import holders, host, processes
from polytmpd.kernel.host import in_words
from polytmpd.kernel.mountinfo import Mount
from polytmpd.slices import CGROUP_ROOTS, Slices

log = logging.getLogger(__name__)

T = TypeVar("T")

NAME_LOOKUP_TIMEOUT: Final = 10.0
"""Seconds that NSS may take for a user whom logind does not know (a cron job of a directory service's user).
"""
_STOPPING: Final = "polytmpd is being stopped"
_LOOK_TIMEOUT: Final = 1.0
"""Seconds that a login waits at most for the service manager to tell of the user's slice."""
_LIST_AGAIN: Final = 30.0
"""Seconds after which logind is asked again, where it did not answer."""


class Announcer(Protocol):
    """Who is told of what everybody may see (bus/service)."""

    def instance_new(self, uid: int) -> None: ...
    def instance_removed(self, uid: int) -> None: ...
    def instance_changed(self, uid: int, names: Sequence[str]) -> None: ...
    def manager_changed(self, names: Sequence[str]) -> None: ...


@dataclass(slots=True)
class _Record:
    """All that is known of one user.

    generation tells the work for this instance from that for a former one.
    """

    user: str
    standing: Standing = field(default_factory=Standing)
    claims: Claims = field(default_factory=Claims)
    control_group: str = ""
    instance: Instance | None = None
    error: PolytmpError | None = None
    shown: bool = False
    told: State = State.ABSENT
    generation: int = 0
    waiting: list["asyncio.Future[int]"] = field(default_factory=list)


class Daemon:
    """The backend of the service, and the listener of all sources of events."""

    def __init__(
        self, config: Config, executor: Executor, load_config: Callable[[], tuple[Config, list[Problem]]]
    ) -> None:
        self._config = config
        self._executor = executor
        self._load_config = load_config
        self._records: dict[int, _Record] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Not the loop's own threads: logins need those, and a user decides how long an answer takes to find.
        # As many as may be at work: who has his turn needs not wait again, for somebody else's answer.
        self._counters = ThreadPoolExecutor(QUESTIONS_AT_ONCE, "questions")
        self._leftovers: list[tuple[str, str]] = []
        self._listing: set[str] | None = None
        self._asking_logind = asyncio.Lock()
        self._lists_later = False
        self._heard_of_sessions = False
        self._stopping = threading.Event()
        self._announcer: Announcer | None = None
        self._logind: Logind | None = None
        self._systemd: Systemd | None = None
        self._slices: Slices | None = None
        self._displays: DisplayLocks | None = None

    def connect(
        self,
        announcer: Announcer,
        logind: Logind,
        systemd: Systemd,
        slices: Slices,
        displays: DisplayLocks | None = None,
    ) -> None:
        """Meet those who need the daemon to be made."""
        self._announcer = announcer
        self._logind = logind
        self._systemd = systemd
        self._slices = slices
        self._displays = displays

    async def restore(self) -> None:
        """Take over what lives, find what is left over. Raises OSError.

        Before anything can call for an instance: one that is being made would be taken for one that was left
        over.
        """
        restored = await asyncio.to_thread(self._executor.restore, self._config.directories)
        for instance in (*restored.held, *restored.draining):
            record = self._record(instance.uid, instance.user)
            record.instance = instance
            state = State.ACTIVE if instance in restored.held else State.DRAINING
            record.standing = Standing(state, claimed=state is State.ACTIVE)
            self._show(instance.uid, record)
        known = {entry.barrier for record in self._records.values() for entry in _made(record).directories}
        self._leftovers = await self._executor.find_leftovers(self._config.directories, known)
        await self._executor.tell_age_cleaner(self._config.directories)
        if self._displays is not None:
            instances = (*restored.held, *restored.draining)
            await self._displays.start(self._config.directories, instances)

    async def start(self) -> None:
        """Hear what logind and the kernel say, clear what is left over. Raises BusError."""
        self._start(self._executor.delete_leftovers(self._leftovers))
        restored = list(self._records)
        for uid in restored:  # before logind is asked: a slice with processes holds what was held
            await self._look_at_slice(uid)
        # Where logind does not answer, what was held stays held: not to be told of a session is not to have
        # none.
        await self._list_logind()
        for uid in restored:
            record = self._records.get(uid)
            if record and record.standing.state is State.DRAINING and record.claims.claimed:
                self._feed(uid, Event.CLAIMED)  # the FD store was lost: hold it again
        self._executor.start()

    async def stop(self) -> None:
        """Let unfinished work end as far as it does so by itself, and begin nothing new; instances stay."""
        self._stopping.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._counters.shutdown(wait=False, cancel_futures=True)
        if self._displays is not None:
            await self._displays.close()
        await self._executor.close()

    # What is told by logind, the slices and the kernel

    def user_new(self, user: User) -> None:
        self._claim(user, lambda claims: claims.with_user())

    def user_removed(self, uid: int) -> None:
        if uid in self._records:
            self._release(uid, lambda claims: claims.without_user())
            self._start(self._look_at_slice(uid))

    def session_new(self, session: Session) -> None:
        self._claim(session.user, lambda claims: claims.with_session(session.id, login=session.is_login))

    def session_removed(self, session_id: str) -> None:
        if self._listing is not None:
            self._listing.add(session_id)
        for uid, record in list(self._records.items()):
            if session_id in record.claims.sessions:
                self._release(uid, lambda claims: claims.without_session(session_id))

    def scope_changed(self, session_id: str) -> None:
        """The session may be closing: then it is over, whoever lives on in it."""
        if any(session_id in record.claims.sessions for record in self._records.values()):
            self._start(self._look_at_session(session_id))

    def logind_changed(self) -> None:
        self._start(self._list_logind())

    def slice_changed(self, uid: int) -> None:
        """The slice started or stopped: its cgroup may be another one now."""
        if uid in self._records:
            self._start(self._look_at_slice(uid))

    def systemd_changed(self) -> None:
        for uid, record in self._records.items():
            self._start(self._look_at_slice(uid))
            for session in record.claims.sessions:
                self._start(self._look_at_session(session))

    def slice_populated(self, uid: int, populated: bool) -> None:
        record = self._records.get(uid)
        if record is not None and record.claims.populated != populated:
            self._release(uid, lambda claims: claims.with_slice(populated=populated))

    def namespace_ended(self, uid: int) -> None:
        if uid in self._records:
            self._feed(uid, Event.NAMESPACE_ENDED)

    def device_gone(self, device: BlockDevice) -> None:
        """What was mounted from it in a private directory nobody else sees, and nobody else unmounts."""

        def is_from_it(mount: Mount) -> bool:
            # btrfs, for one, has a number of its own; the source is what whoever mounted it said.
            return device.number == mount.device or (bool(device.node) and device.node == mount.source)

        self._start(self._executor.detach(is_from_it))

    def devices_missed(self) -> None:
        """At start, and when events were lost."""
        self._start(self._executor.detach(lambda mount: not devices.exists(mount.device)))

    # What the service asks for

    async def acquire(self, uid: int, caller: int) -> int:
        self._require_known_namespace(caller)
        record = self._records.get(uid)
        if reason := self._config.exemptions.reason(uid, record.user if record else None):
            raise ExemptError(reason)
        if record is None:
            name = await self._name_of(uid)
            if reason := self._config.exemptions.reason(uid, name):
                raise ExemptError(reason)
            record = self._record(uid, name)
        look = self._start(self._look_at_slice(uid))
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        record.waiting.append(future)
        if record.claims.starting:  # his manager asks, which from now on is seen in the slice
            await asyncio.wait((look,), timeout=_LOOK_TIMEOUT)
        if not future.done():
            self._feed(uid, Event.ACQUIRED)
        return await future

    async def reload(self) -> None:
        config, problems = await asyncio.to_thread(self._load_config)
        # At start such a one is left to refuse logins, which shows; here the old setting goes on.
        problems += [
            Problem(f"Directories=: {directory.path} is no directory; make it, or name another")
            for directory in config.directories
            if not await asyncio.to_thread(os.path.isdir, directory.path)
        ]
        if problems:
            for problem in problems:
                log.error("%s", problem.fault, extra=fields(MessageId.BAD_CONFIG))
            faults = "; ".join(problem.fault for problem in problems)
            raise InvalidArgsError(f"nothing was changed: {faults}")
        self._config = config
        await self._executor.tell_age_cleaner(config.directories)
        log.info("Configuration reloaded; instances that exist stay as they are")
        self._announce().manager_changed(["Directories"])

    async def remove(self, uid: int, *, persistent: bool = False) -> None:
        record = self._records.get(uid)
        is_shown = record is not None and record.shown
        if record is not None and is_shown and record.standing.state is not State.FAILED:
            raise BusyError(f"the instance of {record.user} is {self._state_of(record)}")
        if not is_shown and not persistent:
            self._shown(uid)
        if persistent:
            try:
                removed = await self._executor.remove_persistent(uid, self._config.directories)
            except OSError as error:
                raise PolytmpError(f"not everything can be removed: {in_words(error)}") from error
            if not removed and not is_shown:
                raise NoSuchInstanceError(f"UID {uid} has no instance, and nothing is kept of former ones")
        if (
            record is None
            or self._records.get(uid) is not record
            or record.standing.state is not State.FAILED
        ):
            return
        generation = record.generation
        if record.instance is not None:
            try:
                await self._executor.remove(record.instance)
            except OSError as error:
                raise PolytmpError(f"not everything can be removed: {in_words(error)}") from error
            more = fields(MessageId.INSTANCE_REMOVED, uid, record.user)
            log.info("Removed instance of user %s", record.user, extra=more)
        if self._records.get(uid) is record and record.generation == generation:
            self._feed(uid, Event.UNCLAIMED)

    def removed_entries(self, uid: int) -> int:
        return self._executor.removed_entries(uid)

    async def processes(self, uid: int) -> list[tuple[int, str]]:
        record = self._shown(uid)
        namespace = record.instance.namespace if record.instance else 0
        group = record.control_group

        def look(cancelled: Callable[[], bool]) -> list[processes.Process]:
            living = processes.living_in(namespace, cancelled) if namespace else []
            found = {process.pid: process for process in living}
            for root in CGROUP_ROOTS if group else ():
                members = processes.in_cgroup(root + group, cancelled)
                found.update((process.pid, process) for process in members)
            return [found[pid] for pid in sorted(found)]

        return [(process.pid, process.command) for process in await self._find_out(look)]

    async def holders(self, uid: int) -> list[tuple[int, str, str, str]]:
        record = self._shown(uid)
        instance, group = record.instance, record.control_group

        def look(cancelled: Callable[[], bool]) -> list[holders.Holder]:
            return holders.find(
                instance.namespace if instance else 0,
                {entry.barrier for entry in instance.directories} if instance else (),
                [root + group for root in CGROUP_ROOTS] if group else (),
                cancelled,
            )

        found = await self._find_out(look)
        return [(entry.pid, entry.command, entry.control_group, entry.how.value) for entry in found]

    async def usage(self, uid: int) -> list[tuple[str, int, int]]:
        record = self._records.get(uid)
        directories = (
            record.instance.directories
            if record and record.instance
            else await asyncio.to_thread(self._executor.persistent, uid, self._config.directories)
        )
        if not directories:
            self._shown(uid)

        def count(cancelled: Callable[[], bool]) -> list[tuple[str, int, int]]:
            result = []
            for entry in directories:
                try:
                    directory = host.open_directory(entry.host_path)
                except FileNotFoundError:  # set aside, and being deleted
                    continue
                with directory:
                    used = usage.count(directory, cancelled)
                result.append((entry.directory.path, used.bytes, used.inodes))
            return result

        try:
            return await self._find_out(count)
        except OSError as error:
            raise PolytmpError(f"cannot be counted: {in_words(error)}") from error

    def views(self) -> list[View]:
        return [self._view_of(uid, record) for uid, record in sorted(self._records.items()) if record.shown]

    def view(self, uid: int) -> View | None:
        record = self._records.get(uid)
        return self._view_of(uid, record) if record and record.shown else None

    async def uid_of_process(self, pid: int) -> int:
        found = await self._find_out(lambda _: processes.namespaces(pid))
        for uid, record in self._records.items():
            if record.instance and record.instance.namespace in found:
                return uid
        raise NotPolyinstantiatedError(f"process {pid} lives in no instance")

    async def resolve(self, uid: int, path: str) -> str:
        record = self._records.get(uid)
        instance = record.instance if record and record.shown else None
        gone = record is not None and record.standing.state in {State.REMOVING, State.FAILED}
        directories = (
            instance.directories
            if instance
            else await asyncio.to_thread(self._executor.persistent, uid, self._config.directories)
        )
        # normpath() does not look at the disk, and leaves two slashes alone
        normal = "/" + os.path.normpath(path).lstrip("/")  # noqa: ASYNC240
        if not path.startswith("/"):
            raise InvalidArgsError(f"{path!r} is not an absolute path")
        for entry in directories:
            if gone and entry.directory.lifetime is Lifetime.INSTANCE:
                continue  # set aside, under a name that says nobody's
            base = entry.directory.path
            rest = normal.removeprefix(base).lstrip("/")
            if normal != base and not normal.startswith(base + "/"):
                continue
            if rest.split("/")[0] in entry.directory.shared:
                return normal
            return f"{entry.host_path}/{rest}".rstrip("/")
        if instance is None or gone:
            raise NoSuchInstanceError(f"UID {uid} has no instance now")
        raise NotPolyinstantiatedError(
            f"{path} is in no directory that is private; it is the same on the host"
        )

    def directories(self) -> list[str]:
        return [directory.path for directory in self._config.directories]

    # Claims

    def _claim(self, user: User, change: Callable[[Claims], Claims]) -> None:
        if self._config.exemptions.reason(user.uid, user.name) is not None:
            return
        record = self._record(user.uid, user.name)
        record.claims = change(record.claims)
        self._start(self._look_at_slice(user.uid))
        self._settle(user.uid)

    def _release(self, uid: int, change: Callable[[Claims], Claims]) -> None:
        record = self._records[uid]
        record.claims = change(record.claims)
        self._settle(uid)

    def _settle(self, uid: int) -> None:
        record = self._records[uid]
        is_held = record.standing.state in {State.PREPARING, State.ACTIVE}
        claimed = record.claims.claimed if is_held else record.claims.calls
        if not claimed and record.standing.state is State.FAILED and record.instance is not None:
            return  # files are left of it: that is shown until remove() is asked for, or a login comes
        self._feed(uid, Event.CLAIMED if claimed else Event.UNCLAIMED)

    async def _list_logind(self) -> None:
        """Compare with what logind says now: at start, and when it came back."""
        async with self._asking_logind:
            answered = await self._compare_with_logind()
        if not answered:
            self._list_later()

    def _list_later(self) -> None:
        """Ask until it answers: one that is only slow never leaves the bus, to be heard coming back."""
        if not self._lists_later:
            self._lists_later = True
            self._start(self._list_until_answered())

    async def _list_until_answered(self) -> None:
        answered = False
        try:
            while not answered:
                await asyncio.sleep(_LIST_AGAIN)
                async with self._asking_logind:
                    answered = await self._compare_with_logind()
        finally:
            self._lists_later = False

    async def _compare_with_logind(self) -> bool:
        """Whether it answered.

        What comes while it answers is newer than the answer: a record, or a session, that was not there
        before is left alone, and a session that went meanwhile does not come back.
        """
        if self._logind is None:
            return True
        before = {uid: record.claims.sessions for uid, record in self._records.items()}
        removed = self._listing = set()
        try:
            users, sessions = await self._logind.users(), await self._logind.sessions()
        except BusError as error:
            level = logging.DEBUG if self._lists_later else logging.WARNING
            log.log(level, "systemd-logind does not answer, going on without and asking again: %s", error)
            return False
        finally:
            self._listing = None
        self._heard_of_sessions = True
        # Users without a session linger: their managers ask by themselves, and slices hold what is there.
        for session in sessions:
            if session.id not in removed:
                self.session_new(session)
        listed = {session.id for session in sessions}
        for known in before.values():
            for gone in known - listed:
                self.session_removed(gone)
        for uid in set(before) - {user.uid for user in users}:
            if uid in self._records and self._records[uid].claims.sessions <= before[uid]:
                self.user_removed(uid)
        for uid in list(self._records):
            self._settle(uid)
        return True

    async def _look_at_session(self, session_id: str) -> None:
        try:
            gone = self._logind is not None and not await self._logind.is_open(session_id)
        except BusError as error:
            log.debug("systemd-logind does not tell of session %s: %s", session_id, error)
            self._list_later()
            return
        if gone:
            self.session_removed(session_id)

    async def _look_at_slice(self, uid: int) -> None:
        if self._systemd is None or self._slices is None:
            return
        try:
            group = await self._systemd.control_group(uid)
        except BusError as error:
            log.warning("The service manager does not tell the cgroup of UID %d, guessing: %s", uid, error)
            group = f"/user.slice/user-{uid}.slice"  # see user@.service(5); it will be asked again
        record = self._records.get(uid)
        if record is None:
            return
        if group and group != record.control_group:
            record.control_group = group
            self._changed(uid, ["ControlGroup"])
        self._slices.watch(uid, group)

    # The lifecycle

    def _feed(self, uid: int, event: Event) -> None:
        record = self._records[uid]
        before = record.standing
        record.standing, actions = advance(before, event)
        if record.standing != before:
            log.debug("UID %d: %s, %s → %s", uid, event.name, before, record.standing)
        for action in actions:
            self._perform(uid, record, action)
        if record.standing.state is not State.ABSENT:
            state = self._state_of(record)
            changed, record.told = state is not record.told, state
            if not record.shown:
                self._show(uid, record)
            elif changed:
                self._changed(uid, ["State"])
        elif not record.waiting and not record.claims.claimed:
            del self._records[uid]

    def _perform(self, uid: int, record: _Record, action: Action) -> None:
        match action:
            case Action.PREPARE:
                record.generation += 1
                self._start(self._prepare(uid, record))
            case Action.REJOIN:
                self._start(self._rejoin(uid, record, _made(record)))
            case Action.HAND_OVER:
                self._hand_over(uid, record)
            case Action.REFUSE:
                self._refuse(record)
            case Action.LET_GO:
                self._executor.let_go(uid)
            case Action.REMOVE:
                if self._displays is not None:
                    self._displays.instance_gone(uid)
                self._start(self._remove(uid, record, _made(record), record.generation))
            case Action.FORGET:
                self._hide(uid, record)

    async def _prepare(self, uid: int, record: _Record) -> None:
        look = self._start(self._look_at_slice(uid))
        try:
            instance = await self._executor.prepare(uid, record.user, self._config.directories)
        except Exception as error:  # a login waits: it gets an answer to "can't start new thread", too
            self._prepare_failed(uid, record, error)
            return
        log.info(
            "New instance of user %s: %s",
            record.user,
            ", ".join(entry.host_path for entry in instance.directories),
            extra=fields(MessageId.INSTANCE_NEW, uid, record.user),
        )
        if self._displays is not None:
            await self._displays.instance_came(instance)
        await asyncio.wait((look,), timeout=_LOOK_TIMEOUT)
        self._prepared(uid, record, instance)

    async def _rejoin(self, uid: int, record: _Record, draining: Instance) -> None:
        look = self._start(self._look_at_slice(uid))
        try:
            instance = await self._executor.rejoin(draining)
        except Exception as error:
            self._prepare_failed(uid, record, error, Event.REJOIN_FAILED)
            if self._executor.has_ended(uid):
                self._feed(uid, Event.NAMESPACE_ENDED)  # while it was tried
            return
        if self._displays is not None:
            await self._displays.instance_came(instance)
        await asyncio.wait((look,), timeout=_LOOK_TIMEOUT)
        self._prepared(uid, record, instance)

    def _prepared(self, uid: int, record: _Record, instance: Instance) -> None:
        self._take_namespace_from_others(uid, instance.namespace)
        record.instance = instance
        record.error = None
        self._changed(
            uid, ["CreatedUSec", "CreatedUSecMonotonic", "NamespaceID", "Directories", "SharedPaths"]
        )
        self._settle(uid)
        self._feed(uid, Event.PREPARED)

    def _take_namespace_from_others(self, owner: int, namespace: int) -> None:
        """The kernel gave the number of one that ended to the owner's: what is still shown of the instance
        that it was, deleted now or mounted elsewhere, has none any more.
        """
        for uid, record in self._records.items():
            if uid != owner and record.instance and record.instance.namespace == namespace:
                record.instance = replace(record.instance, namespace=0)
                self._changed(uid, ["NamespaceID"])

    def _prepare_failed(
        self, uid: int, record: _Record, error: Exception, event: Event = Event.PREPARE_FAILED
    ) -> None:
        log.error(
            "User %s gets no private directories: %s",
            record.user,
            in_words(error),
            exc_info=None if isinstance(error, OSError) else error,
            extra=fields(MessageId.PREPARE_FAILED, uid, record.user),
        )
        record.error = PolytmpError(f"the instance cannot be made: {in_words(error)}")
        self._feed(uid, event)

    def _hand_over(self, uid: int, record: _Record) -> None:
        waiting, record.waiting = record.waiting, []
        for future in waiting:
            if future.done():
                continue
            try:
                future.set_result(self._executor.hand_over(uid))
            except OSError as error:
                future.set_exception(PolytmpError(f"the namespace cannot be handed over: {in_words(error)}"))
        if waiting:
            record.claims = record.claims.with_acquisition()

    def _refuse(self, record: _Record) -> None:
        waiting, record.waiting = record.waiting, []
        for future in waiting:
            if not future.done():
                future.set_exception(record.error or PolytmpError("the instance cannot be made"))

    async def _remove(self, uid: int, record: _Record, instance: Instance, generation: int) -> None:
        try:
            await self._executor.remove(instance)
        except OSError as error:
            event = Event.REMOVE_FAILED
            log.error(
                "Instance of user %s cannot be deleted, polytmpctl remove tries again: %s",
                instance.user,
                in_words(error),
                extra=fields(MessageId.REMOVE_FAILED, uid, instance.user),
            )
        else:
            event = Event.REMOVED
            log.info(
                "Removed instance of user %s",
                instance.user,
                extra=fields(MessageId.INSTANCE_REMOVED, uid, instance.user),
            )
        if self._records.get(uid) is record and record.generation == generation:
            self._feed(uid, event)

    # What is shown

    def _show(self, uid: int, record: _Record) -> None:
        record.shown = True
        self._announce().instance_new(uid)

    def _hide(self, uid: int, record: _Record) -> None:
        record.instance = None
        if record.shown:
            self._announce().instance_removed(uid)
            record.shown = False

    def _changed(self, uid: int, names: Sequence[str]) -> None:
        if self._records[uid].shown:
            self._announce().instance_changed(uid, names)

    def _announce(self) -> Announcer:
        if self._announcer is None:
            raise RuntimeError("connect() comes first")
        return self._announcer

    def _view_of(self, uid: int, record: _Record) -> View:
        instance, state = record.instance, self._state_of(record)
        if instance is None:
            return View(uid, record.user, state, control_group=record.control_group)
        return View(
            uid,
            record.user,
            state,
            instance.created_usec,
            instance.created_monotonic_usec,
            record.control_group,
            instance.namespace,
            instance.directories,
        )

    # Within

    def _state_of(self, record: _Record) -> State:
        """As it is shown. Before logind told anything, what is held is active: nobody says that he left."""
        if not self._heard_of_sessions:
            return record.standing.state
        return visible_state(record.standing, record.claims)

    def _record(self, uid: int, user: str) -> _Record:
        return self._records.setdefault(uid, _Record(user))

    def _shown(self, uid: int) -> _Record:
        record = self._records.get(uid)
        if record is None or not record.shown:
            raise NoSuchInstanceError(f"UID {uid} has no instance now")
        return record

    def _require_known_namespace(self, pid: int) -> None:
        """A login service that lives in a namespace of its own would lose it, or see the wrong mounts."""
        known = {record.instance.namespace for record in self._records.values() if record.instance}
        try:
            known.add(host.namespace_inode())
            if not known.isdisjoint(processes.namespaces(pid)):
                return
        except OSError as error:
            raise PolytmpError(f"the caller's mount namespace cannot be told: {in_words(error)}") from error
        raise NotPolyinstantiatedError(
            f"process {pid} lives in a mount namespace of its own; see PrivateTmp=, ProtectSystem= and such "
            "in its service"
        )

    async def _find_out(self, look: Callable[[Callable[[], bool]], T]) -> T:
        """What look(cancelled) returns, in a thread; cancelled() says that nobody waits for it any more.

        Ends when the thread does, a cancelled one as well: so there are never more at work than may be.
        """
        wanted = True

        def cancelled() -> bool:
            return not wanted or self._stopping.is_set()

        if self._stopping.is_set():
            raise PolytmpError(_STOPPING)
        work = asyncio.get_running_loop().run_in_executor(self._counters, look, cancelled)
        try:
            found = await asyncio.shield(work)
        finally:
            wanted = False
            await asyncio.wait((work,))
        if self._stopping.is_set():  # it may have ended half-way
            raise PolytmpError(_STOPPING)
        return found

    async def _name_of(self, uid: int) -> str:
        try:
            entry = await asyncio.wait_for(asyncio.to_thread(pwd.getpwuid, uid), NAME_LOOKUP_TIMEOUT)
        except KeyError:
            raise InvalidArgsError(f"there is no user with UID {uid} on this host") from None
        except TimeoutError:
            raise PolytmpError(
                f"the name of UID {uid} was not found out in {NAME_LOOKUP_TIMEOUT:.0f} s"
            ) from None
        return entry.pw_name

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        if self._stopping.is_set():
            task.cancel()
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("Internal error: %r", error, exc_info=error)


def _made(record: _Record) -> Instance:
    """The instance that an action is about, as it is when the action is decided."""
    if record.instance is None:
        raise RuntimeError(f"the instance of {record.user} was never made")
    return record.instance

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events in, actions out: feeds what happens to an instance to the lifecycle, and has its actions done.

Not here: who is here (presence), how an action is done (executor), what follows from what (core/lifecycle),
and answers to questions (questions).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from polytmpd.admission import Admission
from polytmpd.blocking import instances
from polytmpd.config import Config, Problem, unfit
from polytmpd.core.lifecycle import Action, Event, Standing, advance, visible_state
from polytmpd.core.model import Directory, Instance, InstanceDirectory, State, View
from polytmpd.core.policy import Claims
from polytmpd.core.views import Views
from polytmpd.errors import BusyError, ExemptError, InvalidArgsError, NoSuchInstanceError, PolytmpError
from polytmpd.executor.actions import Executor
from polytmpd.journal import MessageId, UserLog, fields
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.host import in_words
from polytmpd.presence import Presence
from polytmpd.tasks import Tasks

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Record:
    """All that is known about one user's instance."""

    uid: int
    user: str
    standing: Standing = field(default_factory=Standing)
    claims: Claims = field(default_factory=Claims)
    control_group: str = ""
    instance: Instance | None = None
    error: PolytmpError | None = None
    generation: int = 0
    """Distinguishes work for this instance from work for a former one."""
    waiting: list["asyncio.Future[Descriptor]"] = field(default_factory=list)

    @property
    def log(self) -> UserLog:
        return UserLog(log, self.uid, self.user)

    @property
    def made(self) -> Instance:
        """The instance that an action is about, as it is when the action is decided."""
        if self.instance is None:
            raise RuntimeError(f"the instance of {self.user} was never made")
        return self.instance

    def view(self, *, logind_answered: bool) -> View:
        """What is shown of it.

        Before logind has answered, what is held is active: nothing says that the user has left.
        """
        state = visible_state(self.standing, self.claims) if logind_answered else self.standing.state
        if self.instance is None:
            return View(self.uid, self.user, state, control_group=self.control_group)
        return View(
            self.uid,
            self.user,
            state,
            self.instance.created_usec,
            self.instance.created_monotonic_usec,
            self.control_group,
            self.instance.namespace,
            self.instance.directories,
        )


class Daemon:
    """One record for each user, and everything that happens to it."""

    def __init__(
        self,
        config: Config,
        load_config: Callable[[], tuple[Config, list[Problem]]],
        executor: Executor,
        presence: Presence,
        admission: Admission,
        views: Views,
    ) -> None:
        self._config = config
        self._load_config = load_config
        self._executor = executor
        self._presence = presence
        self._admission = admission
        self._views = views
        self._records: dict[int, _Record] = {}
        self._tasks = Tasks()
        presence.follow(self)
        executor.follow(self.namespace_ended, self.instance_changed)

    async def start(self) -> None:
        """Take over what lives, delete leftovers, and follow events. Raises OSError, BusError."""
        restored = await self._executor.restore(self._config.directories)
        await self._executor.share_files(self._config.sharing)
        for standing, found in (
            (Standing(State.ACTIVE, claimed=True), restored.held),
            (Standing(State.DRAINING), restored.draining),
        ):
            for instance in found:
                record = self._record(instance.uid, instance.user)
                record.instance, record.standing = instance, standing
                self._publish(record)
        await self._presence.start()
        for instance in restored.draining:
            drained = self._records.get(instance.uid)
            if drained and drained.standing.state is State.DRAINING and drained.claims.claimed:
                self._feed(drained, Event.CLAIMED)  # the FD store was lost: hold it again
        self._executor.start()

    async def stop(self) -> None:
        """Begin nothing new, and cancel what is unfinished. Instances stay."""
        await self._presence.close()
        await self._admission.close()
        await self._tasks.close()
        await self._executor.close()

    # What happens

    def claims_changed(self, uid: int, user: str, claims: Claims) -> None:
        record = self._record(uid, user)
        record.claims = claims
        self._settle(record)

    def control_group_changed(self, uid: int, control_group: str) -> None:
        record = self._records[uid]
        record.control_group = control_group
        if uid in self._views:
            self._publish(record)

    def namespace_ended(self, uid: int) -> None:
        if uid in self._records:
            self._feed(self._records[uid], Event.NAMESPACE_ENDED)

    def instance_changed(self, instance: Instance) -> None:
        record = self._records.get(instance.uid)
        if record is not None and record.instance is not None:
            record.instance = replace(record.instance, directories=instance.directories)
            self._publish(record)

    # What is asked for

    async def admit(self, uid: int) -> str:
        """The user's name. Raises ExemptError if they keep the host's directories; PolytmpError."""
        if not self._admission.must_ask(uid) and (reason := self._admission.reason_at_once(uid)):
            raise ExemptError(reason)
        record = self._records.get(uid)
        user = record.user if record else await self._name_of(uid)
        if reason := await self._admission.reason(uid, user):
            raise ExemptError(reason)
        return user

    async def acquire(self, uid: int, user: str) -> Descriptor:
        """A descriptor of the namespace of a user, whom admit() has let in; the caller closes it.

        Makes the instance if necessary. Raises PolytmpError. Cancelling it does not stop that.
        """
        record = self._record(uid, user)
        look = self._presence.look(uid)
        future: asyncio.Future[Descriptor] = asyncio.get_running_loop().create_future()
        record.waiting.append(future)
        try:
            if record.claims.starting:  # the user's manager asks; from now on the slice shows it
                await asyncio.wait((look,))
            if not future.done():
                self._feed(record, Event.ACQUIRED)
            return await future
        except asyncio.CancelledError:  # by a caller that has left
            if not future.cancel() and not future.cancelled() and future.exception() is None:
                future.result().close()
            raise

    async def reload(self) -> None:
        """Read the configuration again, for new instances. Raises PolytmpError, and then changes nothing."""
        config, problems = await asyncio.to_thread(self._load_config)
        problems += await asyncio.to_thread(unfit, config.directories)
        if problems:
            for problem in problems:
                log.error("%s", problem.fault, extra=fields(MessageId.BAD_CONFIG))
            faults = "; ".join(problem.fault for problem in problems)
            raise InvalidArgsError(f"nothing was changed: {faults}")
        self._config = config
        self._admission.replace(config.exemptions)
        await self._executor.tell_age_cleaner(config.directories)
        await self._executor.share_files(config.sharing)
        log.info("Configuration reloaded; existing instances stay as they are")
        self._views.show_directories(config.paths)

    async def remove(self, uid: int, *, persistent: bool = False) -> None:
        """Remove what is left of a failed instance; with persistent, also what is kept between logins.

        Raises PolytmpError: BusyError if there is an instance in use.
        """
        record = self._records.get(uid)
        view = self._views.get(uid)
        if view is not None and view.state is not State.FAILED:
            raise BusyError(f"the instance of {view.user} is {view.state}")
        if view is None and not persistent:
            raise NoSuchInstanceError.of(uid)
        try:
            if persistent:
                removed = await self._executor.remove_persistent(uid, self._config.directories)
                if not removed and view is None:
                    raise NoSuchInstanceError(f"UID {uid} has no instance, and no files are kept for it")
            if record is None or self._records.get(uid) is not record:
                return
            if record.standing.state is not State.FAILED:
                return
            generation = record.generation
            if record.instance is not None:
                await self._executor.remove(record.instance)
        except OSError as error:
            raise PolytmpError(f"failed to delete everything: {in_words(error)}") from error
        if self._records.get(uid) is record and record.generation == generation:
            self._feed(record, Event.UNCLAIMED)

    async def kept(self, uid: int) -> tuple[InstanceDirectory, ...]:
        """What is kept for a user between instances."""
        return await asyncio.to_thread(instances.kept, uid, self._config.directories)

    # The lifecycle

    def _settle(self, record: _Record) -> None:
        is_held = record.standing.state in {State.PREPARING, State.ACTIVE}
        claimed = record.claims.claimed if is_held else record.claims.calls
        if not claimed and record.standing.state is State.FAILED and record.instance is not None:
            return  # files are left: show it until remove() is called or a login comes
        self._feed(record, Event.CLAIMED if claimed else Event.UNCLAIMED)

    def _feed(self, record: _Record, event: Event) -> None:
        before = record.standing
        record.standing, actions = advance(before, event)
        if record.standing != before:
            record.log.debug("UID %d: %s, %s → %s", record.uid, event.name, before, record.standing)
        for action in actions:
            self._perform(record, action)
        if record.standing.state is not State.ABSENT:
            self._publish(record)
        elif not record.waiting and not record.claims.claimed:
            del self._records[record.uid]
            self._presence.forget(record.uid)

    def _perform(self, record: _Record, action: Action) -> None:
        match action:
            case Action.PREPARE:
                record.generation += 1
                prepare = partial(self._prepare, record, self._config.directories)
                self._tasks.start(self._make(record, prepare, Event.PREPARE_FAILED))
            case Action.REJOIN:
                rejoin = partial(self._rejoin, record.made)
                self._tasks.start(self._make(record, rejoin, Event.REJOIN_FAILED))
            case Action.HAND_OVER:
                self._hand_over(record)
            case Action.REFUSE:
                self._refuse(record)
            case Action.LET_GO:
                self._executor.let_go(record.uid)
            case Action.REMOVE:
                self._tasks.start(self._remove(record, record.made, record.generation))
            case Action.FORGET:
                record.instance = None
                self._views.hide(record.uid)

    async def _prepare(self, record: _Record, directories: Sequence[Directory]) -> Instance:
        uid = record.uid
        user = await self._admission.find_name(uid) or record.user  # logind may still have a former name

        async def is_former(name: str) -> bool:
            return await self._admission.is_former(name, uid, user)

        return await self._executor.prepare(uid, user, directories, is_former)

    async def _rejoin(self, instance: Instance) -> Instance:
        """Not if the UID belongs to another user now, and the former user's instance lives on."""
        uid, user = instance.uid, instance.user
        present = await self._admission.find_name(uid) or user
        if await self._admission.is_former(user, uid, present):
            text = f"the instance of {user}, a former user of UID {uid}, is still in use"
            raise PolytmpError(f"{text}; end its processes, see: polytmpctl ps {uid}")
        return await self._executor.rejoin(instance)

    async def _make(self, record: _Record, make: Callable[[], Awaitable[Instance]], failed: Event) -> None:
        """Prepare or rejoin, while systemd is asked for the user's slice."""
        look = self._presence.look(record.uid)
        try:
            instance = await make()
        except Exception as error:  # a login waits for an answer, even to "can't start new thread"
            self._failed(record, error, failed)
            if failed is Event.REJOIN_FAILED and self._executor.has_ended(record.uid):
                self._feed(record, Event.NAMESPACE_ENDED)  # meanwhile
        else:
            await asyncio.wait((look,))
            self._prepared(record, instance)

    def _prepared(self, record: _Record, instance: Instance) -> None:
        for other in self._records.values():
            # The kernel reused the inode number. The instance that is still shown with it is being deleted,
            # or is mounted elsewhere: it no longer has a namespace.
            if other is not record and other.instance and other.instance.namespace == instance.namespace:
                other.instance = replace(other.instance, namespace=0)
                self._publish(other)
        record.instance = instance
        record.error = None
        self._settle(record)
        self._feed(record, Event.PREPARED)

    def _failed(self, record: _Record, error: Exception, event: Event) -> None:
        record.log.error(
            "Failed to make private directories for user %s: %s",
            record.user,
            in_words(error),
            exc_info=None if isinstance(error, OSError | PolytmpError) else error,
            extra=fields(MessageId.PREPARE_FAILED),
        )
        record.error = PolytmpError(f"failed to make the instance: {in_words(error)}")
        self._feed(record, event)

    def _hand_over(self, record: _Record) -> None:
        waiting, record.waiting = record.waiting, []
        for future in waiting:
            if future.done():
                continue
            try:
                future.set_result(self._executor.hand_over(record.uid))
            except OSError as error:
                future.set_exception(PolytmpError(f"failed to hand over the namespace: {in_words(error)}"))
        if waiting:
            record.claims = self._presence.acquired(record.uid)

    def _refuse(self, record: _Record) -> None:
        waiting, record.waiting = record.waiting, []
        for future in waiting:
            if not future.done():
                future.set_exception(record.error or PolytmpError("failed to make the instance"))

    async def _remove(self, record: _Record, instance: Instance, generation: int) -> None:
        event = Event.REMOVED
        try:
            await self._executor.remove(instance)
        except OSError as error:
            event = Event.REMOVE_FAILED
            record.log.error(
                "Failed to delete the instance of user %s: %s. Retry with: polytmpctl remove %s",
                instance.user,
                in_words(error),
                instance.user,
                extra=fields(MessageId.REMOVE_FAILED),
            )
        if self._records.get(record.uid) is record and record.generation == generation:
            self._feed(record, event)

    # Within

    def _record(self, uid: int, user: str) -> _Record:
        record = self._records.get(uid)
        if record is None:
            record = self._records[uid] = _Record(uid, user)
            self._presence.watch(uid, user)
        return record

    def _publish(self, record: _Record) -> None:
        view = record.view(logind_answered=self._presence.logind_answered)
        self._views.show(view)

    async def _name_of(self, uid: int) -> str:
        found = await self._admission.find_name(uid)
        if found is None:
            raise InvalidArgsError(f"there is no user with UID {uid} on this host")
        return found

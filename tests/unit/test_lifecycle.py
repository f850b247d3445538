# SPDX-License-Identifier: LGPL-2.1-or-later
"""The life of an instance: each row of the table, and the table against a small world.

The world below performs actions as daemon.py does. It stands for an executor that finishes at any time, a
kernel that ends a namespace when no process holds it, and a logind that sends anything.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from polytmpd.core.lifecycle import TABLE, Action, Event, IllegalEventError, Standing, advance
from polytmpd.core.model import State
from polytmpd.core.policy import Claims

pytestmark = pytest.mark.unit

A, P, V, D, R, F = State.ABSENT, State.PREPARING, State.ACTIVE, State.DRAINING, State.REMOVING, State.FAILED

# (state, claimed before, event) → (state, claimed after, actions): every row, written out by hand.
ROWS: list[tuple[State, bool, Event, State, bool, list[Action]]] = [
    (A, False, Event.CLAIMED, P, True, [Action.PREPARE]),
    (A, False, Event.UNCLAIMED, A, False, []),
    (A, False, Event.ACQUIRED, P, False, [Action.PREPARE]),
    (A, True, Event.ACQUIRED, P, True, [Action.PREPARE]),
    (A, False, Event.NAMESPACE_ENDED, A, False, []),
    (P, False, Event.CLAIMED, P, True, []),
    (P, True, Event.UNCLAIMED, P, False, []),
    (P, False, Event.ACQUIRED, P, False, []),
    (P, True, Event.PREPARED, V, True, [Action.HAND_OVER]),
    (P, False, Event.PREPARED, D, False, [Action.HAND_OVER, Action.LET_GO]),
    (P, True, Event.PREPARE_FAILED, F, True, [Action.REFUSE]),
    (P, False, Event.PREPARE_FAILED, A, False, [Action.REFUSE, Action.FORGET]),
    (P, True, Event.NAMESPACE_ENDED, P, True, []),
    (P, True, Event.REJOIN_FAILED, D, True, [Action.REFUSE]),
    (V, True, Event.CLAIMED, V, True, []),
    (V, True, Event.UNCLAIMED, D, False, [Action.LET_GO]),
    (V, True, Event.ACQUIRED, V, True, [Action.HAND_OVER]),
    (V, True, Event.NAMESPACE_ENDED, V, True, []),
    (D, False, Event.CLAIMED, P, True, [Action.REJOIN]),
    (D, False, Event.UNCLAIMED, D, False, []),
    (D, False, Event.ACQUIRED, P, False, [Action.REJOIN]),
    (D, False, Event.NAMESPACE_ENDED, R, False, [Action.REMOVE]),
    (R, False, Event.CLAIMED, P, True, [Action.FORGET, Action.PREPARE]),
    (R, False, Event.UNCLAIMED, R, False, []),
    (R, False, Event.ACQUIRED, P, False, [Action.FORGET, Action.PREPARE]),
    (R, False, Event.NAMESPACE_ENDED, R, False, []),
    (R, False, Event.REMOVED, A, False, [Action.FORGET]),
    (R, False, Event.REMOVE_FAILED, F, False, []),
    (F, True, Event.CLAIMED, P, True, [Action.FORGET, Action.PREPARE]),
    (F, True, Event.UNCLAIMED, A, False, [Action.FORGET]),
    (F, True, Event.ACQUIRED, P, True, [Action.FORGET, Action.PREPARE]),
    (F, False, Event.ACQUIRED, P, False, [Action.FORGET, Action.PREPARE]),
    (F, False, Event.NAMESPACE_ENDED, F, False, []),
]


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row[0]}-{'claimed' if row[1] else 'free'}-{row[2].name}"
)
def test_row(row: tuple[State, bool, Event, State, bool, list[Action]]) -> None:
    state, claimed, event, after, claimed_after, actions = row
    assert advance(Standing(state, claimed), event) == (Standing(after, claimed_after), tuple(actions))


def test_every_row_is_tested() -> None:
    assert {(state, event) for state, _, event, *_ in ROWS} == set(TABLE)


@pytest.mark.parametrize("claimed", [True, False])
@pytest.mark.parametrize(
    ("state", "event"), [(s, e) for s in State for e in Event if (s, e) not in TABLE], ids=str
)
def test_an_illegal_event_raises_and_changes_nothing(state: State, event: Event, claimed: bool) -> None:
    standing = Standing(state, claimed)
    with pytest.raises(IllegalEventError, match=event.name):
        advance(standing, event)
    assert standing == Standing(state, claimed)


def test_events_from_outside_are_never_illegal() -> None:
    """Users and logins come and go in every state. Only the executor's events can be illegal."""
    for state in State:
        for event in (Event.CLAIMED, Event.UNCLAIMED, Event.ACQUIRED):
            assert (state, event) in TABLE


@dataclass
class Namespace:
    """Its directories, and the processes in it: name → whether in the user's slice."""

    directories: int
    processes: dict[str, bool] = field(default_factory=dict)
    logins: set[int] = field(default_factory=set)
    ended: bool = False


class World(RuleBasedStateMachine):
    """One user. Each rule may happen at any time. _feed and _perform work like daemon.py's."""

    rejoin_may_fail = False

    def __init__(self) -> None:
        super().__init__()
        self.standing, self.claims = Standing(), Claims()
        self.shown = False
        self.generation = 0
        self.directories: int | None = None  # of the recorded instance
        self.waiting: list[int] = []
        self.answers: dict[int, str] = {}
        self.logins = 0
        # The executor: its pending requests in order, its running deletions, and what it holds.
        self.asked: list[tuple[Action, int, int]] = []
        self.deleting: list[tuple[int, int]] = []
        self.held: int | None = None
        self.on_disk: set[int] = set()
        self.left: set[int] = set()
        self.made = 0
        # The kernel: namespaces by number, which is also the number of the sentinel's watch.
        self.namespaces: dict[int, Namespace] = {}
        self.watches: set[int] = set()
        self.unmounts: list[int] = []

    # The daemon

    def _feed(self, event: Event) -> None:
        self.standing, actions = advance(self.standing, event)
        for action in actions:
            self._perform(action)
        if self.standing.state is not State.ABSENT:
            self.shown = True

    def _perform(self, action: Action) -> None:
        match action:
            case Action.PREPARE:
                self.generation += 1
                self.asked.append((action, 0, self.generation))
            case Action.REJOIN:
                assert self.directories is not None
                self.asked.append((action, self.directories, self.generation))
            case Action.HAND_OVER:
                assert self.held is not None
                for login in self.waiting:
                    self._answer(login, "handed over")
                    self.namespaces[self.held].logins.add(login)
                if self.waiting:
                    self.claims = self.claims.with_acquisition()
                self.waiting = []
            case Action.REFUSE:
                for login in self.waiting:
                    self._answer(login, "refused")
                self.waiting = []
            case Action.LET_GO:
                assert self.held is not None, "released a namespace that is not held"
                self.held = None
                self._kernel()
            case Action.REMOVE:
                assert self.directories is not None
                assert all(n.ended for n in self.namespaces.values() if n.directories == self.directories)
                self.asked.append((action, self.directories, self.generation))
            case Action.FORGET:
                assert self.shown, "hid an instance that was not shown"
                self.shown = False
                self.directories = None

    def _answer(self, login: int, answer: str) -> None:
        assert login not in self.answers
        self.answers[login] = answer

    def _settle(self) -> None:
        self._feed(Event.CLAIMED if self.claims.claimed else Event.UNCLAIMED)

    # The executor

    def _hold(self, number: int) -> None:
        assert self.held is None, "two namespaces of one user are held"
        assert not self.namespaces[number].ended
        self.held = number
        self.directories = self.namespaces[number].directories
        self._feed(Event.PREPARED)

    def _make_namespace(self, directories: int) -> int:
        self.made += 1
        self.namespaces[self.made] = Namespace(directories)
        self.watches.add(self.made)
        return self.made

    def _do_next(self, fails: bool, found: bool) -> None:
        action, directories, generation = self.asked.pop(0)
        if action is Action.REMOVE:
            self.watches.clear()
            self.deleting.append((directories, generation))
        elif action is Action.PREPARE:
            if fails:
                self._feed(Event.PREPARE_FAILED)
                return
            self.made += 1
            self.on_disk.add(self.made)
            self._hold(self._make_namespace(self.made))
        else:
            living = [
                number
                for number, namespace in self.namespaces.items()
                if namespace.directories == directories and not namespace.ended
            ]
            known = [number for number in living if self.namespaces[number].processes]
            if known or (living and found):
                self._hold((known or living)[-1])
            elif fails and self.rejoin_may_fail:
                self._feed(Event.REJOIN_FAILED)
                if not living:
                    self._feed(Event.NAMESPACE_ENDED)
            else:
                self._hold(self._make_namespace(directories))

    def _deleted(self, directories: int, generation: int, fails: bool) -> None:
        self.deleting.remove((directories, generation))
        assert all(n.ended for n in self.namespaces.values() if n.directories == directories)
        self.on_disk.discard(directories)
        if fails:
            self.left.add(directories)
        if generation == self.generation:
            self._feed(Event.REMOVE_FAILED if fails else Event.REMOVED)

    # The kernel

    def _kernel(self) -> None:
        for number, namespace in self.namespaces.items():
            if (
                number != self.held
                and not namespace.processes
                and not namespace.logins
                and not namespace.ended
            ):
                namespace.ended = True
                self.unmounts.append(number)

    def _told_of_unmount(self) -> None:
        number = self.unmounts.pop(0)
        if number in self.watches:
            self.watches.discard(number)
            if not self.watches and (self.standing.state is not State.ABSENT or self.waiting):
                self._feed(Event.NAMESPACE_ENDED)

    def _in_slice(self) -> bool:
        return any(in_slice for n in self.namespaces.values() for in_slice in n.processes.values())

    def _slice_says(self, populated: bool) -> None:
        if self.claims.populated != populated and (self.claims.claimed or self.standing.state is not A):
            self.claims = self.claims.with_slice(populated=populated)
            self._settle()

    # Rules

    @rule()
    def user_new(self) -> None:
        self.claims = self.claims.with_user()
        self._settle()

    @rule()
    def user_removed(self) -> None:
        self.claims = self.claims.without_user()
        self._settle()

    @rule(name=st.sampled_from("ab"))
    def session_new(self, name: str) -> None:
        self.claims = self.claims.with_session(name)
        self._settle()

    @rule(name=st.sampled_from("ab"))
    def session_removed(self, name: str) -> None:
        if name in self.claims.sessions:
            self.claims = self.claims.without_session(name)
            self._settle()

    @rule()
    def slice_reports(self) -> None:
        self._slice_says(self._in_slice())

    @rule(populated=st.booleans())
    def slice_of_other_processes_reports(self, populated: bool) -> None:
        self._slice_says(populated)

    @rule()
    def login_asks(self) -> None:
        self.logins += 1
        self.waiting.append(self.logins)
        self._feed(Event.ACQUIRED)

    @precondition(lambda self: self.asked)
    @rule(fails=st.booleans(), found=st.booleans())
    def executor_does(self, fails: bool, found: bool) -> None:
        self._do_next(fails, found)

    @precondition(lambda self: self.deleting)
    @rule(data=st.data(), fails=st.booleans())
    def deletion_ends(self, data: st.DataObject, fails: bool) -> None:
        self._deleted(*data.draw(st.sampled_from(self.deleting)), fails)

    @precondition(lambda self: self.unmounts)
    @rule()
    def unmount_is_told(self) -> None:
        self._told_of_unmount()

    @precondition(lambda self: any(n.logins for n in self.namespaces.values()))
    @rule(data=st.data(), becomes=st.sampled_from(["in slice", "elsewhere", "nothing"]))
    def login_goes_on(self, data: st.DataObject, becomes: str) -> None:
        choices = [(number, login) for number, n in self.namespaces.items() for login in sorted(n.logins)]
        number, login = data.draw(st.sampled_from(choices))
        if becomes != "nothing":
            self.namespaces[number].processes[f"p{login}"] = becomes == "in slice"
        self.namespaces[number].logins.discard(login)
        self._kernel()

    @precondition(lambda self: any(n.processes for n in self.namespaces.values()))
    @rule(data=st.data())
    def process_ends(self, data: st.DataObject) -> None:
        choices = [(number, name) for number, n in self.namespaces.items() for name in sorted(n.processes)]
        number, name = data.draw(st.sampled_from(choices))
        del self.namespaces[number].processes[name]
        self._kernel()

    # Invariants

    @invariant()
    def active_is_held_and_nothing_else_is(self) -> None:
        assert (self.held is not None) is (self.standing.state is State.ACTIVE)

    @invariant()
    def what_is_there_is_shown(self) -> None:
        assert self.shown is (self.standing.state is not State.ABSENT)

    @invariant()
    def who_waits_will_be_answered(self) -> None:
        assert not self.waiting or self.standing.state is State.PREPARING
        assert self.standing.state is not State.PREPARING or self.asked

    @invariant()
    def nobody_lives_over_what_is_deleted(self) -> None:
        for namespace in self.namespaces.values():
            assert namespace.ended or namespace.directories in self.on_disk

    def teardown(self) -> None:
        """All users leave, and everything that has begun ends."""
        for namespace in self.namespaces.values():
            namespace.processes.clear()
            namespace.logins.clear()
        self._kernel()
        self.claims = Claims()
        self._settle()
        for _ in range(1000):
            if self.asked:
                self._do_next(fails=False, found=True)
            elif self.unmounts:
                self._told_of_unmount()
            elif self.deleting:
                self._deleted(*self.deleting[0], fails=False)
            else:
                break
            for namespace in self.namespaces.values():
                namespace.logins.clear()
            self._kernel()
        assert self.standing == Standing()
        assert not self.shown
        assert self.held is None
        assert all(namespace.ended for namespace in self.namespaces.values())
        assert self.on_disk == set(), "nothing is left on disk"
        assert set(self.answers) == set(range(1, self.logins + 1))


class FailingWorld(World):
    """A draining namespace cannot be joined again, and rebuilding it fails."""

    rejoin_may_fail = True


SETTINGS = settings(max_examples=300, stateful_step_count=40, deadline=None)


def test_world() -> None:
    run_state_machine_as_test(World, settings=SETTINGS)


def test_world_with_failing_rejoins() -> None:
    run_state_machine_as_test(FailingWorld, settings=settings(SETTINGS, phases=[Phase.generate]))

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The life of one user's instance, as a table: (state, event) → (next state, actions).

This table is the specification: the tests go through all of it, and the diagram in docs/ARCHITECTURE.md is
checked against it.
Not here: how an event is found out, how an action is done.

An instance is *claimed* while something says that the user is here: a session, processes in his slice, his
manager that starts. An ACTIVE instance holds a descriptor of its namespace, so that sessions can join.
Unclaimed, it lets the descriptor go and drains: from then on the kernel alone decides, by the end of the
namespace, when nobody is left.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final

from polytmpd.core.model import State
from polytmpd.core.policy import Claims


class Event(Enum):
    """What happens to an instance."""

    CLAIMED = auto()
    """The user is here: logind knows a session, or his slice has processes."""
    UNCLAIMED = auto()
    """No session, and no process in the slice."""
    ACQUIRED = auto()
    """A login asks for the namespace, and waits."""
    PREPARED = auto()
    """The namespace is ready and its descriptor held."""
    PREPARE_FAILED = auto()
    """It could not be made; nothing is left of the attempt."""
    REJOIN_FAILED = auto()
    """The draining namespace could not be held again; whoever lives in it lives on."""
    NAMESPACE_ENDED = auto()
    """The kernel reported the end of the namespace: no process, no descriptor holds it."""
    REMOVED = auto()
    """The directories are gone."""
    REMOVE_FAILED = auto()
    """Something is left on disk."""


class Action(Enum):
    """What the executor has to do, in the order given."""

    PREPARE = auto()
    """Make directories and namespace."""
    REJOIN = auto()
    """Get hold of the draining namespace again."""
    HAND_OVER = auto()
    """Answer every login that waits with the descriptor."""
    REFUSE = auto()
    """Answer every login that waits with the error."""
    LET_GO = auto()
    """Close the descriptor, in the FD store too."""
    REMOVE = auto()
    """Rename the directories aside and delete them."""
    FORGET = auto()
    """Nothing is left to show of this instance."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where an instance stands."""

    state: State = State.ABSENT
    claimed: bool = False


Row = tuple[State, tuple[Action, ...]]

TABLE: Final[dict[tuple[State, Event], Row]] = {
    (State.ABSENT, Event.CLAIMED): (State.PREPARING, (Action.PREPARE,)),
    (State.ABSENT, Event.UNCLAIMED): (State.ABSENT, ()),
    (State.ABSENT, Event.ACQUIRED): (State.PREPARING, (Action.PREPARE,)),
    # One that nobody waited for any more.
    (State.ABSENT, Event.NAMESPACE_ENDED): (State.ABSENT, ()),
    (State.PREPARING, Event.CLAIMED): (State.PREPARING, ()),
    (State.PREPARING, Event.UNCLAIMED): (State.PREPARING, ()),
    (State.PREPARING, Event.ACQUIRED): (State.PREPARING, ()),
    (State.PREPARING, Event.PREPARED): (State.ACTIVE, (Action.HAND_OVER,)),
    (State.PREPARING, Event.PREPARE_FAILED): (State.FAILED, (Action.REFUSE,)),
    (State.PREPARING, Event.REJOIN_FAILED): (State.DRAINING, (Action.REFUSE,)),
    # A namespace that ends while it is joined again: the executor sees it and makes a new one over the same
    # files.
    (State.PREPARING, Event.NAMESPACE_ENDED): (State.PREPARING, ()),
    (State.ACTIVE, Event.CLAIMED): (State.ACTIVE, ()),
    (State.ACTIVE, Event.UNCLAIMED): (State.ACTIVE, ()),
    (State.ACTIVE, Event.ACQUIRED): (State.ACTIVE, (Action.HAND_OVER,)),
    # The descriptor that an active instance holds keeps the namespace: this can only be the end of an
    # earlier one.
    (State.ACTIVE, Event.NAMESPACE_ENDED): (State.ACTIVE, ()),
    (State.DRAINING, Event.CLAIMED): (State.PREPARING, (Action.REJOIN,)),
    (State.DRAINING, Event.UNCLAIMED): (State.DRAINING, ()),
    (State.DRAINING, Event.ACQUIRED): (State.PREPARING, (Action.REJOIN,)),
    (State.DRAINING, Event.NAMESPACE_ENDED): (State.REMOVING, (Action.REMOVE,)),
    # The old directories were renamed aside: a login gets a new instance at once and does not wait for the
    # deletion.
    (State.REMOVING, Event.CLAIMED): (State.PREPARING, (Action.FORGET, Action.PREPARE)),
    (State.REMOVING, Event.UNCLAIMED): (State.REMOVING, ()),
    (State.REMOVING, Event.ACQUIRED): (State.PREPARING, (Action.FORGET, Action.PREPARE)),
    (State.REMOVING, Event.NAMESPACE_ENDED): (State.REMOVING, ()),
    (State.REMOVING, Event.REMOVED): (State.ABSENT, (Action.FORGET,)),
    (State.REMOVING, Event.REMOVE_FAILED): (State.FAILED, ()),
    (State.FAILED, Event.CLAIMED): (State.PREPARING, (Action.FORGET, Action.PREPARE)),
    (State.FAILED, Event.UNCLAIMED): (State.ABSENT, (Action.FORGET,)),
    (State.FAILED, Event.ACQUIRED): (State.PREPARING, (Action.FORGET, Action.PREPARE)),
    (State.FAILED, Event.NAMESPACE_ENDED): (State.FAILED, ()),
}
"""What is not in the table is illegal and raises: an executor that reports what it was not asked for."""


def visible_state(standing: Standing, claims: Claims) -> State:
    """The state that the world is told: where nobody is logged in any more, an instance drains.

    Processes in the slice may still hold it, as a lingering user's do, and sessions still join it.
    """
    if standing.state is State.ACTIVE and not claims.present:
        return State.DRAINING
    return standing.state


class IllegalEventError(Exception):
    """The event has no place in this state; nothing changed."""


def advance(standing: Standing, event: Event) -> tuple[Standing, tuple[Action, ...]]:
    """The next standing and what has to be done. Raises IllegalEventError and changes nothing."""
    try:
        state, actions = TABLE[standing.state, event]
    except KeyError:
        raise IllegalEventError(f"{event.name} in state {standing.state}") from None
    claimed = {Event.CLAIMED: True, Event.UNCLAIMED: False}.get(event, standing.claimed)
    if state is State.ACTIVE and not claimed:
        # Nobody but the logins just answered: they hold the descriptor by themselves now.
        state, actions = State.DRAINING, (*actions, Action.LET_GO)
    elif state is State.FAILED and not claimed and event is Event.PREPARE_FAILED:
        state, actions = State.ABSENT, (*actions, Action.FORGET)
    return replace(standing, state=state, claimed=claimed), actions

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The life of one user's instance, as a table: (state, event) → (next state, actions).

This table is the specification: the tests go through all of it, and the diagram in docs/lifecycle.md is
checked against it.
Not here: how an event is noticed, how an action is done.

An instance is *claimed* while something says that the user is here: a session, processes in their slice,
their service manager starting. An ACTIVE instance holds a descriptor of its namespace, so that sessions can
join. An unclaimed one closes it and drains: from then on the kernel alone decides when no process is left,
by ending the namespace.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final

from polytmpd.core.model import State
from polytmpd.core.policy import Claims


class Event(Enum):
    """What happens to an instance."""

    CLAIMED = auto()
    """The user is here: logind knows a session, or the slice has processes."""
    UNCLAIMED = auto()
    """No session, and no process in the slice."""
    ACQUIRED = auto()
    """A login asks for the namespace, and waits."""
    PREPARED = auto()
    """The namespace is ready and its descriptor is held."""
    PREPARE_FAILED = auto()
    """The namespace could not be made. Nothing is left of the attempt."""
    REJOIN_FAILED = auto()
    """The draining namespace could not be held again. The processes in it live on."""
    NAMESPACE_ENDED = auto()
    """The kernel reported the end of the namespace: no process and no descriptor holds it."""
    REMOVED = auto()
    """The directories are gone."""
    REMOVE_FAILED = auto()
    """Something is left on disk."""


class Action(Enum):
    """What the executor has to do, in the given order."""

    PREPARE = auto()
    """Make directories and namespace."""
    REJOIN = auto()
    """Hold the draining namespace again."""
    HAND_OVER = auto()
    """Answer every waiting login with the descriptor."""
    REFUSE = auto()
    """Answer every waiting login with the error."""
    LET_GO = auto()
    """Close the descriptor, also in the FD store."""
    REMOVE = auto()
    """Rename the directories aside and delete them."""
    FORGET = auto()
    """Stop showing this instance."""


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
    # The end of a namespace that is no longer of interest.
    (State.ABSENT, Event.NAMESPACE_ENDED): (State.ABSENT, ()),
    (State.PREPARING, Event.CLAIMED): (State.PREPARING, ()),
    (State.PREPARING, Event.UNCLAIMED): (State.PREPARING, ()),
    (State.PREPARING, Event.ACQUIRED): (State.PREPARING, ()),
    (State.PREPARING, Event.PREPARED): (State.ACTIVE, (Action.HAND_OVER,)),
    (State.PREPARING, Event.PREPARE_FAILED): (State.FAILED, (Action.REFUSE,)),
    (State.PREPARING, Event.REJOIN_FAILED): (State.DRAINING, (Action.REFUSE,)),
    # The namespace ends while it is being rejoined: the executor notices and makes a new one over the same
    # files.
    (State.PREPARING, Event.NAMESPACE_ENDED): (State.PREPARING, ()),
    (State.ACTIVE, Event.CLAIMED): (State.ACTIVE, ()),
    (State.ACTIVE, Event.UNCLAIMED): (State.ACTIVE, ()),
    (State.ACTIVE, Event.ACQUIRED): (State.ACTIVE, (Action.HAND_OVER,)),
    # The descriptor of an active instance keeps its namespace: this can only be the end of an earlier one.
    (State.ACTIVE, Event.NAMESPACE_ENDED): (State.ACTIVE, ()),
    (State.DRAINING, Event.CLAIMED): (State.PREPARING, (Action.REJOIN,)),
    (State.DRAINING, Event.UNCLAIMED): (State.DRAINING, ()),
    (State.DRAINING, Event.ACQUIRED): (State.PREPARING, (Action.REJOIN,)),
    (State.DRAINING, Event.NAMESPACE_ENDED): (State.REMOVING, (Action.REMOVE,)),
    # The old directories were renamed: a login gets a new instance at once and does not wait for the
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
"""Any other event is illegal and raises: the executor reported what it was not asked for."""


def visible_state(standing: Standing, claims: Claims) -> State:
    """The state to show: an instance drains once its user is no longer logged in.

    Processes in the slice may still hold it, such as those of a lingering user, and sessions still join it.
    """
    if standing.state is State.ACTIVE and not claims.present:
        return State.DRAINING
    return standing.state


class IllegalEventError(Exception):
    """The event has no place in this state; nothing changed."""


def advance(standing: Standing, event: Event) -> tuple[Standing, tuple[Action, ...]]:
    """The next standing and the actions to do. Raises IllegalEventError, and then changes nothing."""
    try:
        state, actions = TABLE[standing.state, event]
    except KeyError:
        raise IllegalEventError(f"{event.name} in state {standing.state}") from None
    claimed = {Event.CLAIMED: True, Event.UNCLAIMED: False}.get(event, standing.claimed)
    if state is State.ACTIVE and not claimed:
        # Only the logins just answered wanted it, and they have their own descriptors now.
        state, actions = State.DRAINING, (*actions, Action.LET_GO)
    elif state is State.FAILED and not claimed and event is Event.PREPARE_FAILED:
        state, actions = State.ABSENT, (*actions, Action.FORGET)
    return replace(standing, state=state, claimed=claimed), actions

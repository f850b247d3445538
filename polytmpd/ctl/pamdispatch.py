# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libpam makes of a stack: which entries run, and whether the session is opened, for each value that
the modules may return.

Not here: which values they return (pamcheck.py).

Hard facts (libpam/pam_dispatch.c; tests/pamstacks.py asks the installed libpam):
- `done` (and so `sufficient`) ends the stack, but in a substack only the substack.
- A number skips that many entries of its own stack. A substack counts as one entry, and a jump does not
  leave it. A jump past the end fails the stack.
- In brackets, `default` covers all values that are not named, wherever it stands. It defaults to `bad`.
- An unknown control, or one mistake in brackets, makes every value `bad`.
- A stack in which every entry is ignored fails.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from polytmpd.ctl.pamstacks import SUBSTACK, Entry

VALUES: Final = (
    *(
        "success",
        "open_err",
        "symbol_err",
        "service_err",
        "system_err",
        "buf_err",
        "perm_denied",
        "auth_err",
    ),
    *("cred_insufficient", "authinfo_unavail", "user_unknown", "maxtries", "new_authtok_reqd"),
    *("acct_expired", "session_err", "cred_unavail", "cred_expired", "cred_err", "no_module_data"),
    *("conv_err", "authtok_err", "authtok_recover_err", "authtok_lock_busy", "authtok_disable_aging"),
    *("try_again", "ignore", "abort", "authtok_expired", "module_unknown", "bad_item", "conv_again"),
    "incomplete",
)
"""The return values of modules, as pam.d(5) names them."""
_ACTIONS: Final = ("ignore", "ok", "done", "bad", "die", "reset")
_SIMPLE: Final = {
    "required": {"success": "ok", "new_authtok_reqd": "ok", "ignore": "ignore", "default": "bad"},
    "requisite": {"success": "ok", "new_authtok_reqd": "ok", "ignore": "ignore", "default": "die"},
    "sufficient": {"success": "done", "new_authtok_reqd": "done", "default": "ignore"},
    "optional": {"success": "ok", "new_authtok_reqd": "ok", "default": "ignore"},
}
_ALL_BAD: Final = {"default": "bad"}
_UNDECIDED: Final = 0
_POSITIVE: Final = 1
_NEGATIVE: Final = -1


@dataclass(frozen=True, slots=True)
class Ending:
    """One way in which a stack can end.

    opened: libpam returns PAM_SUCCESS. reached: one of the wanted entries ran. by: the entry that skipped
    them or, if it was not opened, that refused; None if no entry did.
    """

    opened: bool
    reached: bool
    by: Entry | None = None


@dataclass(frozen=True, slots=True)
class _State:
    """Before the entry at `index`. saved: for each substack around it, how things stood at its beginning."""

    index: int = 0
    level: int = 0
    impression: int = _UNDECIDED
    success: bool = False
    saved: tuple[tuple[int, bool], ...] = ()
    reached: bool = False
    passed: int | None = None
    refused: int | None = None


def actions(control: str) -> dict[str, str]:
    """The action for each return value that the control names, and for `default`."""
    word = control.strip("[]").strip().lower()
    if word in _SIMPLE:
        return _SIMPLE[word]
    found: dict[str, str] = {}
    for pair in control.strip("[]").replace(" =", "=").replace("= ", "=").split():
        value, equals, action = pair.partition("=")
        number = action.isdecimal() and action.isascii() and int(action[:9]) > 0
        if not equals or value not in {*VALUES, "default"} or not (number or action in _ACTIONS):
            return _ALL_BAD
        if value != "default" or value not in found:
            found[value] = action
    return {"default": "bad", **found}


def action(control: str, value: str) -> str:
    found = actions(control)
    return found.get(value, found["default"])


def endings(
    entries: Sequence[Entry],
    returned: Callable[[Entry], Collection[str]],
    wanted: Callable[[Entry], bool] = lambda _: False,
) -> set[Ending]:
    """All ways in which a stack can end, if its modules return those values."""
    targets = [number for number, entry in enumerate(entries) if wanted(entry)]
    seen: set[_State] = set()
    left = [_State()]
    found: set[Ending] = set()
    while left:
        state = left.pop()
        if state in seen:
            continue
        seen.add(state)
        if state.index < len(entries):
            left += _steps(entries, state, returned, targets)
            continue
        opened = state.success and state.impression == _POSITIVE
        number = state.passed if opened else state.refused
        found.add(Ending(opened, state.reached, None if number is None else entries[number]))
    return found


def _steps(
    entries: Sequence[Entry],
    state: _State,
    returned: Callable[[Entry], Collection[str]],
    targets: Sequence[int],
) -> Iterator[_State]:
    number, entry = state.index, entries[state.index]
    saved = state.saved[: entry.depth]
    if entry.depth > state.level:
        saved += ((state.impression, state.success),) * (entry.depth - len(saved))
    state = replace(state, level=entry.depth, saved=saved)
    if entry.control == SUBSTACK:
        yield replace(state, index=number + 1)
        return
    if number in targets:
        state = replace(state, reached=True, passed=None)
    for value in dict.fromkeys(returned(entry)):
        does = action(entry.control, value)
        after, last = _act(entries, state, value, does)
        passed = not state.reached and any(number < target <= last for target in targets)
        yield replace(after, index=last + 1, passed=number if passed else after.passed)


def _act(entries: Sequence[Entry], state: _State, value: str, does: str) -> tuple[_State, int]:
    """The state after an action, and the last entry that it skips."""
    number = state.index
    good = state.impression == _UNDECIDED or (state.impression == _POSITIVE and state.success)
    if does == "reset":
        impression, success = state.saved[-1] if state.saved else (_UNDECIDED, False)
        return replace(state, impression=impression, success=success), number
    if does in {"ok", "done"}:
        if good:
            refused = state.refused if value == "success" else number
            state = replace(state, impression=_POSITIVE, success=value == "success", refused=refused)
        ends = does == "done" and state.impression == _POSITIVE
        return state, _end(entries, number) if ends else number
    if does in {"bad", "die"}:
        return _failed(state), _end(entries, number) if does == "die" else number
    if does == "ignore":
        return state, number
    last, missing = _jump(entries, number, int(does))
    return (_failed(state) if missing else state), last


def _failed(state: _State) -> _State:
    if state.impression == _NEGATIVE:
        return state
    refused = state.index if state.refused is None else state.refused
    return replace(state, impression=_NEGATIVE, success=False, refused=refused)


def _end(entries: Sequence[Entry], number: int) -> int:
    """The last entry of the stack or substack."""
    level = entries[number].depth
    while number + 1 < len(entries) and entries[number + 1].depth >= level:
        number += 1
    return number


def _jump(entries: Sequence[Entry], number: int, count: int) -> tuple[int, int]:
    """The last entry that is skipped, and how many are missing."""
    level = entries[number].depth
    while count and number + 1 < len(entries) and entries[number + 1].depth >= level:
        number += 1
        while number + 1 < len(entries) and entries[number + 1].depth > level:
            number += 1
        count -= 1
    return number, count

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who gets an instance, and what counts as a user's presence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytmpd.core.policy import Claims, Exemptions

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("uid", "name", "exempt"),
    [
        (0, "root", True),
        (999, "daemon", True),
        (1000, "first", False),
        (60000, "last", False),
        (60001, "above", True),
        (65534, "nobody", True),
        (4294967294, "x", True),
        (1001, "alice", True),
        (1002, "bob", True),
        (1003, "carol", False),
        (1001, None, False),
    ],
)
def test_who_is_exempt(uid: int, name: str | None, exempt: bool) -> None:
    exemptions = Exemptions(users=frozenset({"alice", "1002"}))
    assert (exemptions.reason(uid, name) is not None) is exempt


def test_reason_names_the_setting() -> None:
    exemptions = Exemptions(users=frozenset({"alice", "1002"}))
    assert "ExemptUsers=" in str(exemptions.reason(1001, "alice"))
    assert "ExemptUsers=" in str(exemptions.reason(1002, "bob"))
    assert "1000..60000" in str(exemptions.reason(999))


@given(st.integers(0, 1 << 32), st.integers(0, 1 << 32), st.frozensets(st.text(max_size=3)))
def test_root_is_never_moved(low: int, high: int, users: frozenset[str]) -> None:
    assert Exemptions(low, high, users).reason(0, "root")


def test_nothing_claims_nothing() -> None:
    assert not Claims().claimed


def test_starting_ends_when_the_manager_asks() -> None:
    """Before that, systemd makes /run/user/UID in the slice, which is then empty again for a moment."""
    claims = Claims().with_user().with_slice(populated=True).with_slice(populated=False)
    assert claims.claimed
    assert claims.present
    assert claims.with_acquisition().claimed, "a login, but not in the user's slice"
    seen = claims.with_slice(populated=True).with_acquisition()
    assert seen.claimed
    assert not seen.present
    assert not seen.with_slice(populated=False).claimed


def test_starting_ends_with_the_first_session() -> None:
    claims = Claims().with_user().with_session("1")
    assert claims.present
    assert not claims.without_session("1").claimed


def test_a_logged_in_user_is_not_starting() -> None:
    claims = Claims().with_session("1").with_user()
    assert not claims.without_session("1").claimed


def test_processes_outlive_the_user() -> None:
    claims = Claims().with_user().with_session("1").with_slice(populated=True).without_user()
    assert claims.claimed
    assert not claims.with_slice(populated=False).claimed


def test_a_session_is_claimed_once() -> None:
    claims = Claims().with_session("1").with_session("1").with_session("2")
    assert claims.without_session("1").claimed
    assert not claims.without_session("1").without_session("2").claimed
    assert claims.without_session("never") == claims


EVENTS = st.one_of(
    st.just(("user", "")),
    st.just(("no user", "")),
    st.tuples(st.sampled_from(["session", "no session"]), st.sampled_from(["1", "2"])),
    st.tuples(st.just("slice"), st.sampled_from(["yes", "no"])),
    st.just(("acquired", "")),
)


def told(claims: Claims, event: tuple[str, str]) -> Claims:
    match event:
        case "user", _:
            return claims.with_user()
        case "no user", _:
            return claims.without_user()
        case "session", name:
            return claims.with_session(name)
        case "no session", name:
            return claims.without_session(name)
        case "acquired", _:
            return claims.with_acquisition()
        case _, value:
            return claims.with_slice(populated=value == "yes")


@given(st.lists(EVENTS, max_size=30))
def test_a_user_who_left_claims_nothing(events: list[tuple[str, str]]) -> None:
    claims = Claims()
    for event in events:
        claims = told(claims, event)
    assert told(claims, ("slice", "yes")).claimed
    assert told(claims, ("session", "9")).claimed
    assert not claims.without_user().with_slice(populated=False).claimed

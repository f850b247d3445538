# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who gets an instance, and what counts as a user's presence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytmpd.core.policy import Claims, Exemptions, Facts, Need

pytestmark = pytest.mark.unit


NAMED = Exemptions(users=frozenset({"alice", "1002"}))


@pytest.mark.parametrize(
    ("uid", "name", "exempt"),
    [
        (0, "root", True),
        (999, "daemon", True),
        (1000, "first", False),
        (60000, "last", False),
        (60001, "homed", False),
        (60100, "homed", False),
        (60577, "bound", False),
        (60578, "greeter", True),
        (60705, "greeter", True),
        (60706, "unused", False),
        (61183, "unused", False),
        (61184, "dynamic", True),
        (64030, "slurm", True),
        (65519, "dynamic", True),
        (65520, "unused", False),
        (65534, "nobody", True),
        (65535, "none", True),
        (65536, "unused", False),
        (200001, "directory", False),
        (524287, None, False),
        (524288, None, True),
        (524288, "sssd", False),
        (1234567890, "sssd", False),
        (1234567890, None, True),
        (1879048191, None, True),
        (1879048192, None, False),
        (2147352575, "x", False),
        (2147352576, "foreign", True),
        (2147418111, "foreign", True),
        (2147418112, "x", False),
        (2147483646, "x", False),
        (2147483647, "x", True),
        (4294967000, "x", True),
        (4294967294, "x", True),
        (4294967295, "x", True),
        (1001, "alice", True),
        (1002, "bob", True),
        (1003, "carol", False),
        (1001, None, False),
    ],
)
def test_who_is_exempt(uid: int, name: str | None, exempt: bool) -> None:
    assert (NAMED.reason(uid, name) is not None) is exempt


def test_reason_names_the_setting() -> None:
    assert "ExemptUsers=" in str(NAMED.reason(1001, "alice"))
    assert "ExemptUsers=" in str(NAMED.reason(1002, "bob"))
    assert NAMED.reason(999) == "UID 999 is below UID_MIN 1000: a system user"
    assert NAMED.reason(64030) == "UID 64030 is in 61184..65519 (a dynamic or system user)"


@pytest.mark.parametrize("uid", [0, 999, 1000, 60000, 65534, 65535, 4294967295])
def test_an_ordinary_login_asks_nobody(uid: int) -> None:
    assert NAMED.need(uid, "x") is Need.NOTHING


@pytest.mark.parametrize("uid", [60001, 61184, 1234567890, 4294967294])
def test_other_numbers_are_looked_up(uid: int) -> None:
    assert NAMED.need(uid, "x") is Need.RECORD
    assert NAMED.need(uid, "alice") is Need.NOTHING
    assert Exemptions(regular=((1, 5),)).need(uid, "x") is Need.NOTHING


@pytest.mark.parametrize(
    ("uid", "facts", "exempt"),
    [
        (61184, Facts("regular"), False),
        (4294967000, Facts("regular"), False),
        (70000, Facts("system"), True),
        (70000, Facts("dynamic"), True),
        (600000, Facts("container"), True),
        (70000, Facts("regular"), False),
        (70000, Facts("something new"), True),
        (70000, Facts(dynamic=True), True),
        (70000, Facts(), False),
        (0, Facts("regular"), True),
        (65534, Facts("regular"), True),
    ],
)
def test_the_user_record_decides(uid: int, facts: Facts, exempt: bool) -> None:
    assert (Exemptions().reason(uid, "x", facts) is not None) is exempt


def test_ranges_replace_the_rule() -> None:
    exemptions = Exemptions(regular=((500, 600), (64030, 64030), (65534, 4294967294)))
    regular = [
        uid for uid in (0, 499, 500, 600, 601, 1000, 64030, 65534, 65535) if not exemptions.reason(uid)
    ]
    assert regular == [500, 600, 64030]
    assert exemptions.reason(1000) == "UID 1000 is not in RegularUIDs="
    assert exemptions.reason(4294967000) is None


@pytest.mark.parametrize(
    ("exempt", "only", "facts", "reason"),
    [
        ({"staff"}, set(), Facts(member_of=frozenset({"staff"})), "group staff is exempt"),
        ({"staff"}, set(), Facts(), None),
        ({"staff"}, set(), Facts(unknown=frozenset({"staff"})), None),
        (set(), {"staff"}, Facts(member_of=frozenset({"staff"})), None),
        (set(), {"staff"}, Facts(), "the user is in no group of OnlyGroups="),
        (set(), {"staff", "lab"}, Facts(unknown=frozenset({"lab"})), None),
        ({"lab"}, {"staff"}, Facts(member_of=frozenset({"staff", "lab"})), "group lab is exempt"),
    ],
)
def test_groups(exempt: set[str], only: set[str], facts: Facts, reason: str | None) -> None:
    """A group that is not known, or does not answer, exempts nobody."""
    exemptions = Exemptions(exempt_groups=frozenset(exempt), only_groups=frozenset(only))
    assert exemptions.need(1001, "alice") is Need.GROUPS
    assert exemptions.need(999, "daemon") is Need.NOTHING
    assert exemptions.need(70000, "far") == Need.GROUPS | Need.RECORD
    assert exemptions.reason(1001, "alice", facts) == reason


@given(st.integers(0, 1 << 32), st.frozensets(st.text(max_size=3)), st.integers(1, 1 << 32))
def test_root_is_never_moved(low: int, users: frozenset[str], high: int) -> None:
    assert Exemptions(low, users).reason(0, "root")
    assert Exemptions(low, users, ((0, high),)).reason(0, "root")


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


@pytest.mark.parametrize(
    ("uid", "facts", "unknown"),
    [
        (64030, Facts(silent=True), True),
        (4294967000, Facts(silent=True), True),
        (60600, Facts(silent=True), True),
        (64030, Facts(), False),
        (64030, Facts(silent=True, dynamic=True), False),
        (70000, Facts(silent=True), False),  # regular by number: private, whatever the record says
        (1234567890, Facts(silent=True), False),
        (999, Facts(silent=True), False),
        (65534, Facts(silent=True), False),
    ],
)
def test_no_answer_is_not_taken_for_an_exemption(uid: int, facts: Facts, unknown: bool) -> None:
    assert Exemptions().is_unknown(uid, facts) == unknown
    assert not Exemptions(regular=((1000, 2000),)).is_unknown(uid, facts)

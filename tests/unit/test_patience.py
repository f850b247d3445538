# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose time a search takes: asked only once it takes long, and added up whatever the pieces are."""

import errno
import itertools
import time

import pytest

from polytmpd.kernel import patience
from polytmpd.kernel.patience import Patience

pytestmark = pytest.mark.unit

MALLORY, ALICE = 1500, 1001


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def unknown() -> int:
    raise AssertionError("whose it is was asked")


def fail(error: int) -> None:
    raise OSError(error, "no")


def test_a_short_search_is_nobodys(clock: list[float]) -> None:
    limits = Patience(lambda: False)
    for _ in range(9):
        with limits.on_account_of(unknown) as is_over:
            clock[0] += patience.UNATTRIBUTED / 10
            assert not is_over()


@pytest.mark.parametrize("piece", [0.01, 0.3, 2.0])
def test_many_short_searches_are_as_long_as_one(clock: list[float], piece: float) -> None:
    limits = Patience(lambda: False)
    for _ in itertools.count():
        with limits.on_account_of(lambda: MALLORY) as is_over:
            clock[0] += piece
            if is_over():
                break
    spent = clock[0] - 100.0
    assert patience.SECONDS < spent <= patience.SECONDS + patience.UNATTRIBUTED + 2 * piece
    with limits.on_account_of(lambda: ALICE) as is_over:
        assert not is_over(), "another user has all of their time"


def test_root_and_those_searched_for_have_no_limit(clock: list[float]) -> None:
    limits = Patience(lambda: False, {ALICE})
    for user in (patience.ROOT, ALICE):
        with limits.on_account_of(lambda user=user: user) as is_over:  # type: ignore[misc]
            clock[0] += 1000
            assert not is_over()


def test_a_process_that_has_ended(clock: list[float]) -> None:
    """Nothing of it is left to search, and nothing was missed."""

    def gone() -> int:
        raise ProcessLookupError

    limits = Patience(lambda: False)
    with limits.on_account_of(gone) as is_over:
        clock[0] += 100
        assert is_over()
        fail(errno.ECANCELED)
    assert limits.unread == {}


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EACCES])
def test_what_may_concern_anyone_is_raised(error: int) -> None:
    limits = Patience(lambda: False)
    with pytest.raises(OSError), limits.on_account_of(lambda: patience.ROOT):  # noqa: PT011
        fail(error)
    with limits.on_account_of(lambda: MALLORY):
        fail(errno.EACCES)
    assert set(limits.unread) == {MALLORY}

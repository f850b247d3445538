# SPDX-License-Identifier: LGPL-2.1-or-later
"""What SharedPaths= shares: which names match, and which owners are trusted."""

import pytest

from polytmpd.core.policy import Exemptions
from polytmpd.core.sharing import LINKS, Sharing

pytestmark = pytest.mark.unit

SHARING = Sharing("/tmp", ("mysql.sock", ".s.PGSQL.*", "*.ctl", ".*"), Exemptions())


@pytest.mark.parametrize("name", ["mysql.sock", ".s.PGSQL.5432", ".s.PGSQL.5432.lock", "a.ctl", ".anything"])
def test_what_matches(name: str) -> None:
    assert SHARING.matches(name)


@pytest.mark.parametrize(
    "name", ["mysql.sock2", "other", ".X0-lock", LINKS, "polytmp-1000", "polytmp-removing-x.ctl"]
)
def test_what_does_not_match(name: str) -> None:
    assert not SHARING.matches(name)


def test_a_wildcard_does_not_match_a_leading_dot() -> None:
    assert not Sharing("/tmp", ("*.sock",)).matches(".hidden.sock")


def test_which_names_are_known_beforehand() -> None:
    assert SHARING.names == ("mysql.sock",)
    assert Sharing("/tmp", ("a", "b.sock")).names == ("a", "b.sock")
    assert Sharing().names == ()


@pytest.mark.parametrize("uid", [0, 33, 115, 999, 61184, 64030, 65519])
def test_root_and_system_users_are_trusted(uid: int) -> None:
    assert SHARING.objection_to_owner(uid) is None


@pytest.mark.parametrize(
    "uid", [1000, 1001, 60000, 60100, 65534, 65535, 100_000, 231_072, 524_288, 2**32 - 2]
)
def test_users_their_subordinates_and_nobody_are_not(uid: int) -> None:
    assert SHARING.objection_to_owner(uid) == f"owned by UID {uid}, which is neither root nor a system user"


def test_the_range_of_login_defs_counts() -> None:
    assert Sharing("/tmp", ("a",), Exemptions(uid_min=500)).objection_to_owner(700)


def test_whom_regular_uids_names_is_no_system_user() -> None:
    sharing = Sharing("/tmp", ("a",), Exemptions(regular=((500, 600), (64000, 64100))))
    assert sharing.objection_to_owner(550)
    assert sharing.objection_to_owner(64030)
    assert sharing.objection_to_owner(499) is None

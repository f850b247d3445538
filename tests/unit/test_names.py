# SPDX-License-Identifier: LGPL-2.1-or-later
"""The grammar of names: what is written is read back, and no other name is taken for polytmp's."""

import pytest

from polytmpd.core import names

pytestmark = pytest.mark.unit

BOOT_ID = "0123456789abcdef" * 2
RANDOM = "fedcba9876543210"


@pytest.mark.parametrize("uid", [0, 1000, 4294967294])
def test_names_round_trip(uid: int) -> None:
    assert names.owner(names.barrier(BOOT_ID, uid, RANDOM)) == uid
    assert names.owner(names.kept_barrier(uid)) == uid
    assert names.kept_owner(names.kept_barrier(uid)) == uid
    assert names.object_owner(names.object_path(uid)) == uid


def test_which_names_are_leftovers_at_start() -> None:
    assert names.is_leftover(names.barrier(BOOT_ID, 1000, RANDOM))
    assert names.is_leftover(names.removing(RANDOM))
    assert not names.is_leftover(names.kept_barrier(1000)), "it is kept between boots"
    assert not names.is_leftover(names.former(1000, RANDOM)), "root has to find it"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "polytmp-",
        "polytmp-x",
        "polytmp-1000 ",
        "polytmp-1000\n",
        "polytmp-12345678901",
        "polytmp-01000",  # polytmp writes no leading zeros
        names.barrier(BOOT_ID, 1000, RANDOM).replace("-1000-", "-01000-"),
        "polytmp-\u0661",  # a digit, but not an ASCII one
        names.removing(RANDOM),
        names.former(1000, RANDOM),
        names.barrier(BOOT_ID.upper(), 1000, RANDOM),
        names.barrier(BOOT_ID, 1000, RANDOM[1:]),
        names.barrier(BOOT_ID, -1, RANDOM),
        f"x{names.barrier(BOOT_ID, 1000, RANDOM)}",
    ],
)
def test_names_that_are_not_barriers(name: str) -> None:
    assert names.owner(name) is None
    assert names.kept_owner(name) is None


@pytest.mark.parametrize("number", ["", "x", "-1", "01000", "12345678901", "9" * 5000, "1000/x", "1000\n"])
def test_paths_that_are_not_instances(number: str) -> None:
    """A path may come from any caller. Python refuses to convert 5000 digits."""
    assert names.object_owner(f"/org/polytmp1/instance/_{number}") is None


def test_an_instance_that_ends_is_not_kept() -> None:
    assert names.kept_owner(names.barrier(BOOT_ID, 1000, RANDOM)) is None

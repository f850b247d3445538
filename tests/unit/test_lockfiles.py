# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which names are sockets and locks, and which data is a PID."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytmpd.displays.lockfiles import display_of_lock, display_of_socket, lock_name, parse_pid

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("name", "display"),
    [
        ("X0", 0),
        ("X7", 7),
        ("X65535", 65535),
        ("X65536", None),
        ("X99999", None),
        ("X100000", None),
        ("X07", None),
        ("X", None),
        ("X-1", None),
        ("X+1", None),
        ("X1_0", None),
        ("X7\n", None),
        ("X\u0667", None),
        ("x7", None),
        ("X7.1", None),
        (" X7", None),
    ],
)
def test_the_name_of_a_socket(name: str, display: int | None) -> None:
    assert display_of_socket(name) == display


@given(st.integers(0, 65535))
def test_the_name_of_a_lock(display: int) -> None:
    assert display_of_lock(lock_name(display)) == display
    assert "/" not in lock_name(display)


@pytest.mark.parametrize(
    ("content", "pid"),
    [
        (b"       155\n", 155),
        (b"         1\n", 1),
        (b"2147483647\n", 2147483647),
        (b"155", 155),
        (b"155\r\n", 155),
        (b"2147483648\n", None),
        (b"9999999999\n", None),
        (b"         0\n", None),
        (b"        -1\n", None),
        (b"        +1\n", None),
        (b"", None),
        (b"\n", None),
        (b"      0x1f\n", None),
        (b"       1 2\n", None),
        (b"       1_2\n", None),
        (b"       155\0\n", None),
        ("       \u0661\u0665\u0665\n".encode(), None),
        (b"rm -rf /\n", None),
        (b"      155       \n", None),  # 17 bytes
    ],
)
def test_the_pid_in_a_lock(content: bytes, pid: int | None) -> None:
    assert parse_pid(content) == pid


@given(st.binary(max_size=32))
def test_the_result_is_a_positive_pid_or_none(content: bytes) -> None:
    pid = parse_pid(content)
    assert pid is None or (0 < pid < 2**31 and re.fullmatch(rb"\s*0*%d\s*" % pid, content))


@given(st.integers(1, 2**31 - 1))
def test_what_an_x_server_writes_is_read(pid: int) -> None:
    assert parse_pid(b"%10d\n" % pid) == pid

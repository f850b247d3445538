# SPDX-License-Identifier: LGPL-2.1-or-later
"""inotify: real events of real files, and parsing the result of read(2)."""

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytmpd.kernel.inotify import (
    IN_CREATE,
    IN_DELETE,
    IN_IGNORED,
    IN_MODIFY,
    IN_Q_OVERFLOW,
    Event,
    Inotify,
    is_inotify,
    parse,
)

pytestmark = pytest.mark.unit


def packed(event: Event, padding: int) -> bytes:
    name = os.fsencode(event.name)
    name += b"\0" * padding if name else b""
    return struct.pack("=iIII", event.watch, event.mask, 0, len(name)) + name


EVENTS = st.builds(
    Event,
    st.integers(-1, (1 << 31) - 1),
    st.integers(0, (1 << 32) - 1),
    st.binary(max_size=20).map(lambda name: os.fsdecode(name.replace(b"\0", b""))),
)


@given(st.lists(st.tuples(EVENTS, st.integers(1, 16))))
def test_parse(events: list[tuple[Event, int]]) -> None:
    assert parse(b"".join(packed(*entry) for entry in events)) == [event for event, _ in events]


def test_overflow_has_no_watch() -> None:
    assert parse(struct.pack("=iIII", -1, IN_Q_OVERFLOW, 0, 0)) == [Event(-1, IN_Q_OVERFLOW, "")]


def test_real_events(tmp_path: Path) -> None:
    inotify = Inotify()
    try:
        assert inotify.read() == [], "read() does not block"
        watch = inotify.add_watch(str(tmp_path), IN_CREATE | IN_DELETE)
        (tmp_path / "new").touch()
        (tmp_path / "new").unlink()
        assert inotify.read() == [Event(watch, IN_CREATE, "new"), Event(watch, IN_DELETE, "new")]
        assert inotify.add_watch(str(tmp_path), IN_CREATE) == watch
        inotify.remove_watch(watch)
        assert inotify.read() == [Event(watch, IN_IGNORED, "")]
        with pytest.raises(OSError, match="Invalid argument"):
            inotify.remove_watch(watch)
    finally:
        inotify.close()
        inotify.close()


def test_errors_name_the_path() -> None:
    inotify = Inotify()
    try:
        with pytest.raises(FileNotFoundError, match="/does/not/exist"):
            inotify.add_watch("/does/not/exist", IN_MODIFY)
    finally:
        inotify.close()


def test_a_stored_descriptor_is_taken_over(tmp_path: Path) -> None:
    first = Inotify()
    watch = first.add_watch(str(tmp_path), IN_CREATE)
    kept = first.fd.dup()
    first.close()
    (tmp_path / "new").touch()
    second = Inotify(kept)
    assert not os.get_inheritable(second.fd)
    assert second.read() == [Event(watch, IN_CREATE, "new")]
    second.close()


def test_is_inotify(tmp_path: Path) -> None:
    inotify = Inotify()
    fd = inotify.fd
    assert is_inotify(fd)
    inotify.close()
    assert not is_inotify(fd)
    with (tmp_path / "file").open("w") as file:
        assert not is_inotify(file.fileno())

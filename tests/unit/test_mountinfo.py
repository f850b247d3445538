# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mount tables, as the kernel writes them."""

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytmpd.kernel.mountinfo import (
    Mount,
    Outside,
    below,
    is_below,
    mount_id_of,
    parse,
    parse_line,
    read,
    with_ids,
)

pytestmark = pytest.mark.unit

LINE = b"36 35 98:0 /mnt1 /mnt2 rw,noatime shared:7 master:1 - ext3 /dev/root rw,errors=continue"


def test_the_line_in_the_manual_page() -> None:
    assert parse_line(LINE) == Mount(36, 35, "98:0", "/mnt1", "/mnt2", 7, 1, "ext3", "/dev/root")


@pytest.mark.parametrize(
    ("tags", "shared", "master"),
    [
        (b"", None, None),
        (b"shared:3 ", 3, None),
        (b"master:4 ", None, 4),
        (b"master:4 propagate_from:2 ", None, 4),
        (b"unbindable ", None, None),
        (b"future:1 shared:3 another ", 3, None),
    ],
)
def test_propagation(tags: bytes, shared: int | None, master: int | None) -> None:
    mount = parse_line(b"1 2 0:3 / /tmp rw " + tags + b"- tmpfs tmpfs rw")
    assert (mount.shared, mount.master) == (shared, master)
    assert mount.propagates is (shared is not None or master is not None)


def test_escapes() -> None:
    mount = parse_line(rb"1 2 0:3 /a\134b /mnt/with\040space\011\012\043 rw - fuse.x a\040b rw")
    assert mount.root == "/a\\b"
    assert mount.mount_point == "/mnt/with space\t\n#"
    assert mount.source == "a b"


def test_names_that_are_not_utf_8_are_kept() -> None:
    mount = parse_line(b"1 2 0:3 / /mnt/\xff rw - tmpfs  rw")
    assert os.fsencode(mount.mount_point) == b"/mnt/\xff"
    assert mount.source == ""


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"36",
        b"a b 98:0 / / rw - x y",
        b"36 35 98:0 /mnt1 /mnt2 rw shared:7 ext3 /dev/root",
        b"36 35 98:0 /mnt1 /mnt2 rw shared:x - ext3 /dev/root rw",
        b"36 35 98:0 /mnt1 /mnt2 rw shared:7 -",
        b"36 35 98:0 - /mnt1 /mnt2 rw",
    ],
)
def test_invalid_lines(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a line of mountinfo"):
        parse_line(line)


def test_the_kernels_own_table() -> None:
    mounts = read()
    assert any(mount.mount_point == "/proc" and mount.fstype == "proc" for mount in mounts)
    assert len({mount.mount_id for mount in mounts}) == len(mounts)
    assert read("self") == read()


def test_a_process_that_is_gone() -> None:
    with pytest.raises(OSError, match="No such file"):
        read("0")


def test_the_mount_behind_a_descriptor() -> None:
    (expected,) = [mount.mount_id for mount in read() if mount.mount_point == "/proc"][-1:]
    fd = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
    try:
        assert mount_id_of(fd) == expected
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="No such file"):
        mount_id_of(fd)


def escaped(text: bytes) -> bytes:
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in text)


PATH = st.binary(max_size=30).map(lambda rest: b"/" + rest.replace(b"\0", b""))


@given(PATH, PATH, PATH, st.none() | st.integers(0, 1 << 31))
def test_any_name_is_read_back(root: bytes, point: bytes, source: bytes, shared: int | None) -> None:
    tag = b"" if shared is None else b"shared:%d " % shared
    line = b"1 2 0:3 %s %s rw %s- tmpfs %s rw" % (escaped(root), escaped(point), tag, escaped(source))
    (mount,) = parse(line + b"\n")
    assert tuple(map(os.fsencode, (mount.root, mount.mount_point, mount.source))) == (root, point, source)
    assert mount.shared == shared


@given(st.binary() | st.lists(st.sampled_from(LINE.split(b" "))).map(b" ".join))
def test_other_bytes_raise_only_value_error(table: bytes) -> None:
    with contextlib.suppress(ValueError):
        for mount in parse(table):
            assert isinstance(mount.mount_point, str)


def test_paths_are_compared_by_component() -> None:
    assert is_below("/tmp", "/tmp")
    assert is_below("/tmp/x", "/tmp")
    assert is_below("/tmp", "/")
    assert not is_below("/tmpfoo", "/tmp")
    assert not is_below("/", "/tmp")


TABLE = [
    b"1 0 0:1 / / rw shared:7 master:2 - x x rw",
    b"2 1 0:2 / /tmp/a rw - x x rw",
    b"3 1 0:3 /r /tmpfoo rw master:2 - x x rw",
    rb"4 1 0:4 / /with\040space/b rw shared:8 - x - rw",
    b"5 1 0:3 /r /tmpfoo rw master:3 - x x rw",
]


def test_what_must_be_shared_with_the_host() -> None:
    outside = Outside(["/tmp", "/with space"])
    for _ in range(2):
        assert outside.of(TABLE) == {
            (b"/", b"0:1", b"/", b"shared:7"): 1,
            (b"/tmpfoo", b"0:3", b"/r", b""): 2,
        }


def test_mounts_by_their_ids() -> None:
    table = iter(TABLE)
    assert {number: mount.device for number, mount in with_ids(table, {1, 3}).items()} == {
        1: "0:1",
        3: "0:3",
    }
    assert len(list(table)) == 2, "nothing is read after the last one"
    assert with_ids(TABLE, {6}) == {}


def test_the_mounts_below_directories() -> None:
    assert [mount.mount_id for mount in below(TABLE, ["/tmp", "/with space"])] == [2, 4]
    assert [mount.mount_id for mount in below(TABLE, ["/tmpfoo"])] == [3, 5]

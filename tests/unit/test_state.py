# SPDX-License-Identifier: LGPL-2.1-or-later
"""State files: what is written is read back; anything else in the directory is reported and skipped."""

import json
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polytmpd.blocking.state import VERSION, StateDirectory, decode, encode
from polytmpd.core.model import Directory, Instance, InstanceDirectory, Lifetime

pytestmark = pytest.mark.unit

INSTANCE = Instance(
    1000,
    "alice",
    1_700_000_000_000_000,
    5_000_000,
    (
        InstanceDirectory(
            Directory("/tmp", Lifetime.INSTANCE, (".X11-unix",)), f"polytmp-{'a' * 32}-1000-{'b' * 16}"
        ),
        InstanceDirectory(Directory("/var/tmp", Lifetime.PERSISTENT), "polytmp-1000"),
    ),
    4026532000,
    frozenset({1, 7}),
    231917,
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "instances"


def only_problem(place: Path) -> str:
    """The problem with the only bad file; the others must still be read."""
    state = StateDirectory(place)
    state.save(INSTANCE)
    found, problems = state.load()
    assert found == {1000: INSTANCE}
    assert len(problems) == 1
    assert problems[0].startswith(f"{place}/")
    assert problems[0].endswith(", ignoring the file")
    return problems[0]


def test_round_trip(place: Path) -> None:
    state = StateDirectory(place)
    assert place.stat().st_mode & 0o777 == 0o700
    state.save(INSTANCE)
    assert StateDirectory(place).load() == ({1000: INSTANCE}, [])
    state.forget(1000)
    state.forget(1000)
    assert state.load() == ({}, [])


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(
    lambda name: name not in {".", ".."}
)
NUMBERS = st.integers(0, (1 << 64) - 1)
DIRECTORIES = st.builds(
    InstanceDirectory,
    st.builds(
        Directory,
        st.lists(NAMES, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts)),
        st.sampled_from(Lifetime),
        st.lists(NAMES, max_size=3).map(tuple),
    ),
    NAMES,
)
INSTANCES = st.builds(
    Instance,
    st.integers(0, (1 << 32) - 2),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    NUMBERS,
    NUMBERS,
    st.lists(DIRECTORIES, max_size=3).map(tuple),
    NUMBERS,
    st.frozensets(NUMBERS, max_size=3),
    NUMBERS,
)


@given(INSTANCES)
def test_decode_is_the_inverse_of_encode(instance: Instance) -> None:
    assert decode(json.loads(json.dumps(encode(instance)))) == instance


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    JSON,
    st.sampled_from([*encode(INSTANCE), ""]),
    st.sampled_from(["path", "lifetime", "shared", "barrier"]),
)
def test_decode_raises_only_what_it_documents(value: Any, key: str, inner: str) -> None:
    """All wrong, wrong in one value, or wrong in a nested value."""
    record = encode(INSTANCE)
    entry = {**record["directories"][0], inner: value}
    for wrong in (value, {**record, key: value}, {**record, "directories": [entry]}):
        try:
            found = decode(wrong)
        except (ValueError, KeyError, TypeError):
            continue
        assert decode(encode(found)) == found


def test_other_releases(place: Path) -> None:
    """An earlier one recorded no ID of the namespace, and a later one may record more."""
    place.mkdir()
    record = encode(INSTANCE) | {"from a later release": {"a": [1]}}
    del record["namespace_id"]
    (place / "1000").write_text(json.dumps(record))
    assert StateDirectory(place).load() == ({1000: replace(INSTANCE, namespace_id=0)}, [])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": VERSION + 1}, "Version 2 is not supported"),
        ({"version": None}, "Version None is not supported"),
        ({"uid": "1000"}, "is not a natural number"),
        ({"uid": True}, "is not a natural number"),
        ({"uid": -1}, "is not a natural number"),
        ({"uid": 4294967295}, "not a UID"),
        ({"uid": 1001}, "Describes UID 1001"),
        ({"user": 5}, "not a string"),
        ({"user": "a\0b"}, "not a string"),
        ({"user": "\ud800"}, "is not Unicode"),
        ({"created": 1 << 64}, "is not a natural number"),
        ({"namespace": 1.0}, "is not a natural number"),
        ({"namespace_id": "1"}, "is not a natural number"),
        ({"namespace_id": None}, "is not a natural number"),
        ({"watches": 3}, "Not what polytmpd writes"),
        ({"watches": ["a"]}, "is not a natural number"),
        ({"directories": [{"path": "/tmp"}]}, "Without a value for 'lifetime'"),
        ({"directories": ["/tmp"]}, "Not what polytmpd writes"),
    ],
)
def test_invalid_values(place: Path, change: dict[str, Any], says: str) -> None:
    place.mkdir()
    (place / "2000").write_text(json.dumps({**encode(INSTANCE), "uid": 2000, **change}))
    assert says in only_problem(place)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"barrier": "../etc"}, "is not the name of a directory entry"),
        ({"barrier": ".."}, "is not the name of a directory entry"),
        ({"barrier": ""}, "is not the name of a directory entry"),
        ({"path": "tmp"}, "is not a normalized absolute path"),
        ({"path": "/"}, "is not a normalized absolute path"),
        ({"path": "/tmp/../etc"}, "is not a normalized absolute path"),
        ({"path": "/tmp//x"}, "is not a normalized absolute path"),
        ({"shared": ["a/b"]}, "is not the name of a directory entry"),
        ({"lifetime": "for ever"}, "'for ever' is not one of instance, persistent"),
    ],
)
def test_a_path_that_root_must_not_follow(place: Path, change: dict[str, Any], says: str) -> None:
    place.mkdir()
    record = encode(INSTANCE)
    entry = {**record["directories"][0], **change}
    (place / "2000").write_text(json.dumps({**record, "uid": 2000, "directories": [entry]}))
    assert says in only_problem(place)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        json.dumps(encode(INSTANCE)).encode()[:-20],
        b"[]",
        b"null",
        b"\xff\xfe\0",
        b"[" * 60000,
        b"9" * 60000,
        json.dumps({**encode(INSTANCE), "user": "x" * 70000}).encode(),
    ],
    ids=["empty", "cut", "cut late", "list", "null", "no text", "deep", "large number", "large"],
)
def test_invalid_content(place: Path, content: bytes) -> None:
    place.mkdir()
    (place / "2000").write_bytes(content)
    assert re.search("Not a complete JSON text|Not what polytmpd writes|Too large", only_problem(place))


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "socket", "device"])
def test_entries_that_are_not_files(place: Path, tmp_path: Path, kind: str) -> None:
    place.mkdir()
    path = place / "2000"
    match kind:
        case "symlink":
            target = tmp_path / "target"
            target.write_text(json.dumps({**encode(INSTANCE), "uid": 2000}))
            path.symlink_to(target)
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
        case _:
            try:
                os.mknod(path, 0o20600, os.makedev(1, 5))
            except PermissionError:
                pytest.skip("needs root: makes a device node")
    state = StateDirectory(place)
    state.save(INSTANCE)
    found, (problem,) = state.load()
    assert found == {1000: INSTANCE}
    assert f"{path} is not a regular file; {'moved to' if kind == 'directory' else 'removed'}" in problem
    assert [entry.name for entry in place.iterdir()] == ["1000"]
    assert state.load() == ({1000: INSTANCE}, [])


def test_a_directory_that_is_moved_away_keeps_what_is_in_it(place: Path) -> None:
    for name in ("2000", ".2000.new"):
        (place / name).mkdir(parents=True)
        (place / name / "notes").write_text(name)
        _, (problem,) = StateDirectory(place).load()
        assert (Path(problem.rpartition(" ")[2]) / "notes").read_text() == name
    assert list(place.iterdir()) == []


def test_a_directory_gives_way_to_a_state_file(place: Path) -> None:
    state = StateDirectory(place)
    (place / "1000").mkdir()
    state.save(INSTANCE)
    assert state.load() == ({1000: INSTANCE}, [])
    state.forget(1000)
    (place / "1000").mkdir()
    state.forget(1000)
    assert list(place.iterdir()) == []


def test_a_foreign_file_among_the_state_files(place: Path) -> None:
    place.mkdir()
    (place / "notes.txt").write_text(json.dumps(encode(INSTANCE)))
    assert "Describes UID 1000" in only_problem(place)


def test_a_write_that_was_cut_off_is_cleared(place: Path) -> None:
    place.mkdir()
    (place / ".1000.new").write_text("{")
    state = StateDirectory(place)
    assert state.load() == ({}, [])
    assert list(place.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateDirectory(place)
    state.save(INSTANCE)

    def full(path: Path, text: str) -> None:
        path.write_bytes(text.encode()[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        state.save(Instance(1000, "other", 0, 0, ()))
    monkeypatch.undo()
    assert state.load() == ({1000: INSTANCE}, [])
    assert [path.name for path in place.iterdir()] == ["1000"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=200), JSON.map(lambda value: json.dumps(value).encode())))
def test_arbitrary_content(place: Path, content: bytes) -> None:
    state = StateDirectory(place)
    (place / "2000").write_bytes(content)
    found, problems = state.load()
    assert found == {}
    assert len(problems) == 1

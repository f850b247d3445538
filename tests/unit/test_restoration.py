# SPDX-License-Identifier: LGPL-2.1-or-later
"""When the daemon reads all of /proc at start, and when what it knows is everything."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from polytmpd.blocking import instances, recovery, restoration
from polytmpd.blocking.recovery import Living
from polytmpd.core.model import Directory, Instance, InstanceDirectory, Lifetime
from polytmpd.kernel import host, nsfs
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.mountinfo import parse_line

pytestmark = pytest.mark.unit

TMP = Directory("/polytmp-test", Lifetime.INSTANCE)
KEPT = Directory("/polytmp-test-kept", Lifetime.PERSISTENT)
ALICE, BOB = 1001, 1002


def barrier(uid: int) -> str:
    return f"polytmp-{'a' * 32}-{uid}-{'b' * 16}"


def instance(uid: int) -> Instance:
    entries = InstanceDirectory(TMP, barrier(uid)), InstanceDirectory(KEPT, f"polytmp-{uid}")
    return Instance(uid, str(uid), 0, 0, entries, 42, namespace_id=7)


@dataclass(frozen=True, slots=True)
class Case:
    """A start of the daemon.

    is_recorded: alice has a state file. has_id: of her namespace. opens: by that ID. finds_all: see nsfs.
    """

    why: str
    is_searched: bool
    on_disk: Sequence[str] = (barrier(ALICE), "systemd-private-x", "polytmp-removing-" + "c" * 16)
    is_recorded: bool = True
    has_id: bool = True
    opens: bool = True
    finds_all: bool = True
    directories: Sequence[Directory] = (TMP, KEPT)


CASES = [
    Case("everything is known", False),
    Case("alice's has ended", False, opens=False),
    Case("alice's has ended, and her barrier is gone", False, (), opens=False),
    Case("the kernel may have refused", True, opens=False, finds_all=False),
    Case("an earlier release recorded it", True, has_id=False, opens=False),
    Case("bob's state file is lost", True, (barrier(ALICE), barrier(BOB))),
    Case("all state files are lost, and what is in /tmp", True, (), is_recorded=False),
    Case("alice has another barrier", True, (barrier(ALICE), barrier(ALICE).replace("b", "c"))),
    Case("what is kept outlives instances", True, directories=(KEPT,)),
    Case("no such directory", True, directories=(replace(TMP, path="/polytmp-test-missing"),)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_a_search(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / TMP.path[1:]).mkdir()
    for name in case.on_disk:
        (tmp_path / TMP.path[1:] / name).mkdir()
    (tmp_path / KEPT.path[1:] / f"polytmp-{ALICE}").mkdir(parents=True)
    searched: list[object] = []

    def opened(*_: object) -> Descriptor | None:
        return Descriptor.open("/dev/null", os.O_RDONLY) if case.opens else None

    def search(*looked_for: object) -> list[object]:
        searched.append(looked_for)
        return []

    monkeypatch.setattr(host, "path", lambda absolute: str(tmp_path / absolute[1:]))
    monkeypatch.setattr(instances, "open_identified", opened)
    monkeypatch.setattr(nsfs, "finds_all", lambda: case.finds_all)
    monkeypatch.setattr(recovery, "host_peers", set)
    monkeypatch.setattr(recovery, "living", search)
    recorded = {ALICE: replace(instance(ALICE), namespace_id=7 * case.has_id)} if case.is_recorded else {}
    fds = []
    for left in restoration.left({}, recorded, case.directories, lambda *_: None):
        assert (left.instance.uid, left.stored) == (ALICE, None)
        assert (left.namespace is not None) == case.opens
        fds.append(left.namespace)
    assert bool(searched) == case.is_searched
    assert all(fd is None or fd.closed for fd in fds)


@pytest.mark.parametrize(
    ("number", "barriers", "is_its"),
    [
        (42, (barrier(ALICE), f"polytmp-{ALICE}"), True),
        (43, (barrier(ALICE), f"polytmp-{ALICE}"), False),
        (42, (barrier(ALICE),), False),
        (42, (f"polytmp-{ALICE}", barrier(ALICE).replace("b", "c")), False),
    ],
    ids=["hers", "another of hers", "not all of it", "over other files"],
)
def test_what_a_search_finds(
    number: int, barriers: Sequence[str], is_its: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be another namespace of the same user."""
    lines = [f"36 35 0:30 /{name}/tmp /{name} rw - tmpfs tmpfs rw" for name in barriers]
    mounts = tuple(parse_line(line.encode()) for line in lines)
    monkeypatch.setattr(recovery, "host_peers", set)
    with Descriptor.open("/dev/null", os.O_RDONLY) as fd:
        monkeypatch.setattr(recovery, "living", lambda *_: [Living(ALICE, number, mounts, fd)])
        recorded = {ALICE: replace(instance(ALICE), namespace_id=0)}
        (left,) = restoration.left({}, recorded, [TMP, KEPT], lambda *_: None)
    assert left.instance == recorded[ALICE]
    assert (left.namespace is not None) == is_its

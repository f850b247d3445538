# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the user database says of a user: groups, user records, and services that do not answer."""

import grp
import json
import os
import pwd
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from polytmpd import userdb
from polytmpd.core.policy import Exemptions, Facts

pytestmark = pytest.mark.unit

Reply = Callable[[dict[str, object]], bytes]


@pytest.fixture
def root() -> Iterator[Path]:
    """Short: the path of a socket has room for 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="u-", dir="/tmp") as name:
        (Path(name) / "run/systemd/userdb").mkdir(parents=True)
        yield Path(name)


@pytest.fixture
def serve(root: Path) -> Iterator[Callable[[str, Reply], None]]:
    """A service of that name, which answers each question with what reply() returns."""
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(name: str, reply: Reply) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(root / "run/systemd/userdb" / name))
        listener.listen()
        sockets.append(listener)

        def run() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    asked = connection.recv(65536)
                    assert asked.endswith(b"\0")
                    connection.sendall(reply(json.loads(asked[:-1])))

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()

    yield start
    for listener in sockets:
        listener.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(10)
    for listener in sockets:
        listener.close()


def record(disposition: str | None, uid: int = 60100) -> bytes:
    found: dict[str, object] = {"userName": "x", "uid": uid}
    if disposition:
        found["disposition"] = disposition
    return json.dumps({"parameters": {"record": found, "incomplete": False}}).encode() + b"\0"


def test_nobody_is_there(tmp_path: Path) -> None:
    assert userdb.disposition(60100, tmp_path) is None


def test_the_multiplexer_is_asked_alone(root: Path, serve: Callable[[str, Reply], None]) -> None:
    asked: list[dict[str, object]] = []

    def reply(question: dict[str, object]) -> bytes:
        asked.append(question)
        return record("regular")

    serve("io.systemd.Multiplexer", reply)
    serve("io.systemd.Home", lambda _: record("system"))
    assert userdb.disposition(60100, root) == "regular"
    assert asked == [
        {
            "method": "io.systemd.UserDatabase.GetUserRecord",
            "parameters": {"uid": 60100, "service": "io.systemd.Multiplexer"},
        }
    ]


def test_a_multiplexer_that_was_stopped(root: Path, serve: Callable[[str, Reply], None]) -> None:
    """systemd leaves its socket, which refuses connections."""
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.bind(str(root / "run/systemd/userdb/io.systemd.Multiplexer"))
    serve("io.systemd.DynamicUser", lambda _: record("dynamic"))
    assert userdb.disposition(62000, root) is None, "a record of another UID"
    assert userdb.disposition(60100, root) == "dynamic"


def test_without_it_every_service_is_asked(root: Path, serve: Callable[[str, Reply], None]) -> None:
    serve("io.systemd.DynamicUser", lambda _: b'{"error":"io.systemd.UserDatabase.NoRecordFound"}\0')
    serve("io.systemd.NameServiceSwitch", lambda _: record("system"))
    serve("io.systemd.Machine", lambda _: record(None))
    serve("org.example.Directory", lambda _: record("regular"))
    assert userdb.disposition(60100, root) == "regular"


@pytest.mark.parametrize(
    "answer",
    [b"", b"\0", b"{}\0", b"[]\0", b"nonsense\0", b"\xff\0", b'{"parameters":[]}\0', b"[" * 100_000 + b"\0"],
)
def test_answers_that_make_no_sense(root: Path, serve: Callable[[str, Reply], None], answer: bytes) -> None:
    serve("a.Broken", lambda _: answer)
    serve("b.Good", lambda _: record("regular"))
    assert userdb.disposition(60100, root) == "regular"


def test_a_record_of_another_user(root: Path, serve: Callable[[str, Reply], None]) -> None:
    serve("a.Confused", lambda _: record("system", 1))
    assert userdb.disposition(60100, root) is None
    assert not is_silent(root)


def test_a_service_that_does_not_answer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userdb, "_TIMEOUT", 0.05)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "run/systemd/userdb/io.systemd.Multiplexer"))
        listener.listen(0)
        for _ in range(3):  # the last ones find its queue full
            assert userdb.disposition(60100, root) is None
            assert is_silent(root)


@pytest.mark.parametrize(
    ("answer", "silent"),
    [
        (b"", True),
        (b"nonsense\0", True),
        (b"[]\0", True),
        (b'{"error":"io.systemd.UserDatabase.ServiceNotAvailable"}\0', True),
        (b'{"error":["io.systemd.UserDatabase.NoRecordFound"]}\0', True),
        (b'{"error":"io.systemd.UserDatabase.NoRecordFound"}\0', False),
        (b'{"error":"io.systemd.UserDatabase.BadService"}\0', False),
        (record(None), False),
        (record("regular"), False),
    ],
)
def test_what_counts_as_no_answer(
    root: Path, serve: Callable[[str, Reply], None], answer: bytes, silent: bool
) -> None:
    serve("a.Service", lambda _: answer)
    assert is_silent(root) == silent
    serve("b.Good", lambda _: record("regular"))
    assert not is_silent(root), "a record is there"


def test_no_service_is_silent(root: Path) -> None:
    assert not is_silent(root)
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.bind(str(root / "run/systemd/userdb/a.Stopped"))
    assert not is_silent(root)


def test_a_file_that_makes_no_sense(root: Path) -> None:
    (root / "etc/userdb").mkdir(parents=True)
    (root / "etc/userdb/60100.user").write_text('{"disposition": "regu')
    assert is_silent(root)


def is_silent(root: Path) -> bool:
    return userdb.facts(60100, "x", (), record=True, root=root).silent


def test_records_in_files(root: Path) -> None:
    for directory, disposition in (("usr/lib/userdb", "system"), ("etc/userdb", "regular")):
        (root / directory).mkdir(parents=True)
        text = json.dumps({"userName": "x", "uid": 60100, "disposition": disposition})
        (root / directory / "60100.user").write_text(text)
    assert userdb.disposition(60100, root) == "regular"
    assert userdb.disposition(60101, root) is None
    (root / "etc/userdb/60100.user").write_text("{")
    assert userdb.disposition(60100, root) == "system"


def test_dynamic_users(root: Path) -> None:
    (root / "run/systemd/dynamic-uid").mkdir()
    (root / "run/systemd/dynamic-uid/62000").touch()
    assert userdb.facts(62000, "x", (), record=True, root=root) == Facts(dynamic=True)
    assert userdb.facts(62001, "x", (), record=True, root=root) == Facts()


def test_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """By GID as well as by the list of members; what is not found may exist."""
    groups = {
        "main": grp.struct_group(("main", "x", 1001, [])),
        "more": grp.struct_group(("more", "x", 5000, [])),
        "listed": grp.struct_group(("listed", "x", 6000, ["bob", "DOM\\alice"])),
        "others": grp.struct_group(("others", "x", 7000, ["bob"])),
    }
    user = pwd.struct_passwd(("DOM\\alice", "x", 1001, 1001, "", "/", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", {1001: user}.__getitem__)
    monkeypatch.setattr(grp, "getgrnam", groups.__getitem__)
    monkeypatch.setattr(userdb, "_group_list", lambda _, gid: {gid, 5000, 8000})
    wanted = {*groups, "none", "8000", "8001", "5000"}
    member_of, unknown = userdb.memberships(1001, "DOM\\alice", wanted)
    assert member_of == {"main", "more", "listed", "8000", "5000"}
    assert unknown == {"none"}
    assert userdb.memberships(1002, "gone", wanted) == (frozenset(), frozenset(wanted))
    assert userdb.memberships(1001, "DOM\\alice", ()) == (frozenset(), frozenset())


@pytest.mark.parametrize("room", [1, 64])
def test_the_list_of_groups(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(userdb, "_GROUPS", room)
    for user in pwd.getpwall()[:20]:
        assert userdb._group_list(user.pw_name, 4711) == set(os.getgrouplist(user.pw_name, 4711))


def test_settings_that_match_nobody() -> None:
    exemptions = Exemptions(
        users=frozenset({"root", "0", "no-such-user", "4294967294"}),
        exempt_groups=frozenset({"root", "no-such-group"}),
        only_groups=frozenset({"0", "4294967294"}),
    )
    assert list(userdb.unmatched(exemptions)) == [
        ("ExemptUsers", "user", ["4294967294", "no-such-user"]),
        ("ExemptGroups", "group", ["no-such-group"]),
        ("OnlyGroups", "group", ["4294967294"]),
    ]


def test_users_whom_the_settings_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A member may be unknown, and a group may have more than are looked up."""
    users = {"DOM\\dora": 1234567891, "7": 7, "erin@example.com": 200002}
    groups = {"staff": ["DOM\\dora", "gone"], "7000": ["erin@example.com"]}

    def entry(word: str) -> object:
        return SimpleNamespace(pw_uid=users[word], pw_name=word)

    monkeypatch.setattr(userdb, "_user", entry)
    monkeypatch.setattr(userdb, "_group", lambda word: SimpleNamespace(gr_mem=groups[word]))
    exemptions = Exemptions(users=frozenset({"7"}), exempt_groups=frozenset({"staff", "7000", "no-such"}))
    assert userdb.named_users(exemptions) == ({uid: name for name, uid in users.items()}, 0)
    assert userdb.named_users(Exemptions(only_groups=frozenset({"staff"}))) == ({}, 0)
    monkeypatch.setattr(userdb, "_LOOKED_UP_AT_MOST", 1)
    assert userdb.named_users(exemptions) == ({7: "7"}, 3)


def test_local_users(tmp_path: Path) -> None:
    assert userdb.local_users(tmp_path) == {}
    (tmp_path / "etc").mkdir()
    text = "root:x:0:0::/root:/bin/sh\n+::::::\nada:x:1000:1000::/:/bin/sh\ntoor:x:0:0::/:/bin/sh\n"
    (tmp_path / "etc/passwd").write_text(text)
    assert userdb.local_users(tmp_path) == {0: "root", 1000: "ada"}


def test_one_question_about_groups_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asking = threading.Semaphore(1)

    def group_list(_name: str, gid: int) -> set[int]:
        assert asking.acquire(blocking=False), "two at once"
        threading.Event().wait(0.002)
        asking.release()
        return {gid}

    monkeypatch.setattr(userdb, "_group_list_unlocked", group_list)
    failed: list[str] = []

    def ask() -> None:
        for _ in range(10):
            if userdb.memberships(0, "root", ["0"]) != (frozenset({"0"}), frozenset()):
                failed.append("no answer")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failed == []


def test_a_turn_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userdb, "_TURN_TIMEOUT", 0.02)
    with userdb._turn, pytest.raises(TimeoutError):
        userdb.memberships(0, "root", ["0"])

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which namespaces are instances, and which files belong to which user.

Not here: mounts and files (tests/kernel, tests/e2e).
"""

import os
import pwd
from pathlib import Path

import pytest

from polytmpd.blocking import accounts, instances, recovery
from polytmpd.core.model import Directory, Instance, InstanceDirectory, Lifetime
from polytmpd.kernel import inside, mountinfo, mountns, processes
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.mountinfo import Mount, parse_line

pytestmark = pytest.mark.unit

BARRIER = f"polytmp-{'a' * 32}-1000-{'b' * 16}"
INSTANCE = Instance(
    1000, "alice", 0, 0, (InstanceDirectory(Directory("/tmp", Lifetime.INSTANCE), BARRIER),), namespace=42
)
LINE = "36 35 0:30 {} /tmp rw - tmpfs tmpfs rw"


def opened(path: Path) -> list[str]:
    """The descriptors of that file."""
    return [fd.name for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and fd.readlink() == path]


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the namespace in which processes are found; a file, so that a leak shows."""
    path = tmp_path / "namespace"
    path.touch()
    monkeypatch.setattr(processes, "open_namespace", lambda _: Descriptor.open(path, os.O_RDONLY))
    return path


def test_a_namespace_that_cannot_be_read_has_not_ended(
    namespace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mounts_in(_: int) -> list[Mount]:
        raise OSError(24, "Too many open files", "/proc/thread-self")

    monkeypatch.setattr(inside, "mounts_in", mounts_in)
    monkeypatch.setattr(mountns, "is_privileged", lambda _: True)
    with pytest.raises(OSError, match="Too many open files"):
        instances.open_living(INSTANCE)
    assert opened(namespace) == []


@pytest.mark.parametrize(
    ("root", "peer", "privileged", "is_ours"),
    [
        (f"/{BARRIER}/tmp", "shared:7", True, True),
        ("/polytmp-1000/tmp", "shared:7", True, False),  # of another instance, which reuses the number
        (f"/{BARRIER}/tmp", "master:7", True, False),  # derived from the instance's by root
        (f"/{BARRIER}/tmp", "shared:7", False, False),  # by the user
    ],
)
def test_a_namespace_is_recognised_by_its_mounts(
    namespace: Path, monkeypatch: pytest.MonkeyPatch, root: str, peer: str, privileged: bool, is_ours: bool
) -> None:
    """The kernel reuses inode numbers."""
    slash = "35 1 8:1 / / rw {} - ext4 /dev/sda1 rw"
    table = [parse_line(line.encode()) for line in (slash.format(peer), LINE.format(root))]
    monkeypatch.setattr(inside, "mounts_in", lambda _: table)
    monkeypatch.setattr(mountns, "is_privileged", lambda _: privileged)
    monkeypatch.setattr(mountinfo, "read", lambda _: [parse_line(slash.format("shared:7").encode())])
    fd = instances.open_living(INSTANCE)
    assert (fd is not None) == is_ours
    assert len(opened(namespace)) == is_ours
    if fd is not None:
        os.close(fd)


@pytest.mark.parametrize(
    ("users", "name", "is_former"),
    [
        ({"alice": 1000}, "alice", False),
        ({"alice": 1000, "ally": 1000}, "ally", False),  # two names for one UID
        ({"alice": 1000}, "carol", True),  # userdel, or usermod -l
        ({"alice": 1000, "carol": 1001}, "carol", True),  # a user of that name with another UID
        ({"alice": 1000}, "1000", False),  # the state file had no user names when it was written
        ({}, "alice", False),
        ({}, "carol", True),
    ],
)
def test_who_is_a_former_user(
    monkeypatch: pytest.MonkeyPatch, users: dict[str, int], name: str, is_former: bool
) -> None:
    def entry(name: str, uid: int) -> pwd.struct_passwd:
        return pwd.struct_passwd((name, "x", uid, uid, "", "/", "/bin/sh"))

    def by_uid(uid: int) -> pwd.struct_passwd:
        return entry({of: name for name, of in reversed(users.items())}[uid], uid)

    monkeypatch.setattr(pwd, "getpwnam", lambda name: entry(name, users[name]))
    monkeypatch.setattr(pwd, "getpwuid", by_uid)
    present = accounts.find_name(1000) or "alice"
    assert present == "alice"
    assert accounts.is_former(name, 1000, present) is is_former


def test_a_local_users_name_is_that_of_the_user_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "LOCAL", "/etc/passwd")
    found = {user.pw_uid: accounts.find_local_name(user.pw_uid) for user in pwd.getpwall()}
    assert {uid: name for uid, name in found.items() if name} == {
        uid: pwd.getpwuid(uid).pw_name for uid, name in found.items() if name
    }
    assert found[0] == "root"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("alice:x:1001:1001::/:/bin/sh", "alice"),
        ("alice:x:1001:1001:1001:/:1001:/bin/sh\nbob:x:1001:9:,,:/home:\n", "bob"),
        ("x:1001:1002:1001::/:\nalice:x:1001:0::/:\nalicia:x:1001:1001::/:\n", "alice"),
        ("M\xfcller:x:1001:0::/:\n", "M\udcfcller"),
        *(
            (line, None)
            for line in (
                "",
                "alice:x:10011:1001::/:\n",
                "alice:x:01001:1001::/:\n",
                "alice:x:1001::::\n",
                "#alice:x:1001:1001::/:\n",
                "+alice:x:1001:1001::/:\n",
                "-:x:1001:1001::/:\n",
                ":x:1001:1001::/:\n",
                "alice:x:1001:1001::/:\n" + "#" * (1 << 20),
            )
        ),
    ],
)
def test_a_local_users_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str | None
) -> None:
    """In doubt, the user database is asked."""
    (tmp_path / "passwd").write_bytes(text.encode("latin-1"))
    monkeypatch.setattr(accounts, "LOCAL", str(tmp_path / "passwd"))
    assert accounts.find_local_name(1001) == name


@pytest.mark.parametrize("removed", [False, True])
def test_what_was_removed_on_the_host_is_known_again(removed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the directory, the mounts in it went: all that is shared is shared again."""
    monkeypatch.setattr(accounts, "find_name", lambda _: None)
    directory = Directory("/tmp", Lifetime.INSTANCE, (".X11-unix", ".ICE-unix"))
    root = f"/{BARRIER}/tmp" + ("//deleted" if removed else "")
    lines = [LINE.format(root)]
    if not removed:
        lines.append("37 36 0:30 /.X11-unix /tmp/.X11-unix rw - tmpfs tmpfs rw")
    mounts = [parse_line(line.encode()) for line in lines]
    found = recovery.reconstruct(1000, 42, mounts, [directory])
    assert found is not None
    [entry] = found.directories
    assert entry.barrier == BARRIER
    assert entry.directory.shared == ((".X11-unix", ".ICE-unix") if removed else (".X11-unix",))
    assert recovery.barrier_of(mounts[0]) == BARRIER
    assert recovery.is_inner(mounts[0], BARRIER)
    assert mounts[0].is_removed == removed

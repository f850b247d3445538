# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sessions for which the module does not call polytmpd: root, unknown users, chroots, system users."""

import pytest

from polytmpd.core import policy
from tests.pam.outcomes import MakeDaemon, assert_refused, assert_skipped, assert_untouched
from tests.pam.pam_world import (
    CHROOT,
    PAM_IGNORE,
    PAM_PERM_DENIED,
    PAM_USER_UNKNOWN,
    Bus,
    Namespace,
    World,
    plain_build,
)

pytestmark = [pytest.mark.pam, pytest.mark.timeout(120)]


@pytest.mark.parametrize("user", ["root", "toor"])
def test_root_is_never_moved_and_polytmpd_is_not_asked(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace, user: str
) -> None:
    fake = daemon(open=[private.path])
    session = world.open_session("-u", user, bus=bus.address)
    assert session.result == PAM_IGNORE
    assert_untouched(session)
    assert (session.log, session.messages) == ([], [])
    assert fake.stop() == []


@pytest.mark.parametrize("arguments", [[], ["-T"], ["-e", "1500"], ["-w", "/tmp"]], ids=str)
def test_root_without_a_bus(world: World, arguments: list[str]) -> None:
    session = world.open_session("-u", "root", *arguments)
    assert session.result == PAM_IGNORE
    assert (session.log, session.messages) == ([], [])


def test_an_unknown_user(world: World, bus: Bus, daemon: MakeDaemon, private: Namespace) -> None:
    fake = daemon(open=[private.path])
    session = world.open_session("-u", "nobody-knows", bus=bus.address)
    assert session.result == PAM_USER_UNKNOWN
    assert_untouched(session)
    assert session.log == [("ERR", "user unknown: nobody-knows")]
    assert fake.stop() == []


def test_no_user_name(world: World) -> None:
    session = world.open_session("-u", "")
    assert session.result == PAM_USER_UNKNOWN
    assert session.log == [("ERR", "the session has no user name")]


def test_a_caller_that_is_not_root(world: World) -> None:
    assert_refused(world.open_session("-e", "1500"), "the calling process is not root")


def test_a_process_in_a_chroot_is_left_alone(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    """As in an image build. The session must work, and the chroot has its own /tmp."""
    fake = daemon(open=[private.path])
    world.shell(f"{CHROOT}\nmount --rbind /proc proc")
    session = world.open_session("-r", "/tmp/chroot", bus=bus.address)
    assert_skipped(session, "NOTICE", "user alice is in a chroot, keeping the chroot's /tmp")
    assert fake.stop() == []


@plain_build
def test_a_process_in_a_chroot_without_proc_is_left_alone(world: World) -> None:
    world.shell(f"{CHROOT}\nmkdir -p proc/thread-self/fd")  # the harness counts descriptors in it
    session = world.open_session("-r", "/tmp/chroot")
    assert_skipped(session, "NOTICE", "user alice is in a chroot, keeping the chroot's /tmp")


def test_a_thread_outside_its_processs_namespace(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    fake = daemon(open=[private.path])
    other = world.make_namespace()
    session = world.open_session("-T", "-n", other.inner_path, bus=bus.address)
    assert_refused(session, "the calling thread is not in its process's mount namespace")
    assert session.namespace == other.inode
    assert fake.stop() == []


# System users


@pytest.mark.parametrize(
    ("login_defs", "user", "system"),
    [
        ("UID_MIN 1000\nUID_MAX 60000\n", "cronuser", True),
        ("UID_MIN 1000\nUID_MAX 60000\n", "alice", False),
        ("UID_MIN 1000\nUID_MAX 60000\n", "high", False),
        ("UID_MIN 1501\n", "alice", True),
        ("UID_MIN 1501\n", "bob", False),
        ("UID_MIN 1500\nUID_MAX 1500\n", "alice", False),
        ("UID_MIN 1500\nUID_MAX 1500\n", "bob", False),
        ("UID_MIN 70001\nUID_MAX 80000\n", "high", True),
        ("UID_MIN 500\n", "cronuser", False),
        ("", "alice", False),
        ("", "cronuser", True),
        ("#UID_MIN 2000\n", "alice", False),
        ("UID_MIN many\nUID_MAX -1\n", "alice", False),
        ("UID_MIN 2000x\n", "alice", False),
        ("UID_MIN 99999999999999999999999\n", "alice", False),
        ("UID_MIN 4294967295\n", "alice", False),
        ("UID_MAX 0x10\n", "alice", False),
        ("UID_MIN 0x5dd\n", "alice", True),
        ("UID_MIN 02735\n", "alice", True),
        ("UID_MIN 02734\n", "alice", False),
        ("UID_MIN 0\n", "cronuser", True),
        ("UID_MIN 3000\nUID_MAX 2000\n", "alice", False),  # or all users would be system users
    ],
)
def test_who_is_a_system_user(world: World, login_defs: str, user: str, system: bool) -> None:
    world.login_defs(login_defs)
    session = world.open_session("-u", user)
    assert session.result == (PAM_IGNORE if system else PAM_PERM_DENIED)


def edges() -> list[int]:
    """The first and last UID of each range of core/policy.py, and their neighbours."""
    ranges = [(1000, policy.REGULAR_LAST), *(entry[:2] for entry in policy.NOT_REGULAR), policy.CONTAINERS]
    found = {number + step for entry in ranges for number in entry for step in (-1, 0, 1)}
    # the last UID has a meaning of its own in the stack of pam_world
    return sorted(uid for uid in found if 0 < uid < policy.UID_LAST)


def test_the_daemon_has_the_same_rule(world: World) -> None:
    """While it is down, the module lets through those whom it would exempt by number, and nobody else."""
    users = {f"u{uid}": uid for uid in edges()}
    lines = [f"{user}:x:{uid}:{uid}::/:/bin/sh\n" for user, uid in users.items()]
    (world.base / "passwd").write_text("".join(lines))
    exempt = {user for user, uid in users.items() if policy.Exemptions().reason(uid, user)}
    assert len(exempt) > 8
    assert len(users) - len(exempt) > 8
    results = {user: world.open_session("-u", user).result for user in users}
    assert {user for user, result in results.items() if result == PAM_IGNORE} == exempt
    assert set(results.values()) == {PAM_IGNORE, PAM_PERM_DENIED}

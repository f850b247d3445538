# SPDX-License-Identifier: LGPL-2.1-or-later
"""A session that joins the namespace of its user, and its working directory."""

import subprocess

import pytest

from tests.pam.outcomes import CALL, MakeDaemon, assert_joined, assert_untouched
from tests.pam.pam_world import (
    PAM_PERM_DENIED,
    Namespace,
    Session,
    World,
)

pytestmark = [pytest.mark.pam, pytest.mark.timeout(120)]


def test_joins_the_namespace_of_its_user(world: World, daemon: MakeDaemon, private: Namespace) -> None:
    fake = daemon(open=[private.path])
    session = world.open_session("-l", "/tmp/marker")
    assert_joined(session, private)
    assert session.moved
    assert session.seen
    assert session.cwd == "/"
    assert (session.log, session.messages) == ([], [])
    assert fake.stop() == [CALL + "1500"]


def test_asks_for_the_uid_of_the_pam_user(world: World, daemon: MakeDaemon, private: Namespace) -> None:
    fake = daemon(open=[private.path])
    assert_joined(world.open_session("-u", "bob"), private)
    assert_joined(world.open_session("-u", "cronuser"), private)
    assert fake.stop() == [CALL + "1501", CALL + "500"]


def test_a_process_already_in_the_namespace_is_left_alone(
    world: World, daemon: MakeDaemon, private: Namespace
) -> None:
    fake = daemon(open=[private.path])
    session = world.open_session("-o", "2", "-w", "/tmp")
    assert_joined(session, private)
    assert session.cwd == "/tmp"
    assert len(fake.stop()) == 2


def test_a_process_already_in_the_namespace_keeps_a_deleted_working_directory(
    world: World, daemon: MakeDaemon, private: Namespace
) -> None:
    daemon(open=[private.path])
    session = world.open_session("-n", private.inner_path, "-w", "/tmp/work", "-d")
    assert_joined(session, private)
    assert not session.moved
    assert session.same_directory
    assert session.log == []


def test_fifty_sessions_leave_no_descriptor(world: World, daemon: MakeDaemon, private: Namespace) -> None:
    daemon(open=[private.path])
    assert_joined(world.open_session("-o", "50"), private)


def test_fifty_refused_sessions_leave_no_descriptor(world: World, daemon: MakeDaemon) -> None:
    daemon(open=["/etc/hostname"] * 4)
    session = world.open_session("-o", "50", "-q")
    assert session.result == PAM_PERM_DENIED
    assert_untouched(session)


def test_fifty_sessions_without_a_socket_leave_no_descriptor(world: World) -> None:
    session = world.open_session("-o", "50", "-q")
    assert session.result == PAM_PERM_DENIED
    assert_untouched(session)


def test_a_process_with_threads(world: World, daemon: MakeDaemon, private: Namespace) -> None:
    """gdm-session-worker; setns() alone gives EINVAL."""
    daemon(open=[private.path])
    assert_joined(world.open_session("-t", "4"), private)


def test_a_process_that_shares_its_working_directory(
    world: World, daemon: MakeDaemon, private: Namespace
) -> None:
    """As after vfork(); setns() alone gives EINVAL."""
    daemon(open=[private.path])
    assert_joined(world.open_session("-F"), private)


def test_only_the_calling_thread_moves(world: World, daemon: MakeDaemon, private: Namespace) -> None:
    daemon(open=[private.path])
    session = world.open_session("-T")
    assert_joined(session, private)
    assert session.leader == session.namespace_before


def test_with_pamtester(world: World, daemon: MakeDaemon, private: Namespace) -> None:
    """An independent program, with the control flag of the profile."""
    (world.base / "pam.d/polytmp-test").write_text(
        f"session required pam_permit.so\nsession required {world.build}/pam_polytmp.so\n"
    )
    fake = daemon(open=[private.path])
    environment = dict(world.environment)
    if world.build.name == "sanitize":
        library = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True)
        environment["LD_PRELOAD"] = library.strip()
        environment["ASAN_OPTIONS"] = "detect_leaks=0"  # pamtester leaks

    def pamtester(user: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*world.inside, "pamtester", "polytmp-test", user, "open_session", "close_session"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    assert pamtester("alice").returncode == 0
    fake.stop()
    world.stop_listening()
    assert pamtester("root").returncode == 0
    assert pamtester("cronuser").returncode == 0
    refused = pamtester("alice")
    assert refused.returncode != 0
    assert "ask your administrator" in refused.stdout + refused.stderr


# The working directory


def test_a_working_directory_in_tmp_becomes_the_private_one(
    world: World, daemon: MakeDaemon, private: Namespace
) -> None:
    world.shell("mkdir /tmp/work")
    daemon(open=[private.path])
    session = world.open_session("-w", "/tmp/work", "-l", "/tmp/marker")
    assert_joined(session, private)
    assert session.cwd == "/tmp/work"
    assert not session.same_directory  # not the host's /tmp/work
    assert session.log == []


def test_a_working_directory_elsewhere_is_kept(world: World, daemon: MakeDaemon, private: Namespace) -> None:
    daemon(open=[private.path])
    session = world.open_session("-w", "/usr/lib")
    assert_joined(session, private)
    assert session.cwd == "/usr/lib"
    assert session.same_directory


def assert_at_the_root(session: Session, namespace: Namespace, directory: str) -> None:
    assert_joined(session, namespace)
    assert session.cwd == "/"
    line = f"working directory {directory} is not available in the namespace of user alice, using /"
    assert session.log == [("NOTICE", line)]
    assert session.messages == []


def test_a_working_directory_that_is_missing_in_the_namespace(
    world: World, daemon: MakeDaemon, private: Namespace
) -> None:
    world.shell("mkdir /tmp/missing")
    daemon(open=[private.path])
    assert_at_the_root(world.open_session("-w", "/tmp/missing"), private, "/tmp/missing")


def test_a_deleted_working_directory(world: World, daemon: MakeDaemon, private: Namespace) -> None:
    world.shell("mkdir /tmp/gone")
    daemon(open=[private.path])
    assert_at_the_root(world.open_session("-w", "/tmp/gone", "-d"), private, "(unknown)")


def test_an_unreachable_working_directory(world: World, daemon: MakeDaemon, private: Namespace) -> None:
    """It is in another mount namespace: the kernel's getcwd() gives "(unreachable)/..."."""
    other = world.make_namespace("mkdir /tmp/elsewhere")
    pid = other.inner_path.split("/")[2]
    daemon(open=[private.path])
    session = world.open_session("-w", f"/proc/{pid}/root/tmp/elsewhere")
    assert_at_the_root(session, private, "(unknown)")


@pytest.mark.parametrize("path", ["/tmp/link", "/tmp/link/deeper"])
def test_the_working_directory_is_not_reached_through_a_symlink(
    world: World, daemon: MakeDaemon, path: str
) -> None:
    """Root could pass through a directory that the user may not enter."""
    world.shell(f"mkdir -p {path}; mkdir -p -m 700 /tmp/secret; mkdir -p /tmp/secret/deeper")
    private = world.make_namespace("mkdir -p -m 700 /tmp/secret/deeper; ln -s secret /tmp/link")
    daemon(open=[private.path])
    assert_at_the_root(world.open_session("-w", path), private, path)

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks of how a session ended: joined, refused or skipped, with nothing else changed.

Not here: the world in which sessions are opened (pam_world).
"""

from collections.abc import Callable

from tests.pam.pam_world import (
    PAM_ERROR_MSG,
    PAM_IGNORE,
    PAM_PERM_DENIED,
    PAM_SUCCESS,
    Daemon,
    Namespace,
    Session,
    World,
)

MakeDaemon = Callable[..., Daemon]

CALL = "acquire "


def assert_untouched(session: Session, cwd: str = "/") -> None:
    assert not session.moved
    assert session.cwd == cwd
    assert session.same_directory
    assert_clean(session)


def assert_clean(session: Session) -> None:
    assert session.fds == session.after_fds == session.fds_before
    assert session.after_namespace == session.namespace_before
    assert session.environment == 0
    assert session.closed == PAM_SUCCESS


def assert_refused(
    session: Session, reason: str, name: str = "", user: str = "alice", cwd: str = "/"
) -> None:
    """PAM_PERM_DENIED, one line in the log and one for the user; the process has not moved."""
    assert session.result == PAM_PERM_DENIED
    assert_untouched(session, cwd)
    detail = f"{name}: {reason}" if name else reason
    assert session.log == [("ERR", f"no private /tmp for user {user}, refusing the session: {detail}")]
    told = f"polytmp: cannot give you a private /tmp: {reason}; ask your administrator"
    assert session.messages == [(PAM_ERROR_MSG, told)]


def assert_skipped(session: Session, level: str, line: str) -> None:
    assert session.result == PAM_IGNORE
    assert_untouched(session)
    assert session.log == [(level, line)]
    assert session.messages == []


def assert_joined(session: Session, namespace: Namespace) -> None:
    assert session.result == PAM_SUCCESS
    assert session.namespace == namespace.inode
    assert_clean(session)


def assert_unreachable_for(world: World, user: str) -> Session:
    """A regular user is refused, a system user is let through; returns the session."""
    session = world.open_session("-u", user)
    assert_untouched(session)
    assert len(session.log) == 1
    level, line = session.log[0]
    assert "polytmpd cannot be reached: " in line
    assert user in line
    if user == "cronuser":
        assert (session.result, level, session.messages) == (PAM_IGNORE, "WARNING", [])
    else:
        assert (session.result, level, len(session.messages)) == (PAM_PERM_DENIED, "ERR", 1)
    return session

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Error replies of polytmpd, and replies that the module must not trust."""

import pytest

from tests.pam.outcomes import (
    MakeDaemon,
    assert_refused,
    assert_untouched,
)
from tests.pam.pam_world import (
    PAM_IGNORE,
    PAM_PERM_DENIED,
    Namespace,
    World,
)

pytestmark = [pytest.mark.pam, pytest.mark.timeout(120)]

ANSWERED = [
    "org.polytmp1.Error.Failed",
    "org.polytmp1.Error.NotPolyinstantiated",
    "org.freedesktop.DBus.Error.AccessDenied",
    "org.freedesktop.DBus.Error.InvalidArgs",
]


def test_an_exempt_user_is_left_alone_silently(world: World, daemon: MakeDaemon) -> None:
    daemon(error="exempt", text="alice is exempt")
    session = world.open_session()
    assert session.result == PAM_IGNORE
    assert_untouched(session)
    assert (session.log, session.messages) == ([], [])


@pytest.mark.parametrize("user", ["alice", "cronuser"])
@pytest.mark.parametrize("name", ANSWERED)
def test_an_error_from_polytmpd_refuses_every_user(
    world: World, daemon: MakeDaemon, name: str, user: str
) -> None:
    daemon(error=name, text="no space left")
    session = world.open_session("-u", user)
    assert_refused(session, "no space left", name, user)


def test_an_error_without_text(world: World, daemon: MakeDaemon) -> None:
    daemon(error="org.polytmp1.Error.Failed", text="")
    session = world.open_session()
    assert_refused(session, "org.polytmp1.Error.Failed", "org.polytmp1.Error.Failed")


def test_a_text_with_control_characters_stays_one_line(world: World, daemon: MakeDaemon) -> None:
    daemon(error="org.polytmp1.Error.Failed", text="a\nb\x1b[2Jc")
    session = world.open_session()
    assert_refused(session, "a b [2Jc", "org.polytmp1.Error.Failed")


@pytest.mark.parametrize(("text", "told"), [("is masked.", "is masked"), (".", ""), ("wait...", "wait..")])
def test_the_users_message_drops_a_full_stop(world: World, daemon: MakeDaemon, text: str, told: str) -> None:
    daemon(error="org.polytmp1.Error.Failed", text=text)
    assert_refused(world.open_session(), told, "org.polytmp1.Error.Failed")


def test_a_silent_session_reports_to_the_log_only(world: World, daemon: MakeDaemon) -> None:
    daemon(error="org.polytmp1.Error.Failed", text="no")
    session = world.open_session("-q")
    assert session.result == PAM_PERM_DENIED
    assert session.messages == []
    assert len(session.log) == 1


def test_after_a_refusal_the_working_directory_is_as_it_was(world: World, daemon: MakeDaemon) -> None:
    world.shell("mkdir /tmp/work")
    daemon(error="org.polytmp1.Error.Failed", text="no")
    session = world.open_session("-w", "/tmp/work")
    assert_refused(session, "no", "org.polytmp1.Error.Failed", cwd="/tmp/work")


# Hostile replies

NO_NAMESPACE = "polytmpd's reply contains no namespace: Protocol error"
NOT_OURS = "polytmpd's reply is not a mount namespace of this host"


@pytest.mark.parametrize(
    "answer",
    [
        {},  # no descriptor
        {"reply": "", "open": ["/etc/hostname"]},
        {"open": ["/etc/hostname"] * 2},
        {"open": ["/etc/hostname"] * 4},
        {"open": ["/etc/hostname"] * 250},
        {"reply": "exempt", "open": ["/etc/hostname"]},
        {"reply": "refused x y", "open": ["/etc/hostname"]},
        {"reply": "namespace ", "open": ["/etc/hostname"]},
        {"reply": "namespace\0", "open": ["/etc/hostname"]},
        {"reply": "namespaces", "open": ["/etc/hostname"]},
        {"reply": "exempted user"},
        {"reply": "refused"},
        {"reply": "refused "},
        {"reply": "l\1\0\1"},
        {"reply": "\xff" * 100},
        {"reply": "x", "times": 60_000},
        {"reply": "exempt x", "times": 1000},  # too long, and cut it would be exempt
        {"reply": "namespace", "times": 500, "open": ["/etc/hostname"]},
    ],
    ids=lambda answer: f"{answer.get('reply', 'namespace')[:12]!r}-{len(answer.get('open', []))}",
)
def test_a_reply_that_is_none(world: World, daemon: MakeDaemon, answer: dict[str, object]) -> None:
    daemon(**answer)
    assert_refused(world.open_session(), NO_NAMESPACE)


def test_many_descriptors_with_a_namespace(world: World, daemon: MakeDaemon, private: Namespace) -> None:
    """The module closes all of them."""
    daemon(open=[private.path] + ["/dev/null"] * 6)
    assert_refused(world.open_session(), NO_NAMESPACE)


@pytest.mark.parametrize(
    "answer",
    [
        {"open": ["/etc/hostname"]},
        {"open": ["/tmp"]},
        {"open": ["/proc/self/ns/net"]},
        {"open": ["/proc/self/ns/pid"]},
        {"open": ["/proc/self/ns/user"]},
        {"open": ["/proc/self/mountinfo"]},
        {"open": ["/dev/null"]},
        {"pipe": True},
    ],
    ids=str,
)
def test_a_descriptor_that_is_not_a_mount_namespace(
    world: World, daemon: MakeDaemon, answer: dict[str, object]
) -> None:
    daemon(**answer)
    assert_refused(world.open_session(), NOT_OURS)


def test_a_mount_namespace_made_by_a_user(world: World, daemon: MakeDaemon) -> None:
    """CVE-2022-31214 in firejail --join: the user controls everything in it, even setuid programs."""
    theirs = world.make_namespace(":", "--user", "--map-root-user")
    daemon(open=[theirs.path])
    assert_refused(world.open_session(), NOT_OURS)

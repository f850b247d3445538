# SPDX-License-Identifier: LGPL-2.1-or-later
"""Error replies of polytmpd, and replies that the module must not trust."""

import pytest

from tests.pam.outcomes import (
    DBUS,
    MakeDaemon,
    assert_joined,
    assert_refused,
    assert_skipped,
    assert_untouched,
)
from tests.pam.pam_world import (
    PAM_IGNORE,
    PAM_PERM_DENIED,
    Bus,
    Namespace,
    World,
)

pytestmark = [pytest.mark.pam, pytest.mark.timeout(120)]

UNREACHABLE = [
    f"{DBUS}ServiceUnknown",
    f"{DBUS}NameHasNoOwner",
    f"{DBUS}NoReply",
    f"{DBUS}Timeout",
    f"{DBUS}TimedOut",
    f"{DBUS}Disconnected",
    f"{DBUS}NoServer",
    f"{DBUS}Spawn.ExecFailed",
    f"{DBUS}Spawn.ChildExited",
    "org.freedesktop.systemd1.UnitMasked",
    "org.freedesktop.systemd1.NoSuchUnit",
]
ANSWERED = [
    "org.polytmp1.Error.Failed",
    "org.polytmp1.Error.Exempted",  # not Exempt
    "org.polytmp1.Error.NotPolyinstantiated",
    f"{DBUS}AccessDenied",
    f"{DBUS}InvalidArgs",
    f"{DBUS}UnknownMethod",
    f"{DBUS}TimeoutError",  # a longer name than Timeout
]


def test_an_exempt_user_is_left_alone_silently(world: World, bus: Bus, daemon: MakeDaemon) -> None:
    daemon(error="org.polytmp1.Error.Exempt", text="alice is exempt")
    session = world.open_session(bus=bus.address)
    assert session.result == PAM_IGNORE
    assert_untouched(session)
    assert (session.log, session.messages) == ([], [])


@pytest.mark.parametrize("user", ["alice", "cronuser"])
@pytest.mark.parametrize("name", ANSWERED)
def test_an_error_from_polytmpd_refuses_every_user(
    world: World, bus: Bus, daemon: MakeDaemon, name: str, user: str
) -> None:
    daemon(error=name, text="no space left")
    session = world.open_session("-u", user, bus=bus.address)
    assert_refused(session, "no space left", name, user)


@pytest.mark.parametrize("name", UNREACHABLE)
def test_without_polytmpd_only_regular_users_are_refused(
    world: World, bus: Bus, daemon: MakeDaemon, name: str
) -> None:
    daemon(error=name, text="not today")
    session = world.open_session(bus=bus.address)
    assert_refused(session, "polytmpd cannot be reached: not today", name)
    assert_skipped(
        world.open_session("-u", "cronuser", bus=bus.address),
        "WARNING",
        "system user cronuser stays in the caller's directories, "
        f"polytmpd cannot be reached: {name}: not today",
    )


def test_an_error_without_text(world: World, bus: Bus, daemon: MakeDaemon) -> None:
    daemon(error="org.polytmp1.Error.Failed", text="")
    session = world.open_session(bus=bus.address)
    assert_refused(session, "org.polytmp1.Error.Failed", "org.polytmp1.Error.Failed")


def test_a_text_with_control_characters_stays_one_line(world: World, bus: Bus, daemon: MakeDaemon) -> None:
    daemon(error="org.polytmp1.Error.Failed", text="a\nb\x1b[2Jc")
    session = world.open_session(bus=bus.address)
    assert_refused(session, "a b [2Jc", "org.polytmp1.Error.Failed")


@pytest.mark.parametrize(("text", "told"), [("is masked.", "is masked"), (".", ""), ("wait...", "wait..")])
def test_the_users_message_drops_a_full_stop(
    world: World, bus: Bus, daemon: MakeDaemon, text: str, told: str
) -> None:
    daemon(error="org.polytmp1.Error.Failed", text=text)
    assert_refused(world.open_session(bus=bus.address), told, "org.polytmp1.Error.Failed")


def test_a_silent_session_reports_to_the_log_only(world: World, bus: Bus, daemon: MakeDaemon) -> None:
    daemon(error="org.polytmp1.Error.Failed", text="no")
    session = world.open_session("-q", bus=bus.address)
    assert session.result == PAM_PERM_DENIED
    assert session.messages == []
    assert len(session.log) == 1


def test_after_a_refusal_the_working_directory_is_as_it_was(
    world: World, bus: Bus, daemon: MakeDaemon
) -> None:
    world.shell("mkdir /tmp/work")
    daemon(error="org.polytmp1.Error.Failed", text="no")
    session = world.open_session("-w", "/tmp/work", bus=bus.address)
    assert_refused(session, "no", "org.polytmp1.Error.Failed", cwd="/tmp/work")


# Hostile replies

NO_NAMESPACE = "polytmpd's reply contains no namespace: Protocol error"
NOT_OURS = "polytmpd's reply is not a mount namespace of this host"


@pytest.mark.parametrize(
    "answer",
    [
        {"signature": "", "body": []},
        {"signature": "s", "body": ["/proc/1/ns/mnt"]},
        {"signature": "u", "body": [0]},
        {"signature": "hh", "body": [0, 1], "open": ["/etc/hostname", "/etc/hostname"]},
        {"signature": "hs", "body": [0, "x"], "open": ["/etc/hostname"]},
        {"signature": "ah", "body": [[0]], "open": ["/etc/hostname"]},
    ],
    ids=lambda answer: answer["signature"] or "nothing",
)
def test_a_reply_of_the_wrong_type(
    world: World, bus: Bus, daemon: MakeDaemon, answer: dict[str, object]
) -> None:
    daemon(**answer)
    assert_refused(world.open_session(bus=bus.address), NO_NAMESPACE)


def test_a_missing_descriptor(world: World, bus: Bus, daemon: MakeDaemon) -> None:
    daemon(body=[0])
    session = world.open_session(bus=bus.address)
    assert session.result == PAM_PERM_DENIED
    assert_untouched(session)
    assert len(session.log) == len(session.messages) == 1


def test_an_index_past_the_descriptors(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    daemon(body=[7], open=[private.path])
    session = world.open_session(bus=bus.address)
    assert session.result == PAM_PERM_DENIED
    assert_untouched(session)


def test_many_descriptors_with_one_namespace(
    world: World, bus: Bus, daemon: MakeDaemon, private: Namespace
) -> None:
    daemon(body=[9], open=["/etc/hostname"] * 9 + [private.path] + ["/dev/null"] * 6)
    assert_joined(world.open_session("-o", "3", bus=bus.address), private)


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
    world: World, bus: Bus, daemon: MakeDaemon, answer: dict[str, object]
) -> None:
    daemon(**answer)
    assert_refused(world.open_session(bus=bus.address), NOT_OURS)


def test_a_mount_namespace_made_by_a_user(world: World, bus: Bus, daemon: MakeDaemon) -> None:
    """CVE-2022-31214 in firejail --join: the user controls everything in it, even setuid programs."""
    theirs = world.make_namespace(":", "--user", "--map-root-user")
    daemon(open=[theirs.path])
    assert_refused(world.open_session(bus=bus.address), NOT_OURS)

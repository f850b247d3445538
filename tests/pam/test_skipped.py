# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sessions for which the module does not call polytmpd: root, unknown users, chroots, system users."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from polytmpd import config
from polytmpd.core import policy
from tests.pam.outcomes import MakeDaemon, assert_refused, assert_skipped, assert_untouched
from tests.pam.pam_world import (
    CHROOT,
    PAM_IGNORE,
    PAM_PERM_DENIED,
    PAM_USER_UNKNOWN,
    Namespace,
    World,
    plain_build,
)

pytestmark = [pytest.mark.pam, pytest.mark.timeout(120)]


@pytest.mark.parametrize("user", ["root", "toor"])
def test_root_is_never_moved_and_polytmpd_is_not_asked(
    world: World, daemon: MakeDaemon, private: Namespace, user: str
) -> None:
    fake = daemon(open=[private.path])
    session = world.open_session("-u", user)
    assert session.result == PAM_IGNORE
    assert_untouched(session)
    assert (session.log, session.messages) == ([], [])
    assert fake.stop() == []


@pytest.mark.parametrize("arguments", [[], ["-T"], ["-e", "1500"], ["-w", "/tmp"]], ids=str)
def test_root_without_a_socket(world: World, arguments: list[str]) -> None:
    session = world.open_session("-u", "root", *arguments)
    assert session.result == PAM_IGNORE
    assert (session.log, session.messages) == ([], [])


def test_an_unknown_user(world: World, daemon: MakeDaemon, private: Namespace) -> None:
    fake = daemon(open=[private.path])
    session = world.open_session("-u", "nobody-knows")
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


def test_a_process_in_a_chroot_is_left_alone(world: World, daemon: MakeDaemon, private: Namespace) -> None:
    """As in an image build. The session must work, and the chroot has its own /tmp."""
    fake = daemon(open=[private.path])
    world.shell(f"{CHROOT}\nmount --rbind /proc proc")
    session = world.open_session("-r", "/tmp/chroot")
    assert_skipped(session, "NOTICE", "user alice is in a chroot, keeping the chroot's /tmp")
    assert fake.stop() == []


@plain_build
def test_a_process_in_a_chroot_without_proc_is_left_alone(world: World) -> None:
    world.shell(f"{CHROOT}\nmkdir -p proc/thread-self/fd")  # the harness counts descriptors in it
    session = world.open_session("-r", "/tmp/chroot")
    assert_skipped(session, "NOTICE", "user alice is in a chroot, keeping the chroot's /tmp")


@plain_build
def test_a_process_without_proc_that_may_not_be_in_a_chroot(world: World) -> None:
    """As in a sandbox with InaccessiblePaths=/proc: its /tmp may be the shared one."""
    hidden = world.make_namespace("mount -t tmpfs tmpfs /proc; mkdir -p /proc/thread-self/fd")
    session = world.open_session("-n", hidden.inner_path)
    assert_refused(session, "cannot compare / with /proc/1/root: No such file or directory")


def test_a_thread_outside_its_processs_namespace(
    world: World, daemon: MakeDaemon, private: Namespace
) -> None:
    fake = daemon(open=[private.path])
    other = world.make_namespace()
    session = world.open_session("-T", "-n", other.inner_path)
    assert_refused(session, "the calling thread is not in its process's mount namespace")
    assert session.namespace == other.inode
    assert fake.stop() == []


# System users, while polytmpd cannot be reached

UNREACHABLE = "polytmpd cannot be reached: No such file or directory"

LOGIN_DEFS = [
    ("UID_MIN 1000\nUID_MAX 60000\n", 1000),
    ("UID_MIN 1501\n", 1501),
    ("UID_MIN\t500\n", 500),
    ("  UID_MIN  \t 500  \t\n", 500),
    ("", 1000),
    ("#UID_MIN 2000\n", 1000),
    (" # UID_MIN 2000\n", 1000),
    ("UID_MIN 1500\nUID_MIN 500\n", 500),  # the last one counts
    ("UID_MIN 500\nUID_MIN 1500\n", 1500),
    ("UID_MIN 500\nUID_MIN many\n", 1000),
    ("UID_MIN many\nUID_MIN 500\n", 500),
    ("UID_MAX 400\nUID_MAX 60000\nUID_MIN 500\n", 500),
    ("UID_MIN 500\nUID_MAX 60000\nUID_MAX 400\n", 1000),
    ("UID_MIN=500\n", 1000),
    ("UID_MIN = 500\n", 1000),
    ("uid_min 500\n", 1000),
    ("SYS_UID_MIN 500\n", 1000),
    ("UID_MIN 500 # ours\n", 1000),
    ('UID_MIN "500"\n', 500),
    ('UID_MIN "500" # ours\n', 500),
    ("UID_MIN 500", 500),
    ("UID_MIN 500\r\n", 500),
    ("UID_MIN 500\rUID_MIN 600\n", 1000),
    ("UID_MIN 500\0 UID_MIN 600\n", 500),
    ("UID_MIN\xa0500\n", 1000),
    ("\xe4\xf6\xfc\nUID_MIN 500\n", 500),
    ("UID_MIN\n", 1000),
    ("UID_MIN \n", 1000),
    ("UID_MIN many\nUID_MAX -1\n", 1000),
    ("UID_MIN 2000x\n", 1000),
    ("UID_MIN 1_500\n", 1000),
    ("UID_MIN +1500\n", 1000),
    ("UID_MIN 99999999999999999999999\n", 1000),
    ("UID_MIN 4294967295\n", 1000),
    ("UID_MIN 0x5dd\n", 1501),
    ("UID_MIN 0X5DD\n", 1501),
    ("UID_MIN 0x\n", 1000),
    ("UID_MIN 0b10111011101\n", 1000),
    ("UID_MIN 02735\n", 1501),
    ("UID_MIN 000000000000002735\n", 1501),
    ("UID_MIN 0\n", 1000),
    ("UID_MIN 1500\nUID_MAX 1500\n", 1500),
    ("UID_MIN 3000\nUID_MAX 2000\n", 1000),  # or all users would be system users
    ("UID_MIN 2000\nUID_MAX 0x10\n", 1000),
]


@pytest.mark.parametrize(("text", "uid_min"), LOGIN_DEFS)
def test_login_defs(world: World, text: str, uid_min: int) -> None:
    """polytmpd and the module read the same file alike."""
    etc = world.base / "root/etc"
    etc.mkdir(parents=True)
    for path in (etc / "login.defs", world.base / "login.defs"):
        path.write_bytes(text.encode("latin-1"))
    assert config.load(world.base / "root")[0].exemptions.uid_min == uid_min
    add_users(world, {"below": uid_min - 1, "first": uid_min})
    assert world.open_session("-u", "below").result == PAM_IGNORE
    assert world.open_session("-u", "first").result == PAM_PERM_DENIED


# Values that shadow does not read alike, on purpose: it takes signs, and any UID_MAX.
SHADOWS_OWN = {
    text for text, _ in LOGIN_DEFS if re.search(r"UID_MAX|[-+]|\b0\n|0[bx]|9999|4294967295", text)
}


@plain_build
@pytest.mark.parametrize(("text", "uid_min"), [entry for entry in LOGIN_DEFS if entry[0] not in SHADOWS_OWN])
def test_shadow_reads_login_defs_alike(base: Path, build: Path, text: str, uid_min: int) -> None:
    """The first user that useradd(8) makes has the UID UID_MIN."""
    prefix = Path(tempfile.mkdtemp(prefix="shadow-", dir=base))
    (prefix / "etc").mkdir()
    (prefix / "etc/login.defs").write_bytes(text.encode("latin-1"))
    for name in ("passwd", "shadow", "group", "gshadow"):
        (prefix / "etc" / name).write_text("")
    (prefix / "etc/group").write_text("users:x:100:\n")
    command = ["/usr/sbin/useradd", "--prefix", str(prefix), "--no-user-group", "--no-create-home", "first"]
    subprocess.run(command, check=True, capture_output=True, timeout=20)
    assert (prefix / "etc/passwd").read_text().split(":")[2] == str(uid_min)


def test_login_defs_that_cannot_be_read(world: World) -> None:
    """Then it is not known who is a system user."""
    world.shell(
        "mkdir -p /tmp/etc; cp -a /etc/. /tmp/etc; rm /tmp/etc/login.defs; mkdir /tmp/etc/login.defs"
    )
    world.shell(
        "cp /etc/passwd /tmp/etc/; mount --bind /etc/pam.d /tmp/etc/pam.d; mount --rbind /tmp/etc /etc"
    )
    assert_refused(world.open_session("-u", "cronuser"), UNREACHABLE, user="cronuser")


def add_users(world: World, users: dict[str, int], home: str = "/") -> None:
    lines = [f"{user}:x:{uid}:{uid}::{home}:/bin/sh\n" for user, uid in users.items()]
    (world.base / "passwd").write_text("".join(lines))


def edges() -> list[int]:
    """The first and last UID of each range of core/policy.py, and their neighbours."""
    ranges = [(1000, policy.REGULAR_LAST), *(entry[:2] for entry in policy.NOT_REGULAR), policy.CONTAINERS]
    found = {number + step for entry in ranges for number in entry for step in (-1, 0, 1)}
    # the last UID has a meaning of its own in the stack of pam_world
    return sorted(uid for uid in found if 0 < uid < policy.UID_LAST)


def test_the_module_lets_nobody_in_whom_polytmpd_may_call_regular(world: World) -> None:
    """A user record may say `regular` of any UID above 60000, which the module does not read."""
    users = {f"u{uid}": uid for uid in edges()}
    add_users(world, users)
    regular = policy.Facts(disposition="regular")

    def may_be_regular(uid: int, user: str) -> bool:
        rule = policy.Exemptions()
        return not rule.reason(uid, user) or (
            policy.Need.RECORD in rule.need(uid, user) and not rule.reason(uid, user, regular)
        )

    results = {user: world.open_session("-u", user).result for user in users}
    let_in = {user for user, result in results.items() if result == PAM_IGNORE}
    assert let_in == {user for user, uid in users.items() if not may_be_regular(uid, user)}
    assert let_in == {"u999", "u65534", "u65535"}
    assert set(results.values()) == {PAM_IGNORE, PAM_PERM_DENIED}


def test_a_high_uid_min_makes_nobody_above_60000_a_system_user(world: World) -> None:
    world.login_defs("UID_MIN 70001\nUID_MAX 80000\n")
    assert world.open_session("-u", "alice").result == PAM_IGNORE
    assert_refused(world.open_session("-u", "high"), UNREACHABLE, user="high")


@pytest.mark.parametrize(
    ("name", "link", "system"),
    [
        ("unit", "unit", True),
        ("unit", None, False),
        ("unit", "unit2", False),
        ("unit2", "unit", False),
        ("unit", "", False),
    ],
)
def test_a_dynamic_user_is_one_whom_pid_1_names(
    world: World, name: str, link: str | None, system: bool
) -> None:
    world.shell("mount -t tmpfs tmpfs /run/systemd; mkdir /run/systemd/dynamic-uid")
    if link:
        world.shell(f"ln -s {link} /run/systemd/dynamic-uid/direct:61184")
    elif link is not None:
        world.shell("touch /run/systemd/dynamic-uid/direct:61184")
    add_users(world, {name: 61184, "other": 61185})
    assert world.open_session("-u", name).result == (PAM_IGNORE if system else PAM_PERM_DENIED)
    assert world.open_session("-u", "other").result == PAM_PERM_DENIED


@pytest.mark.parametrize(
    ("links", "known"),
    [
        ({"unit": "61184", "61184": "unit"}, True),
        ({"unit": "61184"}, False),
        ({"61184": "unit"}, False),
        ({"unit": "61184", "61184": "other"}, False),
        ({"unit": "unit"}, False),
        ({}, False),
    ],
)
def test_a_dynamic_user_whom_only_pid_1_knows(world: World, links: dict[str, str], known: bool) -> None:
    """PID 1 opens the session of a unit (PAMName=) where nss-systemd does not find its dynamic user."""
    world.shell("mount -t tmpfs tmpfs /run/systemd; mkdir /run/systemd/dynamic-uid")
    for link, target in links.items():
        world.shell(f"ln -s {target} /run/systemd/dynamic-uid/direct:{link}")
    session = world.open_session("-u", "unit")
    assert_untouched(session)
    if known:  # the next module of the stack does not know the user, so there is no result
        assert session.log == [("INFO", "dynamic user unit keeps the host's directories")]
    else:
        assert session.result == PAM_USER_UNKNOWN
        assert session.log == [("ERR", "user unknown: unit")]
    for name in ("../unit", "61184", "x" * 300, "/"):
        assert world.open_session("-u", name).result == PAM_USER_UNKNOWN


@pytest.mark.parametrize(
    ("home", "system"),
    [("/run/gdm3/home/gdm-greeter", True), ("/home/gdm-greeter", False), ("/running", False), ("/", False)],
)
def test_a_greeter_has_its_home_in_run(world: World, home: str, system: bool) -> None:
    add_users(world, {"gdm-greeter": 60578, "last": 60705, "before": 60577, "after": 60706}, home)
    for user in ("gdm-greeter", "last"):
        assert world.open_session("-u", user).result == (PAM_IGNORE if system else PAM_PERM_DENIED)
    for user in ("before", "after"):
        assert world.open_session("-u", user).result == PAM_PERM_DENIED

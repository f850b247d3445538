# SPDX-License-Identifier: LGPL-2.1-or-later
"""pam_polytmp.so where users meet: commands run as another user, and processes that serve several users.

Not here: a single login (test_pam_polytmp), real programs (tests/e2e/test_handover).
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pam.pam_world import (
    CHROOT,
    PAM_AUTH_ERR,
    PAM_IGNORE,
    PAM_PERM_DENIED,
    PAM_SUCCESS,
    Daemon,
    Namespace,
    Step,
    World,
)

pytestmark = [pytest.mark.pam, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
INSTALL, SOURCE = ROOT / "docs/install.md", ROOT / "pam/pam_polytmp.c"
MakeDaemon = Callable[..., Daemon]

ALICE, BOB = 1500, 1501
WARNING = (
    "this process opens sessions for several users (UID {}, now user {}), "
    "so it stays in the directories that it came from"
)

REFUSED = "no private /tmp for user alice, refusing the session: the process has a session"


@pytest.fixture
def alices(world: World) -> Namespace:
    return world.make_namespace("mkdir /tmp/work; touch /tmp/work/of-alice")


@pytest.fixture
def bobs(world: World) -> Namespace:
    return world.make_namespace("mkdir /tmp/work")


@pytest.fixture
def served(daemon: MakeDaemon, alices: Namespace, bobs: Namespace) -> Daemon:
    """A daemon with a namespace for each of two users; anyone else is exempt."""
    return daemon(
        users={str(ALICE): [alices.path], str(BOB): [bobs.path]},
        others="exempt",
    )


def host(world: World) -> int:
    return Path(f"/proc/{world.init}/ns/mnt").stat().st_ino


def namespaces(steps: list[Step]) -> list[int]:
    return [step.namespace for step in steps]


# -- commands and logins -----------------------------------------------------------------------------

COMMANDS = ["sudo", "su", "runuser", "doas", "polkit-1", "pkexec"]
LOGINS = [
    "sudo-i",
    "su-l",
    "runuser-l",
    "sshd",
    "login",
    "cron",
    "atd",
    "systemd-user",
    "systemd-run0",
    "sudoers",
]


@pytest.mark.parametrize("service", COMMANDS)
def test_a_command_stays_where_its_caller_is(
    world: World, served: Daemon, alices: Namespace, service: str
) -> None:
    world.module("debug", service=service)
    session = world.open_session("-s", service, "-u", "bob", "-n", alices.inner_path)
    assert session.result == PAM_IGNORE
    assert session.namespace == session.after_namespace == alices.inode
    assert session.log == [
        ("DEBUG", f"service {service} runs commands (name): user bob stays in the caller's directories")
    ]
    assert session.messages == []
    assert served.stop() == []


def documented_servers() -> dict[str, str]:
    """PAM service → whose directories, as docs/install.md has them."""
    text = INSTALL.read_text().partition("### Servers\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    return {row[1].strip(" `"): row[2].strip() for row in rows}


@pytest.mark.parametrize(("service", "place"), documented_servers().items())
def test_a_server_is_where_the_documentation_says(
    world: World,
    served: Daemon,
    alices: Namespace,
    bobs: Namespace,
    service: str,
    place: str,
) -> None:
    world.module("debug", service=service)
    session = world.open_session("-s", service, "-u", "bob", "-n", alices.inner_path)
    if place == "the user's":
        assert session.namespace == bobs.inode
        assert session.after_namespace == alices.inode
    else:
        assert place == "the server's"
        assert (session.result, session.namespace) == (PAM_IGNORE, alices.inode)
        assert session.log == [
            ("DEBUG", f"service {service} is a server (name): user bob stays in the caller's directories")
        ]
        assert served.stop() == []


def test_all_servers_are_documented() -> None:
    table = re.search(r"SERVER_SERVICES\[\] = \{\n(.*?)\};", SOURCE.read_text(), re.DOTALL)
    assert table
    left = {service for service, place in documented_servers().items() if place == "the server's"}
    assert set(re.findall(r'^ +"([\w-]+)"', table[1], re.MULTILINE)) == left


@pytest.mark.parametrize("service", LOGINS)
def test_a_login_goes_to_its_user(
    world: World, served: Daemon, alices: Namespace, bobs: Namespace, service: str
) -> None:
    """From another user's namespace as well, and the process returns to it."""
    world.module("debug", service=service)
    session = world.open_session("-s", service, "-u", "bob", "-n", alices.inner_path)
    assert session.result == PAM_SUCCESS
    assert session.namespace == bobs.inode
    assert session.after_namespace == alices.inode
    assert session.after_fds == session.fds_before
    assert session.log[0] == (
        "DEBUG",
        f"service {service} is a login (default): user bob gets their own directories",
    )


@pytest.mark.parametrize(
    ("service", "arguments", "moved"),
    [
        ("sudo", ["user"], True),
        ("sshd", ["caller"], False),
        ("sshd", ["caller", "user"], True),
        ("sudo", ["user", "caller"], False),
        ("sudo", ["users"], False),
    ],
    ids=str,
)
def test_an_argument_goes_before_the_name(
    world: World, served: Daemon, service: str, arguments: list[str], moved: bool
) -> None:
    world.module("debug", *arguments, service=service)
    session = world.open_session("-s", service, "-u", "bob")
    assert session.moved == moved
    if "users" in arguments:
        assert session.log[0] == ("ERR", "unknown module argument 'users', ignoring")
    else:
        what = "is a login" if moved else "runs commands"
        assert session.log[0][1].startswith(f"service {service} {what} (argument): user bob ")


def test_a_command_asks_for_nothing(world: World) -> None:
    """Without a daemon and without privileges it works all the same."""
    world.module(service="sudo")
    for arguments in (["-u", "alice"], ["-u", "alice", "-e", "1500"]):
        session = world.open_session("-s", "sudo", *arguments)
        assert session.result == PAM_IGNORE
        assert (session.log, session.messages) == ([], [])


# -- processes that open sessions for several users ---------------------------------------------------


def test_users_one_after_the_other(world: World, served: Daemon, alices: Namespace, bobs: Namespace) -> None:
    """Each open and close has a PAM handle of its own, and libpam unloads the module in between."""
    steps = world.steps("+alice,-alice,+bob,-bob,+alice")
    home = host(world)
    assert namespaces(steps) == [alices.inode, home, bobs.inode, home, alices.inode]
    assert len({step.fds for step in steps}) == 1
    assert world.log.take() == []


def test_users_at_the_same_time(world: World, served: Daemon, alices: Namespace) -> None:
    steps = world.steps("+alice,+bob,+alice,-alice,-bob,-alice,+alice")
    home = host(world)
    assert namespaces(steps) == [alices.inode, *[home] * 5, alices.inode]
    assert [step.result for step in steps[1:3]] == [7, 7]  # the stack's way to show PAM_IGNORE
    assert world.log.take() == [
        ("WARNING", WARNING.format(ALICE, "bob")),
        ("WARNING", WARNING.format(ALICE, "alice")),
    ]


@pytest.mark.parametrize("other", ["root", "toor", "cronuser"])
def test_others_count_although_they_are_never_moved(
    world: World, served: Daemon, alices: Namespace, other: str
) -> None:
    """Otherwise a system user's or root's requests would look into a user's directories."""
    home = host(world)
    steps = world.steps(f"+{other},+alice,-alice,-{other},+alice,+{other}")
    assert namespaces(steps) == [home, home, home, home, alices.inode, home]


def test_a_user_with_two_sessions_stays_until_the_last_is_closed(
    world: World, served: Daemon, alices: Namespace
) -> None:
    steps = world.steps("+alice,+alice,-alice,-alice,-alice")
    assert namespaces(steps) == [alices.inode] * 3 + [host(world)] * 2


@pytest.fixture
def refusing(daemon: MakeDaemon, bobs: Namespace) -> Daemon:
    """A daemon that refuses everyone but bob."""
    return daemon(users={str(BOB): [bobs.path]}, others="refused org.polytmp1.Error.Failed")


def test_a_refused_session_counts(world: World, refusing: Daemon) -> None:
    """An optional module lets it in, and bob's directories are not for it. A required one does not, and the
    host's are not for bob. So bob is refused, too; root is not.
    """
    steps = world.steps("+alice,+bob,+root")
    assert namespaces(steps) == [host(world)] * 3
    assert [step.result for step in steps] == [PAM_PERM_DENIED, PAM_PERM_DENIED, PAM_AUTH_ERR]
    open_still = "a session of UID 1500 in this process was refused and may be open"
    assert world.log.take()[1:] == [
        ("ERR", f"no private /tmp for user bob, refusing the session: {open_still}"),
        ("WARNING", WARNING.format(ALICE, "root")),
    ]


@pytest.mark.parametrize("steps", ["?alice,+bob", "?alice,?alice,+bob", "+alice,-alice,+bob"])
def test_a_refused_session_that_is_over(world: World, refusing: Daemon, bobs: Namespace, steps: str) -> None:
    """A server such as dovecot ends the handle with the error, and goes on to the next user."""
    *before, last = world.steps(steps)
    assert namespaces(before) == [host(world)] * len(before)
    assert (last.result, last.namespace) == (PAM_SUCCESS, bobs.inode)


def test_only_refused_sessions_end_with_their_handle(
    world: World, served: Daemon, alices: Namespace
) -> None:
    """smbd ends the handle of each session that it has opened."""
    steps = world.steps("?alice,+bob")
    assert namespaces(steps) == [alices.inode, host(world)]


def test_without_a_close_the_way_to_another_user_leads_back(
    world: World, served: Daemon, alices: Namespace
) -> None:
    assert namespaces(world.steps("+alice,+bob")) == [alices.inode, host(world)]


def test_a_child_knows_where_its_parent_came_from(
    world: World, served: Daemon, alices: Namespace, bobs: Namespace
) -> None:
    home = host(world)
    steps = world.steps("+alice,fork,+bob,-bob,-alice,+bob")
    assert namespaces(steps) == [alices.inode, alices.inode, home, home, home, bobs.inode]


def test_a_child_that_closes_its_parents_session_goes_back(
    world: World, served: Daemon, alices: Namespace
) -> None:
    steps = world.steps("+alice,fork,-alice")
    assert namespaces(steps) == [alices.inode, alices.inode, host(world)]


def test_a_thread_is_where_its_process_was_moved(world: World, served: Daemon, alices: Namespace) -> None:
    """It has not opened the session, but it must not go on to the next user."""
    steps = world.steps("+alice,thread,+bob")
    assert steps[0].namespace == alices.inode
    assert steps[-1].namespace == host(world)
    assert world.log.take() == [("WARNING", WARNING.format(ALICE, "bob"))]


def test_from_another_users_session(
    world: World, served: Daemon, alices: Namespace, bobs: Namespace
) -> None:
    """As `su - bob` in alice's session: it came from there, and goes back there."""
    steps = world.steps("+bob,+root,-root,-bob", "-n", alices.inner_path)
    assert namespaces(steps) == [bobs.inode, alices.inode, alices.inode, alices.inode]
    assert steps[0].fds == steps[-1].fds + 1  # the way back
    assert world.log.take() == [("WARNING", WARNING.format(BOB, "root"))]


def test_the_descriptor_is_lost_but_the_host_is_found(
    world: World, served: Daemon, alices: Namespace
) -> None:
    steps = world.steps("+alice,close,+bob")
    assert namespaces(steps) == [alices.inode, alices.inode, host(world)]


def test_a_way_back_that_is_lost(world: World, served: Daemon, alices: Namespace, bobs: Namespace) -> None:
    """The program has closed the descriptor: no other user's session, and the close does not fail."""
    steps = world.steps("+bob,close,+alice,-alice,-bob", "-n", alices.inner_path)
    assert namespaces(steps) == [bobs.inode] * 5
    assert [step.result for step in steps] == [0, 0, PAM_PERM_DENIED, 0, 0]
    lost = "the namespace that it came from cannot be found any more"
    back = f"cannot go back to the directories before the session of user {{}}: {lost}"
    assert world.log.take() == [
        (
            "ERR",
            f"{REFUSED} of UID 1501 open, and cannot leave their namespace: {lost}",
        ),
        ("WARNING", back.format("alice")),
        ("WARNING", back.format("bob")),
    ]


def test_a_process_that_could_not_go_back_serves_nobody_else(
    world: World, served: Daemon, alices: Namespace, bobs: Namespace
) -> None:
    """All its sessions are closed, but it is still among bob's files."""
    steps = world.steps("+bob,close,-bob,+alice", "-n", alices.inner_path)
    assert namespaces(steps) == [bobs.inode] * 4
    assert steps[-1].result == PAM_PERM_DENIED


def test_a_descriptor_whose_number_is_used_again(
    world: World, served: Daemon, alices: Namespace, bobs: Namespace
) -> None:
    """It leads to a namespace, but not to the one that the process came from."""
    steps = world.steps("+bob,close,reuse,+alice,-alice,-bob", "-n", alices.inner_path)
    assert namespaces(steps) == [bobs.inode] * 6
    assert steps[3].result == PAM_PERM_DENIED


def test_a_descriptor_of_the_programs_is_not_closed(world: World, served: Daemon, alices: Namespace) -> None:
    """It has the number of the way back, which is not needed any more."""
    steps = world.steps("+bob,+root,close,reuse,-root,-bob", "-n", alices.inner_path)
    assert namespaces(steps[1:]) == [alices.inode] * 5
    assert steps[-1].fds == steps[3].fds


def test_a_namespace_that_the_program_made(world: World, served: Daemon) -> None:
    """A copy of alice's: nobody else's session is opened there."""
    steps = world.steps("+alice,own,+bob,+root")
    own = steps[1].namespace
    assert namespaces(steps[1:]) == [own] * 3
    assert [step.result for step in steps[2:]] == [PAM_PERM_DENIED, 7]
    levels = [level for level, _ in world.log.take()]
    assert levels == ["ERR", "ERR"]


def test_a_process_that_has_gone_into_a_chroot(world: World, daemon: MakeDaemon) -> None:
    """setns() would take it out. As it cannot leave alice's namespace, bob has no session in it."""
    alices = world.make_namespace(f"{CHROOT}\nmount --rbind /proc proc")
    daemon(users={str(ALICE): [alices.path]}, others="exempt")
    steps = world.steps("+alice,chroot,+bob,-bob,-alice")
    assert namespaces(steps) == [alices.inode] * 5
    assert steps[2].result == PAM_PERM_DENIED
    assert steps[4].directory == steps[1].directory
    assert "it is in a chroot" in world.log.take()[0][1]


def test_a_process_that_has_become_the_user_closes_silently(
    world: World, served: Daemon, alices: Namespace
) -> None:
    """As (sd-pam) of systemd."""
    steps = world.steps("+alice,drop,-alice")
    assert namespaces(steps) == [alices.inode] * 3
    assert steps[-1].result == PAM_SUCCESS
    assert world.log.take() == []


def test_a_command_in_between_changes_nothing(world: World, served: Daemon, alices: Namespace) -> None:
    world.module("caller")
    assert namespaces(world.steps("+alice,+bob,-alice,-bob")) == [host(world)] * 4
    assert served.stop() == []


@pytest.mark.parametrize(
    ("directory", "kept"), [("/tmp/work", "/tmp/work"), ("/tmp/missing", "/"), ("/usr", "/usr")]
)
def test_the_working_directory_after_the_way_back(
    world: World, served: Daemon, directory: str, kept: str
) -> None:
    world.shell("mkdir -p /tmp/work /tmp/missing")
    steps = world.steps("+alice,-alice", "-w", directory)
    assert steps[0].cwd == kept
    assert steps[1].cwd == kept
    assert [level for level, _ in world.log.take()] == (["NOTICE"] if kept == "/" else [])


def test_the_working_directory_is_the_one_of_each_namespace(
    world: World, served: Daemon, alices: Namespace
) -> None:
    arguments = ["-n", alices.inner_path, "-w", "/tmp/work", "-l", "of-alice"]
    steps = world.steps("+bob,-bob", *arguments)
    assert [step.cwd for step in steps] == ["/tmp/work", "/tmp/work"]
    assert [step.seen for step in steps] == [0, 1]


def test_the_module_stays_loaded(build: Path) -> None:
    """Its record of the process is in static variables."""
    read = subprocess.check_output(["readelf", "-dW", build / "pam_polytmp.so"], text=True)
    assert re.search(r"FLAGS_1.*NODELETE", read)

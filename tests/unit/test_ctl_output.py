# SPDX-License-Identifier: LGPL-2.1-or-later
"""How polytmpctl prints: tables of input and output, without a bus."""

import json
import time
from pathlib import Path

import pytest

from polytmpd.bus.client import Holder
from polytmpd.ctl import enter, output, status, tree
from polytmpd.ctl.output import Style

pytestmark = pytest.mark.unit

PLAIN, COLOURED = Style(), Style(True)
HOUR = 3600


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1.0K"),
        (1536, "1.5K"),
        (1024**2 - 1, "1023.9K"),
        (5 * 1024**3, "5.0G"),
        (2**70, "1024.0E"),
    ],
)
def test_size(number: int, text: str) -> None:
    assert output.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "just now"),
        (5, "5s ago"),
        (61, "1min 1s ago"),
        (3 * HOUR + 61, "3h 1min ago"),
        (24 * HOUR, "1d ago"),
        (8 * 24 * HOUR, "1w 1d ago"),
        (70 * 24 * HOUR, "2 months 1w ago"),
        (400 * 24 * HOUR, "1y 1 month ago"),
        (-90, "1min 30s left"),
    ],
)
def test_age(seconds: int, text: str) -> None:
    now = 10**15
    assert output.age(now - seconds * output.USEC, now) == text
    assert output.age(0, now) == "-", "as moment()"


def test_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    assert output.moment(1_700_000_000 * output.USEC) == "Tue 2023-11-14 22:13:20 UTC"
    assert output.moment(0) == "-"


def test_table() -> None:
    rows = [("1001", "alice", "active"), ("7", "böb", "-"), ("12", "日本", "failed")]
    shown = output.table(("UID>", "USER", "STATE"), rows, PLAIN, legend=True, noun="instance")
    assert shown.splitlines() == [
        " UID USER  STATE",
        "1001 alice active",
        "   7 böb   -",
        "  12 日本  failed",
        "",
        "3 instances listed.",
    ]
    without = output.table(("UID>", "USER", "STATE"), rows[:1], PLAIN, legend=False, noun="instance")
    assert without == "1001 alice active"
    one = output.table(("UID>",), [("1",)], PLAIN, legend=True, noun="instance")
    assert one.endswith("\n\n1 instance listed.")


def test_colours_do_not_change_the_width_of_a_table() -> None:
    rows = [(COLOURED.state("active"), "x"), (COLOURED.state("-"), "y")]
    plain = output.table(("STATE", "A"), [("active", "x"), ("-", "y")], PLAIN, legend=True)
    coloured = output.table(("STATE", "A"), rows, COLOURED, legend=True)
    assert "\x1b[" in coloured
    assert output._ESCAPE.sub("", coloured) == plain


@pytest.mark.parametrize(
    ("environment", "is_terminal", "wanted"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm"}, False, False),
        ({"TERM": "dumb"}, True, False),
        ({}, True, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
        ({"TERM": "xterm", "NO_COLOR": "1", "SYSTEMD_COLORS": "1"}, True, True),
        ({"SYSTEMD_COLORS": "16"}, False, True),
        ({"TERM": "xterm", "SYSTEMD_COLORS": "0"}, True, False),
        ({"TERM": "xterm", "SYSTEMD_COLORS": "false"}, True, False),
        ({"TERM": "xterm", "SYSTEMD_COLORS": "nonsense"}, True, True),
    ],
)
def test_when_output_is_coloured(environment: dict[str, str], is_terminal: bool, wanted: bool) -> None:
    assert output.wants_colour(environment, is_terminal) is wanted


@pytest.mark.parametrize(
    ("environment", "foreign", "command"),
    [
        ({}, False, []),
        ({"TERM": "dumb", "PAGER": "most"}, False, []),
        ({"TERM": "xterm"}, False, [["pager"], ["less"], ["more"]]),
        ({"TERM": "xterm", "PAGER": "most -s"}, False, [["most", "-s"], ["pager"], ["less"], ["more"]]),
        (
            {"TERM": "xterm", "PAGER": "most", "SYSTEMD_PAGER": "less"},
            False,
            [["less"], ["pager"], ["less"], ["more"]],
        ),
        ({"TERM": "xterm", "PAGER": "most", "SYSTEMD_PAGER": ""}, False, []),
        ({"TERM": "xterm", "SYSTEMD_PAGER": "cat"}, False, []),
        ({"TERM": "xterm", "PAGER": "sh -i"}, True, [["less"]]),
    ],
)
def test_pager(environment: dict[str, str], foreign: bool, command: list[list[str]]) -> None:
    assert output.pager_command(environment, foreign=foreign) == command


def test_pager_environment() -> None:
    assert output.pager_environment({"LESS": "x"}, foreign=False) == {"LESS": "FRSXMK"}
    assert output.pager_environment({"SYSTEMD_LESS": "R"}, foreign=False)["LESS"] == "R"
    assert output.pager_environment({}, foreign=True)["LESSSECURE"] == "1", (
        "less could start a shell as root"
    )
    assert "LESSSECURE" not in output.pager_environment({"SYSTEMD_PAGERSECURE": "0"}, foreign=True)


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert output.clean("a\x1b]0;x\x07b\nc\u202e") == "a?]0;x?b?c?"


@pytest.mark.parametrize(
    ("columns", "text"), [(100, "0123456789"), (10, "0123456789"), (7, "012…789"), (4, "01…9")]
)
def test_shorten(columns: int, text: str) -> None:
    assert output.shorten("0123456789", columns) == text


def test_json() -> None:
    value = [{"user": "böb", "since": None}]
    assert output.to_json(value, "short") == '[{"user":"böb","since":null}]'
    assert output.to_json(value, "pretty").splitlines()[1] == "\t{"
    assert json.loads(output.to_json(value, "pretty")) == value


# The process tree


def holder(pid: int, group: str, how: str = "namespace", command: str = "sleep 1") -> Holder:
    return Holder(pid, command, group, how)


SLICE = "/user.slice/user-1001.slice"


def test_tree() -> None:
    shown = tree.draw(
        [
            holder(12, f"{SLICE}/session-3.scope", command="bash"),
            holder(1012, f"{SLICE}/session-3.scope", "derived"),
            holder(9, f"{SLICE}/user@1001.service/init.scope", command="systemd --user"),
            holder(30, f"{SLICE}/user@1001.service/app.slice/tmux.service", "outside"),
            holder(77, "/system.slice/cron.service", "descriptor", "evil\x1b[2J"),
        ],
        PLAIN,
    )
    assert shown == [
        "/",
        "├─system.slice/cron.service",
        "│ └─  77 evil?[2J  (holds it open)",
        "└─user.slice/user-1001.slice",
        "  ├─session-3.scope",
        "  │ ├─  12 bash",
        "  │ └─1012 sleep 1  (in a namespace made from it)",
        "  └─user@1001.service",
        "    ├─app.slice/tmux.service",
        "    │ └─  30 sleep 1  (not in it)",
        "    └─init.scope",
        "      └─   9 systemd --user",
    ]


def test_tree_of_one_group_and_of_none() -> None:
    assert tree.draw([holder(1, f"{SLICE}/session-1.scope")], PLAIN) == [
        f"{SLICE}/session-1.scope",
        "└─1 sleep 1",
    ]
    assert tree.draw([], PLAIN) == ["/"]
    assert tree.draw([holder(1, "")], PLAIN) == ["/", "└─1 sleep 1"]


def test_tree_fits_the_terminal() -> None:
    lines = tree.draw([holder(1, "/a/b", "derived", "x" * 200), holder(2, "/a/c")], PLAIN, 60)
    assert max(map(len, lines)) == 60
    assert all("in a namespace" in line for line in lines if "xx" in line)


@pytest.mark.parametrize(
    ("group", "text"),
    [
        (f"{SLICE}/session-3.scope", "session 3"),
        (f"{SLICE}/session-c12.scope", "session c12"),
        ("/user.slice/user-1002.slice/session-4.scope", "session 4 of UID 1002"),
        (f"{SLICE}/user@1001.service/init.scope", "user manager"),
        (f"{SLICE}/user@1001.service/app.slice/tmux.service", "user unit tmux.service"),
        ("/user.slice/user-1002.slice/user@1002.service/a.service", "user unit a.service of UID 1002"),
        (f"{SLICE}", "user slice"),
        ("/system.slice/cron.service", "unit cron.service"),
        ("/elsewhere", "cgroup /elsewhere"),
        ("", "cgroup ?"),
    ],
)
def test_why(group: str, text: str) -> None:
    assert tree.why(holder(1, group), 1001) == text


# enter, status


@pytest.mark.parametrize(
    ("command", "as_user", "tail"),
    [
        (["ls", "-l"], None, ["ls", "-l"]),
        ([], None, ["/bin/zsh"]),
        (["id"], "alice", ["runuser", "-u", "alice", "--", "id"]),
        ([], "alice", ["runuser", "--login", "alice"]),
    ],
)
def test_enter(
    command: list[str], as_user: str | None, tail: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHELL", "/bin/zsh")
    found = enter.command_line(7, "/srv", command, as_user)
    assert found == ["nsenter", "--mount=/proc/self/fd/7", "--wdns=/srv", "--", *tail]


MOUNTINFO = """\
22 1 0:21 / /tmp rw,nosuid - tmpfs tmpfs rw
40 22 0:50 / /tmp rw - tmpfs polytmp-sentinel rw,size=4k
41 40 0:21 /polytmp-x/tmp /tmp rw - tmpfs tmpfs rw
42 41 0:21 /.X11-unix /tmp/.X11-unix rw shared:3 - tmpfs tmpfs rw
43 41 0:60 / /tmp/my\\040mount rw - fuse.sshfs host:/a\\040b rw
44 1 0:61 / /tmpfoo/x rw - ext4 /dev/sda rw
nonsense
"""


def test_mounts_in_an_instance() -> None:
    assert status.mounts_below(MOUNTINFO, ["/tmp", "/var/tmp"], ["/tmp/.X11-unix"]) == [
        {"mount": "/tmp/my mount", "type": "fuse.sshfs", "source": "host:/a b"}
    ]


def test_a_mount_table_that_a_user_has_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """root reads it: neither memory nor the page grows with it."""
    line = "300 36 0:90 / /tmp/{:08} rw - tmpfs tmpfs rw\n"
    (tmp_path / "mountinfo").write_text("".join(map(line.format, range(1000))))
    monkeypatch.setattr(status, "_TABLE_AT_MOST", 100 * len(line.format(0)) + 20)
    real = open
    monkeypatch.setattr("builtins.open", lambda path, **words: real(tmp_path / Path(path).name, **words))
    found = status._mounts([Holder(1, "sh", "", "namespace")], ["/tmp"], [])
    assert [mount["mount"] for mount in found] == [f"/tmp/{number:08}" for number in range(100)]
    shown = status._mount_texts(found)
    assert (len(shown), shown[-1]) == (65, "and 36 more")


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8", "● a → … │ é"),
        ("ascii", "* a > ~ | ?"),
        ("iso-8859-1", "* a > ~ | é"),
    ],
)
def test_a_terminal_that_cannot_show_everything(encoding: str, text: str) -> None:
    assert output.displayable("● a → … │ é", encoding) == text


@pytest.mark.parametrize(
    ("session", "text"),
    [
        (("c22", "su-l", "pts/0", "", "closing"), "c22 (su-l, pts/0, closing)"),
        (("3", "sshd", "", "10.0.0.1", "active"), "3 (sshd, 10.0.0.1)"),
        (("4", "", "", "", "online"), "4"),
    ],
)
def test_a_session(session: tuple[str, ...], text: str) -> None:
    names = ("session", "service", "tty", "remote_host", "state")
    assert status._session_text(dict(zip(names, session, strict=True))) == text

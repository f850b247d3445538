# SPDX-License-Identifier: LGPL-2.1-or-later
"""polytmpd.conf: what administrators write, and which mistakes are reported."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polytmpd.config import _KEYS, SOCKET_DIRECTORIES, Config, load, unfit
from polytmpd.core.model import Directory, Lifetime
from polytmpd.core.policy import Exemptions
from polytmpd.core.sharing import LINKS

pytestmark = pytest.mark.unit

DEFAULT = Config()
INSTEAD = re.compile(r", (ignoring|using)[^;]*")


def put(root: Path, path: str, text: str | bytes) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def conf(root: Path, text: str) -> Path:
    return put(root, "etc/polytmpd.conf", f"[Polytmp]\n{text}\n")


def paths(config: Config) -> list[str]:
    return [directory.path for directory in config.directories]


def test_no_configuration_gives_the_defaults(tmp_path: Path) -> None:
    config, problems = load(tmp_path)
    assert (config, problems) == (DEFAULT, [])
    assert config.directories == (
        Directory("/tmp", Lifetime.INSTANCE, SOCKET_DIRECTORIES),
        Directory("/var/tmp", Lifetime.PERSISTENT),
    )


def test_all_settings(tmp_path: Path) -> None:
    conf(
        tmp_path,
        "Directories=/tmp /srv/scratch/\n# a comment\nPersistentDirectories=/srv/scratch\n"
        "SharedPaths=.X11-unix .mine-unix\nExemptUsers=alice \\\n; in between\n  1005 DOM\\user",
    )
    config, problems = load(tmp_path)
    assert problems == []
    assert config.directories == (
        Directory("/tmp", Lifetime.INSTANCE, (".X11-unix", ".mine-unix")),
        Directory("/srv/scratch", Lifetime.PERSISTENT, must_be_sticky=True),
    )
    assert config.exemptions.users == {"alice", "1005", "DOM\\user"}


def test_what_is_shared_by_name_and_by_pattern(tmp_path: Path) -> None:
    conf(tmp_path, "SharedPaths=.X11-unix app/ mysql.sock .s.PGSQL.* /tmp/.hidden /tmp/.my.app/")
    config, problems = load(tmp_path)
    assert problems == []
    assert config.directories[0].shared == (".X11-unix", "app", ".my.app", LINKS)
    assert config.shared_files == ("mysql.sock", ".s.PGSQL.*", ".hidden")
    assert config.sharing.patterns == config.shared_files
    conf(tmp_path, "SharedPaths=.s.PGSQL.*\nDirectories=/var/tmp")
    config, problems = load(tmp_path)
    assert config.shared_files == (), "/tmp is the host's anyway"


def test_lists_accumulate_and_an_empty_assignment_resets_them(tmp_path: Path) -> None:
    conf(tmp_path, "ExemptUsers=a b\nExemptUsers=b c\nSharedPaths=.x\nSharedPaths=")
    config, problems = load(tmp_path)
    assert problems == []
    assert config.exemptions.users == {"a", "b", "c"}
    assert config.directories[0].shared == ()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("Directories=/tmp tmp", "'tmp' is not an absolute path"),
        ("Directories=/tmp /", "The root directory cannot be private, ignoring; remove it"),
        (
            "Directories=/tmp /etc",
            "/etc is a directory of the system, not one for temporary files, ignoring",
        ),
        ("Directories=/tmp /usr/local/tmp", "if you mean it, add UncheckedDirectories=/usr/local/tmp"),
        ("Directories=/tmp /home", "/home is a directory of the system"),
        ("Directories=/tmp /var", "/var is a directory of the system"),
        ("Directories=/tmp /run/user", "/run/user is a directory of the system"),
        ("Directories=/tmp /root", "/root is a directory of the system"),
        ("Directories=/tmp /proc", "/proc is not a place for files of users, ignoring; remove it"),
        ("Directories=/tmp /dev", "/dev is not a place for files of users, ignoring; remove it"),
        ("Directories=/tmp /dev/shm/x", "/dev/shm/x is not a place for files of users"),
        ("UncheckedDirectories=/srv", "/srv is not in Directories=, ignoring; add it there, too"),
        ("RegularUIDs=x", "'x' is not a range of UIDs, ignoring the setting; write 1000-60000"),
        ("RegularUIDs=5-4", "'5-4' is not a range of UIDs, ignoring the setting; write two UIDs of"),
        ("RegularUIDs=0-5", "'0-5' is not a range of UIDs"),
        ("RegularUIDs=1-4294967295", "'1-4294967295' is not a range of UIDs"),
        ("ExemptUsers=x,y", "'x,y' is neither a user name nor a UID"),
        ("ExemptUsers=@a:b", "'a:b' is neither a group name nor a GID"),
        ("ExemptGroups=@", "'' is neither a group name nor a GID"),
        ("OnlyGroups=4294967295", "'4294967295' is neither a group name nor a GID, ignoring the setting"),
        ('ExemptUsers=x "y', "Unbalanced quotes in 'x \"y', ignoring; close the quotes"),
        ("Directories=/tmp /tmp/../etc", "is not normalized, ignoring; write it without . and .."),
        (
            "Directories=/tmp /tmp/below",
            "Directories=: /tmp/below is inside another directory of the list, ignoring; remove one",
        ),
        ("Directories=", "names no directory"),
        ("PersistentDirectories=/srv", "/srv is not in Directories=, ignoring; add it there, too"),
        (
            "SharedPaths=/var/tmp/x",
            "'/var/tmp/x' is not a valid name, ignoring; name something in /tmp",
        ),
        ("SharedPaths=/tmp", "'/tmp' is not a valid name"),
        ("SharedPaths=a/b.sock", "'a/b.sock' is not a valid name"),
        ("SharedPaths=polytmp-*", "'polytmp-*' is not a valid name"),
        ("SharedPaths=.X0-lock", "'.X0-lock' is not a valid name"),
        ("SharedPaths=[a-z]*", "'[a-z]*' matches almost everything, ignoring; write at least one letter"),
        ("SharedPaths=app-*/", "'app-*/' is a pattern for directories, ignoring; name each directory"),
        ("SharedPaths=.a/b", "'.a/b' is not a valid name"),
        ("SharedPaths=..", "'..' is not a valid name"),
        ("ExemptUsers=a:b", "'a:b' is neither a user name nor a UID"),
        ("ExemptUsers=4294967295", "is neither a user name nor a UID"),
        pytest.param(
            f"ExemptUsers={'1' * 5000}",
            "is neither a user name nor a UID",
            id="more digits than int takes",
        ),
        ("Directory=/tmp", "Unknown setting Directory=, ignoring; the settings are Directories=,"),
        ("no assignment", "Missing '=' in 'no assignment', ignoring; write Key=value"),
        ("[Service]", "Unknown section '[Service]', ignoring; the only section is [Polytmp]"),
    ],
)
def test_a_mistake_is_reported_and_the_other_lines_apply(tmp_path: Path, line: str, what: str) -> None:
    file = conf(tmp_path, f"ExemptUsers=counts\n\n{line}")
    config, problems = load(tmp_path)
    assert len(problems) == 1
    assert problems[0].startswith(f"{file}:4: ")
    assert what in problems[0]
    assert INSTEAD.search(problems[0])
    assert INSTEAD.sub("", problems[0]) == problems[0].fault
    assert "counts" in config.exemptions.users
    assert paths(config)[0] == "/tmp"


def test_a_continued_line_is_reported_by_its_first_line(tmp_path: Path) -> None:
    file = conf(tmp_path, "ExemptUsers=a \\\n  b \\\n  c:d")
    config, problems = load(tmp_path)
    assert [problem.split(": ")[0] for problem in problems] == [f"{file}:2"]
    assert config.exemptions.users == {"a", "b"}


def test_who_is_exempt(tmp_path: Path) -> None:
    conf(tmp_path, "ExemptUsers=@wheel 007 a@b.example\nExemptGroups=@staff 5\nOnlyGroups=@a b")
    config, problems = load(tmp_path)
    assert problems == []
    assert config.exemptions == Exemptions(
        users=frozenset({"7", "a@b.example"}),
        exempt_groups=frozenset({"wheel", "staff", "5"}),
        only_groups=frozenset({"a", "b"}),
    )


@pytest.mark.parametrize(
    ("login_defs", "ranges", "low"),
    [
        ("", "500-60000", 500),
        ("", "70000- 999", 999),
        ("UID_MIN 500\n", "499-", 499),
        ("UID_MIN 500\n", "500-", None),
        ("UID_MIN 70001\nUID_MAX 80000\n", "60000-", 60000),
        ("UID_MIN 70001\nUID_MAX 80000\n", "60001-", None),  # the module lets nobody in by such a number
    ],
)
def test_regular_users_whom_the_module_calls_system_users(
    tmp_path: Path, login_defs: str, ranges: str, low: int | None
) -> None:
    """They get private directories all the same: only the reload is refused."""
    put(tmp_path, "etc/login.defs", login_defs)
    conf(tmp_path, f"RegularUIDs={ranges}")
    config, problems = load(tmp_path)
    for first in [int(word.partition("-")[0]) for word in ranges.split()]:
        assert config.exemptions.reason(first, "x") is None
    assert len(problems) == (low is not None)
    if low is not None:
        assert f":2: RegularUIDs=: UID {low} is below UID_MIN" in problems[0]
        assert problems[0].endswith(f"polytmpd is down, using it; set UID_MIN {low} there")


def test_ranges(tmp_path: Path) -> None:
    conf(tmp_path, "RegularUIDs=1000-60000 61000\nRegularUIDs=200000-")
    config, problems = load(tmp_path)
    assert problems == []
    assert config.exemptions.regular == ((1000, 60000), (61000, 61000), (200000, 4294967294))


def test_a_mistake_exempts_nobody(tmp_path: Path) -> None:
    """These settings exempt those whom they do not name."""
    conf(tmp_path, "RegularUIDs=1000-60000 200O00-\nOnlyGroups=staff us:ers")
    config, problems = load(tmp_path)
    assert len(problems) == 2
    assert config.exemptions == Exemptions()


@pytest.mark.parametrize(
    ("value", "users"),
    [
        ('"alice" bob', {"alice", "bob"}),
        ('"DOM\\domain users" DOM\\carol', {"DOM\\domain users", "DOM\\carol"}),
        ("'al ice'", {"al ice"}),
        ('al"ic"e', {"alice"}),
        ('"it\'s"', {"it's"}),
    ],
)
def test_quotes(tmp_path: Path, value: str, users: set[str]) -> None:
    conf(tmp_path, f"ExemptUsers={value}")
    config, problems = load(tmp_path)
    assert problems == []
    assert config.exemptions.users == users


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    put(tmp_path, "etc/polytmpd.conf", b"\xef\xbb\xbf[Polytmp]\nExemptUsers=a\n")
    config, problems = load(tmp_path)
    assert problems == []
    assert config.exemptions.users == {"a"}


@pytest.mark.parametrize("path", ["/dev/shm", "/scratch", "/srv/scratch", "/var/scratch", "/mnt/x"])
def test_other_directories(tmp_path: Path, path: str) -> None:
    conf(tmp_path, f"Directories=/tmp {path}")
    config, problems = load(tmp_path)
    assert problems == []
    assert config.directories[1] == Directory(path, Lifetime.INSTANCE, must_be_sticky=True)


def test_a_directory_that_the_administrator_answers_for(tmp_path: Path) -> None:
    conf(tmp_path, "Directories=/tmp /srv /etc/x /proc\nUncheckedDirectories=/srv/ /etc/x /proc")
    config, problems = load(tmp_path)
    assert [problem.partition("=: ")[2].split()[0] for problem in problems] == ["/proc"]
    assert [(entry.path, entry.must_be_sticky) for entry in config.directories[1:]] == [
        ("/srv", False),
        ("/etc/x", False),
    ]


def test_links_to_directories(tmp_path: Path) -> None:
    """Two names of one directory, and a name of one that is refused."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "work").symlink_to("scratch")
    (tmp_path / "below").symlink_to("scratch/x")
    (tmp_path / "conf").symlink_to("/etc")
    conf(tmp_path, "Directories=/tmp /work /scratch /below /conf")
    config, problems = load(tmp_path)
    assert paths(config) == ["/tmp", "/work"]
    assert [problem.partition("=: ")[2].partition(", ignoring")[0] for problem in problems] == [
        "/scratch is the same directory as /work",
        "/below, a link to /scratch/x, is inside another directory of the list",
        "/conf, a link to /etc, is a directory of the system, not one for temporary files",
    ]


def test_directories_that_no_instance_can_be_made_in(tmp_path: Path) -> None:
    for name, mode in (("plain", 0o755), ("sticky", 0o1777), ("trusted", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    (tmp_path / "file").touch()
    conf(tmp_path, "Directories=/plain /sticky /trusted /file /none\nUncheckedDirectories=/trusted")
    config, problems = load(tmp_path)
    assert problems == []
    assert [problem.partition(";")[0] for problem in unfit(config.directories, tmp_path)] == [
        "Directories=: /plain is not sticky, so not a directory for temporary files",
        "Directories=: /file is not a directory",
        "Directories=: /none is not a directory",
    ]


def test_a_setting_outside_of_any_section(tmp_path: Path) -> None:
    file = put(tmp_path, "etc/polytmpd.conf", "ExemptUsers=a\n")
    config, problems = load(tmp_path)
    assert problems == [f"{file}:1: Assignment outside of a section, ignoring; put [Polytmp] above it"]
    assert config == DEFAULT


def test_another_section_is_reported_once(tmp_path: Path) -> None:
    put(tmp_path, "etc/polytmpd.conf", "[Other]\nA=1\nB\n[Polytmp]\nExemptUsers=a\n")
    config, problems = load(tmp_path)
    assert len(problems) == 1
    assert config.exemptions.users == {"a"}


def test_the_first_main_file_applies(tmp_path: Path) -> None:
    for base in ("usr/lib", "run", "etc"):
        put(tmp_path, f"{base}/polytmpd.conf", f"[Polytmp]\nExemptUsers={base.replace('/', '-')}\n")
        assert load(tmp_path)[0].exemptions.users == {base.replace("/", "-")}


def test_drop_ins_merge_by_name_and_shadow_by_directory(tmp_path: Path) -> None:
    conf(tmp_path, "ExemptUsers=main")
    put(tmp_path, "usr/lib/polytmpd.conf.d/50-a.conf", "[Polytmp]\nExemptUsers=vendor\n")
    put(tmp_path, "run/polytmpd.conf.d/50-a.conf", "[Polytmp]\nExemptUsers=run\n")
    put(tmp_path, "usr/lib/polytmpd.conf.d/90-z.conf", "[Polytmp]\nExemptUsers=\nExemptUsers=last\n")
    put(tmp_path, "etc/polytmpd.conf.d/20-b.conf", "[Polytmp]\nSharedPaths=.b\n")
    put(tmp_path, "etc/polytmpd.conf.d/README", "no configuration")
    config, problems = load(tmp_path)
    assert problems == []
    assert config.exemptions.users == {"last"}
    assert config.directories[0].shared == (".b",)
    (tmp_path / "usr/lib/polytmpd.conf.d/90-z.conf").unlink()
    assert load(tmp_path)[0].exemptions.users == {"main", "run"}
    put(tmp_path, "etc/polytmpd.conf.d/50-a.conf", "[Polytmp]\nExemptUsers=etc\n")
    assert load(tmp_path)[0].exemptions.users == {"main", "etc"}


def test_a_link_to_dev_null_masks(tmp_path: Path) -> None:
    put(tmp_path, "usr/lib/polytmpd.conf.d/50-a.conf", "[Polytmp]\nExemptUsers=vendor\n")
    directory = tmp_path / "etc/polytmpd.conf.d"
    directory.mkdir(parents=True)
    (directory / "50-a.conf").symlink_to("/dev/null")
    assert load(tmp_path) == (DEFAULT, [])


def test_bytes_that_are_not_utf_8(tmp_path: Path) -> None:
    file = put(tmp_path, "etc/polytmpd.conf", b"[Polytmp]\nExemptUsers=a\xff\n")
    config, problems = load(tmp_path)
    assert problems == [f"{file}: Byte 23 is not UTF-8, ignoring the file; save it as UTF-8 text"]
    assert config == DEFAULT


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "dangling link"])
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "etc/polytmpd.conf.d"
    directory.mkdir(parents=True)
    path = directory / "x.conf"
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            path.symlink_to("/does/not/exist")
    config, problems = load(tmp_path)
    assert problems == [
        f"{path}: Not a regular file, ignoring; replace it with a regular file, or remove it"
    ]
    assert config == DEFAULT


@pytest.mark.parametrize(
    ("text", "uid_min", "problem"),
    [
        ("UID_MIN 500\nUID_MAX\t70000\n#UID_MIN 9\nSYS_UID_MIN 100\n", 500, None),
        ("UID_MIN 0x1F4\n", 500, None),
        ("UID_MIN 0764\n", 500, None),
        ("UID_MIN\n", 1000, None),
        ("UID_MIN many\n", 1000, ":1: UID_MIN 'many' is not a valid UID, using 1000"),
        ("UID_MIN 1_500\n", 1000, ":1: UID_MIN '1_500' is not a valid UID, using 1000"),
        ("\nUID_MAX -1\n", 1000, ":2: UID_MAX '-1' is not a valid UID, using 60000"),
        ("UID_MIN 0\n", 1000, ":1: UID_MIN '0' is not a valid UID, using 1000"),
        ("UID_MIN 9\nUID_MAX 8\n", 1000, ": UID_MIN is greater than UID_MAX, using UID_MIN 1000"),
    ],
)
def test_login_defs(tmp_path: Path, text: str, uid_min: int, problem: str | None) -> None:
    file = put(tmp_path, "etc/login.defs", text)
    config, problems = load(tmp_path)
    assert config.exemptions.uid_min == uid_min
    assert problems == ([] if problem is None else [f"{file}{problem}"])


LINES = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda key, value: f"{key}={value}".encode(errors="surrogatepass"),
        st.sampled_from([*_KEYS, "X", ""]),
        st.one_of(
            st.text(max_size=30),
            st.sampled_from(["", "/tmp", "/a /a/b", ".x", "..", "1" * 5000, "\\", "'", "1-", "@x"]),
        ),
    ),
    st.sampled_from([b"[Polytmp]", b"[Polytmp", b"[", b"#", b"\\", b"=", b"\0", b"UID_MIN " + b"9" * 5000]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    main=st.lists(LINES, max_size=8), drop_in=st.lists(LINES, max_size=4), defs=st.lists(LINES, max_size=3)
)
def test_any_bytes_give_a_valid_configuration(
    tmp_path: Path, main: list[bytes], drop_in: list[bytes], defs: list[bytes]
) -> None:
    put(tmp_path, "etc/polytmpd.conf", b"\n".join(main))
    put(tmp_path, "run/polytmpd.conf.d/a.conf", b"[Polytmp]\n" + b"\n".join(drop_in))
    put(tmp_path, "etc/login.defs", b"\n".join(defs))
    config, problems = load(tmp_path)
    assert config.directories, "at least one directory is private"
    for directory in config.directories:
        assert directory.path.startswith("/")
        assert os.path.normpath(directory.path) == directory.path != "/"
        assert not any("/" in name or name in {".", ".."} for name in directory.shared)
    assert config.exemptions.uid_min > 0
    for problem in problems:
        assert problem.startswith(str(tmp_path))
        assert INSTEAD.search(problem), problem

# SPDX-License-Identifier: LGPL-2.1-or-later
"""polytmpd.conf: what administrators write, and which mistakes are reported."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polytmpd.config import SOCKET_DIRECTORIES, Config, load
from polytmpd.core.model import Directory, Lifetime

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
        Directory("/srv/scratch", Lifetime.PERSISTENT),
    )
    assert config.exemptions.users == {"alice", "1005", "DOM\\user"}


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
        ("Directories=/tmp /tmp/../etc", "is not normalized, ignoring; write it without . and .."),
        (
            "Directories=/tmp /tmp/below",
            "Directories=: /tmp/below is inside another directory of the list, ignoring; remove one",
        ),
        ("Directories=", "names no directory"),
        ("PersistentDirectories=/srv", "/srv is not in Directories=, ignoring; add it there, too"),
        ("SharedPaths=X11", "'X11' is not a valid name, ignoring; name a directory in /tmp that"),
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
    ("text", "uids", "problem"),
    [
        ("UID_MIN 500\nUID_MAX\t70000\n#UID_MIN 9\nSYS_UID_MIN 100\n", (500, 70000), None),
        ("UID_MIN 0x1F4\n", (500, 60000), None),
        ("UID_MIN\n", (1000, 60000), None),
        ("UID_MIN many\n", (1000, 60000), ":1: UID_MIN 'many' is not a valid UID, using 1000"),
        ("\nUID_MAX -1\n", (1000, 60000), ":2: UID_MAX '-1' is not a valid UID, using 60000"),
        ("UID_MIN 0\n", (1000, 60000), ":1: UID_MIN '0' is not a valid UID, using 1000"),
        ("UID_MIN 9\nUID_MAX 8\n", (1000, 60000), ": UID_MIN is greater than UID_MAX, using 1000 and 60000"),
    ],
)
def test_login_defs(tmp_path: Path, text: str, uids: tuple[int, int], problem: str | None) -> None:
    file = put(tmp_path, "etc/login.defs", text)
    config, problems = load(tmp_path)
    assert (config.exemptions.uid_min, config.exemptions.uid_max) == uids
    assert problems == ([] if problem is None else [f"{file}{problem}"])


LINES = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda key, value: f"{key}={value}".encode(errors="surrogatepass"),
        st.sampled_from(["Directories", "PersistentDirectories", "SharedPaths", "ExemptUsers", "X", ""]),
        st.one_of(
            st.text(max_size=30), st.sampled_from(["", "/tmp", "/a /a/b", ".x", "..", "1" * 5000, "\\"])
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
    assert 0 < config.exemptions.uid_min <= config.exemptions.uid_max
    for problem in problems:
        assert problem.startswith(str(tmp_path))
        assert INSTEAD.search(problem), problem

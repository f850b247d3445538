# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which sockets of servers check reports, and how they can be reached."""

import os
import socket
from contextlib import closing
from pathlib import Path

import pytest

from polytmpd.config import SOCKET_DIRECTORIES, Config
from polytmpd.core.model import Directory, Lifetime
from polytmpd.core.policy import Exemptions
from polytmpd.core.sharing import LINKS
from polytmpd.ctl import sockets
from polytmpd.ctl.host import Result

pytestmark = pytest.mark.unit

HEAD = "Num       RefCount Protocol Flags    Type St Inode Path\n"
DEFAULTS = " ".join(SOCKET_DIRECTORIES)
WE_ARE_SYSTEM = Exemptions(uid_min=os.getuid() + 1)


def line(path: str, flags: str = "00010000") -> str:
    return f"0000000000000000: 00000002 00000000 {flags} 0001 01 12345 {path}\n"


def config(*files: str, exemptions: Exemptions = WE_ARE_SYSTEM) -> Config:
    names = (*SOCKET_DIRECTORIES, *((LINKS,) if files else ()))
    directories = (Directory("/tmp", Lifetime.INSTANCE, names), Directory("/var/tmp", Lifetime.PERSISTENT))
    return Config(directories, exemptions, files)


def found(root: Path, table: str, settings: Config | None = None) -> list[Result]:
    (root / "proc/net").mkdir(parents=True, exist_ok=True)
    (root / "proc/net/unix").write_text(HEAD + table)
    return list(sockets.judge(root, settings or config()))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("tmp/.X11-unix", "tmp/app", "var/tmp", "run"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def listen(root: Path, path: str) -> str:
    with closing(socket.socket(socket.AF_UNIX)) as listening:
        before = Path.cwd()
        os.chdir(root)  # sun_path is short
        try:
            listening.bind(f".{path}")
        finally:
            os.chdir(before)
    return line(path)


def test_what_the_table_says() -> None:
    table = line("/tmp/b c") + line("/tmp/a") + line("@/tmp/abstract") + line("/tmp/client", "00000000")
    assert sockets.listening(HEAD + table + line("/tmp/a") + "garbage\n" + line("")) == [
        "/tmp/a",
        "/tmp/b c",
    ]


def test_both_remedies(root: Path) -> None:
    (result,) = found(root, listen(root, "/tmp/.s.PGSQL.5432"))
    assert (result.topic, result.name, result.verdict) == ("software", "/tmp/.s.PGSQL.5432", "warn")
    assert result.remedy == (
        f"SharedPaths={DEFAULTS} .s.PGSQL.5432 in polytmpd.conf; "
        "or have the server listen in /run, for example /run/.s.PGSQL.5432"
    )


def test_the_remedy_keeps_what_is_shared(root: Path) -> None:
    (result,) = found(root, listen(root, "/tmp/.live"), config("mysql.sock"))
    assert result.remedy.startswith(f"SharedPaths={DEFAULTS} /tmp/mysql.sock /tmp/.live in polytmpd.conf")


@pytest.mark.parametrize("path", ["/tmp/with blank", "/var/tmp/x.sock", "/tmp/[1].sock*"])
def test_what_can_only_be_moved(root: Path, path: str) -> None:
    (result,) = found(root, listen(root, path))
    assert result.verdict == "warn"
    assert result.remedy.startswith("have the server listen in /run")


def test_in_a_directory(root: Path) -> None:
    (result,) = found(root, listen(root, "/tmp/app/x.sock"))
    assert ("SharedPaths" in result.remedy) == (os.getuid() == 0), "only a directory of root's is shared"


@pytest.mark.parametrize("path", ["/tmp/.X11-unix/X0", "/run/x.sock", "/tmp/mysql.sock"])
def test_what_can_be_reached(root: Path, path: str) -> None:
    (result,) = found(root, listen(root, path), config("mysql.*"))
    assert (result.name, result.verdict) == ("sockets", "pass")


def test_sockets_of_users_and_of_instances_do_not_count(root: Path) -> None:
    table = listen(root, "/tmp/mine") + line("/tmp/in-an-instance")
    (result,) = found(root, table, config(exemptions=Exemptions(uid_min=0)))
    assert (result.name, result.verdict) == ("sockets", "pass")
    (root / "tmp/mine").unlink()
    (root / "tmp/mine").touch()
    assert found(root, table)[0].verdict == "pass", "not a socket"


def test_no_table(root: Path) -> None:
    (result,) = list(sockets.judge(root, config()))
    assert result.verdict == "skip"


def test_the_list_is_bounded(root: Path) -> None:
    results = found(root, "".join(listen(root, f"/tmp/{number:03}") for number in range(25)))
    assert len(results) == 21
    assert results[-1].text == "5 more servers listen in private directories"

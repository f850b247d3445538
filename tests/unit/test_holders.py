# SPDX-License-Identifier: LGPL-2.1-or-later
"""The search for holders and processes, which ends when its caller no longer waits."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polytmpd.kernel import holders, namespaces, processes
from polytmpd.kernel.descriptor import Descriptor

pytestmark = pytest.mark.unit

FEW = 10
MANY = 200
DEEP = 2000
NO_NAMESPACE = 1


class Patience:
    """Cancels after a few checks."""

    def __init__(self, times: int = FEW) -> None:
        self.left = times

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths read in /proc; there is one process, with many threads and descriptors."""
    looked: list[str] = []
    fds = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(MANY)]
    process = subprocess.Popen(["sleep", "infinity"], pass_fds=fds)
    for fd in fds:
        os.close(fd)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def look(path: Any, *arguments: Any, **more: Any) -> Any:
            if str(path).startswith("/proc/"):
                looked.append(str(path))
            return real(path, *arguments, **more)

        return look

    def threads(pid: int) -> Iterator[str]:
        for _ in range(MANY):
            yield f"/proc/{pid}/ns/mnt"

    for module in (namespaces, processes):
        monkeypatch.setattr(module, "namespace_paths", threads)
    for module in (holders, namespaces, processes):
        monkeypatch.setattr(module, "pids", lambda: iter([process.pid]))
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", counted(os.stat))
        patch.setattr(os, "readlink", counted(os.readlink))
        yield looked
    process.kill()
    process.wait()


def test_a_cancelled_search_for_holders_ends(looks: list[str]) -> None:
    assert holders.find(NO_NAMESPACE, ()) == []
    assert len([path for path in looks if "/fd/" in path]) >= MANY
    looks.clear()
    assert holders.find(NO_NAMESPACE, (), cancelled=Patience()) == []
    assert len(looks) <= FEW, "each thread checks for cancellation"
    looks.clear()
    assert holders.find(NO_NAMESPACE, (), cancelled=Patience(MANY + FEW)) == []
    assert len([path for path in looks if "/fd/" in path]) <= FEW, "each descriptor checks for cancellation"


def test_descriptors_are_left_out_at_the_timeout(looks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "_DESCRIPTORS_TIMEOUT", 0.0)
    assert holders.find(NO_NAMESPACE, ()) == []
    assert not [path for path in looks if "/fd/" in path]


def test_processes_with_few_descriptors_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {101: 1 << 20, 102: 3, 103: 7}
    looked: list[int] = []
    monkeypatch.setattr(holders, "pids", lambda: iter(counts))
    monkeypatch.setattr(namespaces, "inhabited", lambda _: iter(()))
    monkeypatch.setattr(holders, "_descriptor_count", counts.__getitem__)
    monkeypatch.setattr(holders, "_has_open", lambda pid, *_: looked.append(pid))
    assert holders.find(NO_NAMESPACE, ()) == []
    assert looked == [102, 103, 101]


def test_a_cancelled_walk_over_a_cgroup_ends(looks: list[str], tmp_path: Any) -> None:
    for number in range(MANY):
        (tmp_path / str(number)).mkdir()
    (tmp_path / "cgroup.procs").write_text(f"{os.getppid()}\n")
    assert [entry.pid for entry in holders.find(0, (), [str(tmp_path)])] == [os.getppid()]
    assert holders.find(0, (), [str(tmp_path)], lambda: True) == []
    assert [entry.pid for entry in processes.in_cgroup(str(tmp_path))] == [os.getppid()]
    assert processes.in_cgroup(str(tmp_path), lambda: True) == []


def test_cgroups_may_be_nested_deeper_than_python_recurses() -> None:
    """Not in tmp_path, which Python 3.11 could not delete either."""
    top = tempfile.mkdtemp(dir="/tmp")
    try:
        with contextlib.ExitStack() as fds:
            fd = fds.enter_context(Descriptor.open(top, os.O_PATH))
            for _ in range(DEEP):
                os.mkdir("c", dir_fd=fd)
                below = Descriptor.open("c", os.O_PATH, dir_fd=fd)
                fd.close()
                fd = fds.enter_context(below)
            Path(f"/proc/self/fd/{fd}/cgroup.procs").write_text(f"{os.getppid()}\n")
        assert processes.cgroup_pids(top) == {os.getppid()}
    finally:
        subprocess.run(["rm", "-rf", top], check=True)


def test_a_cancelled_search_for_processes_ends(looks: list[str]) -> None:
    assert processes.living_in(NO_NAMESPACE) == []
    assert len(looks) == MANY
    looks.clear()
    assert processes.living_in(NO_NAMESPACE, Patience()) == []
    assert len(looks) <= FEW


def test_namespaces_of_a_process(looks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_THREADS_AT_MOST", FEW)
    own = Path("/proc/self/ns/mnt").stat().st_ino
    looks.clear()
    assert processes.namespaces(os.getpid()) == {own}
    assert len(looks) == FEW
    assert processes.namespaces(1 << 30) == set()


def test_cancelled_command_lines_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_command", lambda pid, timeout: pytest.fail("read although cancelled"))
    assert processes.commands([os.getpid()], lambda: True) == ["?"]

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a search finds if it remembers former ones, and where the kernel lists all namespaces."""

import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from polytmpd.blocking import recovery
from polytmpd.kernel import host, mounted, namespaces, syscalls
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.patience import Patience
from tests.kernel import children
from tests.kernel.world import run_alone

BARRIER = "polytmp-1001"
_MS_BIND = 4096


@contextlib.contextmanager
def base(where: str = "/var/tmp") -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=where) as path:
        os.makedirs(f"{path}/{BARRIER}/tmp/inside")
        os.mkdir(f"{path}/outside")
        yield path


@contextlib.contextmanager
def elsewhere(*steps: Callable[[], object]) -> Iterator[tuple[int, Callable[[], None]]]:
    """A process with a mount namespace of its own, and a function that makes it take the next step."""
    go, done = os.pipe(), os.pipe()

    def live() -> None:
        children.alone()
        os.write(done[1], b".")
        for step in steps:
            os.read(go[0], 1)
            step()
            os.write(done[1], b".")
        signal.pause()

    pid = children.start(live)

    def advance() -> None:
        os.write(go[1], b".")
        assert os.read(done[0], 1) == b"."

    try:
        assert os.read(done[0], 1) == b"."
        yield pid, advance
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for fd in (*go, *done):
            os.close(fd)


class Search:
    """Searches for an instance again and again, and remembers."""

    def __init__(self) -> None:
        self.known = mounted.Known()

    def __call__(self, directory: str) -> dict[str, int]:
        return recovery.mounted_barriers([(directory, BARRIER)], known=self.known)


def case_a_mount_that_got_its_id_long_before() -> None:
    """Its ID is lower than that of mounts which former searches have seen."""
    search = Search()
    with base() as path:
        trees: list[Descriptor] = []

        def take() -> None:
            trees.append(syscalls.open_tree(-100, f"{path}/{BARRIER}/tmp/inside", syscalls.OPEN_TREE_CLONE))
            syscalls.mount("none", "/mnt", "tmpfs", 0)
            os.mkdir("/mnt/here")

        def attach() -> None:
            with Descriptor.open("/mnt/here", os.O_PATH) as place:
                syscalls.move_mount(trees[0], place)

        with elsewhere(take, attach) as (pid, advance):
            assert search(path) == {}
            advance()
            assert search(path) == search(path) == {}
            advance()
            assert search(path) == search(path) == {BARRIER: pid}
        assert search(path) == {}


def case_a_mounted_directory_that_is_renamed() -> None:
    """Root moves what is mounted elsewhere into the instance."""
    search = Search()
    with base() as path:
        with elsewhere(lambda: syscalls.mount(f"{path}/outside", "/mnt", None, _MS_BIND)) as (pid, advance):
            advance()
            assert search(path) == search(path) == {}
            Path(path, "outside").rename(f"{path}/{BARRIER}/tmp/outside")
            assert search(path) == {BARRIER: pid}
        assert search(path) == {}


def case_an_instance_on_another_device() -> None:
    search = Search()
    Path("/mnt/own").mkdir()
    syscalls.mount("none", "/mnt/own", "tmpfs", 0)
    with base() as path, base("/mnt/own") as other:
        inside = f"{other}/{BARRIER}/tmp/inside"
        with elsewhere(lambda: syscalls.mount(inside, "/mnt", None, _MS_BIND)) as (pid, advance):
            advance()
            assert search(path) == search(path) == {}
            assert search(other) == {BARRIER: pid}
            assert search(path) == {}


def case_what_cannot_change_is_not_read_again() -> None:
    search = Search()
    Path("/mnt/own").mkdir()
    syscalls.mount("none", "/mnt/own", "tmpfs", 0)
    with base("/mnt/own") as path, elsewhere():
        search(path)
        with mock.patch.object(mounted, "statmount", side_effect=syscalls.statmount) as again:
            search(path)
        its = os.stat(path).st_dev
        assert again.mock_calls
        for _, (namespace, mount_id, *_), _ in again.mock_calls:
            entry = syscalls.statmount(namespace, mount_id, syscalls.STATMOUNT_SB_BASIC)
            assert entry.device == f"{os.major(its)}:{os.minor(its)}"


def case_there_are_more_mounts_than_are_remembered() -> None:
    search = Search()
    with base() as path, mock.patch.object(mounted, "KNOWN_AT_MOST", 3):
        inside = f"{path}/{BARRIER}/tmp/inside"
        with elsewhere(lambda: syscalls.mount(inside, "/mnt", None, _MS_BIND)) as (pid, advance):
            assert search(path) == search(path) == {}
            advance()
            assert search(path) == search(path) == {BARRIER: pid}
        remembered = [listed.others for listed in search.known._namespaces.values()]
        assert sum(map(len, remembered)) <= 3


def case_a_table_that_is_read_piece_by_piece() -> None:
    refused = mock.patch.object(mounted, "get_mntns_id", side_effect=OSError("needs Linux 6.11"))
    search = Search()
    with base() as path, refused:
        inside = f"{path}/{BARRIER}/tmp/inside"
        with elsewhere(lambda: syscalls.mount(inside, "/mnt", None, _MS_BIND)) as (pid, advance):
            assert search(path) == {}
            advance()
            for size in range(1, 3 * len(BARRIER)):
                with mock.patch.object(mounted, "_READ_AT_ONCE", size):
                    assert search(path) == {BARRIER: pid}, size


CASES = sorted(name for name in globals() if name.startswith("case_"))


@pytest.mark.parametrize("case", CASES)
def test_case(case: str) -> None:
    run_alone(__name__, case)


def test_the_kernel_lists_all_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so outside of containers. One is in flight between processes, another has an inhabitant."""
    monkeypatch.setattr(host, "open_namespace", lambda: Descriptor.open("/proc/self/ns/mnt", os.O_RDONLY))
    if not namespaces._shows_neighbours():
        pytest.skip("this kernel, or this container, does not list namespaces")
    ours, theirs = socket.socketpair()
    with ours, theirs, elsewhere() as (inhabitant, _):
        wanted = {os.stat(f"/proc/{pid}/ns/mnt").st_ino for pid in ("self", inhabitant)}
        with elsewhere() as (gone, _), Descriptor.open(f"/proc/{gone}/ns/mnt", os.O_RDONLY) as fd:
            wanted.add(inode := os.fstat(fd).st_ino)
            socket.send_fds(ours, [b"."], [fd])
        with mock.patch.object(
            namespaces, "inhabited", side_effect=AssertionError("no process is searched")
        ):
            found = {
                each.inode: namespaces.pid_of(each)
                for each in namespaces.every(Patience(lambda: False))
                if each.inode in wanted  # the host may have hundreds
            }
        assert wanted <= found.keys()
        assert found[os.stat(f"/proc/{inhabitant}/ns/mnt").st_ino] == inhabitant
        assert found[inode] == 0

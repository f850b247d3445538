# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which process has an instance mounted, wherever its directory is."""

import contextlib
import errno
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest

from polytmpd.blocking import recovery
from polytmpd.blocking.removal import Place, unused
from polytmpd.core.names import SENTINEL
from polytmpd.kernel import holders, mounted, namespaces, patience, syscalls
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.patience import Patience
from tests.kernel import children
from tests.kernel.world import run_alone

BARRIER = "polytmp-1001"
MALLORY, SUBORDINATE = 1500, 200000
REMOVING = f"polytmp-removing-{'a' * 16}"
NO_NAMESPACE = 1
_MS_BIND = 4096
_CLONE_NEWUSER = 0x10000000
_PR_SET_DUMPABLE = 4


def _without_listmount() -> contextlib.AbstractContextManager[object]:
    refused = OSError(errno.ENOTTY, "needs Linux 6.11")
    return mock.patch.object(mounted, "get_mntns_id", side_effect=refused)


def _impatient() -> contextlib.AbstractContextManager[object]:
    return mock.patch.multiple(patience, SECONDS=-1.0, UNATTRIBUTED=-1.0)


def _taken_along(base: str) -> None:
    """A process that has part of the instance mounted in another namespace is found until it ends."""
    inside = f"{base}/{BARRIER}/tmp/inside"
    os.makedirs(inside)
    os.makedirs(f"{base}/polytmp-1002/tmp")
    ready, done = os.pipe(), os.pipe()

    def takes_it_along() -> None:
        children.alone()
        syscalls.mount(inside, "/mnt", None, _MS_BIND)
        os.write(ready[1], b".")
        os.close(done[1])
        os.read(done[0], 1)

    places = [(base, BARRIER), (base, "polytmp-1002")]
    assert recovery.mounted_barriers(places) == {}
    pid = children.start(takes_it_along)
    os.close(ready[1])
    assert os.read(ready[0], 1) == b"."
    assert recovery.mounted_barriers(places) == {BARRIER: pid}
    with _without_listmount():
        assert recovery.mounted_barriers(places) == {BARRIER: pid}
    os.close(done[1])
    assert os.waitpid(pid, 0) == (pid, 0)
    assert recovery.mounted_barriers(places) == {}


def _in_the_root_file_system() -> None:
    # Two levels, like /tmp on Debian 12, and /var/tmp everywhere.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as base:
        _taken_along(base)


def _in_a_directory_of_the_root() -> None:
    with tempfile.TemporaryDirectory(dir="/") as base:
        _taken_along(base)


def _in_a_mount_of_its_own() -> None:
    base = Path("/mnt/own")
    base.mkdir()
    syscalls.mount("none", str(base), "tmpfs", 0)
    _taken_along(str(base))


def _in_a_bind_mount() -> None:
    base, elsewhere = Path("/mnt/bind"), Path("/mnt/else/where")
    base.mkdir()
    elsewhere.mkdir(parents=True)
    syscalls.mount(str(elsewhere), str(base), None, _MS_BIND)
    _taken_along(str(base))


@pytest.mark.parametrize(
    "where",
    [_in_the_root_file_system, _in_a_directory_of_the_root, _in_a_mount_of_its_own, _in_a_bind_mount],
    ids=lambda where: where.__name__.strip("_"),
)
def test_an_instance_that_is_mounted_elsewhere(where: Callable[[], None]) -> None:
    run_alone(__name__, where.__name__)


@dataclass
class Cage:
    """A namespace with an instance mounted on /mnt/here, and the processes in it."""

    base: str
    pids: list[int] = field(default_factory=list)
    ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def start(self, work: Callable[[], object]) -> int:
        """Have a process call work() in the namespace, and stay; returns its pid."""
        ready = os.pipe()

        def live() -> None:
            if self.pids:
                with Descriptor.open(f"/proc/{self.pids[0]}/ns/mnt", os.O_RDONLY) as fd:
                    syscalls.unshare(syscalls.CLONE_FS)
                    syscalls.setns(fd, syscalls.CLONE_NEWNS)
            else:
                children.alone()
                Path("/mnt/here").mkdir(exist_ok=True)
                syscalls.mount(f"{self.base}/{BARRIER}/tmp", "/mnt/here", None, _MS_BIND)
            work()
            os.write(ready[1], b".")
            signal.pause()

        self.pids.append(children.start(live))
        os.close(ready[1])
        assert os.read(ready[0], 1) == b".", "it has started"
        os.close(ready[0])
        self.ends.callback(os.waitpid, self.pids[-1], 0)
        self.ends.callback(os.kill, self.pids[-1], signal.SIGKILL)
        return self.pids[-1]

    def users(self) -> dict[str, int]:
        return recovery.mounted_barriers([(self.base, BARRIER)])


@contextlib.contextmanager
def cage() -> Iterator[Cage]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as base:
        os.makedirs(f"{base}/{BARRIER}/tmp")
        made = Cage(base)
        assert made.users() == {}
        with made.ends:
            yield made
        assert made.users() == {}, "and it is not in use any more"


def _chroot() -> None:
    Path("/mnt/empty").mkdir(exist_ok=True)
    os.chroot("/mnt/empty")


def _chroot_into_a_cover() -> None:
    """What is on /mnt/here is in reach of the working directory alone."""
    os.chdir("/mnt/here")
    syscalls.mount("cover", "/", "tmpfs", 0)
    os.chroot("/..")
    assert not Path("/mnt/here").exists()


def case_a_process_in_a_chroot_hides_nothing_from_the_others() -> None:
    with cage() as it:
        lowest = it.start(_chroot)
        it.start(lambda: None)
        assert it.users() == {BARRIER: lowest}
        with _without_listmount():
            assert it.users() == {BARRIER: lowest}


def case_all_processes_are_in_a_chroot() -> None:
    with cage() as it:
        pid = it.start(_chroot)
        assert it.users() == {BARRIER: pid}
        with _without_listmount():
            assert it.users() == {BARRIER: pid}


def case_one_process_is_beneath_a_cover() -> None:
    """A new process in the namespace would not see the mount, and neither does the first."""
    with cage() as it:
        lowest = it.start(_chroot)
        it.start(lambda: syscalls.mount("cover", "/", "tmpfs", 0))
        assert it.users() == {BARRIER: lowest}
        with _without_listmount():
            assert it.users() == {BARRIER: lowest}


def case_no_process_reaches_the_mount_by_a_path() -> None:
    with cage() as it:
        pid = it.start(_chroot_into_a_cover)
        assert it.users() == {BARRIER: pid}


def case_a_namespace_that_another_process_has_open() -> None:
    with cage() as it, cage() as other:
        inside = it.start(lambda: None)
        fd = Descriptor.open(f"/proc/{inside}/ns/mnt", os.O_RDONLY)
        holder = other.start(lambda: None)
        fd.close()
        it.ends.close()
        it.pids.clear()
        assert it.users() == {BARRIER: holder}


def case_what_cannot_be_read_may_be_in_use() -> None:
    too_long = OSError(errno.EOVERFLOW, "Value too large")
    with cage() as it:
        pid = it.start(lambda: None)
        with (
            mock.patch.object(mounted, "_device_and_root", side_effect=too_long),
            pytest.raises(OSError, match="too long to be read"),
        ):
            it.users()
        lack = OSError(errno.EMFILE, "Too many open files")
        with (
            mock.patch.object(Descriptor, "open", side_effect=lack),
            pytest.raises(OSError, match="Too many open files"),
        ):
            it.users()
        assert it.users() == {BARRIER: pid}


def case_a_chroot_hides_no_copy_from_who_asks_for_holders() -> None:
    def copied() -> None:
        syscalls.mount(SENTINEL, "/media", "tmpfs", 0)
        _chroot()

    with cage() as it:
        pids = [it.start(copied), it.start(lambda: None)]
        found = holders.find(NO_NAMESPACE, [BARRIER])
        assert [(holder.pid, holder.how) for holder in found] == [(pid, "derived") for pid in pids]
        assert holders.find(NO_NAMESPACE, ["polytmp-1002"]) == []


# Namespaces of other users


@contextlib.contextmanager
def of_mallory(work: Callable[[], object] = lambda: None) -> Iterator[int]:
    """A process of UID 1500's in namespaces of their own calls work(), and stays; yields its pid."""
    ready, mapped = os.pipe(), os.pipe()

    def live() -> None:
        children.become(MALLORY)
        children._libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self is root's
        syscalls.unshare(_CLONE_NEWUSER | syscalls.CLONE_NEWNS)
        os.write(ready[1], b".")
        os.read(mapped[0], 1)
        work()
        os.write(ready[1], b".")
        signal.pause()

    pid = children.start(live)
    try:
        os.close(ready[1])
        assert os.read(ready[0], 1) == b".", "it has its namespaces"
        for table in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{table}").write_text(f"0 {MALLORY} 1\n1 {SUBORDINATE} 1\n")
        os.write(mapped[1], b".")
        assert os.read(ready[0], 1) == b".", "it has started"
        yield pid
    finally:
        for fd in (ready[0], *mapped):
            os.close(fd)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def junk() -> Iterator[str]:
    """A directory that lies deeper than is read here, in the file system with the barriers."""
    with (
        tempfile.TemporaryDirectory(dir="/var/tmp") as base,
        mock.patch.object(mounted, "_ROOT_AT_MOST", 4096),
    ):
        for name in (BARRIER, f"polytmp-{MALLORY}", REMOVING):
            os.makedirs(f"{base}/{name}/tmp")
        deep = f"{base}/" + "/".join(["d" * 250] * 13)
        os.makedirs(deep)
        os.chmod(base, 0o755)
        yield base
        assert recovery.mounted_barriers([(base, BARRIER)]) == {}


def mount_deep(base: str) -> None:
    os.chdir(f"{base}/" + "/".join(["d" * 250] * 13))
    os.makedirs("/".join(["e" * 250] * 5), exist_ok=True)
    for _ in range(5):
        os.chdir("e" * 250)
    syscalls.mount(".", "/mnt", None, _MS_BIND)


def unknown(base: str, *names: str) -> set[str]:
    try:
        found = recovery.mounted_barriers([(base, name) for name in names])
    except recovery.UnreadError as error:
        return {*error.unknown, *error.found}
    return set(found)


def case_what_one_user_makes_unreadable_is_in_use_for_them_alone() -> None:
    with junk() as base:
        os.chmod(f"{base}/" + "/".join(["d" * 250] * 13), 0o777)
        with of_mallory(lambda: mount_deep(base)):
            assert unknown(base, BARRIER) == set()
            assert unknown(base, BARRIER, f"polytmp-{MALLORY}", REMOVING) == {f"polytmp-{MALLORY}", REMOVING}
            places = [Place(base, name) for name in (f"polytmp-{MALLORY}", BARRIER)]
            assert unused(places, lambda: False) == places[1:]
        assert unknown(base, BARRIER, f"polytmp-{MALLORY}", REMOVING) == set()


def case_what_root_has_put_in_an_unreadable_namespace_may_be_anyones() -> None:
    with junk() as base:
        os.chmod(f"{base}/" + "/".join(["d" * 250] * 13), 0o777)
        with of_mallory(lambda: mount_deep(base)) as pid:
            ready = os.pipe()

            def enter() -> None:
                with Descriptor.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY) as fd:
                    syscalls.unshare(syscalls.CLONE_FS)
                    syscalls.setns(fd, syscalls.CLONE_NEWNS)
                children.become(1001)
                os.write(ready[1], b".")
                signal.pause()

            alices = children.start(enter)
            assert os.read(ready[0], 1) == b"."
            assert unknown(base, BARRIER, "polytmp-1002") == {BARRIER}
            os.kill(alices, signal.SIGKILL)
            os.waitpid(alices, 0)
            assert unknown(base, BARRIER) == set()


def case_one_user_does_not_keep_a_search_for_others_for_long() -> None:
    with junk() as base, of_mallory(), _impatient():
        assert unknown(base, BARRIER) == set()
        assert unknown(base, f"polytmp-{MALLORY}") == set(), "all the time it takes"
        limits = Patience(lambda: False, {1001})
        assert list(namespaces.every(limits))
        with limits.on_account_of(lambda: MALLORY) as over:
            assert over()
        with limits.on_account_of(lambda: 1001) as over:
            assert not over()
        with limits.on_account_of(lambda: patience.ROOT) as over:
            assert not over()


def case_one_users_descriptors_do_not_keep_a_search_for_long() -> None:
    """Of all that a user has open, so much is examined as fits."""
    refused = mock.patch.object(namespaces, "_shows_neighbours", return_value=False)
    with of_mallory(), refused, _impatient():
        limits = Patience(lambda: False)
        list(namespaces.every(limits))
        assert set(limits.unread) == {MALLORY}
        assert "more mounts or descriptors than can be searched" in str(limits.unread[MALLORY])
        limits = Patience(lambda: False, {MALLORY})
        list(namespaces.every(limits))
        assert limits.unread == {}


def case_whose_a_namespace_is() -> None:
    """Also one that a subordinate UID made in it, and that of a process whose /proc/PID is root's."""

    def nested() -> None:
        os.setresuid(1, 1, 1)
        syscalls.unshare(_CLONE_NEWUSER | syscalls.CLONE_NEWNS)

    def hidden() -> None:
        children._libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)

    for work in (lambda: None, nested, hidden):
        with of_mallory(work) as pid, Descriptor.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY) as fd:
            assert patience.owner(fd) == patience.user_of(str(pid)) == MALLORY
    with Descriptor.open("/proc/self/ns/mnt", os.O_RDONLY) as fd:
        assert patience.owner(fd) == patience.user_of("self") == 0


def case_a_namespace_in_flight() -> None:
    """No process lives in it or has it open. A kernel that lists no namespaces does not show it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ready, done = os.pipe(), os.pipe()

        def lives_there() -> None:
            os.close(done[1])
            children.alone()
            os.write(ready[1], b".")
            os.read(done[0], 1)

        pid = children.start(lives_there)
        os.read(ready[0], 1)
        with Descriptor.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY) as fd:
            inode = os.fstat(fd).st_ino
            socket.send_fds(ours, [b"."], [fd])
        assert {found.inode: found.pid for found in namespaces.every(Patience(lambda: False))}[inode] == pid
        os.close(done[1])
        os.waitpid(pid, 0)
        others = [found.pid for found in namespaces.every(Patience(lambda: False)) if found.inode == inode]
        assert others == ([0] if namespaces._shows_neighbours() else [])
        _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
        for number in (*fds, *ready, done[0]):
            os.close(number)
        assert inode not in [found.inode for found in namespaces.every(Patience(lambda: False))]


CASES = sorted(name for name in globals() if name.startswith("case_"))


@pytest.mark.parametrize("case", CASES)
def test_case(case: str) -> None:
    run_alone(__name__, case)

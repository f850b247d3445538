# SPDX-License-Identifier: LGPL-2.1-or-later
"""kernel/nsfs with the running kernel, and whose namespace an ID may lead to."""

import contextlib
import errno
import os
import resource
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import pytest

from polytmpd.blocking import instances, restoration
from polytmpd.core.model import Directory, Instance, InstanceDirectory, Lifetime
from polytmpd.kernel import host, inside, nsfs, processes, syscalls
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.mountns import Namespace
from tests.kernel import children
from tests.kernel.bed import Bed, bed, soon
from tests.kernel.places import USER
from tests.kernel.world import run_alone

pytestmark = pytest.mark.kernel

ALICE, BOB = 1001, 1002
_MS_BIND = 4096
_CLONE_NEWUSER = 0x10000000


def case_it_opens() -> None:
    """Whether this kernel opens namespaces by their ID here."""
    with sleeping() as pid:
        assert lives(name(pid))


@pytest.fixture(scope="module")
def newer() -> None:
    try:
        case_it_opens()
    except AssertionError:
        pytest.skip("expected: needs Linux 6.18")


@pytest.fixture(scope="module")
def newer_in_a_container() -> None:
    try:
        run_alone(__name__, "case_it_opens")
    except AssertionError:
        pytest.skip("expected: needs Linux 6.18 before 6.18.50")


@contextlib.contextmanager
def sleeping() -> Iterator[int]:
    """A process in a mount namespace of its own."""
    with subprocess.Popen(["unshare", "--mount", "sleep", "infinity"]) as process:
        own = os.stat("/proc/self/ns/mnt").st_ino
        soon(lambda: os.stat(f"/proc/{process.pid}/ns/mnt").st_ino != own)
        try:
            yield process.pid
        finally:
            process.kill()


def name(pid: int) -> tuple[int, int]:
    """(ID, inode) of the mount namespace of a process."""
    with Descriptor.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY) as fd:
        return nsfs.identify(fd), os.fstat(fd).st_ino


def lives(named: tuple[int, int]) -> bool:
    found = nsfs.open_namespace(*named)
    if found is None:
        return False
    with found:
        assert (nsfs.identify(found), os.fstat(found).st_ino) == named
        assert syscalls.get_nstype(found) == syscalls.CLONE_NEWNS
        assert not os.get_inheritable(found)
    return True


# What opens, and what keeps a namespace


@pytest.mark.usefixtures("newer")
def test_a_process_keeps_it() -> None:
    with sleeping() as pid:
        named = name(pid)
        assert lives(named)
    soon(lambda: not lives(named))


@pytest.mark.usefixtures("newer")
def test_a_descriptor_keeps_it() -> None:
    with sleeping() as pid:
        named = name(pid)
        fd = Descriptor.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    assert lives(named)
    fd.close()
    assert not lives(named)


@pytest.mark.usefixtures("newer")
def test_a_descriptor_in_flight_keeps_it() -> None:
    """No process has it open."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with sleeping() as pid:
            named = name(pid)
            with Descriptor.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY) as fd:
                socket.send_fds(ours, [b"."], [fd])
        assert lives(named)
    soon(lambda: not lives(named))


@pytest.mark.usefixtures("newer")
def test_a_bind_mount_keeps_it() -> None:
    """A namespace can be mounted in one with a lower ID, and each processor has its own range of IDs."""

    def work() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        children.alone()
        with tempfile.NamedTemporaryFile() as place, sleeping() as pid:
            named = name(pid)
            syscalls.mount(f"/proc/{pid}/ns/mnt", place.name, None, _MS_BIND)
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert lives(named)
            syscalls.umount2(place.name, 0)
            soon(lambda: not lives(named))

    children.in_child(work)


@pytest.mark.usefixtures("newer")
def test_an_id_is_not_given_again() -> None:
    """Inode numbers are: the lowest that is free."""
    used: list[tuple[int, int]] = []
    for _ in range(100):
        with sleeping() as pid:
            named = name(pid)
            assert named[0] not in [former for former, _ in used]
            for former, inode in used:
                assert not lives((former, inode))
                assert not lives((former, named[1])), "with the number of one that lives"
        if named[1] in [inode for _, inode in used]:
            return
        used.append(named)
    raise AssertionError("no number was given again: this tested nothing")


@pytest.mark.usefixtures("newer")
def test_what_is_no_namespace() -> None:
    with sleeping() as pid:
        identity, inode = name(pid)
        network = os.stat("/proc/self/ns/net").st_ino
        for wrong in (
            (identity, inode + 1),
            (identity, 0),
            (identity, inode + (1 << 32)),
            (identity, (1 << 64) - 1),
            (0, inode),
            (0, 0),
            ((1 << 64) - 1, inode),
            (identity, network),
        ):
            assert nsfs.open_namespace(*wrong) is None, wrong
        assert lives((identity, inode))
    with Descriptor.open("/proc/self/ns/net", os.O_RDONLY) as other:
        assert nsfs.identify(other) == 0
    with Descriptor.open("/dev/null", os.O_RDONLY) as other:
        assert nsfs.identify(other) == 0


# Who may


def pid1_is(pid: int) -> contextlib.AbstractContextManager[object]:
    """Take that process's namespace for PID 1's."""
    path = f"/proc/{pid}/ns/mnt"
    return mock.patch.object(host, "open_namespace", side_effect=lambda: Descriptor.open(path, os.O_RDONLY))


@pytest.mark.usefixtures("newer")
def test_root_may() -> None:
    with sleeping() as pid, pid1_is(pid):
        assert nsfs.finds_all()
    with pid1_is(os.getpid()):
        assert lives(name(os.getpid()))
        assert not nsfs.finds_all(), "the kernel opens that for anyone"


@pytest.mark.usefixtures("newer")
def test_a_user_may_not() -> None:
    def refuses() -> None:
        with kept, mock.patch.object(host, "open_namespace", return_value=kept):
            assert nsfs.open_namespace(*named) is None
            assert not nsfs.finds_all()

    def user() -> None:
        children.become(USER)
        refuses()

    def root_of_their_own() -> None:
        children.become(USER)
        syscalls.unshare(_CLONE_NEWUSER | syscalls.CLONE_NEWNS)
        refuses()

    with sleeping() as pid, Descriptor.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY) as kept:
        named = name(pid)
        children.in_child(user)
        children.in_child(root_of_their_own)


def test_a_lack_of_descriptors_is_no_end() -> None:
    """Not even if there is no such namespace."""

    def work() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        with pytest.raises(OSError, match="Too many open files"):
            nsfs.open_namespace(*named)

    with sleeping() as pid:
        named = name(pid)
        children.in_child(work)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EBADF, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP])
def test_older_kernels_and_sandboxes(number: int) -> None:
    """They find nothing, and finds_all() says so."""
    refused = OSError(number, os.strerror(number))
    with sleeping() as pid, mock.patch.object(nsfs, "open_by_handle_at", side_effect=refused), pid1_is(pid):
        assert nsfs.open_namespace(*name(pid)) is None
        assert not nsfs.finds_all()


# Whose it is


@contextlib.contextmanager
def instance_of(it: Bed, uid: int) -> Iterator[tuple[Instance, Namespace]]:
    """An instance that nothing keeps but a descriptor."""
    barrier = f"polytmp-{uid}"
    it.directories = [it.make(it.mounted, barrier=barrier)]
    namespace = it.build()
    directory = Directory(it.mounted, Lifetime.PERSISTENT)
    made = Instance(uid, str(uid), 0, 0, (InstanceDirectory(directory, barrier),), namespace.inode)
    with namespace.fd:
        yield instances.identified(made, namespace.fd), namespace


def not_searched() -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(processes, "open_namespace", side_effect=AssertionError("searched /proc"))


def opened(instance: Instance) -> int:
    """The inode of what open_living() opens; 0 for nothing."""
    found = instances.open_living(instance)
    if found is None:
        return 0
    with found:
        return os.fstat(found).st_ino


def case_the_instance_opens_without_a_search() -> None:
    with bed() as it, instance_of(it, ALICE) as (alice, namespace):
        with not_searched():
            assert opened(alice) == namespace.inode
        namespace.fd.close()
        soon(lambda: opened(alice) == 0)  # a thread that worked in it is still ending
        with mock.patch.object(nsfs, "finds_all", return_value=True), not_searched():
            assert opened(alice) == 0, "it has ended: there is nothing to search"


def case_a_state_file_is_no_proof() -> None:
    """It names namespaces that live, and are not alice's."""
    with contextlib.ExitStack() as stack:
        it = stack.enter_context(bed())
        alice, _ = stack.enter_context(instance_of(it, ALICE))
        bob, namespace = stack.enter_context(instance_of(it, BOB))
        with derived_from(namespace.fd) as theirs, not_searched():
            found = [name(1), (bob.namespace_id, bob.namespace), *map(name, theirs)]
            assert len(set(found)) == 4
            for identity, inode in found:
                assert lives((identity, inode))
                for user in (alice, bob):
                    claims = replace(user, namespace_id=identity, namespace=inode)
                    expected = inode if (user, inode) == (bob, bob.namespace) else 0
                    with mock.patch.object(nsfs, "finds_all", return_value=True):
                        assert opened(claims) == expected


@contextlib.contextmanager
def derived_from(namespace: Descriptor) -> Iterator[tuple[int, int]]:
    """Processes in namespaces made from that one: by root, and by a user."""

    def work(user: int) -> Callable[[], None]:
        def derive() -> None:
            inside.enter(namespace)
            if user:
                children.become(user)
                syscalls.unshare(_CLONE_NEWUSER | syscalls.CLONE_NEWNS)
            else:
                syscalls.unshare(syscalls.CLONE_NEWNS)
                syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
            os.write(ready[1], b".")
            signal.pause()

        return derive

    ready = os.pipe()
    pids = [children.start(work(0)), children.start(work(USER))]
    os.close(ready[1])
    try:
        for _ in pids:
            assert os.read(ready[0], 1) == b"."
        yield pids[0], pids[1]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def case_all_that_is_left_is_found() -> None:
    """One by ID, one by its process alone, one by its process and the record, and one has ended."""
    with bed() as it, contextlib.ExitStack() as stack:
        made = {uid: stack.enter_context(instance_of(it, uid)) for uid in range(ALICE, ALICE + 4)}
        by_id, by_process, by_both, ended = (instance for instance, _ in made.values())
        pids = []
        for known in (by_process, by_both):
            path = f"/proc/{os.getpid()}/fd/{made[known.uid][1].fd}"
            pids.append(subprocess.Popen(["nsenter", f"--mount={path}", "sleep", "infinity"]))
            soon(lambda: processes.living_in(known.namespace))  # noqa: B023
        for uid in (by_process.uid, by_both.uid, ended.uid):
            made[uid][1].fd.close()
        recorded = {known.uid: known for known in (by_id, replace(by_both, namespace_id=0), ended)}
        directories = [entry.directory for entry in by_id.directories]
        found = {}
        for left in restoration.left({}, recorded, directories, lambda *_: None):
            assert left.stored is None
            inode = os.fstat(left.namespace).st_ino if left.namespace is not None else 0
            found[left.instance.uid] = left.instance.namespace_id, inode
        assert found == {
            **{known.uid: (known.namespace_id, known.namespace) for known in (by_id, by_process, by_both)},
            ended.uid: (ended.namespace_id, 0),
        }
        for process in pids:
            process.kill()
            process.wait()


@pytest.mark.usefixtures("newer_in_a_container")
@pytest.mark.parametrize(
    "case",
    [
        case_the_instance_opens_without_a_search,
        case_all_that_is_left_is_found,
    ],
    ids=lambda case: case.__name__.removeprefix("case_"),
)
def test_an_instance(case: Callable[[], None]) -> None:
    run_alone(__name__, case.__name__)


@pytest.mark.usefixtures("newer_in_a_container")
def test_a_state_file_is_no_proof() -> None:
    run_alone(__name__, "case_a_state_file_is_no_proof")


def case_what_is_refused_is_searched() -> None:
    """As before Linux 6.18. This process has it open."""
    refused = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    with bed() as it, instance_of(it, ALICE) as (alice, namespace):
        for known in (alice, replace(alice, namespace_id=1), replace(alice, namespace_id=0)):
            with mock.patch.object(nsfs, "open_by_handle_at", side_effect=refused):
                assert opened(known) == namespace.inode


def test_what_is_refused_is_searched() -> None:
    run_alone(__name__, "case_what_is_refused_is_searched")

# SPDX-License-Identifier: LGPL-2.1-or-later
"""kernel/mountns and kernel/inside with the running kernel. Each case_ runs in new namespaces (world.py).

Not here: what the host mounts meanwhile (test_mount_events).
"""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from polytmpd.blocking import recovery
from polytmpd.core.model import Directory, Lifetime
from polytmpd.kernel import inotify, inside, mountinfo, mountns, processes, syscalls
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.mountinfo import Mount
from polytmpd.kernel.mountns import Namespace, PrivateDirectory
from tests.kernel import children
from tests.kernel.bed import POINT, Bed, bed, points, soon, within
from tests.kernel.world import run_alone

pytestmark = pytest.mark.kernel


def test_root_is_here() -> None:
    if os.geteuid() != 0:
        pytest.fail("the kernel tests need root: they make mount namespaces", pytrace=False)


def case_only_the_directories_are_private() -> None:
    with bed() as it:
        before = points()
        namespace = it.build()
        assert points() == before, "the host has no new mount"
        for path in (it.mounted, it.plain):
            within(namespace, f"touch {path}/mine")
            assert not Path(path, "mine").exists()
            assert Path(path, "barrier/tmp/mine").exists()
        within(namespace, f"mount -t tmpfs x {POINT}")
        assert POINT in points()
        subprocess.run(["umount", POINT], check=True)
        assert within(namespace, f"grep -c ' {POINT} ' /proc/self/mountinfo || true").strip() == "0"
        subprocess.run(["mount", "-t", "tmpfs", "x", POINT], check=True)
        within(namespace, f"umount {POINT}")
        assert POINT not in points()


def case_mounts_in_the_directories_stay_there() -> None:
    with bed() as it:
        namespace = it.build()
        for path in (it.mounted, it.plain):
            before = points()
            within(namespace, f"mkdir {path}/m; mount -t tmpfs m {path}/m")
            assert points() == before


def case_two_namespaces_share_what_is_not_private() -> None:
    with bed() as it:
        first, second = it.build(), it.build()
        assert first.inode != second.inode
        within(first, f"mount -t tmpfs x {POINT}; touch {POINT}/f")
        assert within(second, f"ls {POINT}").strip() == "f"
        within(second, f"umount {POINT}")
        assert within(first, f"ls {POINT}") == ""


def case_shared_names_are_the_hosts() -> None:
    with bed() as it:
        namespace = it.build()
        within(namespace, f"touch {it.mounted}/.X11-unix/X0")
        assert Path(it.mounted, ".X11-unix/X0").exists()


def case_what_is_shared_again_is_no_peer_of_the_hosts() -> None:
    """Not for a moment: a user may mount on it at once, and so may the host."""
    sub, attach = "/mnt/tmp/.X11-unix/sub", inside.attach
    with bed() as it:
        namespace = it.build()
        Path(it.mounted, ".X11-unix").rmdir()
        Path(sub).mkdir(parents=True)
        on_host: list[list[str]] = []

        def attach_and_mount(tree: int, path: str, flags: int = 0) -> None:
            subprocess.run(
                ["nsenter", "--mount=/proc/1/ns/mnt", "mount", "-t", "tmpfs", "host", sub], check=True
            )
            attach(tree, path, flags)
            syscalls.mount("user", sub, "tmpfs", 0)
            on_host.append([mount.source for mount in mountinfo.read("1") if mount.mount_point == sub])

        with mock.patch.object(inside, "attach", attach_and_mount):
            assert inside.share_again(namespace.fd, it.mounted, [".X11-unix"]) == [f"{it.mounted}/.X11-unix"]
        assert on_host == [["host"]], "the user's mount did not reach the host"
        subprocess.run(["umount", sub], check=True)
        table = inside.mounts_in(namespace.fd)
        assert [mount.source for mount in table if mount.mount_point == sub] == ["user"]
        (shared,) = [mount for mount in table if mount.mount_point.endswith("/.X11-unix")]
        assert not shared.propagates


def case_a_host_mount_below_is_not_kept() -> None:
    with bed() as it:
        for path in (it.mounted, it.plain):
            Path(path, "iso/nested").mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "iso", f"{path}/iso"], check=True)
            Path(path, "iso/nested").mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "nested", f"{path}/iso/nested"], check=True)
        # A covered mount: no path leads to it.
        subprocess.run(["mount", "-t", "tmpfs", "nested", f"{it.mounted}/iso"], check=True)
        before = points()
        namespace = it.build()
        assert points() == before, f"the host keeps its mounts: {set(before) ^ set(points())}"
        table = inside.mounts_in(namespace.fd)
        assert not [mount for mount in table if mount.source in {"iso", "nested"}]


def case_a_covered_host_mount_below_is_not_taken_from_the_host() -> None:
    with bed() as it:
        for source in ("iso", "cover"):
            Path(it.plain, "iso/nested").mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", source, f"{it.plain}/iso"], check=True)
        before = points()
        os.close(it.build().fd)
        assert points() == before


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """All but one are in use: that reads /proc, and the next open(2) fails."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Descriptor.open("/", os.O_PATH) as next_fd:
        number = int(next_fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number + 1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def case_the_end_is_reported_when_the_last_is_gone() -> None:
    with bed() as it:
        namespace = it.build()
        path = f"/proc/{os.getpid()}/fd/{namespace.fd}"
        process = subprocess.Popen(["nsenter", f"--mount={path}", "sleep", "infinity"])
        soon(lambda: processes.living_in(namespace.inode))
        os.close(namespace.fd)
        again = processes.open_namespace(namespace.inode)
        assert again is not None
        assert os.fstat(again).st_ino == namespace.inode
        os.close(again)
        with no_descriptor_left(), pytest.raises(OSError, match="Too many open files"):
            processes.open_namespace(namespace.inode)
        assert it.ended() == []
        assert inotify.living_watches(it.watches.fd) == {namespace.watch}
        process.kill()
        process.wait()
        found = soon(it.ended)
        assert found == [namespace.watch]
        assert inotify.living_watches(it.watches.fd) == set()
        assert processes.open_namespace(namespace.inode) is None


def case_a_chroot_hides_no_living_instance() -> None:
    """From a daemon that has lost its FD store and its state: the only process sees none of the mounts."""
    with bed() as it:
        it.directories = [it.make(it.mounted, barrier="polytmp-1001")]
        namespace = it.build()
        ready = os.pipe()

        def chrooted() -> None:
            inside.enter(namespace.fd)
            os.close(namespace.fd)
            os.chroot("/usr")
            os.write(ready[1], b".")
            signal.pause()

        pid = children.start(chrooted)
        assert os.read(ready[0], 1) == b"."
        os.close(namespace.fd)
        (found,) = recovery.living([Directory(it.mounted, Lifetime.INSTANCE)])
        assert (found.uid, found.namespace) == (1001, namespace.inode)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert list(recovery.living([Directory(it.mounted, Lifetime.INSTANCE)])) == []


@pytest.mark.parametrize("beneath", [True, False])
def test_renewed_sentinel(beneath: bool) -> None:
    run_alone(__name__, "case_renewed_sentinel_beneath" if beneath else "case_renewed_sentinel_under_shared")


def case_renewed_sentinel_beneath() -> None:
    renewed_sentinel()


def case_renewed_sentinel_under_shared() -> None:
    too_old = OSError(errno.EINVAL, "MOVE_MOUNT_BENEATH needs Linux 6.5")
    with mock.patch.object(inside, "_set_sentinel_beneath", side_effect=too_old):
        renewed_sentinel()


def renewed_sentinel() -> None:
    with bed() as it:
        namespace = it.build()
        it.watches.close()
        it.watches = inotify.Inotify()
        within(namespace, f"touch {it.mounted}/mine")
        first = it.directories[0]
        watch = inside.renew_sentinel(namespace.fd, first.path, first.shared, it.watch)
        assert within(namespace, f"ls {it.mounted}").strip() == "mine"
        within(namespace, f"touch {it.mounted}/.X11-unix/X0")
        assert Path(it.mounted, ".X11-unix/X0").exists()
        assert it.ended() == []
        os.close(namespace.fd)
        found = soon(it.ended)
        assert found == [watch]


def case_replaced_beneath() -> None:
    with bed() as it:
        namespace = it.build()
        for directory in it.directories:
            replaced(it, namespace, directory)
        os.close(namespace.fd)
        assert soon(it.ended) == [namespace.watch], "nothing keeps the namespace"


def case_replaced_before_linux_6_5() -> None:
    def too_old(from_fd: int, to_fd: int, flags: int = 0) -> None:
        if flags & syscalls.MOVE_MOUNT_BENEATH:
            raise OSError(errno.EINVAL, "Invalid argument")
        syscalls.move_mount(from_fd, to_fd, flags)

    with bed() as it, mock.patch.object(inside, "move_mount", too_old):
        namespace = it.build()
        for directory in it.directories:
            replaced(it, namespace, directory)
        os.close(namespace.fd)
        assert soon(it.ended) == [namespace.watch]


def case_never_above_the_hosts() -> None:
    """The host would get what is mounted there. Earlier daemons set a sentinel in one directory only."""
    with bed() as it:
        namespace = it.build()
        path = it.directories[1].path
        within(namespace, f"mkdir {path}/kept; mount --bind {path}/kept {path}/kept")
        table = inside.mounts_in(namespace.fd)
        entry = next(mount for mount in table if mount.mount_point == f"{path}/kept")
        before = points()
        with Descriptor.open(path, os.O_PATH) as fd, pytest.raises(OSError, match="earlier polytmpd"):
            inside.replace(namespace.fd, entry, fd)
        assert points() == before
        within(namespace, f"umount {path}/kept")


def replaced(it: Bed, namespace: Namespace, directory: PrivateDirectory) -> None:
    path = directory.path
    inner = Path(path, directory.source)
    within(namespace, f"touch {path}/former")
    # In a namespace of their own the directories are no mount points, as in the host's.
    subprocess.run(["rm", "-rf", inner.parent], check=True)
    removed = private(namespace, path)
    assert removed.is_removed
    assert removed.former_root.endswith("/barrier/tmp")
    assert "No such file" in within(namespace, f"touch {path}/x 2>&1 || true")
    inner.mkdir(parents=True)
    before = points()
    with Descriptor.open(inner, os.O_PATH) as fd:
        inside.replace(namespace.fd, removed, fd)
        with pytest.raises(OSError, match="something else is mounted"):
            inside.replace(namespace.fd, removed, fd)
    within(namespace, f"touch {path}/mine")
    assert os.listdir(inner) == ["mine"]
    assert points() == before, "the host has no new mount"
    found = private(namespace, path)
    assert not found.is_removed
    assert not found.propagates


def private(namespace: Namespace, path: str) -> Mount:
    """The one mount of an inner directory at the path."""
    table = inside.mounts_in(namespace.fd)
    [found] = [mount for mount in table if mount.mount_point == path and "/barrier/tmp" in mount.root]
    return found


def case_something_else_in_its_place_is_refused() -> None:
    with bed() as it:
        before = points()
        Path(it.plain, "barrier/tmp").rename(Path(it.plain, "barrier/old"))
        Path(it.plain, "barrier/tmp").mkdir()
        with pytest.raises(OSError, match="not the instance directory") as caught:
            it.build()
        assert caught.value.errno == errno.ESTALE
        assert points() == before
        soon(lambda: inotify.living_watches(it.watches.fd) == set())


def case_a_link_is_refused() -> None:
    with bed() as it:
        os.symlink(it.plain, "/mnt/link")
        link = PrivateDirectory("/mnt/link", "barrier/tmp", it.directories[1].identity)
        with pytest.raises(OSError, match="/mnt/link"):
            mountns.build([link], it.watch)


def case_nothing_leaks() -> None:
    with bed() as it:
        fds = len(os.listdir("/proc/self/fd"))
        threads = threading.active_count()
        before = points()
        for _ in range(50):
            os.close(it.build().fd)
        assert len(os.listdir("/proc/self/fd")) == fds
        assert threading.active_count() == threads
        assert points() == before
        soon(lambda: inotify.living_watches(it.watches.fd) == set())


def case_a_host_without_propagation_is_served_too() -> None:
    with bed() as it:
        namespace = it.build()
        within(namespace, f"touch {it.plain}/mine")
        assert not Path(it.plain, "mine").exists()
        within(namespace, f"mount -t tmpfs x {POINT}")
        assert POINT not in points()


CASES = sorted(name for name in globals() if name.startswith("case_") and "renewed" not in name)


@pytest.mark.parametrize("case", CASES)
def test_case(case: str) -> None:
    run_alone(__name__, case, shared=case != "case_a_host_without_propagation_is_served_too")

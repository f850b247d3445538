# SPDX-License-Identifier: LGPL-2.1-or-later
"""kernel/mountns and kernel/inside with the running kernel. Each case_ runs in new namespaces (world.py)."""

import contextlib
import errno
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar
from unittest import mock

import pytest

from polytmpd.blocking import recovery
from polytmpd.core.model import Directory, Lifetime
from polytmpd.kernel import inotify, inside, mountinfo, mountns, processes, syscalls
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.mountinfo import Mount
from polytmpd.kernel.mountns import Namespace, PrivateDirectory
from tests.bed import eventually
from tests.kernel import children
from tests.kernel.world import run_alone

pytestmark = pytest.mark.kernel

T = TypeVar("T")

POINT = "/var/tmp/polytmp-test-point"
"""On the root file system, which is briefly private while a namespace is made."""


def test_root_is_here() -> None:
    if os.geteuid() != 0:
        pytest.fail("the kernel tests need root: they make mount namespaces", pytrace=False)


class Bed:
    """Two private directories, as on Debian 13: a mount, and a plain directory of the root file system."""

    def __init__(self) -> None:
        self.watches = inotify.Inotify()
        self.mounted, self.plain = "/mnt/tmp", tempfile.mkdtemp(prefix="polytmp-test-", dir="/var/tmp")
        Path(self.mounted).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "tmp", self.mounted], check=True)
        Path(POINT).mkdir(exist_ok=True)
        self.directories = [
            self.make(self.mounted, (".X11-unix",)),
            self.make(self.plain),
        ]

    def make(self, path: str, shared: tuple[str, ...] = (), barrier: str = "barrier") -> PrivateDirectory:
        inner = Path(path, barrier, "tmp")
        inner.mkdir(parents=True)
        for name in shared:
            Path(path, name).mkdir()
            (inner / name).mkdir()
        status = inner.stat()
        return PrivateDirectory(path, f"{barrier}/tmp", (status.st_dev, status.st_ino), shared)

    def watch(self, path: str) -> int:
        return self.watches.add_watch(path, inotify.IN_DELETE_SELF)

    def build(self) -> Namespace:
        return mountns.build(self.directories, self.watch)

    def ended(self) -> list[int]:
        return [event.watch for event in self.watches.read() if event.mask & inotify.IN_UNMOUNT]


@contextlib.contextmanager
def bed() -> Iterator[Bed]:
    made = Bed()
    try:
        yield made
    finally:
        subprocess.run(["umount", "--lazy", "--quiet", f"{made.plain}/iso"], check=False)
        subprocess.run(["umount", "--lazy", "--quiet", f"{made.plain}/iso"], check=False)
        subprocess.run(["rm", "-rf", "--one-file-system", made.plain], check=True)


def within(namespace: Namespace, script: str) -> str:
    path = f"/proc/{os.getpid()}/fd/{namespace.fd}"
    done = subprocess.run(
        ["nsenter", f"--mount={path}", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{script}: {done.stderr}"
    return done.stdout


def soon(condition: Callable[[], T]) -> T:
    """The first true value, within 10 s."""
    return eventually(condition, 10)


def points() -> list[str]:
    return sorted(mount.mount_point for mount in mountinfo.read("1"))


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


def case_no_mount_event_is_missed() -> None:
    """The host keeps mounting while namespaces are made; each must agree with it in the end."""
    with bed() as it:
        Path("/var/tmp/storm").mkdir(exist_ok=True)
        stop = threading.Event()

        def storm() -> None:
            while not stop.is_set():
                subprocess.run(["mount", "-t", "tmpfs", "storm", "/var/tmp/storm"], check=True)
                subprocess.run(["umount", "/var/tmp/storm"], check=True)

        thread = threading.Thread(target=storm)
        thread.start()
        made = []
        try:
            for _ in range(60):
                made.append(it.build())
        finally:
            stop.set()
            thread.join()
        subprocess.run(["mount", "-t", "tmpfs", "last", "/var/tmp/storm"], check=True)
        for namespace in made:
            sources = [m.source for m in inside.mounts_in(namespace.fd) if m.mount_point == "/var/tmp/storm"]
            assert sources == ["last"]
        subprocess.run(["umount", "/var/tmp/storm"], check=True)
        for namespace in made:
            assert "/var/tmp/storm" not in [m.mount_point for m in inside.mounts_in(namespace.fd)]
        Path("/var/tmp/storm").rmdir()


def agrees(it: Bed, namespace: Namespace) -> None:
    """Check that the namespace has the host's mounts, each as a peer of the host's."""
    paths = [directory.path for directory in it.directories]
    outside = mountinfo.Outside(paths)
    with contextlib.closing(mountinfo.lines("1")) as lines:
        expected = outside.of(lines)
    with inside.open_table(namespace.fd) as table:
        assert outside.of(mountinfo.lines_from(table)) == expected


def on_the_host(*command: str) -> None:
    subprocess.run(["nsenter", "--target=1", "--mount", *command], check=True)


@contextlib.contextmanager
def meanwhile(step: int, *commands: tuple[str, ...]) -> Iterator[list[tuple[str, ...]]]:
    """Run a command on the host each time when a namespace stops receiving, MS_SLAVE or MS_PRIVATE.

    Yields those that are still to be run.
    """
    left = list(commands)
    real = syscalls.set_propagation

    def set_propagation(tree: int, propagation: int) -> None:
        real(tree, propagation)
        if propagation == step and tree in roots and left:
            on_the_host(*left.pop(0))

    roots: set[int] = set()
    away = mountns._away_from_host

    def away_from_host(outer: Mapping[Descriptor, object], work: Callable[[], None]) -> bool:
        roots.update(outer)
        return away(outer, work)  # type: ignore[arg-type]

    with (
        mock.patch.object(mountns, "set_propagation", set_propagation),
        mock.patch.object(mountns, "_away_from_host", away_from_host),
    ):
        yield left


MOUNT, UMOUNT = ("mount", "-t", "tmpfs", "missed", POINT), ("umount", POINT)


def events_in_the_window(step: int) -> None:
    with bed() as it:
        for uncompared in (mountns._BUILDS_UNCOMPARED, 0):
            for commands in ([MOUNT], [UMOUNT], [MOUNT, UMOUNT], [MOUNT, UMOUNT, MOUNT], [UMOUNT]):
                with (
                    mock.patch.object(mountns, "_BUILDS_UNCOMPARED", uncompared),
                    meanwhile(step, *commands) as left,
                ):
                    namespace = it.build()
                for command in left:  # one that compares may agree before the last of them
                    on_the_host(*command)
                agrees(it, namespace)
                namespace.fd.close()


def case_an_event_that_a_private_mount_misses() -> None:
    events_in_the_window(syscalls.MS_PRIVATE)


def case_an_event_that_makes_a_slave() -> None:
    events_in_the_window(syscalls.MS_SLAVE)


def case_a_storm_of_mounts_refuses_nobody() -> None:
    """Three loops, each with mounts that stay for a while, so that no two tables are the same."""
    with bed() as it, contextlib.ExitStack() as stopping:
        for number in range(3):
            places = [f"/mnt/storm-{number}-{index}" for index in range(20)]
            for place in places:
                Path(place).mkdir()

            def storm(places: list[str] = places) -> None:
                while True:
                    for place in places:
                        syscalls.mount("storm", place, "tmpfs", 0)
                    for place in places:
                        syscalls.umount2(place, 0)

            pid = children.start(storm)
            stopping.callback(os.waitpid, pid, 0)
            stopping.callback(os.kill, pid, signal.SIGKILL)
        made = [it.build() for _ in range(100)]
        stopping.close()
        for namespace in made:
            agrees(it, namespace)
            namespace.fd.close()


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

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host mounts and unmounts while namespaces are made: none may miss an event, and no login may fail.

Each case_ runs in new namespaces (world.py).
"""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest import mock

import pytest

from polytmpd.kernel import inside, mountinfo, mountns, syscalls
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.mountns import Namespace
from tests.kernel import children
from tests.kernel.bed import POINT, Bed, bed
from tests.kernel.world import run_alone

pytestmark = pytest.mark.kernel


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


CASES = sorted(name for name in globals() if name.startswith("case_"))


@pytest.mark.parametrize("case", CASES)
def test_case(case: str) -> None:
    run_alone(__name__, case)

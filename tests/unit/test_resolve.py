# SPDX-License-Identifier: LGPL-2.1-or-later
"""Translating every kind of path in an instance to the host's path."""

import pytest

from polytmpd.core.model import Directory, InstanceDirectory, Lifetime
from polytmpd.core.resolve import resolve

pytestmark = pytest.mark.unit

DIRECTORIES = (
    InstanceDirectory(Directory("/tmp", Lifetime.INSTANCE, (".X11-unix", ".ICE-unix")), "polytmp-a"),
    InstanceDirectory(Directory("/var/tmp", Lifetime.PERSISTENT), "polytmp-1000"),
)


@pytest.mark.parametrize(
    ("path", "host"),
    [
        # the directory itself
        ("/tmp", "/tmp/polytmp-a/tmp"),
        ("/tmp/", "/tmp/polytmp-a/tmp"),
        ("/var/tmp", "/var/tmp/polytmp-1000/tmp"),
        # what is in it
        ("/tmp/x", "/tmp/polytmp-a/tmp/x"),
        ("/tmp/x/y/", "/tmp/polytmp-a/tmp/x/y"),
        ("/var/tmp/x", "/var/tmp/polytmp-1000/tmp/x"),
        ("/tmp/tmp", "/tmp/polytmp-a/tmp/tmp"),
        # shared names, which are the host's
        ("/tmp/.X11-unix", "/tmp/.X11-unix"),
        ("/tmp/.X11-unix/", "/tmp/.X11-unix"),
        ("/tmp/.X11-unix/X0", "/tmp/.X11-unix/X0"),
        ("/tmp/.ICE-unix/1", "/tmp/.ICE-unix/1"),
        # and names that only resemble one
        ("/tmp/.X11-unixx", "/tmp/polytmp-a/tmp/.X11-unixx"),
        ("/tmp/.X11", "/tmp/polytmp-a/tmp/.X11"),
        ("/tmp/x/.X11-unix", "/tmp/polytmp-a/tmp/x/.X11-unix"),
        ("/var/tmp/.X11-unix", "/var/tmp/polytmp-1000/tmp/.X11-unix"),
        # spelled in another way
        ("//tmp/x", "/tmp/polytmp-a/tmp/x"),
        ("///tmp//x", "/tmp/polytmp-a/tmp/x"),
        ("/tmp/./x", "/tmp/polytmp-a/tmp/x"),
        ("/var/../tmp/x", "/tmp/polytmp-a/tmp/x"),
        ("/tmp/.X11-unix/../x", "/tmp/polytmp-a/tmp/x"),
        ("/tmp/x/../.X11-unix/X0", "/tmp/.X11-unix/X0"),
        # elsewhere
        ("/", None),
        ("/etc/passwd", None),
        ("/tmpx", None),
        ("/var", None),
        ("/var/tmpx", None),
        ("/tmp/../etc", None),
        ("/home/tmp/x", None),
    ],
)
def test_resolve(path: str, host: str | None) -> None:
    assert resolve(DIRECTORIES, path) == host


def test_without_private_directories_no_path_resolves() -> None:
    assert resolve((), "/tmp/x") is None

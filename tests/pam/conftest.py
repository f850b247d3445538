# SPDX-License-Identifier: LGPL-2.1-or-later
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pam.pam_world import Daemon, Namespace, World

HERE = Path(__file__).parent
PAM = HERE.parent.parent / "pam"

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


@pytest.fixture(scope="session")
def base() -> Iterator[Path]:
    """A directory that has the same path inside and outside of the world; no private /tmp hides it."""
    if os.geteuid() != 0:
        pytest.fail("the PAM tests make mount namespaces: run them as root")
    path = Path(tempfile.mkdtemp(prefix="polytmp-test-", dir="/run"))
    Path("/run/polytmpd").mkdir(mode=0o700, exist_ok=True)  # each world mounts its own there
    path.chmod(0o755)  # callers other than root must be able to load the module
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session", params=["plain", "sanitized"])
def build(request: pytest.FixtureRequest, base: Path) -> Path:
    """pam_polytmp.so and the harness, built from a copy of pam/ by its own Makefile."""
    source = base / f"build-{request.param}"
    shutil.copytree(PAM, source, ignore=shutil.ignore_patterns("*.so", "sanitize"))
    sanitized = request.param == "sanitized"
    target = source / "sanitize" if sanitized else source
    subprocess.run(["make", "-s", "-C", source, "sanitize" if sanitized else "all"], check=True, timeout=120)
    flags = ["-D_GNU_SOURCE", "-g", "-O1", "-Wall", "-Wextra", "-Werror", *(SANITIZE if sanitized else [])]
    command = ["gcc", *flags, f"{HERE}/harness.c", "-o", f"{target}/harness", "-pthread", "-lpam"]
    subprocess.run(command, check=True, timeout=120)
    return target


@pytest.fixture
def world(base: Path, build: Path) -> Iterator[World]:
    path = Path(tempfile.mkdtemp(prefix="world-", dir=base))
    path.chmod(0o755)
    with World(path, build) as world:
        yield world


@pytest.fixture
def daemon(world: World) -> Callable[..., Daemon]:
    return lambda **script: Daemon(world, **script)


@pytest.fixture
def private(world: World) -> Namespace:
    return world.make_namespace("mkdir -m 1777 /tmp/work")

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Builds the Debian package of a source directory for a release, as Debian's builders do: clean and offline.

Not here: the unit tests (DEB_BUILD_OPTIONS=nocheck). tests/ is left out of the copy, and a changed test does
not build the package again.
"""

import hashlib
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

from . import nspawn
from .tree import PROJECT, BedError, cache_directory, locked, tree

LEFT_OUT = ("bench/", "tests/", ".ci/", ".github/")
BUILD_TIMEOUT = 900


def build(release: str, source: Path = PROJECT) -> Path:
    """Return the .deb of the working tree as it is now, committed or not; built if it is not in the cache.

    Raises BedError.
    """
    nspawn.require_tools()
    builder = tree("builder", release)
    files = _files(source)
    if "debian/control" not in files:
        raise BedError(f"{source}: no debian/control")
    key = _digest(source, files, builder.name)
    packages = cache_directory() / "packages"
    packages.mkdir(exist_ok=True)
    target = packages / f"{release}-{key}"
    with locked(target.name):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=packages, prefix="new-") as directory:
                _build(builder, source, files, Path(directory))
                built = Path(directory, "debs")
                built.mkdir()
                for deb in Path(directory).glob("*.deb"):
                    if "-dbgsym_" not in deb.name:
                        deb.rename(built / deb.name)
                built.rename(target)
    debs = list(target.glob("*.deb"))
    if len(debs) != 1:
        raise BedError(f"{target}: expected one package, found {[deb.name for deb in debs]}")
    return debs[0]


def _files(source: Path) -> list[str]:
    """Return the files that git tracks or would add."""
    argv = ["git", "-C", str(source), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BedError(f"{source}: git ls-files: {done.stderr.strip()}")
    names = sorted(set(done.stdout.split("\0")) - {""})
    return [name for name in names if not name.startswith(LEFT_OUT) and os.path.lexists(source / name)]


def _digest(source: Path, files: list[str], builder: str) -> str:
    digest = hashlib.sha256(builder.encode())
    for name in files:
        path = source / name
        if path.is_symlink():
            mode, data = "link", os.fsencode(path.readlink())
        else:
            mode, data = ("755" if os.access(path, os.X_OK) else "644"), path.read_bytes()
        digest.update(f"\0{name}\0{mode}\0{len(data)}\0".encode(errors="surrogateescape"))
        digest.update(data)
    return digest.hexdigest()[:16]


def _build(builder: Path, source: Path, files: list[str], directory: Path) -> None:
    copy = directory / "source"
    for name in files:
        path, to = source / name, copy / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, to, follow_symlinks=False)
        if not path.is_symlink():
            to.chmod(0o755 if os.access(path, os.X_OK) else 0o644)
    options = [
        "--volatile=overlay",  # keeps the cached tree unchanged
        f"--bind={directory}:/build",
        "--chdir=/build/source",
        "--setenv=DEB_BUILD_OPTIONS=nocheck parallel=2",
        "--setenv=LC_ALL=C.UTF-8",
    ]
    name = f"build-{os.getpid()}-{secrets.token_hex(3)}"  # the directory's name may end in "_"
    nspawn.run(name, builder, options, ["dpkg-buildpackage", "-b", "-us", "-uc"], BUILD_TIMEOUT)

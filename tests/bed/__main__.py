# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bed by hand: python -m tests.bed trees | deb RELEASE DIRECTORY | shell RELEASE [--deb FILE].

Not here: what a tree, a package and a machine are (tree.py, package.py, machine.py).
"""

import argparse
import functools
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import nspawn
from .machine import Machine
from .package import build
from .tree import RELEASES, BedError, tree


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bed", description="Disposable Debian systems.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("trees", help="make the cached trees")
    deb = commands.add_parser("deb", help="build the package")
    deb.add_argument("release", choices=RELEASES)
    deb.add_argument("directory", type=Path)
    shell = commands.add_parser("shell", help="boot a machine and open a root shell in it")
    shell.add_argument("release", choices=RELEASES)
    shell.add_argument("--deb", type=Path, help="install this package (default: none)")
    arguments = parser.parse_args()
    try:
        nspawn.require_tools()
        if arguments.command == "trees":
            make_trees()
        elif arguments.command == "deb":
            build_package(arguments.release, arguments.directory)
        else:
            return open_shell(arguments.release, arguments.deb)
    except BedError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


def make_trees() -> None:
    """Make all trees at the same time: each spends about half of its time waiting for the mirror."""
    begin = time.monotonic()
    with ThreadPoolExecutor() as pool:
        made = [
            pool.submit(make, release)
            for release in RELEASES
            for make in (functools.partial(tree, "builder"), functools.partial(tree, "host"))
        ]
        for future in made:
            print(future.result())  # noqa: T201
    print(f"{time.monotonic() - begin:.0f} s")  # noqa: T201


def build_package(release: str, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    print(shutil.copy2(build(release), directory))  # noqa: T201


def open_shell(release: str, deb: Path | None) -> int:
    with Machine(release, deb) as machine:
        print(f"{machine.name}: booted in {machine.boot_seconds:.1f} s; exit the shell to remove it")  # noqa: T201
        return machine.shell()


if __name__ == "__main__":
    sys.exit(main())

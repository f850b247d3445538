#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""An attacker that exchanges names as fast as it can, renameat2(2) with RENAME_EXCHANGE, until SIGTERM.

Runs in a machine under test, with Python's standard library only.

swap.py pair ONE OTHER [TRIES]   exchanges the two; prints how often that worked
swap.py squat BASE TARGET        exchanges every name of polytmp in BASE with a symbolic link to TARGET;
                                 prints how often it tried, and how often that worked
"""

import contextlib
import ctypes
import os
import signal
import sys

AT_FDCWD = -100
RENAME_EXCHANGE = 2
LIBC = ctypes.CDLL(None, use_errno=True)


class Over(Exception):
    pass


def exchange(one: str, other: str) -> bool:
    result: int = LIBC.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)
    return result == 0


def pair(one: str, other: str, count: int) -> None:
    done = 0
    with contextlib.suppress(Over):
        while count:
            count -= 1
            done += exchange(one, other)
    print(done, flush=True)


def squat(base: str, target: str) -> None:
    link = f"{base}/attack-{os.getpid()}"
    os.symlink(target, link)
    tried = done = 0
    with contextlib.suppress(Over):
        while True:
            for name in os.listdir(base):
                if name.startswith("polytmp-"):
                    path = f"{base}/{name}"
                    tried += 1
                    done += exchange(path, link)
                    for attempt in (os.rmdir, os.unlink):
                        with contextlib.suppress(OSError):
                            attempt(path)
                            done += 1
                    with contextlib.suppress(OSError):
                        os.rename(path, f"{path}.gone")
                        done += 1
    os.unlink(link)
    print(tried, done, flush=True)


def stop(*_: object) -> None:
    raise Over


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    match sys.argv[1:]:
        case ["pair", one, other, *count]:
            pair(one, other, int(count[0]) if count else -1)
        case ["squat", base, target]:
            squat(base, target)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()

#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens any number of descriptors: descriptors.py COUNT.

Prints "there" when they are open, in as many processes as that needs, and stays until it is killed.
"""

import os
import resource
import signal
import sys


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    left = int(sys.argv[1])
    each = min(left, most - 16)
    fd = os.open("/dev/null", os.O_RDONLY)
    for number in range(fd + 1, fd + each):
        os.dup2(fd, number)
    while (left := left - each) > 0:
        if not os.fork():
            break
    else:
        print("there", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()

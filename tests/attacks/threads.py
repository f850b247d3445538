#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts any number of threads: threads.py COUNT.

Prints its PID when they run, and stays until it is killed.
"""

import os
import signal
import sys
import threading


def main() -> None:
    threading.stack_size(64 * 1024)
    for _ in range(int(sys.argv[1])):
        threading.Thread(target=signal.pause, daemon=True).start()
    print(f"pid {os.getpid()}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()

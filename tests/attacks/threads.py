#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Threads without end: threads.py COUNT. Says its pid when they are there."""

import os
import sys
import threading
import time


def main() -> None:
    threading.stack_size(64 * 1024)
    for _ in range(int(sys.argv[1])):
        threading.Thread(target=time.sleep, args=(300,), daemon=True).start()
    print(f"pid {os.getpid()}", flush=True)
    time.sleep(300)


if __name__ == "__main__":
    main()

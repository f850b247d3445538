# SPDX-License-Identifier: LGPL-2.1-or-later
"""mounts.py COUNT: mounts and unmounts a file system on /mnt; prints the milliseconds of each pair.

Run by a process in the host's namespace, it shows what propagation to the namespaces costs.
"""

import ctypes
import json
import sys
import time

MNT_DETACH = 2


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    found = []
    for _ in range(int(sys.argv[1])):
        begin = time.perf_counter()
        failed = libc.mount(b"bench", b"/mnt", b"tmpfs", 0, None) or libc.umount2(b"/mnt", MNT_DETACH)
        if failed:
            raise OSError(ctypes.get_errno(), "mount or umount of /mnt")
        found.append((time.perf_counter() - begin) * 1000)
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens a mount namespace by its ID, without a process that lives in it.

Not here: whose namespace it is (blocking/instances).

Hard facts
- The ID has 64 bits and is unique until the next boot; inode numbers are given again. The file handle of a
  namespace consists of its ID, type and inode number, see struct nsfs_file_handle in <linux/nsfs.h>. Any
  program may put one together. Since Linux 6.18 open_by_handle_at(2) opens it if all three are right and the
  namespace lives, whether a process, a mount or a descriptor (open, or in flight) keeps it.
- That takes CAP_SYS_ADMIN in the user namespace that owns it, and not CAP_DAC_READ_SEARCH. Since Linux
  6.18.50, 6.19.9 and 7.0 it also takes the initial PID namespace (CVE-2026-43391): no container may do so.
- What the kernel refuses looks as if it had ended: ESTALE. What it does not know is EBADF, and a seccomp
  filter's answer is its own. That of systemd-nspawn(1) forbids the system call unless the container's
  --system-call-filter= allows it.
"""

import errno
import os
import struct

from polytmpd.kernel import host
from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.syscalls import (
    CLONE_NEWNS,
    FD_NSFS_ROOT,
    FILEID_NSFS,
    get_mntns_id,
    open_by_handle_at,
)


def identify(fd: int) -> int:
    """The ID of a mount namespace; 0 before Linux 6.11, or if the descriptor is anything else."""
    try:
        return get_mntns_id(fd)
    except OSError:
        return 0


def open_namespace(namespace_id: int, inode: int) -> Descriptor | None:
    """Open the mount namespace with that ID and inode; the caller closes it.

    None if it has ended, and also if the kernel refuses to open it: finds_all() tells one from the other.
    Raises OSError for our own lack of descriptors or memory.
    """
    if inode >= 1 << 32:  # no namespace has such a number
        return None
    handle = struct.pack("=QII", namespace_id, CLONE_NEWNS, inode)
    try:
        return open_by_handle_at(FD_NSFS_ROOT, FILEID_NSFS, handle, os.O_RDONLY)
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
            raise
        return None


def finds_all() -> bool:
    """Whether open_namespace() opens every namespace of our user namespace that lives.

    Tried with PID 1's. If that is our own, the kernel opens it whatever it thinks of others: False. Raises
    OSError.
    """
    with host.open_namespace() as fd:
        inode = os.fstat(fd).st_ino
        if inode == os.stat("/proc/self/ns/mnt").st_ino:
            return False
        found = open_namespace(identify(fd), inode)
    if found is None:
        return False
    found.close()
    return True

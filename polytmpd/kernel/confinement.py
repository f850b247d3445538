# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's own mount namespace, in which all is read-only, and people's directories are empty.

systemd has settings for that (ProtectSystem=strict, ProtectHome=yes). They are not used, because of what
they cost on a host with many instances; see the hard facts.
Not here: capabilities, devices and system calls, which the unit restricts.

Hard facts
- For each slave mount in /proc/self/mountinfo, the kernel searches all peers of its master for one in the
  reader's namespace (get_dominating_id()). The mounts of all instances are peers of the host's. systemd
  makes the mounts of a sandbox slaves, and reads that file some seventy times: 0.3 s with 1,000 instances,
  16 s with 9,000.
- mount_setattr(2) changes all mounts at once, and reads nothing.
- The mounts stay slaves: what the host unmounts goes away here, too, and does not stay busy.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import Final

from polytmpd.kernel.descriptor import Descriptor
from polytmpd.kernel.syscalls import (
    AT_FDCWD,
    CLONE_NEWNS,
    MOUNT_ATTR_RDONLY,
    MS_SLAVE,
    OPEN_TREE_CLONE,
    fsmount,
    mount_setattr,
    move_mount,
    open_tree,
    unshare,
)

EMPTY: Final = ("/home", "/root", "/run/user")
"""What the daemon has no use for: it reaches the host's files through /proc/1/root."""
_NOTHING: Final = (("size", "4k"), ("nr_inodes", "1"), ("mode", "0000"))
_PLACE: Final = os.O_PATH | os.O_NOFOLLOW
"""Not O_DIRECTORY, which would have autofs mount something there."""


def confine(writable: Sequence[str]) -> None:
    """Move this process, which has no other thread yet, into such a namespace.

    writable: directories that stay writable. Raises OSError.
    """
    unshare(CLONE_NEWNS)
    with Descriptor.open("/", _PLACE) as root:
        mount_setattr(root, propagation=MS_SLAVE, recursive=True)
        with contextlib.ExitStack() as fds:
            kept = [fds.enter_context(open_tree(AT_FDCWD, path, OPEN_TREE_CLONE)) for path in writable]
            for path in EMPTY:
                _empty(path)
            mount_setattr(root, attributes=MOUNT_ATTR_RDONLY, recursive=True)
            for path, tree in zip(writable, kept, strict=True):
                with Descriptor.open(path, _PLACE) as place:
                    move_mount(tree, place)


def _empty(path: str) -> None:
    try:
        place = Descriptor.open(os.path.realpath(path), _PLACE)
    except FileNotFoundError:
        return
    with place, fsmount("polytmpd", "tmpfs", _NOTHING) as nothing:
        move_mount(nothing, place)

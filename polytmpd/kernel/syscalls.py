# SPDX-License-Identifier: LGPL-2.1-or-later
"""System calls that Python 3.11 does not wrap, under the kernel's names.

Each wrapper is named after its man page, takes bytes or str paths and integer descriptors, and raises
OSError with the path in it. Each returned descriptor is O_CLOEXEC; the caller closes it.
Not here: any decision.

Hard facts
- All libc calls go through one CDLL handle with use_errno. ctypes releases the GIL around each, so a call
  that hangs, for example on a dead NFS server, blocks one thread and not the event loop.
- glibc 2.36 (Debian 12) wraps open_tree, move_mount, mount_setattr and setns, but not openat2, which needs
  syscall(2).
- From 424 on, system calls have the same number on every architecture except alpha, see
  Documentation/process/adding-syscalls.rst. So no table of architectures is needed.
"""

import ctypes
import errno
import fcntl
import functools
import os
import struct
from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

from polytmpd.kernel.abi import HERE, LONG
from polytmpd.kernel.descriptor import Descriptor

AT_FDCWD: Final = -100
AT_EMPTY_PATH: Final = 0x1000
AT_RECURSIVE: Final = 0x8000

CLONE_FS: Final = 0x00000200
CLONE_NEWNS: Final = 0x00020000

MS_REC: Final = 0x4000
MS_PRIVATE: Final = 1 << 18
MS_SLAVE: Final = 1 << 19

MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

OPEN_TREE_CLONE: Final = 1
OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC

MOVE_MOUNT_F_EMPTY_PATH: Final = 0x00000004
MOVE_MOUNT_T_EMPTY_PATH: Final = 0x00000040
MOVE_MOUNT_SET_GROUP: Final = 0x00000100
MOVE_MOUNT_BENEATH: Final = 0x00000200

RENAME_NOREPLACE: Final = 1

RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08

FS_IOC_GETFLAGS: Final = HERE.ior(ord("f"), 1, LONG)
FS_IOC_SETFLAGS: Final = HERE.iow(ord("f"), 2, LONG)
FS_IMMUTABLE_FL: Final = 0x00000010
FS_APPEND_FL: Final = 0x00000020

NS_GET_USERNS: Final = HERE.io(0xB7, 1)
NS_GET_PARENT: Final = HERE.io(0xB7, 2)
NS_GET_NSTYPE: Final = HERE.io(0xB7, 3)
NS_GET_OWNER_UID: Final = HERE.io(0xB7, 4)
NS_GET_MNTNS_ID: Final = HERE.ior(0xB7, 5, 8)
NS_MNT_GET_NEXT: Final = HERE.ior(0xB7, 11, 16)
NS_MNT_GET_PREV: Final = HERE.ior(0xB7, 12, 16)

FD_NSFS_ROOT: Final = -10003
FILEID_NSFS: Final = 0xF1

LSMT_ROOT: Final = 0xFFFFFFFFFFFFFFFF
STATMOUNT_SB_BASIC: Final = 0x1
STATMOUNT_MNT_BASIC: Final = 0x2
STATMOUNT_MNT_ROOT: Final = 0x8

FSOPEN_CLOEXEC: Final = 1
FSCONFIG_SET_STRING: Final = 1
FSCONFIG_CMD_CREATE: Final = 6
FSMOUNT_CLOEXEC: Final = 1
MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_NOSUID: Final = 0x2
MOUNT_ATTR_NODEV: Final = 0x4
MOUNT_ATTR_NOEXEC: Final = 0x8

_SYS_OPENAT2: Final = 437
_SYS_STATMOUNT: Final = 457
_SYS_LISTMOUNT: Final = 458

_libc = ctypes.CDLL(None, use_errno=True)

_path = ctypes.c_char_p
_int = ctypes.c_int
_uint = ctypes.c_uint
_ulong = ctypes.c_ulong
for _name, _argtypes in {
    "unshare": (_int,),
    "setns": (_int, _int),
    "mount": (_path, _path, _path, _ulong, ctypes.c_char_p),
    "umount2": (_path, _int),
    "open_tree": (_int, _path, _uint),
    "move_mount": (_int, _path, _int, _path, _uint),
    "mount_setattr": (_int, _path, _uint, ctypes.c_char_p, ctypes.c_size_t),
    "fsopen": (_path, _uint),
    "fsconfig": (_int, _uint, _path, ctypes.c_char_p, _int),
    "fsmount": (_int, _uint, _uint),
    "renameat2": (_int, _path, _int, _path, _uint),
    "open_by_handle_at": (_int, ctypes.c_char_p, _int),
    "inotify_init1": (_int,),
    "inotify_add_watch": (_int, _path, ctypes.c_uint32),
    "inotify_rm_watch": (_int, _int),
}.items():
    _function = getattr(_libc, _name)
    _function.argtypes = _argtypes
    _function.restype = _int
_libc.syscall.restype = ctypes.c_long
# An object of its own: with types, a call takes half the time, and deletion makes one for each directory.
_openat2 = _libc["syscall"]
_openat2.argtypes = (ctypes.c_long, _int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
_openat2.restype = ctypes.c_long
_on_mounts = _libc["syscall"]
_on_mounts.argtypes = (ctypes.c_long, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, _uint)
_on_mounts.restype = ctypes.c_long

StrOrBytes = str | bytes

# What sysctl(8) calls the limits that make a system call fail with ENOSPC or EMFILE.
_MOUNTS: Final = "fs.mount-max"
_NAMESPACES: Final = "user.max_mnt_namespaces"
_WATCHES: Final = "fs.inotify.max_user_watches"
_INOTIFY: Final = "fs.inotify.max_user_instances"


def _check(
    result: int, path: StrOrBytes | None = None, path2: StrOrBytes | None = None, limit: str = ""
) -> int:
    """limit: the sysctl that makes this system call fail with ENOSPC or EMFILE."""
    if result >= 0:
        return result
    number = ctypes.get_errno()
    text = os.strerror(number)
    if number == errno.ENOSYS:
        text = "this kernel lacks a system call that polytmp needs (Linux 5.15 or newer has them all)"
    elif number == errno.ENOSPC and limit:  # strerror(3) would speak of a device
        text = f"the kernel's limit {limit} is reached; raise it, see sysctl(8)"
    elif number == errno.EMFILE and limit:
        text += f", or the kernel's limit {limit} is reached; raise it, see sysctl(8)"
    elif number == errno.EXDEV:  # "Invalid cross-device link", of renameat2() and RESOLVE_NO_XDEV
        text = "Something is mounted there, or on the way to it; see findmnt(8)"
    raise OSError(number, text, path, None, path2)


def unshare(flags: int) -> None:
    """unshare(2). Affects only the calling thread."""
    _check(_libc.unshare(flags), limit=_NAMESPACES)


def setns(fd: int, nstype: int) -> None:
    """setns(2). CLONE_NEWNS requires an unshared fs_struct, and resets root and working directory."""
    _check(_libc.setns(fd, nstype))


def mount(source: str, target: StrOrBytes, fstype: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    _check(
        _libc.mount(
            os.fsencode(source),
            os.fsencode(target),
            None if fstype is None else fstype.encode(),
            flags,
            None if data is None else data.encode(),
        ),
        target,
        limit=_MOUNTS,
    )


def umount2(target: StrOrBytes, flags: int) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def open_tree(dirfd: int, path: StrOrBytes, flags: int) -> Descriptor:
    """open_tree(2), Linux 5.2.

    Returns an O_PATH descriptor; with OPEN_TREE_CLONE it holds a detached copy.
    """
    result = _libc.open_tree(dirfd, os.fsencode(path), flags | OPEN_TREE_CLOEXEC)
    return Descriptor(_check(result, path, limit=_MOUNTS))


def move_mount(from_fd: int, to_fd: int, flags: int = 0) -> None:
    """move_mount(2), Linux 5.2. Takes descriptors only, so that no path is looked up twice.

    With MOVE_MOUNT_SET_GROUP (Linux 5.15) nothing moves: the target joins the source's peer group.
    """
    _check(
        _libc.move_mount(
            from_fd, b"", to_fd, b"", flags | MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
        ),
        limit=_MOUNTS,
    )


def mount_setattr(tree: int, *, attributes: int = 0, propagation: int = 0, recursive: bool = False) -> None:
    """mount_setattr(2), Linux 5.12: set attributes of a mount, and of all below it if recursive."""
    values = struct.pack("=QQQQ", attributes, 0, propagation, 0)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    _check(_libc.mount_setattr(tree, b"", flags, values, len(values)))


def set_propagation(tree: int, propagation: int) -> None:
    """MS_PRIVATE or such, also of a tree that is not mounted yet."""
    mount_setattr(tree, propagation=propagation)


def fsmount(source: str, fstype: str, options: Sequence[tuple[str, str]]) -> Descriptor:
    """fsopen(2), fsconfig(2), fsmount(2), Linux 5.2: a new file system, nosuid, nodev and noexec.

    It is not mounted anywhere yet: pass the descriptor to move_mount().
    """
    with Descriptor(_check(_libc.fsopen(fstype.encode(), FSOPEN_CLOEXEC), fstype)) as context:
        for key, value in (("source", source), *options):
            _check(_libc.fsconfig(context, FSCONFIG_SET_STRING, key.encode(), value.encode(), 0), fstype)
        _check(_libc.fsconfig(context, FSCONFIG_CMD_CREATE, None, None, 0), fstype)
        attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
        return Descriptor(_check(_libc.fsmount(context, FSMOUNT_CLOEXEC, attributes), fstype))


def renameat2(old_dirfd: int, old: StrOrBytes, new_dirfd: int, new: StrOrBytes, flags: int) -> None:
    """renameat2(2)."""
    _check(_libc.renameat2(old_dirfd, os.fsencode(old), new_dirfd, os.fsencode(new), flags), old, new)


def openat2(dirfd: int, path: StrOrBytes, flags: int, resolve: int, mode: int = 0) -> Descriptor:
    """openat2(2), Linux 5.6. O_CLOEXEC is added."""
    name = path if isinstance(path, bytes) else path.encode("utf-8", "surrogateescape")
    result = _openat2(_SYS_OPENAT2, dirfd, name, _open_how(flags | os.O_CLOEXEC, mode, resolve), 24)
    return Descriptor(result if result >= 0 else _check(result, path))


@functools.cache
def _open_how(flags: int, mode: int, resolve: int) -> bytes:
    """struct open_how in <linux/openat2.h>. Few differ, and deletion needs one for each directory."""
    return struct.pack("=QQQ", flags, mode, resolve)


def get_inode_flags(fd: int) -> int:
    """ioctl_iflags(2): the FS_*_FL flags of an open file or directory."""
    buffer = bytearray(8)
    fcntl.ioctl(fd, FS_IOC_GETFLAGS, buffer)
    return int(struct.unpack_from("=I", buffer)[0])


def set_inode_flags(fd: int, flags: int) -> None:
    """ioctl_iflags(2). Clearing FS_IMMUTABLE_FL and FS_APPEND_FL requires CAP_LINUX_IMMUTABLE."""
    fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("=Q", flags))


def clear_inode_flags(fd: int, flags: int) -> bool:
    """Clear these flags. False if none of them is set, or the file system has none, or we may not."""
    try:
        found = get_inode_flags(fd)
        if not found & flags:
            return False
        set_inode_flags(fd, found & ~flags)
    except OSError:
        return False
    return True


def get_nstype(fd: int) -> int:
    """ioctl_ns(2) NS_GET_NSTYPE: the CLONE_* constant of the namespace."""
    return fcntl.ioctl(fd, NS_GET_NSTYPE)


def get_userns(fd: int) -> Descriptor:
    """ioctl_ns(2) NS_GET_USERNS: the user namespace that owns the namespace."""
    return Descriptor(fcntl.ioctl(fd, NS_GET_USERNS))


def get_parent(userns: int) -> Descriptor:
    """ioctl_ns(2) NS_GET_PARENT: the parent of a user namespace. EPERM if it is outside of our own."""
    return Descriptor(fcntl.ioctl(userns, NS_GET_PARENT))


def get_owner_uid(userns: int) -> int:
    """ioctl_ns(2) NS_GET_OWNER_UID: the UID that made a user namespace."""
    buffer = bytearray(4)
    fcntl.ioctl(userns, NS_GET_OWNER_UID, buffer)
    return int(struct.unpack("=I", buffer)[0])


def get_mntns_id(fd: int) -> int:
    """ioctl_nsfs(2) NS_GET_MNTNS_ID, Linux 6.11: the ID of a mount namespace, never given again."""
    buffer = bytearray(8)
    fcntl.ioctl(fd, NS_GET_MNTNS_ID, buffer)
    return int(struct.unpack("=Q", buffer)[0])


def neighbour(fd: int, request: int) -> Descriptor:
    """ioctl_nsfs(2) NS_MNT_GET_NEXT or NS_MNT_GET_PREV, Linux 6.12: another mount namespace of the system.

    ENOENT at the end. EPERM in a PID namespace other than the initial one, since Linux 6.18.
    """
    return Descriptor(fcntl.ioctl(fd, request, bytearray(struct.pack("=IIQ", 16, 0, 0))))


def open_by_handle_at(mount_fd: int, handle_type: int, handle: bytes, flags: int) -> Descriptor:
    """open_by_handle_at(2). mount_fd: FD_NSFS_ROOT for a namespace, Linux 6.18. O_CLOEXEC is added.

    ESTALE if what the handle names has ended, and also if the kernel refuses to open it.
    """
    buffer = struct.pack("=Ii", len(handle), handle_type) + handle
    return Descriptor(_check(_libc.open_by_handle_at(mount_fd, buffer, flags | os.O_CLOEXEC)))


def listmount(namespace_id: int, mount_id: int, after: int, count: int) -> "array[int]":
    """listmount(2), Linux 6.8; of another namespace, 6.11.

    The IDs of at most `count` mounts below a mount, in ascending order, that come after an ID. Such IDs are
    never given again.
    """
    request = struct.pack("=IIQQQ", 32, 0, mount_id, after, namespace_id)
    found = array("Q", bytes(8 * count))
    del found[_check(_on_mounts(_SYS_LISTMOUNT, request, found.buffer_info()[0], count, 0)) :]
    return found


class StatMount(NamedTuple):
    """What statmount() was asked for. device: MAJOR:MINOR. root: not escaped, unlike in mountinfo."""

    device: str
    mount_id: int
    parent_id: int
    root: bytes


def statmount(namespace_id: int, mount_id: int, mask: int, size: int = 4096) -> StatMount:
    """statmount(2), Linux 6.8; of another namespace, 6.11. mask: STATMOUNT_*.

    Raises EOVERFLOW if the answer is longer than `size` bytes.
    """
    request = struct.pack("=IIQQQ", 32, 0, mount_id, mask, namespace_id)
    buffer = ctypes.create_string_buffer(size)
    _check(_on_mounts(_SYS_STATMOUNT, request, ctypes.addressof(buffer), size, 0))
    # struct statmount in <linux/mount.h>: the strings begin at 512.
    major, minor, own, parent, root = struct.unpack_from("=16xII16xQQ48xI", buffer)
    text = ctypes.string_at(ctypes.byref(buffer, 512 + root)) if mask & STATMOUNT_MNT_ROOT else b""
    return StatMount(f"{major}:{minor}", own, parent, text)


def inotify_init1(flags: int) -> Descriptor:
    """inotify_init1(2)."""
    return Descriptor(_check(_libc.inotify_init1(flags), limit=_INOTIFY))


def inotify_add_watch(fd: int, path: StrOrBytes, mask: int) -> int:
    """inotify_add_watch(2). Returns the watch descriptor."""
    return _check(_libc.inotify_add_watch(fd, os.fsencode(path), mask), path, limit=_WATCHES)


def inotify_rm_watch(fd: int, wd: int) -> None:
    """inotify_rm_watch(2)."""
    _check(_libc.inotify_rm_watch(fd, wd))

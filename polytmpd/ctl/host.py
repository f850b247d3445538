# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check finds on the host itself: kernel, cgroups, directories, cleaners, Kerberos, containers.

Kernel features are probed with calls that cannot succeed: the answer is which error comes first.
Not here: what the daemon, logind and systemd report (check.py), and PAM (pamcheck.py).
"""

import errno
import fcntl
import os
import re
import shutil
import socket
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from polytmpd.core import names

_TMPFILES: Final = ("etc/tmpfiles.d", "run/tmpfiles.d", "usr/lib/tmpfiles.d")
_CLEANERS: Final = {
    "tmpreaper": ("etc/cron.daily/tmpreaper", "etc/tmpreaper.conf"),
    "tmpwatch": ("etc/cron.daily/tmpwatch",),
}
_CCACHE: Final = re.compile(r"(?m)^\s*default_ccache_name\s*=\s*(\S+)")
_GSSAPI: Final = re.compile(r"(?mi)^\s*GSSAPI(?:Authentication|DelegateCredentials)\s+yes\b")
_NOT_ALLOWED: Final = 1  # EPERM
_UNKNOWN: Final = (22, 38)  # EINVAL: an unknown flag; ENOSYS
_FS_IOC_GETFLAGS: Final = 2 << 30 | struct.calcsize("l") << 16 | ord("f") << 8 | 1
_GENERIC_PEERCRED: Final = 17
_ROOM: Final = 2
"""The least number of namespaces and mounts that each user needs."""


_BARRIER_MODE: Final = 0o700
_NAMED_AT_MOST: Final = 5


@dataclass(frozen=True, slots=True)
class Result:
    """verdict: pass, warn, fail, or skip if it could not be determined."""

    topic: str
    name: str
    verdict: str
    text: str
    remedy: str = ""


def kernel() -> Iterator[Result]:
    """Requires root: without CAP_SYS_ADMIN the kernel returns EPERM before it checks anything else."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def probe(call: Callable[[], int]) -> int:
        ctypes.set_errno(0)
        return 0 if call() >= 0 else ctypes.get_errno()

    def move_mount() -> int:
        # MOVE_MOUNT_SET_GROUP | F_EMPTY_PATH | T_EMPTY_PATH, no descriptors: EBADF if the flags are known
        return int(libc.move_mount(-1, b"", -1, b"", 0x100 | 0x4 | 0x40))

    def open_tree() -> int:
        return int(libc.open_tree(-1, b"", 0x1000 | 1 | os.O_CLOEXEC))

    def openat2() -> int:
        how = bytes(24)
        number = ctypes.c_long(437)
        return int(libc.syscall(number, ctypes.c_int(-1), b"x", how, ctypes.c_size_t(len(how))))

    for name, call, needed in (
        ("move_mount(MOVE_MOUNT_SET_GROUP)", move_mount, "Linux 5.15"),
        ("open_tree(OPEN_TREE_CLONE)", open_tree, "Linux 5.2"),
        ("openat2", openat2, "Linux 5.6"),
    ):
        try:
            error = probe(call)
        except AttributeError:
            yield Result(
                "kernel", name, "fail", "missing from this C library", "upgrade to glibc 2.36 or newer"
            )
            continue
        if error == _NOT_ALLOWED:
            yield Result("kernel", name, "skip", "only root can check this", "run as root")
        elif error in _UNKNOWN:
            yield Result("kernel", name, "fail", "missing from this kernel", f"upgrade to {needed} or newer")
        else:
            yield Result("kernel", name, "pass", "available")


def limits(root: Path, users: int) -> Iterator[Result]:
    for path, what in (
        ("proc/sys/user/max_mnt_namespaces", "mount namespaces"),
        ("proc/sys/fs/mount-max", "mounts in a namespace"),
    ):
        name = path.removeprefix("proc/sys/").replace("/", ".")
        try:
            value = int((root / path).read_text())
        except (OSError, ValueError):
            yield Result("kernel", name, "skip", f"failed to read /{path}")
            continue
        if value < _ROOM * max(users, 1) + 64:
            yield Result(
                "kernel",
                name,
                "fail",
                f"{value} {what} are too few",
                f"sysctl -w {name}=100000; to keep it, see sysctl.d(5)",
            )
        else:
            yield Result("kernel", name, "pass", f"{value} {what}")


def cgroups(root: Path) -> Iterator[Result]:
    for place, text in (("", "cgroup v2"), ("unified", "cgroup v2 in addition to v1 (hybrid)")):
        if (root / "sys/fs/cgroup" / place / "cgroup.procs").exists() and (
            place or (root / "sys/fs/cgroup/cgroup.controllers").exists()
        ):
            yield Result("kernel", "cgroups", "pass", text)
            return
    yield Result(
        "kernel",
        "cgroups",
        "fail",
        "no cgroup v2: the kernel does not report the end of a user's last process",
        "boot with systemd.unified_cgroup_hierarchy=1",
    )


def directories(root: Path, paths: Iterable[str], kept: Iterable[str] = ()) -> Iterator[Result]:
    """kept: the paths in which users' files are kept between logins, under predictable names."""
    for path in paths:
        yield _directory(root, path)
    for path in kept:
        yield from _squatters(root, path)
    yield _propagation(root)


def _directory(root: Path, path: str) -> Result:
    place = root / path.lstrip("/")
    try:
        found = place.lstat()
        if stat.S_ISLNK(found.st_mode):
            return Result(
                "mounts", path, "warn", f"is a link to {place.readlink()}, which is private instead"
            )
    except OSError as error:
        return Result("mounts", path, "fail", f"{error.strerror}", f"install -d -m 1777 {path}")
    if found.st_uid != 0:
        return Result("mounts", path, "fail", f"owned by UID {found.st_uid}", f"chown root:root {path}")
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        return Result("mounts", path, "fail", "world-writable without the sticky bit", f"chmod 1777 {path}")
    mode = stat.S_IMODE(found.st_mode)
    if mode != 0o1777:
        return Result(
            "mounts",
            path,
            "warn",
            f"mode {mode:04o}, which instances inherit",
            f"usually: chmod 1777 {path}",
        )
    text = "owned by root, mode 1777"
    if _lacks_flags(place):
        text += "; its file system has no chattr +i: what root removes there is made again"
    return Result("mounts", path, "pass", text)


def _lacks_flags(place: Path) -> bool:
    """Whether polytmpd cannot protect the directories of users who are logged in against removal by root.

    False where it is not known: kernel/abi has the numbers of other architectures.
    """
    if socket.SO_PEERCRED != _GENERIC_PEERCRED:
        return False
    try:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8))
        finally:
            os.close(fd)
    except OSError as error:
        return error.errno in {errno.ENOTTY, errno.EOPNOTSUPP}
    return False


def _squatters(root: Path, path: str) -> Iterator[Result]:
    """Report entries that polytmpd needs the name of but did not create: that user's next login fails."""
    try:
        with os.scandir(root / path.lstrip("/")) as entries:
            found = sorted(
                (entry.name, uid, why)
                for entry in entries
                if (uid := names.kept_owner(entry.name)) is not None and (why := _foreign(entry))
            )
    except OSError:
        return  # reported for the directory itself
    for name, uid, why in found[:_NAMED_AT_MOST]:
        text = f"not made by polytmpd ({why}): logins of UID {uid} are refused"
        remedy = f"examine it, then: mv {path}/{name} {path}/not-{name}, or remove it"
        yield Result("mounts", f"{path}/{name}", "fail", text, remedy)
    if len(found) > _NAMED_AT_MOST:
        text = f"{len(found) - _NAMED_AT_MOST} more that were not made by polytmpd"
        yield Result("mounts", f"{path}/{names.PREFIX}*", "fail", text, "do the same, then run check again")


def _foreign(entry: "os.DirEntry[str]") -> str:
    """Why the daemon does not accept an entry as its own; empty if it does."""
    try:
        found = entry.stat(follow_symlinks=False)
    except OSError:
        return ""  # gone in the meantime
    if not stat.S_ISDIR(found.st_mode):
        return "not a directory"
    if (found.st_uid, found.st_gid) != (0, 0):
        return f"owned by {found.st_uid}:{found.st_gid}"
    mode = stat.S_IMODE(found.st_mode)
    return "" if mode == _BARRIER_MODE else f"mode {mode:04o}"


def _propagation(root: Path) -> Result:
    try:
        table = (root / "proc/1/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return Result("mounts", "/ (propagation)", "skip", "only root can check this", "run as root")
    line = next((line for line in table if line.split(" ")[4:5] == ["/"]), "")
    if " shared:" in line.partition(" - ")[0]:
        return Result(
            "mounts", "/ (propagation)", "pass", "shared: mounts reach sessions, and the other way round"
        )
    return Result(
        "mounts",
        "/ (propagation)",
        "fail",
        "private: mounts on the host do not reach sessions",
        "mount --make-rshared / at boot (systemd does this by default; find out what undoes it)",
    )


def cleaners(root: Path) -> Iterator[Result]:
    found = next((place for place in _TMPFILES if (root / place / "polytmp.conf").exists()), None)
    path = root / (found or "") / "polytmp.conf"
    if found is None:
        remedy = "reinstall polytmp: /usr/lib/tmpfiles.d/polytmp.conf is missing"
        yield Result(
            "cleaners", "tmpfiles.d", "fail", "systemd-tmpfiles may delete files in instances", remedy
        )
    elif _is_empty(path):
        yield Result(
            "cleaners",
            "tmpfiles.d",
            "fail",
            f"/{found}/polytmp.conf masks polytmp's own",
            f"rm /{found}/polytmp.conf",
        )
    elif found != _TMPFILES[-1]:
        yield Result(
            "cleaners",
            "tmpfiles.d",
            "warn",
            f"/{found}/polytmp.conf overrides polytmp's own",
            "compare it with /usr/lib/tmpfiles.d/polytmp.conf",
        )
    else:
        yield Result("cleaners", "tmpfiles.d", "pass", f"/{found}/polytmp.conf")
    for name, places in _CLEANERS.items():
        if any((root / place).exists() for place in places):
            yield Result(
                "cleaners",
                name,
                "warn",
                "deletes files in /tmp by age, also in instances, and ignores tmpfiles.d",
                f"remove {name} (systemd-tmpfiles does the same), or exclude /tmp/{names.PREFIX}* and "
                f"/var/tmp/{names.PREFIX}*",
            )


def _is_empty(path: Path) -> bool:
    try:
        return str(path.readlink()) == "/dev/null"
    except OSError:
        return path.stat().st_size == 0


def kerberos(root: Path) -> Iterator[Result]:
    files = [root / "etc/krb5.conf"]
    for directory in ("etc/krb5.conf.d", "etc/sssd/conf.d"):
        files += sorted((root / directory).glob("*")) if (root / directory).is_dir() else []
    texts = [_text(file) for file in files]
    if not any(texts):
        yield Result("software", "Kerberos", "pass", "not configured")
        return
    names = [match[1] for text in texts for match in _CCACHE.finditer(text)]
    name = names[-1] if names else "FILE:/tmp/krb5cc_%{uid}"
    if name.removeprefix("FILE:").startswith(("/tmp/", "/var/tmp/")):
        gssd = " rpc.gssd looks in the host's /tmp." if shutil.which("rpc.gssd") else ""
        sshd = " sshd writes them before the session is private." if _GSSAPI.search(_sshd(root)) else ""
        yield Result(
            "software",
            "Kerberos",
            "warn",
            f"credential caches are in /tmp ({name}): services on the host do not see them.{gssd}{sshd}",
            "default_ccache_name = KEYRING:persistent:%{uid}, KCM:, or FILE:/run/user/%{uid}/krb5cc",
        )
    else:
        yield Result("software", "Kerberos", "pass", f"credential caches in {name}")


def _sshd(root: Path) -> str:
    directory = root / "etc/ssh/sshd_config.d"
    files = [root / "etc/ssh/sshd_config", *(sorted(directory.glob("*.conf")) if directory.is_dir() else [])]
    return "\n".join(map(_text, files))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def containers(root: Path) -> Iterator[Result]:
    for name, path in (("Docker", "run/docker.sock"), ("Podman", "run/podman/podman.sock")):
        if (root / path).exists():
            yield Result(
                "software",
                name,
                "warn",
                "its daemon looks up -v /tmp/… on the host, not in the user's /tmp",
                '-v "$(polytmpctl path /tmp/x)":/x',
            )

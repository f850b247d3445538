# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which directories of a host must not become private, by their names.

Not here: what a directory is like on disk (config, blocking/barriers).
"""

from typing import Final

_API_FILE_SYSTEMS: Final = ("/proc", "/sys", "/dev")
_ORDINARY_IN_THEM: Final = ("/dev/shm",)
"""A tmpfs for shared memory, shm_overview(7), in which anyone may make files."""
_SYSTEM_TREES: Final = (
    *("/bin", "/boot", "/efi", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/root", "/run", "/sbin"),
    *("/usr", "/var/cache", "/var/lib", "/var/log", "/var/mail", "/var/spool"),
)
_SYSTEM_DIRECTORIES: Final = ("/home", "/media", "/mnt", "/opt", "/srv", "/var")
"""Directories that are the system's themselves, but not what is in them."""


def is_kernels(path: str) -> bool:
    """Whether a real path is the root directory or in an API file system, which nothing can replace."""
    return path == "/" or (_below(path, _API_FILE_SYSTEMS) and path not in _ORDINARY_IN_THEM)


def is_systems(path: str) -> bool:
    """Whether a real path is a directory that programs or logins need as it is on the host."""
    return path in _SYSTEM_DIRECTORIES or _below(path, _SYSTEM_TREES)


def _below(path: str, tops: tuple[str, ...]) -> bool:
    return any(path == top or path.startswith(f"{top}/") for top in tops)

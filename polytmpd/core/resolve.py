# SPDX-License-Identifier: LGPL-2.1-or-later
"""Translates a path as a user knows it into the host's path.

Not here: whether anything exists there. Nothing touches the disk, so symbolic links are not followed.
"""

import posixpath
from collections.abc import Iterable

from polytmpd.core.model import InstanceDirectory


def resolve(directories: Iterable[InstanceDirectory], path: str) -> str | None:
    """The host's path of what the user calls path; None if it is not in a private directory.

    path must be absolute. A shared name, such as /tmp/.X11-unix, is the same path on the host.
    """
    normal = "/" + posixpath.normpath(path).lstrip("/")  # normpath() leaves two leading slashes alone
    for entry in directories:
        base = entry.directory.path
        if normal != base and not normal.startswith(base + "/"):
            continue
        rest = normal.removeprefix(base).lstrip("/")
        if rest.split("/")[0] in entry.directory.shared:
            return normal
        return f"{entry.host_path}/{rest}".rstrip("/")
    return None

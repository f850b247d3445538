# SPDX-License-Identifier: LGPL-2.1-or-later
"""The names that the daemon serves and polytmpctl calls; others script against them too."""

from typing import Final

SERVICE: Final = "org.polytmp1"
PATH: Final = "/org/polytmp1"
MANAGER: Final = "org.polytmp1.Manager"
INSTANCE: Final = "org.polytmp1.Instance"
REMOVE_PERSISTENT: Final = 1
"""Flag of RemoveInstanceWithFlags: what is kept between logins (/var/tmp) goes too."""


def instance_path(uid: int) -> str:
    """The object path of a user's instance."""
    return f"{PATH}/instance/_{uid}"


def uid_of_path(path: str) -> int | None:
    """The user of an instance's object path."""
    prefix = f"{PATH}/instance/_"
    text = path.removeprefix(prefix)
    return int(text) if path.startswith(prefix) and text.isdecimal() else None

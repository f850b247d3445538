# SPDX-License-Identifier: LGPL-2.1-or-later
"""The names that the daemon serves and polytmpctl calls; others script against them too."""

from typing import Final

SERVICE: Final = "org.polytmp1"
PATH: Final = "/org/polytmp1"
MANAGER: Final = "org.polytmp1.Manager"
INSTANCE: Final = "org.polytmp1.Instance"
REMOVE_PERSISTENT: Final = 1
"""Flag of RemoveInstanceWithFlags: what is kept between logins (/var/tmp) goes too."""

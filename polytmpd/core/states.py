# SPDX-License-Identifier: LGPL-2.1-or-later
"""The words for where an instance stands and for how long files live.

polytmpctl imports it: nothing here may take long to import.
Not here: instances and directories (model).
"""

from enum import StrEnum


class State(StrEnum):
    """Where an instance stands. Part of the D-Bus contract, except ABSENT, which has no object."""

    ABSENT = "absent"
    PREPARING = "preparing"
    ACTIVE = "active"
    DRAINING = "draining"
    REMOVING = "removing"
    FAILED = "failed"


class Lifetime(StrEnum):
    """How long files live: as long as the instance, or until systemd-tmpfiles ages them."""

    INSTANCE = "instance"
    PERSISTENT = "persistent"

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The test bed: disposable Debian systems, booted from a cached tree, with the package under test.

Not here: what polytmp does, which the end-to-end tests know.
"""

from .command import CommandError, CommandTimeout, Result
from .machine import Machine
from .package import build
from .session import Session
from .tree import RELEASES, BedError
from .waiting import eventually

__all__ = [
    "RELEASES",
    "BedError",
    "CommandError",
    "CommandTimeout",
    "Machine",
    "Result",
    "Session",
    "build",
    "eventually",
]

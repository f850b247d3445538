# SPDX-License-Identifier: LGPL-2.1-or-later
"""The test bed: disposable Debian systems, booted from a cached tree, with the package under test.

Nothing here knows what polytmp does; the end-to-end tests do.
"""

from .machine import CommandError, Machine, Result, Session, eventually
from .package import build
from .tree import RELEASES, BedError

__all__ = [
    "RELEASES",
    "BedError",
    "CommandError",
    "Machine",
    "Result",
    "Session",
    "build",
    "eventually",
]

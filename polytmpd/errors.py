# SPDX-License-Identifier: LGPL-2.1-or-later
"""The errors that polytmpd answers with, each with its name on the bus.

Not here: OSError, which the floors below raise; the code that answers a call turns it into one of these.
"""

from enum import StrEnum
from typing import Self


class ErrorName(StrEnum):
    """D-Bus error names. They are part of the contract: scripts depend on them."""

    NO_SUCH_INSTANCE = "org.polytmp1.Error.NoSuchInstance"
    EXEMPT = "org.polytmp1.Error.Exempt"
    BUSY = "org.polytmp1.Error.Busy"
    NOT_POLYINSTANTIATED = "org.polytmp1.Error.NotPolyinstantiated"
    FAILED = "org.polytmp1.Error.Failed"
    INVALID_ARGS = "org.freedesktop.DBus.Error.InvalidArgs"
    ACCESS_DENIED = "org.freedesktop.DBus.Error.AccessDenied"
    INTERACTIVE = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"


class PolytmpError(Exception):
    """An error for the caller to read: what is wrong and, if there is one, the remedy."""

    name = ErrorName.FAILED


class NoSuchInstanceError(PolytmpError):
    name = ErrorName.NO_SUCH_INSTANCE

    @classmethod
    def of(cls, uid: int) -> Self:
        return cls(f"UID {uid} has no instance")


class ExemptError(PolytmpError):
    name = ErrorName.EXEMPT


class BusyError(PolytmpError):
    name = ErrorName.BUSY


class NotPolyinstantiatedError(PolytmpError):
    name = ErrorName.NOT_POLYINSTANTIATED


class InvalidArgsError(PolytmpError):
    name = ErrorName.INVALID_ARGS


class AccessDeniedError(PolytmpError):
    name = ErrorName.ACCESS_DENIED


class InteractiveAuthorizationError(PolytmpError):
    """It would be allowed after authentication, but the call did not allow that."""

    name = ErrorName.INTERACTIVE

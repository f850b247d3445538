# SPDX-License-Identifier: LGPL-2.1-or-later
"""The errors that polytmpd answers with, each with the name it has on the bus.

Not here: OSError, which is what kernel/ and storage raise and which the executor turns into one of these.
"""

import re
from enum import StrEnum
from typing import Final

_HOST_ROOT: Final = re.compile(r"/proc/1/root(?=/)")
"""By which the daemon goes to the host's files; nobody else calls them so."""


class ErrorName(StrEnum):
    """D-Bus error names; part of the contract that others script against."""

    NO_SUCH_INSTANCE = "org.polytmp1.Error.NoSuchInstance"
    EXEMPT = "org.polytmp1.Error.Exempt"
    BUSY = "org.polytmp1.Error.Busy"
    NOT_POLYINSTANTIATED = "org.polytmp1.Error.NotPolyinstantiated"
    FAILED = "org.polytmp1.Error.Failed"
    INVALID_ARGS = "org.freedesktop.DBus.Error.InvalidArgs"
    ACCESS_DENIED = "org.freedesktop.DBus.Error.AccessDenied"
    INTERACTIVE = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"


class PolytmpError(Exception):
    """Something the caller is told: what is wrong, and where there is one, the remedy."""

    name = ErrorName.FAILED


class NoSuchInstanceError(PolytmpError):
    name = ErrorName.NO_SUCH_INSTANCE


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
    """It would be allowed after authentication; the call did not allow to ask for it."""

    name = ErrorName.INTERACTIVE


def in_words(error: BaseException) -> str:
    """What an error says, for people: without the number, and with paths as they are called on the host."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        names = (error.filename, error.filename2)
        text = ": ".join((error.strerror, *(str(name) for name in names if name is not None)))
    return _HOST_ROOT.sub("", text)


class ConfigError(Exception):
    """A configuration file that makes no sense; the text names file, line and remedy."""

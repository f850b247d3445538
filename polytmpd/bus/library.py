# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one place that imports the D-Bus library: dbus-next, or its maintained fork where that cannot be
imported.

dbus-next fails to import from Python 3.15 on (typing.no_type_check_decorator is gone); dbus-fast has nearly
the same interface, and is sound from 5.0.22 on. Only what both have is used: MessageBus, Message, Variant.
Their object server is not, for the reasons in server.py. The types are dbus-fast's, the only one of the two
that has them.
"""

import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from dbus_fast import BusType, DBusError, Message, MessageFlag, MessageType, Variant
    from dbus_fast.aio import MessageBus
else:
    # dbus-next's GLib flavour is imported with the rest where PyGObject is installed, 3 MB for nothing: keep
    # it out.
    _gi = sys.modules.get("gi")
    sys.modules["gi"] = None
    try:
        from dbus_next import BusType, DBusError, Message, MessageFlag, MessageType, Variant
        from dbus_next.aio import MessageBus
    except ImportError:
        from dbus_fast import BusType, DBusError, Message, MessageFlag, MessageType, Variant
        from dbus_fast.aio import MessageBus
    finally:
        if _gi is None:
            del sys.modules["gi"]
        else:
            sys.modules["gi"] = _gi

__all__ = [
    "LIBRARY",
    "SIGNATURES_AT_MOST",
    "BusType",
    "DBusError",
    "Message",
    "MessageBus",
    "MessageFlag",
    "MessageType",
    "Variant",
    "signatures",
]

LIBRARY: Final = Message.__module__.partition(".")[0]
"""dbus_next or dbus_fast."""

SIGNATURES_AT_MOST: Final = 1000


class _BoundedCache(dict[str, Any]):
    """Empties itself when it is full."""

    def __setitem__(self, signature: str, tree: Any) -> None:
        if len(self) >= SIGNATURES_AT_MOST:
            self.clear()
        super().__setitem__(signature, tree)


def signatures() -> int:
    """How many parsed signatures the library remembers."""
    module: Any = sys.modules[f"{LIBRARY}.signature"]
    if LIBRARY == "dbus_next":
        return len(module.SignatureTree._cache)
    return int(module.get_signature_tree.cache_info().currsize)


if LIBRARY == "dbus_next":
    # Its cache is global, without bound, and fed by every variant in every message of every caller: 45 KiB
    # for each novel signature. dbus-fast's has a bound.
    _signature: Any = sys.modules["dbus_next.signature"]
    _signature.SignatureTree._cache = _BoundedCache()

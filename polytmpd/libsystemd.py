# SPDX-License-Identifier: LGPL-2.1-or-later
"""libsystemd's functions of sd-bus(3) and sd-login(3), declared for ctypes as in its headers.

polytmpctl imports it: nothing here may take long to import.
Not here: sd_notify(3), which python3-systemd calls (sdnotify).
"""

import ctypes
import os
from ctypes import POINTER, c_char, c_char_p, c_int, c_uint, c_uint64, c_void_p
from typing import Any, Final


class Error(ctypes.Structure):
    """struct sd_bus_error."""

    _fields_ = (("name", c_char_p), ("message", c_char_p), ("_need_free", c_int))


_RAISING: Final[dict[str, tuple[Any, ...]]] = {
    "sd_bus_open_system": (POINTER(c_void_p),),
    "sd_bus_is_ready": (c_void_p,),
    "sd_bus_get_fd": (c_void_p,),
    "sd_bus_get_events": (c_void_p,),
    "sd_bus_process": (c_void_p, POINTER(c_void_p)),
    "sd_bus_send": (c_void_p, c_void_p, POINTER(c_uint64)),
    "sd_bus_message_new_method_call": (c_void_p, POINTER(c_void_p), *(c_char_p,) * 4),
    "sd_bus_message_set_allow_interactive_authorization": (c_void_p, c_int),
    "sd_bus_message_append_basic": (c_void_p, c_char, c_char_p),
    "sd_bus_message_peek_type": (c_void_p, POINTER(c_char), POINTER(c_char_p)),
    "sd_bus_message_enter_container": (c_void_p, c_char, c_char_p),
    "sd_bus_message_exit_container": (c_void_p,),
    "sd_bus_message_read": (c_void_p, c_char_p),  # and a pointer for each value
}
"""The arguments of functions that return a negative errno on failure: here, they raise OSError."""
_OTHERS: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "sd_bus_close_unref": (c_void_p, (c_void_p,)),
    "sd_bus_message_unref": (c_void_p, (c_void_p,)),
    "sd_bus_message_get_error": (POINTER(Error), (c_void_p,)),
    "sd_bus_message_get_reply_cookie": (c_int, (c_void_p, POINTER(c_uint64))),
    "sd_session_get_uid": (c_int, (c_char_p, POINTER(c_uint))),
    "sd_session_get_class": (c_int, (c_char_p, POINTER(c_char_p))),
    "sd_session_get_state": (c_int, (c_char_p, POINTER(c_char_p))),
}
"""What other functions return, and their arguments."""


def load() -> ctypes.CDLL:
    """Raises OSError if libsystemd is not installed."""
    library = ctypes.CDLL("libsystemd.so.0")
    for name, arguments in _RAISING.items():
        function = getattr(library, name)
        function.argtypes, function.errcheck = arguments, _raise
    for name, (result, arguments) in _OTHERS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _raise(result: int, _function: Any, _arguments: Any) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result

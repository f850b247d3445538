# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens PAM sessions one after the other, as root, and prints how many milliseconds each took to open.

Runs in a machine under test, with Python's standard library only.

sessions.py SERVICE USER COUNT   each in its own process; "done" at the end, unless one is refused
"""

import ctypes
import os
import sys
import time

PAM_CONV_ERR = 19
CONVERSATION = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
)


class Conv(ctypes.Structure):
    _fields_ = (("conv", CONVERSATION), ("appdata_ptr", ctypes.c_void_p))


def session(service: bytes, user: bytes) -> None:
    """Open a session, print the time, and close it."""
    pam = ctypes.CDLL("libpam.so.0")
    handle = ctypes.c_void_p()
    conv = Conv(CONVERSATION(lambda *_: PAM_CONV_ERR), None)
    assert pam.pam_start(service, user, ctypes.byref(conv), ctypes.byref(handle)) == 0
    began = time.monotonic()
    result = pam.pam_open_session(handle, 0)
    took = time.monotonic() - began
    assert result == 0, f"pam_open_session: {result}"
    print(f"{took * 1000:.3f}", flush=True)
    pam.pam_close_session(handle, 0)
    pam.pam_end(handle, 0)


def main() -> None:
    service, user, count = sys.argv[1:]
    for _ in range(int(count)):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                session(service.encode(), user.encode())
                code = 0
            finally:
                os._exit(code)
        if os.waitpid(pid, 0)[1] != 0:
            sys.exit("a session was refused")
    print("done", flush=True)


if __name__ == "__main__":
    main()

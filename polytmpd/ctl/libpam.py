# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asks libpam through ctypes, in its own process: whether modules load, and where a session ends up.

Run as `python3 -I -m polytmpd.ctl.libpam load`, or `… session SERVICE USER`. Speaks JSON, one value a line.
Modules are other people's code: they may crash, change the process, or start others. Nothing of that reaches
polytmpctl.
Not here: who asks, and what the answers mean (pammodules.py, probe.py).

Hard facts
- libpam loads modules with dlopen(RTLD_NOW). A relative path is relative to a directory that is compiled in.
- The answers to a conversation are freed by the module, so they come from calloc(3).
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

LIBRARY: Final = "libpam.so.0"
SYMBOLS: Final = ("pam_sm_open_session", "pam_sm_acct_mgmt")
SESSION_SECONDS: Final = 60
_DIRECTORY: Final = re.compile(rb"\0(/[\w./-]*/security/)(?=\0)")
_PAM_USER_UNKNOWN: Final = 10
_PAM_CONV_ERR: Final = 19
_PAM_TTY: Final = 3
_PAM_RHOST: Final = 4
_PROMPTS: Final = (1, 2)  # PAM_PROMPT_ECHO_OFF, PAM_PROMPT_ECHO_ON
_TTYS: Final = {"sshd": b"ssh", "cron": b"cron", "crond": b"cron"}
"""What these programs set as PAM_TTY: modules look at it."""


def main() -> int:
    match sys.argv[1:]:
        case ["load"]:
            _say(_load(json.load(sys.stdin)))
        case ["session", service, user]:
            signal.alarm(SESSION_SECONDS)  # whatever a module waits for
            _say(_session(service, user))
        case _:
            return 2
    return 0


def _say(value: Any) -> None:
    sys.stdout.write(f"{json.dumps(value)}\n")
    sys.stdout.flush()


# Modules


def _load(paths: list[str]) -> dict[str, Any]:
    """For each path, the file and what is wrong with it. directory: where libpam looks."""
    ctypes.CDLL(LIBRARY)
    directory = _module_directory()
    found = {}
    for path in paths:
        file = path if path.startswith("/") else f"{directory}{path}"
        found[path] = {"file": file, **_in_a_child(file)}
    return {"directory": directory, "modules": found}


def _module_directory() -> str:
    """The directory that the loaded libpam has been compiled with."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.partition("/")[2]
        if Path(path).name.startswith(LIBRARY) and (
            match := _DIRECTORY.search(Path(f"/{path}").read_bytes())
        ):
            return match[1].decode()
    return ""


def _in_a_child(file: str) -> dict[str, Any]:
    """problem: why libpam cannot load it, empty if it can. symbols: those of SYMBOLS that it has."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            signal.alarm(10)
            os.write(write_fd, json.dumps(_examine(file)).encode())
        os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as stream:
        text = stream.read()
    _, status = os.waitpid(pid, 0)
    if not text:
        return {"problem": f"it crashes when it is loaded (status {status})", "symbols": []}
    answer: dict[str, Any] = json.loads(text)
    return answer


def _examine(file: str) -> dict[str, Any]:
    if not Path(file).exists():
        return {"problem": "the file does not exist", "symbols": []}
    if not Path(file).stat().st_size:
        return {"problem": "the file is empty", "symbols": []}
    try:
        module = ctypes.CDLL(file, mode=os.RTLD_NOW)
    except OSError as error:
        return {"problem": f"it cannot be loaded: {error}", "symbols": []}
    return {"problem": "", "symbols": [name for name in SYMBOLS if hasattr(module, name)]}


# Sessions


class _Message(ctypes.Structure):
    _fields_ = (("style", ctypes.c_int), ("text", ctypes.c_char_p))


class _Response(ctypes.Structure):
    _fields_ = (("text", ctypes.c_void_p), ("code", ctypes.c_int))


_CONVERSE: Final = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_int,
    ctypes.POINTER(ctypes.POINTER(_Message)),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)


class _Conversation(ctypes.Structure):
    _fields_ = (("function", _CONVERSE), ("data", ctypes.c_void_p))


class _Refused(Exception):
    """(the function, why)"""


def _session(service: str, user: str) -> dict[str, Any]:
    """Open a session as a login service does, say where it is, and close it when stdin says so."""
    said: list[str] = []
    try:
        with _opened(service, user, said):
            _say({"opened": True, **_place()})
            sys.stdin.readline()
    except _Refused as refused:
        function, why = refused.args
        return {"opened": False, "function": function, "why": why, "said": said}
    return {"closed": True}


def _place() -> dict[str, Any]:
    """The mount namespace, as (device, inode), of this thread: a namespace belongs to a thread."""
    found = os.stat("/proc/thread-self/ns/mnt")  # noqa: PTH116
    return {"namespace": (found.st_dev, found.st_ino), "pid": os.getpid()}


@contextlib.contextmanager
def _opened(service: str, user: str, said: list[str]) -> Iterator[None]:
    library = ctypes.CDLL(LIBRARY)
    library.pam_strerror.restype = ctypes.c_char_p
    libc = ctypes.CDLL(None)
    libc.calloc.restype = ctypes.c_void_p
    libc.calloc.argtypes = (ctypes.c_size_t, ctypes.c_size_t)

    def converse(count: int, messages: Any, answer: Any, _: Any) -> int:
        shown = [messages[number].contents for number in range(count)]
        said.extend((message.text or b"").decode(errors="replace") for message in shown)
        if any(message.style in _PROMPTS for message in shown):
            return _PAM_CONV_ERR  # nobody is there to answer
        answer[0] = libc.calloc(count, ctypes.sizeof(_Response))
        return 0

    handle = ctypes.c_void_p()
    conversation = _Conversation(_CONVERSE(converse), None)

    def call(function: str, *arguments: Any) -> None:
        status = getattr(library, function)(*arguments)
        if status:
            text = library.pam_strerror(handle, status)
            raise _Refused(function, (text or b"").decode(errors="replace"))

    name = service.encode()
    call("pam_start", name, user.encode(), ctypes.byref(conversation), ctypes.byref(handle))
    status = 0
    try:
        if tty := _TTYS.get(service):
            library.pam_set_item(handle, _PAM_TTY, tty)
        if service == "sshd":
            library.pam_set_item(handle, _PAM_RHOST, b"localhost")
        call("pam_acct_mgmt", handle, 0)
        call("pam_open_session", handle, 0)
        try:
            yield
        finally:
            status = library.pam_close_session(handle, 0)
    finally:
        library.pam_end(handle, status)


if __name__ == "__main__":
    sys.exit(main())

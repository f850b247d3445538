# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens PAM sessions as a server does, and says how long that took; reads commands, a JSON object a line.

    {"do": "time", "service": [S, ...], "user": U, "count": N}   N sessions, one after the other
    {"do": "open", "service": [S, ...], "users": [U, ...], "at_once": N}   one for each, which stays open
    {"do": "look", "users": [U, ...]}                             the namespace and the file of each
    {"do": "close", "users": [U, ...]}

Each session has a process of its own, because the module moves its process. The process opens the session
through the services in turn; the answer has the milliseconds that each of them took. In a session that stays
open, a child becomes the user and writes a file.
Not here: what the services' PAM files contain.
"""

import ctypes
import gc
import json
import os
import pwd
import select
import signal
import sys
import time
from typing import Any

PATIENCE = 5.0
"""Seconds after which a session that is being opened is reported as slow."""
PAM_TTY = 3
PAM_RHOST = 4

_pam = ctypes.CDLL("libpam.so.0")
_CONVERSATION = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)


class _Conversation(ctypes.Structure):
    _fields_ = (("conv", _CONVERSATION), ("data", ctypes.c_void_p))


_silent = _Conversation(_CONVERSATION(lambda *_: 19), None)  # PAM_CONV_ERR: nobody to talk to
_handle = ctypes.c_void_p
for _name, _types in {
    "pam_start": (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.POINTER(_handle)),
    "pam_end": (_handle, ctypes.c_int),
    "pam_set_item": (_handle, ctypes.c_int, ctypes.c_char_p),
    "pam_open_session": (_handle, ctypes.c_int),
    "pam_close_session": (_handle, ctypes.c_int),
}.items():
    getattr(_pam, _name).argtypes = _types


def open_session(service: str, user: str) -> tuple[Any, float, int]:
    """(handle, milliseconds, result) of pam_open_session(3)."""
    handle = _handle()
    result = _pam.pam_start(service.encode(), user.encode(), ctypes.byref(_silent), ctypes.byref(handle))
    if result:
        return handle, 0.0, result
    _pam.pam_set_item(handle, PAM_TTY, b"ssh")  # what sshd says: a session of a user, not a job
    _pam.pam_set_item(handle, PAM_RHOST, b"127.0.0.1")
    begin = time.perf_counter()
    result = _pam.pam_open_session(handle, 0)
    return handle, (time.perf_counter() - begin) * 1000, result


def close_session(handle: Any) -> None:
    _pam.pam_close_session(handle, 0)
    _pam.pam_end(handle, 0)


def _tell(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)  # noqa: T201


class Sessions:
    """The sessions that are open: user → (process, pipe whose closing ends it, process of the user)."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[int, int, int]] = {}
        self._started: dict[int, tuple[str, int, int, float]] = {}
        """Result pipe → (user, process, pipe, time of the start), of those that are being opened."""

    def time(self, services: list[str], user: str, count: int) -> list[list[float]]:
        found = []
        for _ in range(count):
            self._start(services, user, stays=False)
            found += [spent for _, spent in self._finish()]
        return found

    def open(self, services: list[str], users: list[str], at_once: int) -> list[list[float]]:
        found: list[list[float]] = []
        for user in users:
            self._start(services, user, stays=True)
            if len(self._started) >= at_once:
                found += [spent for _, spent in self._finish()]
        while self._started:
            found += [spent for _, spent in self._finish()]
        return found

    def look(self, users: list[str]) -> dict[str, tuple[str, str]]:
        found = {}
        for user in users:
            process = self._open[user][2]
            try:
                with open(f"/proc/{process}/root/tmp/mark-{user}") as file:  # noqa: PTH123
                    text = file.read()
                found[user] = os.readlink(f"/proc/{process}/ns/mnt"), text  # noqa: PTH115
            except OSError as error:
                found[user] = str(error), ""
        return found

    def close(self, users: list[str]) -> None:
        closing = [self._open.pop(user) for user in users if user in self._open]
        for _, pipe, _ in closing:
            os.close(pipe)
        for process, _, _ in closing:
            os.waitpid(process, 0)

    def _start(self, services: list[str], user: str, *, stays: bool) -> None:
        results, result = os.pipe()
        wait, hold = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                os.close(hold)
                for pipe in {entry[1] for entry in self._open.values()} | {
                    entry[2] for entry in self._started.values()
                }:
                    os.close(pipe)
                self._session(services, user, result, wait, stays)
            except BaseException as error:
                os.write(result, json.dumps({"error": repr(error)}).encode() + b"\n")
            finally:
                os._exit(0)
        os.close(result)
        os.close(wait)
        self._started[results] = user, process, hold, time.monotonic()
        if stays:
            self._open[user] = process, hold, 0

    def _session(self, services: list[str], user: str, result: int, wait: int, stays: bool) -> None:
        handles, spent = [], []
        for service in services:
            handle, took, status = open_session(service, user)
            spent.append(took)
            if status:
                os.write(result, json.dumps({"error": f"{service}: {status}"}).encode() + b"\n")
                return
            handles.append(handle)
        child = 0
        if stays:
            child = self._become(user)
        os.write(result, json.dumps({"ms": spent, "process": child}).encode() + b"\n")
        if stays:
            os.close(result)
            os.read(wait, 1)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for handle in reversed(handles):
            close_session(handle)

    def _become(self, user: str) -> int:
        ready, done = os.pipe()
        child = os.fork()
        if child == 0:
            entry = pwd.getpwnam(user)
            os.setgroups([])
            os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
            os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
            with open(f"/tmp/mark-{user}", "w") as file:  # noqa: PTH123
                file.write(user)
            os.closerange(3, 4096)
            while True:
                signal.pause()
        os.close(done)
        os.read(ready, 1)
        os.close(ready)
        return child

    def _finish(self) -> list[tuple[str, list[float]]]:
        """Wait for one of those that are being opened, or more. Says which ones are slow."""
        while True:
            ready, _, _ = select.select(list(self._started), [], [], PATIENCE)
            if ready:
                break
            _tell(slow=[user for user, _, _, _ in self._started.values()])
        found = []
        for results in ready:
            user, process, hold, _ = self._started.pop(results)
            text = os.read(results, 4096)
            os.close(results)
            answer = json.loads(text or '{"error": "no answer"}')
            if "error" in answer:
                _tell(failed=f"{user}: {answer['error']}")
                os._exit(1)
            if user in self._open and self._open[user][0] == process:
                self._open[user] = process, hold, answer["process"]
            else:
                os.close(hold)
                os.waitpid(process, 0)
            found.append((user, answer["ms"]))
        return found


def main() -> None:
    sessions = Sessions()
    gc.disable()
    gc.freeze()  # children share the memory until they write to it
    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "time":
                _tell(ms=sessions.time(command["service"], command["user"], command["count"]))
            case "open":
                _tell(ms=sessions.open(command["service"], command["users"], command["at_once"]))
            case "look":
                _tell(found=sessions.look(command["users"]))
            case "close":
                sessions.close(command["users"])
                _tell(closed=len(command["users"]))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the user database says about a user: their groups, and the kind of user that systemd takes them for.

Not here: what follows from it (core/policy), names (blocking/accounts), and when to ask (admission).

Hard facts
- getgrnam(3) and getgrouplist(3) also find nothing if a directory service does not answer: the caller cannot
  tell that from a group that does not exist. So a group that is not found counts as unknown.
- os.getgrouplist() keeps the GIL (up to Python 3.13 at least), so a directory service that hangs would stop
  the whole process, the event loop too. ctypes releases it, as pwd and grp do.
- If an NSS module has no initgroups_dyn function, getgrouplist(3) goes through all groups with the module's
  getgrent_r, and glibc takes no lock for that. libnss-extrausers keeps one open file for it, so two threads
  end the process. Hence one call at a time, also for modules that could do more.
- systemd's user records (https://systemd.io/USER_RECORD/) come from services that listen in
  /run/systemd/userdb, and from files. io.systemd.Multiplexer, of systemd-userdbd, asks all of them; Debian
  does not install it by default. Records made up from NSS have no disposition.
- The varlink protocol (https://varlink.org/Interface-Definition): JSON objects, each ended by a NUL byte.
- Every function blocks: NSS without a bound, all services of user records together for five seconds.
"""

import contextlib
import ctypes
import errno
import grp
import json
import os
import pwd
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from polytmpd.core.policy import Exemptions, Facts

_SERVICES: Final = "run/systemd/userdb"
_MULTIPLEXER: Final = "io.systemd.Multiplexer"
_NOT_ALONE: Final = {_MULTIPLEXER, "io.systemd.NameServiceSwitch", "io.systemd.DropIn"}
_NOT_THERE: Final = [
    f"io.systemd.UserDatabase.{error}"
    for error in ("NoRecordFound", "BadService", "NonMatchingRecordFound", "ConflictingRecordFound")
]
"""Errors that mean that a service has no such record. With any other error, it may have one."""
_FILES: Final = ("etc/userdb", "run/userdb", "run/host/userdb", "usr/local/lib/userdb", "usr/lib/userdb")
"""The directories of userdb-drop-in records, see nss-systemd(8)."""
_DYNAMIC: Final = "run/systemd/dynamic-uid"
_TIMEOUT: Final = 5.0
"""Seconds for all services. systemd-userdbd may have to be started first."""
_BYTES_AT_MOST: Final = 1 << 20
_GROUPS: Final = 64
_GROUPS_AT_MOST: Final = 1 << 17
"""More than NGROUPS_MAX, with which a process may have 65536."""
_TURN_TIMEOUT: Final = 15.0
"""Seconds that a thread waits for its turn to ask for groups. A login gives up earlier."""
_LOOKED_UP_AT_MOST: Final = 500
"""Users. An uncached answer of a directory service takes milliseconds."""
_turn: Final = threading.Lock()
_libc: Final = ctypes.CDLL(None)
_libc.getgrouplist.argtypes = (
    ctypes.c_char_p,
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_int),
)
_ROOT: Final = Path("/")


def facts(uid: int, name: str, groups: Collection[str], *, record: bool, root: Path = _ROOT) -> Facts:
    """Answer what policy.Need names: the record, if asked for, and membership in those groups."""
    member_of, unknown = memberships(uid, name, groups)
    if not record:
        return Facts(member_of=member_of, unknown=unknown)
    dynamic = (root / _DYNAMIC / str(uid)).exists()
    declared, silent = _declared(uid, root)
    return Facts(declared, dynamic, member_of, unknown, silent)


def memberships(uid: int, name: str, groups: Collection[str]) -> tuple[frozenset[str], frozenset[str]]:
    """(those of the groups that the user is in, those that are not known). A group is a name or a GID.

    Raises TimeoutError if a call of another thread hangs.
    """
    if not groups:
        return frozenset(), frozenset()
    try:
        gids = _group_list(name, pwd.getpwuid(uid).pw_gid)
    except TimeoutError:
        raise
    except (KeyError, OSError, ValueError):
        return frozenset(), frozenset(groups)
    member_of, unknown = set(), set()
    for group in groups:
        if group.isdecimal():
            if int(group) in gids:
                member_of.add(group)
            continue
        try:
            found = grp.getgrnam(group)
        except (KeyError, ValueError):
            unknown.add(group)
        else:
            if found.gr_gid in gids or name in found.gr_mem:
                member_of.add(group)
    return frozenset(member_of), frozenset(unknown)


def _group_list(name: str, gid: int) -> set[int]:
    """The GIDs of a user's groups, with the one given. Raises OSError, ValueError."""
    if not _turn.acquire(timeout=_TURN_TIMEOUT):
        raise TimeoutError(errno.ETIMEDOUT, "another question about groups has no answer")
    try:
        return _group_list_unlocked(name, gid)
    finally:
        _turn.release()


def _group_list_unlocked(name: str, gid: int) -> set[int]:
    count = ctypes.c_int(_GROUPS)
    while count.value <= _GROUPS_AT_MOST:
        room = count.value
        gids = (ctypes.c_uint * room)()
        if _libc.getgrouplist(os.fsencode(name), gid, gids, ctypes.byref(count)) >= 0:
            return set(gids[: count.value])
        count.value = max(count.value, 2 * room)
    raise OSError(errno.E2BIG, "too many groups", name)


def unmatched(exemptions: Exemptions) -> Iterator[tuple[str, str, list[str]]]:
    """(setting, user or group, words) of settings whose users or groups are not found at present."""
    for setting, what, words in (
        ("ExemptUsers", "user", exemptions.users),
        ("ExemptGroups", "group", exemptions.exempt_groups),
        ("OnlyGroups", "group", exemptions.only_groups),
    ):
        if missing := [word for word in sorted(words) if not _is_known(what, word)]:
            yield setting, what, missing


def _is_known(what: str, word: str) -> bool:
    try:
        _user(word) if what == "user" else _group(word)
    except (KeyError, ValueError, OverflowError):
        return False
    return True


def named_users(exemptions: Exemptions) -> tuple[dict[int, str], int]:
    """(users whom ExemptUsers= and ExemptGroups= name, number of names that were not looked up).

    group(5) does not name those whose primary group it is. A directory service may leave out others.
    """
    members = {name for group in exemptions.exempt_groups for name in _members(group)}
    words = [*sorted(exemptions.users), *sorted(members - exemptions.users)]
    found: dict[int, str] = {}
    for word in words[:_LOOKED_UP_AT_MOST]:
        with contextlib.suppress(KeyError, ValueError, OverflowError):
            user = _user(word)
            found[user.pw_uid] = user.pw_name
    return found, len(words[_LOOKED_UP_AT_MOST:])


def _members(group: str) -> list[str]:
    try:
        return _group(group).gr_mem
    except (KeyError, ValueError, OverflowError):
        return []


def _user(word: str) -> pwd.struct_passwd:
    """Raises KeyError, ValueError, OverflowError if there is no such user."""
    return pwd.getpwuid(int(word)) if word.isdecimal() else pwd.getpwnam(word)


def _group(word: str) -> grp.struct_group:
    """Raises KeyError, ValueError, OverflowError if there is no such group."""
    return grp.getgrgid(int(word)) if word.isdecimal() else grp.getgrnam(word)


def local_users(root: Path = _ROOT) -> dict[int, str]:
    """The users in /etc/passwd. Listing a directory service may take minutes, and most forbid it."""
    found: dict[int, str] = {}
    try:
        text = (root / "etc/passwd").read_text(errors="replace")
    except OSError:
        return found
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) == 7 and fields[2].isdecimal() and fields[2].isascii():
            found.setdefault(int(fields[2]), fields[0])
    return found


def disposition(uid: int, root: Path = _ROOT) -> str | None:
    """The disposition that the user's record declares, or None, also if no service answers."""
    return _declared(uid, root)[0]


def _declared(uid: int, root: Path) -> tuple[str | None, bool]:
    """(the disposition or None, whether a service that may have a record did not answer)."""
    silent = False
    for look in _places(uid, root):
        try:
            record = look()
        except (OSError, ValueError, RecursionError):
            silent = True
            continue
        found = record.get("disposition") if record else None
        if record and isinstance(found, str) and record.get("uid", uid) == uid:
            return found, False
    return None, silent


def _places(uid: int, root: Path) -> Iterator[Callable[[], dict[str, Any] | None]]:
    """Where to look for a record, in this order. Each raises OSError, ValueError or RecursionError."""
    for directory in _FILES:
        yield partial(_read, root / directory / f"{uid}.user")
    end = time.monotonic() + _TIMEOUT
    place = root / _SERVICES
    if (multiplexer := _connect(place / _MULTIPLEXER, end)) is not None:
        yield partial(_ask, multiplexer, _MULTIPLEXER, uid, end)
        return
    for path in _others(place):
        if (service := _connect(path, end)) is not None:
            yield partial(_ask, service, path.name, uid, end)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        text = path.read_bytes()[:_BYTES_AT_MOST]
    except (FileNotFoundError, NotADirectoryError):
        return None
    record = json.loads(text)
    return record if isinstance(record, dict) else None


def _others(place: Path) -> list[Path]:
    """The services beside the multiplexer, whose socket and links stay when systemd-userdbd is stopped."""
    with contextlib.suppress(OSError):
        return sorted(path for path in place.iterdir() if path.name not in _NOT_ALONE)
    return []


def _connect(path: Path, end: float) -> socket.socket | None:
    """None if there is no such service. The caller closes the socket.

    It is not connected if the service is busy: then _ask() fails.
    """
    service = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    service.settimeout(max(end - time.monotonic(), 0.001))
    try:
        service.connect(str(path))
    except (BlockingIOError, TimeoutError):
        pass
    except OSError:
        service.close()
        return None
    return service


def _ask(service: socket.socket, name: str, uid: int, end: float) -> dict[str, Any] | None:
    """The record that a service has; closes the socket. Raises OSError, ValueError if there is no answer."""
    call = {"method": "io.systemd.UserDatabase.GetUserRecord", "parameters": {"uid": uid, "service": name}}
    with service:
        service.settimeout(max(end - time.monotonic(), 0.001))
        service.sendall(json.dumps(call).encode() + b"\0")
        reply = b""
        while b"\0" not in reply:
            service.settimeout(max(end - time.monotonic(), 0.001))
            data = service.recv(65536)
            if not data or len(reply) > _BYTES_AT_MOST:
                raise ConnectionError(errno.ECONNRESET, "no answer", name)
            reply += data
    answer = json.loads(reply.partition(b"\0")[0])
    if not isinstance(answer, dict):
        raise ValueError(f"{name}: no answer")
    if "error" in answer:
        if answer["error"] in _NOT_THERE:
            return None
        raise ValueError(f"{name}: {answer['error']}")
    parameters = answer.get("parameters")
    record = parameters.get("record") if isinstance(parameters, dict) else None
    return record if isinstance(record, dict) else None

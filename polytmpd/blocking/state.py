# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the descriptors in the FD store do not say: one small JSON file for each instance in
/run/polytmpd/instances/.

A file is written in full and renamed into place, so a reader sees the old one or the new one. Any of them
may be lost: one that makes no sense is reported and ignored, and its instance is found again by its
namespace.
Not here: what is done with the state at start (executor, daemon).
"""

import contextlib
import errno
import fcntl
import json
import os
import stat
from pathlib import Path
from typing import Any, Final

from polytmpd.core.model import Directory, Instance, InstanceDirectory, Lifetime, shared_by_all
from polytmpd.kernel.descriptor import Descriptor

VERSION: Final = 1
_BYTES_AT_MOST: Final = 65536


class StateDirectory:
    """The directory of state files. Made if it is missing, with mode 0700."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def lock(self) -> None:
        """Lock it until this process ends.

        Raises OSError if another process has locked it: a second daemon would take the first one's instances
        for leftovers.
        """
        fd = Descriptor.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fd.close()
            text = "another polytmpd is running, see: systemctl status polytmpd.service"
            raise BlockingIOError(errno.EWOULDBLOCK, text, str(self._path)) from None

    def save(self, instance: Instance) -> None:
        """Write the instance's file. On OSError, such as ENOSPC, the old file is untouched."""
        temporary = self._path / f".{instance.uid}.new"
        path = self._path / str(instance.uid)
        try:
            temporary.write_text(json.dumps(encode(instance)))
            try:
                temporary.replace(path)
            except IsADirectoryError:
                _put_away(path)
                temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def forget(self, uid: int) -> None:
        """Remove the file of a user's instance. Raises OSError."""
        path = self._path / str(uid)
        try:
            path.unlink(missing_ok=True)
        except IsADirectoryError:
            _put_away(path)

    def load(self) -> tuple[dict[int, Instance], list[str]]:
        """What is recorded, and what is wrong with the rest. Puts away what is not a regular file.

        Raises OSError if the directory cannot be read.
        """
        found: dict[int, Instance] = {}
        problems: list[str] = []
        with os.scandir(self._path) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            try:
                if not entry.is_file(follow_symlinks=False):
                    path = Path(entry.path)
                    problems.append(f"{path} is not a regular file; {_put_away(path)}")
                    continue
                if entry.name.startswith("."):
                    Path(entry.path).unlink()  # a write that was cut off
                    continue
                instance = decode(_read(entry.path))
                if entry.name != str(instance.uid):
                    raise ValueError(f"Describes UID {instance.uid}")
            except (OSError, ValueError, KeyError, TypeError) as error:
                problems.append(f"{entry.path}: {_in_words(error)}, ignoring the file")
                continue
            found[instance.uid] = instance
        return found, problems


def _put_away(path: Path) -> str:
    """Free the name of what is not a regular file, and say how. Only root can have put it there.

    A directory may contain something that root needs, so it is moved to /run/polytmpd. Raises OSError (EBUSY
    for a mount point).
    """
    try:
        path.unlink()
    except IsADirectoryError:
        place = path.parent.parent / f"found-{path.name.lstrip('.')}-{os.urandom(4).hex()}"
        path.rename(place)
        return f"moved to {place}"
    return "removed"


def _in_words(error: Exception) -> str:
    """What is wrong with a state file, for an administrator."""
    match error:
        case OSError():
            return f"Failed to read: {os.strerror(error.errno or 0)}"
        case KeyError(args=[str(key)]):
            return f"Without a value for {key!r}"
        case ValueError():
            return str(error)
        case _:
            return "Not what polytmpd writes"


def _read(path: str) -> Any:
    with Descriptor.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as fd:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("Not a regular file")
        data = os.read(fd, _BYTES_AT_MOST + 1)
    if len(data) > _BYTES_AT_MOST:
        raise ValueError("Too large for a state file")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("Not a complete JSON text") from None


def encode(instance: Instance) -> dict[str, Any]:
    return {
        "version": VERSION,
        "uid": instance.uid,
        "user": instance.user,
        "created": instance.created_usec,
        "created_monotonic": instance.created_monotonic_usec,
        "namespace": instance.namespace,
        "namespace_id": instance.namespace_id,
        "watches": sorted(instance.watches),
        "directories": [
            {
                "path": entry.directory.path,
                "lifetime": entry.directory.lifetime.value,
                "shared": list(entry.directory.shared),
                "barrier": entry.barrier,
            }
            for entry in instance.directories
        ],
    }


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{value!r} is not a string")
    if any("\ud800" <= character <= "\udfff" for character in value):  # no message on the bus can carry it
        raise ValueError(f"{value!r} is not Unicode")
    return value


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"{value!r} is not a natural number")
    return value


def _uid(value: Any) -> int:
    if _number(value) >= (1 << 32) - 1:
        raise ValueError(f"{value!r} is not a UID")
    return int(value)


def _name(value: Any) -> str:
    text = _text(value)
    if not text or "/" in text or text in {".", ".."}:
        raise ValueError(f"{text!r} is not the name of a directory entry")
    return text


def _lifetime(value: Any) -> Lifetime:
    known = {lifetime.value: lifetime for lifetime in Lifetime}
    if (text := _text(value)) not in known:
        raise ValueError(f"{text!r} is not one of {', '.join(known)}")
    return known[text]


def _directory(path: str, lifetime: Any, shared: list[Any]) -> Directory:
    return shared_by_all(Directory(_absolute(path), _lifetime(lifetime), tuple(map(_name, shared))))


def _absolute(value: Any) -> str:
    text = _text(value)
    parts = text.split("/")[1:]
    if not text.startswith("/") or not all(parts) or {".", ".."} & set(parts):
        raise ValueError(f"{text!r} is not a normalized absolute path")
    return text


def decode(value: Any) -> Instance:
    """Decode what encode() wrote, here or in another release. Keys that it does not know are ignored.

    Raises ValueError, KeyError or TypeError for anything else.
    """
    if not isinstance(value, dict):
        raise TypeError("not a JSON object")
    if value["version"] != VERSION:
        raise ValueError(f"Version {value['version']!r} is not supported, only {VERSION}")
    directories = tuple(
        InstanceDirectory(
            _directory(entry["path"], entry["lifetime"], entry["shared"]), _name(entry["barrier"])
        )
        for entry in value["directories"]
    )
    return Instance(
        _uid(value["uid"]),
        _text(value["user"]),
        _number(value["created"]),
        _number(value["created_monotonic"]),
        directories,
        _number(value["namespace"]),
        frozenset(_number(watch) for watch in value["watches"]),
        _number(value.get("namespace_id", 0)),
    )

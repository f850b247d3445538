# SPDX-License-Identifier: LGPL-2.1-or-later
"""Numbers that differ between architectures, against the headers that are installed.

Debian 13 has those of all architectures, in /usr/lib/linux/uapi.
"""

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from polytmpd.kernel import abi, syscalls

pytestmark = pytest.mark.unit

GENERIC = Path("/usr/include/asm-generic")
DIRECTIONS = {"none": "_IOC_NONE", "read": "_IOC_READ", "write": "_IOC_WRITE"}


def headers(name: str) -> Iterator[Path]:
    yield from [path for path in (GENERIC / name,) if path.exists()]
    yield from Path("/usr/lib/linux/uapi").glob(f"*/asm/{name}")


def defined(path: Path) -> dict[str, int]:
    found = re.findall(r"^# ?define\s+(\w+)\s+(0[xX][0-9a-fA-F]+|\d+)U?\b", path.read_text(), re.MULTILINE)
    return {name: int(value, 0) for name, value in found}


def test_the_directions_of_an_ioctl() -> None:
    for path in headers("ioctl.h"):
        found = defined(path)
        if "_IOC_NONE" not in found:  # it includes the generic one
            continue
        options = defined(path.with_name("socket.h"))
        if path.parent.parent.name in {"alpha", "mips", "powerpc", "sparc", "parisc"}:
            known = abi.BY_PEERCRED[options["SO_PEERCRED"]]
        else:
            known = abi.GENERIC
        shift = 29 if found.get("_IOC_SIZEBITS", 14) == 13 else 30
        assert {name: getattr(known, name) for name in DIRECTIONS} == {
            name: found[macro] << shift for name, macro in DIRECTIONS.items()
        }, path


def test_the_number_of_so_peerpidfd() -> None:
    for path in headers("socket.h"):
        options = defined(path)
        if {"SO_PEERCRED", "SO_PEERPIDFD"} <= set(options):
            known = abi.BY_PEERCRED.get(options["SO_PEERCRED"], abi.GENERIC)
            assert known.peerpidfd == options["SO_PEERPIDFD"], path


def test_the_numbers_of_most_architectures() -> None:
    if socket.SO_PEERCRED == 17 and abi.LONG == 8:
        assert abi.HERE is abi.GENERIC
        assert (syscalls.FS_IOC_GETFLAGS, syscalls.FS_IOC_SETFLAGS) == (0x80086601, 0x40086602)
        assert (syscalls.NS_GET_NSTYPE, syscalls.NS_MNT_GET_NEXT) == (0xB703, 0x8010B70B)
    powerpc = abi.BY_PEERCRED[21]
    assert powerpc.ior(ord("f"), 1, 8) == 0x40086601
    assert powerpc.io(0xB7, 3) == 0x2000B703

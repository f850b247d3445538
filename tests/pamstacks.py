# SPDX-License-Identifier: LGPL-2.1-or-later
"""What check makes of PAM stacks, and what the installed libpam makes of them.

libpam reads the same files, with pam_debug.so and pam_echo.so as modules, and says how it went. Also run by
itself in the machines, with the package's polytmpd: prints a line for each disagreement.
Not here: the verdicts on stacks.
"""

import ctypes
import random
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from polytmpd.ctl import pamdispatch, pamstacks
from polytmpd.ctl.pamstacks import Entry

ABORT = 26
MARK = "pam_echo.so"


class Message(ctypes.Structure):
    _fields_ = (("style", ctypes.c_int), ("text", ctypes.c_char_p))


class Response(ctypes.Structure):
    _fields_ = (("text", ctypes.c_void_p), ("code", ctypes.c_int))


CONVERSE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_int,
    ctypes.POINTER(ctypes.POINTER(Message)),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)


class Conversation(ctypes.Structure):
    _fields_ = (("function", CONVERSE), ("data", ctypes.c_void_p))


def libpam(directory: Path) -> tuple[bool, bool]:
    """Whether libpam opens a session, and whether pam_echo.so ran."""
    library = ctypes.CDLL("libpam.so.0")
    libc = ctypes.CDLL(None)
    libc.calloc.restype = ctypes.c_void_p
    said: list[bytes] = []

    def converse(
        count: int,
        messages: "ctypes._Pointer[ctypes._Pointer[Message]]",
        answer: "ctypes._Pointer[ctypes.c_void_p]",
        _: int,
    ) -> int:
        said.extend(messages[number].contents.text for number in range(count))
        answer[0] = libc.calloc(count, ctypes.sizeof(Response))
        return 0

    handle = ctypes.c_void_p()
    conversation = Conversation(CONVERSE(converse), None)
    started = library.pam_start_confdir(
        b"x", b"root", ctypes.byref(conversation), str(directory).encode(), ctypes.byref(handle)
    )
    if started:
        assert started == ABORT
        return False, False
    opened = library.pam_open_session(handle, 0)
    library.pam_end(handle, opened)
    return opened == 0, b"mark" in said


def returned(entry: Entry) -> set[str]:
    if entry.broken:
        return {"perm_denied"}
    if entry.module == "pam_nosuch.so":
        return {"module_unknown"}
    values = [word.partition("=")[2] for word in entry.arguments if word.startswith("open_session=")]
    return {values[-1] if values else "success"}


def ours(root: Path) -> tuple[bool, bool]:
    stack = pamstacks.stack(root, "x")
    if stack.error:
        return False, False
    (ending,) = pamdispatch.endings(stack.entries, returned, lambda entry: entry.module == MARK)
    return ending.opened, ending.reached


def both(root: Path, files: Mapping[str, str]) -> tuple[tuple[bool, bool], tuple[bool, bool]]:
    """(opened, reached) by our reckoning, and by libpam's. root: an empty directory.

    With a directory of its own, libpam still includes files of /etc/pam.d: they are named in full.
    """
    directory, theirs = root / "etc/pam.d", root / "libpam"
    directory.mkdir(parents=True)
    theirs.mkdir()
    for name, text in files.items():
        (directory / name).write_text(text)
        (theirs / name).write_text(re.sub(r"\b(include|substack) (?=[xab]\b)", rf"\1 {theirs}/", text))
    return ours(root), libpam(theirs)


YES, NO, ECHO = (
    "session required pam_debug.so\n",
    "session required pam_debug.so open_session=session_err\n",
    "session required pam_echo.so mark\n",
)
FILES = {
    "plain": {"x": YES + ECHO, "other": NO},
    "no file": {"other": ECHO},
    "neither": {},
    "no session entry": {"x": "auth required pam_permit.so\n", "other": ECHO},
    "no session entry, other refuses": {"x": "auth required pam_permit.so\n", "other": NO},
    "an empty file": {"x": "", "other": ECHO},
    "no other": {"x": ECHO},
    "other cannot be read": {"x": ECHO, "other": "@include nosuch\n"},
    "other cannot be read, and is not needed": {"x": ECHO, "other": "session include nosuch\n"},
    "no entry at all": {"x": "auth required pam_permit.so\n", "other": "auth required pam_permit.so\n"},
    "other ends too early": {"x": ECHO, "other": "session required \\"},
    "other's other type": {"x": ECHO, "other": "auth required \\"},
    "an included file is missing": {"x": YES + "@include nosuch\n", "other": YES},
    "a file for a type is missing": {"x": YES + "session include nosuch\n", "other": YES},
    "a substack is missing": {"x": YES + "session substack nosuch\n" + ECHO, "other": YES},
    "a loop of substacks": {"x": ECHO + "session substack x\n", "other": YES},
    "another type's include is missing": {"x": ECHO + "auth include nosuch\n", "other": YES},
    "an unknown control": {"x": "session requird pam_debug.so\n" + ECHO, "other": YES},
    "an unknown type": {"x": "sesion required pam_nosuch.so\n" + ECHO, "other": YES},
    "an unknown value": {"x": "session [success=ok foo=ok] pam_debug.so\n" + ECHO, "other": YES},
    "a bracket is open": {"x": "session [success=ok pam_debug.so\n" + ECHO, "other": YES},
    "brackets around a word": {"x": "session [required] pam_debug.so\n" + ECHO, "other": YES},
    "no module": {"x": "session required\n" + ECHO, "other": YES},
    "optional, no module": {"x": "session optional\n" + ECHO, "other": YES},
    "no control": {"x": "session\n" + ECHO, "other": YES},
    "a missing module": {"x": "session required pam_nosuch.so\n" + ECHO, "other": YES},
    "a missing optional one": {"x": "session optional pam_nosuch.so\n" + ECHO, "other": YES},
    "a missing silent one": {"x": "-session required pam_nosuch.so\n" + ECHO, "other": YES},
    "capitals": {"x": "SESSION REQUIRED pam_echo.so mark\n", "other": YES},
    "a jump of nothing": {"x": "session [success=0 default=bad] pam_debug.so\n" + ECHO, "other": YES},
    "a continued line": {"x": "session required \\\n pam_echo.so mark\n", "other": YES},
    "a continued comment": {"x": f"# comment \\\n{ECHO}", "other": YES},
    "a comment at the end": {"x": f"session required pam_debug.so # x \\\n{ECHO}", "other": YES},
    "no end of line": {"x": "session required pam_echo.so mark", "other": YES},
    "continued at the end": {"x": "session required pam_echo.so mark \\", "other": YES},
    "continued behind the end": {"x": "session required pam_echo.so mark \\\n", "other": YES},
    "all ignored": {"x": "session optional pam_debug.so open_session=ignore\n", "other": YES},
    "an absolute include": {"x": "session include /nosuch\n" + ECHO, "other": YES},
    "spaces in brackets": {"x": "session [ success = 1  default = ignore ] pam_debug.so\n" + ECHO + YES},
}


WORDS = ("required", "requisite", "sufficient", "optional")
VALUES = ("success", "session_err", "ignore", "new_authtok_reqd", "perm_denied")
ACTIONS = ("ok", "done", "bad", "die", "ignore", "reset", "1", "2", "3")


def a_stack(rng: random.Random, others: tuple[str, ...]) -> str:
    lines = []
    for _ in range(rng.randrange(1, 6)):
        control = rng.choice(WORDS)
        if rng.random() < 0.6:
            pairs = [f"{value}={rng.choice(ACTIONS)}" for value in rng.sample(VALUES, rng.randrange(3))]
            control = f"[{' '.join([*pairs, f'default={rng.choice(ACTIONS)}'])}]"
        module = rng.choice(
            [MARK + " mark", "pam_nosuch.so", *(f"pam_debug.so open_session={value}" for value in VALUES)]
        )
        line = f"session {control} {module}"
        if others and rng.random() < 0.4:
            other = rng.choice(others)
            line = rng.choice([f"@include {other}", f"session include {other}", f"session substack {other}"])
        lines.append(line)
    return "\n".join([*lines, ""])


def at_random(seed: int) -> dict[str, str]:
    """The files of a service."""
    rng = random.Random(seed)
    return {"x": a_stack(rng, ("a", "b")), "a": a_stack(rng, ("b",)), "b": a_stack(rng, ()), "other": NO}


def main() -> int:
    cases = {**FILES, **{str(seed): at_random(seed) for seed in range(1000)}}
    wrong = 0
    for name, files in cases.items():
        with tempfile.TemporaryDirectory() as root:
            found, expected = both(Path(root), files)
        if found != expected:
            wrong += 1
            sys.stdout.write(f"{name}: {found} instead of {expected}: {files}\n")
    sys.stdout.write(f"{len(cases)} cases, {wrong} disagreements\n")
    return wrong != 0


if __name__ == "__main__":
    sys.exit(main())

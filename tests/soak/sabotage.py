# SPDX-License-Identifier: LGPL-2.1-or-later
"""Faults to put into the installed package, to see that the checker notices them.

Not here: the checks (checker.py, leftovers.py).
"""

from pathlib import Path
from typing import Final

_PACKAGE: Final = "usr/lib/python3/dist-packages/polytmpd"

# name → (file, what it contains, what replaces that)
FAULTS: Final[dict[str, tuple[str, str, str]]] = {
    "never-remove": (
        "executor/actions.py",
        "aside = await asyncio.to_thread(removal.set_aside, instance) if known else []",
        "aside: list[removal.Place] = []",
    ),
    "set-aside-only": (
        "blocking/deletion.py",
        "complete = work.run()",
        "complete = False",
    ),
    "too-early": (
        "executor/actions.py",
        "self._namespaces.let_go(uid)",
        (
            "self._namespaces.let_go(uid); "
            "asyncio.get_running_loop().call_soon(self._sentinels._followers[0], uid)"
        ),
    ),
    "leak-namespace": ("executor/fdstore.py", "self._held.pop(uid).close()", "self._held.pop(uid)"),
    "leak-descriptor": (
        "executor/fdstore.py",
        "return self._held[uid].dup()",
        "self._held[uid].dup(); return self._held[uid].dup()",
    ),
    "leak-store": (
        "executor/fdstore.py",
        "sdnotify.remove(_name(uid))\n        self._held",
        "self._held",
    ),
    "namespace-per-login": (
        "executor/actions.py",
        "fd = await asyncio.to_thread(instances.open_living, instance)",
        "fd = None",
    ),
    "one-way-mounts": (
        "kernel/mountns.py",
        "holder.mount.propagates",
        "False",
    ),
    "one-for-all": (
        "daemon.py",
        "self._executor.hand_over(record.uid)",
        "self._executor.hand_over(min(self._executor._namespaces._held))",
    ),
}


def put(root: Path, name: str) -> None:
    """Put a fault into the installed package of a machine that is not booted yet.

    Raises ValueError if the package no longer contains what the fault replaces.
    """
    if name == "open-door":  # optional in PAM, and the daemon takes longer to start than PAM waits
        slow = root / "etc/systemd/system/polytmpd.service.d/slow.conf"
        slow.parent.mkdir(parents=True)
        slow.write_text("[Service]\nExecStartPre=/bin/sleep 3\n")
        for stack in ("common-session", "common-session-noninteractive"):
            path = root / "etc/pam.d" / stack
            text = path.read_text()
            path.write_text(text.replace("required\tpam_polytmp.so", "optional\tpam_polytmp.so timeout=1"))
        return
    file, there, instead = FAULTS[name]
    path = root / _PACKAGE / file
    text = path.read_text()
    if there not in text:
        raise ValueError(f"{name}: {path} no longer contains {there!r}")
    path.write_text(text.replace(there, instead))

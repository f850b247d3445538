# SPDX-License-Identifier: LGPL-2.1-or-later
"""What polytmp costs with many instances: starting, memory, polytmpctl, a mount on the host, and idling.

Not here: logins while many are logged in (scale), how the instances are made (inside/crowd.py).
"""

import time
from pathlib import Path
from typing import Final

from tests.bed import eventually

from .contestants import FIRST_UID, MODULE, OURS, PEER, PLAIN, Contestant, booted, settled
from .figures import Figures

ACQUIRE_NEW: Final = "request for a new instance"
MOUNT: Final = "mount and unmount on the host, 1,000 alive"
IDLE: Final = "context switches of the idle polytmpd in 60 s"
LIMITS: Final = "[Service]\nFileDescriptorStoreMax=20000\nMemoryMax=4G\n"
"""docs/hpc.md says so for more than 4,000 users."""
ALIVE: Final = 1000
_REMOVAL: Final = 120.0


def start(count: int) -> str:
    return f"start to READY with {count:,} instances"


def acquired(count: int) -> str:
    return f"first request after a start with {count:,} instances"


def memory(count: int) -> str:
    return f"RSS of polytmpd with {count:,} instances"


def churn(count: int) -> str:
    return f"CPU of polytmpd, a new instance and its removal, beside {count:,} instances"


def watches(count: int) -> str:
    return f"inotify watches of polytmpd with {count:,} instances"


def descriptors(count: int) -> str:
    return f"descriptors of polytmpd with {count:,} instances"


def command(name: str, count: int) -> str:
    return f"{name}, {count:,} instances"


def properties(contestant: Contestant, *names: str) -> dict[str, str]:
    """Of polytmpd.service."""
    argv = ["systemctl", "show", "polytmpd.service", *(f"--property={name}" for name in names)]
    lines = contestant.machine.run(*argv).stdout.splitlines()
    return dict(line.split("=", 1) for line in lines)


def resident(contestant: Contestant) -> int:
    """KiB."""
    pid = properties(contestant, "MainPID")["MainPID"]
    text = (contestant.root / "proc" / pid / "status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0])


def enlarge(contestant: Contestant) -> None:
    """Set the limits that polytmpd.service needs for more than 4,000 instances."""
    contestant.machine.write("/etc/systemd/system/polytmpd.service.d/bench.conf", LIMITS)
    contestant.machine.sh("systemctl daemon-reload && systemctl restart polytmpd")


def grow(contestant: Contestant, count: int, figures: Figures) -> None:
    """Have so many instances in all."""
    there = instances(contestant)
    if there < count:
        spent = contestant.python(
            "crowd.py", "more", str(FIRST_UID + there), str(FIRST_UID + count - 1), timeout=1200
        )
        figures.add(ACQUIRE_NEW, OURS, spent)
    eventually(lambda: instances(contestant) == count, 60, f"{count} instances")


def instances(contestant: Contestant) -> int:
    return len(list((contestant.root / "run/polytmpd/instances").iterdir()))


def starts(contestant: Contestant, count: int, times: int, figures: Figures) -> None:
    """Restart polytmpd: how long systemd waits for READY, and the first request after it."""
    machine = contestant.machine
    for _ in range(times):
        machine.run("systemctl", "stop", "polytmpd.service")
        script = (
            f"systemctl start polytmpd.service && python3 /opt/bench/crowd.py acquire {FIRST_UID}"
            " && systemctl show polytmpd.service "
            "--property=ExecMainStartTimestampMonotonic,ActiveEnterTimestampMonotonic --value"
        )
        words = machine.sh(script, timeout=300).stdout.split()
        figures.add(acquired(count), OURS, [float(words[0])])
        figures.add(start(count), OURS, [(int(words[2]) - int(words[1])) / 1000])
        if count == 0:
            contestant.wait_until_quiet()


def commands(contestant: Contestant, count: int, rounds: int, figures: Figures) -> None:
    """polytmpctl, for a user who is logged in, against loginctl and a bare Python."""
    user = f"u{FIRST_UID}" if count else "alice"
    asked = {
        "polytmpctl list": "polytmpctl list",
        "polytmpctl status USER": f"polytmpctl status {user}",
        "polytmpctl path FILE": f"polytmpctl path --user={user} /tmp/x",
        "loginctl list-users": "loginctl list-users --no-pager",
        "python3 -I -S -c pass": "/usr/bin/python3 -I -S -c pass",
    }
    found = contestant.python("commands.py", str(rounds), *asked.values())
    for shown, line in asked.items():
        figures.add(command(shown, count), OURS, found[line])


def keep_size(contestant: Contestant, count: int, figures: Figures) -> None:
    figures.add(memory(count), OURS, [resident(contestant)])
    process = contestant.root / "proc" / properties(contestant, "MainPID")["MainPID"]
    held = list((process / "fdinfo").iterdir())
    figures.add(descriptors(count), OURS, [len(held)])
    figures.add(watches(count), OURS, [sum(_watches(entry) for entry in held)])


def _watches(fdinfo: Path) -> int:
    try:
        return fdinfo.read_text().count("inotify wd:")
    except FileNotFoundError:
        return 0  # closed meanwhile


def come_and_go(contestant: Contestant, count: int, times: int, figures: Figures) -> None:
    """An instance that no session claims is removed as soon as its namespace is released."""
    for _ in range(times):
        before = settled(contestant)
        contestant.python("crowd.py", "acquire", "1001")
        eventually(lambda: instances(contestant) == count, 60, "the instance is gone")
        figures.add(churn(count), OURS, [settled(contestant) - before])


def switches(contestant: Contestant) -> int:
    pid = properties(contestant, "MainPID")["MainPID"]
    total = 0
    for task in (contestant.root / "proc" / pid / "task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if "ctxt_switches" in line:
                total += int(line.split()[1])
    return total


def idle(contestant: Contestant, label: str, seconds: float, figures: Figures) -> None:
    """With one user logged in who does nothing."""
    with contestant.machine.session("alice"):
        time.sleep(3)  # what the login has caused is over
        before = switches(contestant)
        time.sleep(seconds)
        figures.add(IDLE, label, [(switches(contestant) - before) * 60 / seconds])
    contestant.wait_until_quiet()


def mounts(contestants: list[Contestant], count: int, rounds: int, figures: Figures) -> None:
    """A mount on the host reaches each namespace. The peer's are made by its module."""
    for contestant in contestants:
        names = [f"u{FIRST_UID + number}" for number in range(count)]
        if contestant.name == PLAIN:
            _mount(contestant, rounds, figures)
            continue
        with contestant.pam() as pam:
            pam.open([MODULE], names, at_once=4)
            _mount(contestant, rounds, figures)
            pam.close(names)


def _mount(contestant: Contestant, rounds: int, figures: Figures) -> None:
    found = contestant.python("mounts.py", str(rounds * 10))
    figures.add(MOUNT, contestant.name, found)


def measure(release: str, rounds: int, sizes: tuple[int, ...], seconds: float, figures: Figures) -> None:
    """The whole part."""
    with booted(release, (PLAIN, PEER, OURS), crowd=True) as contestants:
        ours = contestants[-1]
        idle(ours, "with systemd-udevd", seconds, figures)
        ours.machine.sh("systemctl stop 'systemd-udevd*.socket' systemd-udevd.service", check=False)
        idle(ours, "without systemd-udevd", seconds, figures)
        mounts(contestants, min(ALIVE, max(sizes)), rounds, figures)
        ours.wait_until_quiet()
        enlarge(ours)
        with ours.machine.session("alice"):
            commands(ours, 0, rounds, figures)
        ours.wait_until_quiet()
        for count in sizes:
            grow(ours, count, figures)
            keep_size(ours, count, figures)
            come_and_go(ours, count, max(3, rounds // 3) if count <= ALIVE else 3, figures)
            if 0 < count <= ALIVE:
                commands(ours, count, rounds, figures)
            starts(ours, count, max(3, rounds if count == 0 else rounds * 100 // count), figures)
            require_all(ours)


def require_all(contestant: Contestant) -> dict[str, list[str]]:
    """Each instance of the crowd has its own namespace, and its file is there. Returns what was found."""
    found: dict[str, list[str]] = contestant.python("crowd.py", "look")
    wrong = [uid for uid, (_, text) in found.items() if text != uid]
    if wrong or len({namespace for namespace, _ in found.values()}) != len(found):
        raise AssertionError(f"{len(wrong)} files are missing, such as that of UID {wrong[:1]}")
    return found

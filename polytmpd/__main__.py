# SPDX-License-Identifier: LGPL-2.1-or-later
"""The composition root of polytmpd: makes the parts, connects them, runs until told to stop."""

import gc
import sys

# Imports make no garbage, but the collector would look for it again and again: a fifth of their time.
gc.disable()
# asyncio would import it for nothing, which takes 5 ms and 1 MB.
sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]  # tells the import system that there is none

import asyncio
import contextlib
import logging
import os
import signal
from pathlib import Path
from typing import Final

from polytmpd import __version__, config, journal, login, sdnotify, stacks
from polytmpd.acquisition import Acquisition
from polytmpd.admission import Admission
from polytmpd.blocking.state import StateDirectory
from polytmpd.bus.connection import BusError, Connection
from polytmpd.bus.logind import Logind
from polytmpd.bus.service import Service
from polytmpd.bus.systemd1 import Systemd
from polytmpd.core.views import Views
from polytmpd.daemon import Daemon
from polytmpd.devices import Devices
from polytmpd.displays.displaylocks import DisplayLocks
from polytmpd.errors import PolytmpError
from polytmpd.executor import fdstore
from polytmpd.executor.actions import Executor
from polytmpd.kernel import confinement, host
from polytmpd.kernel.host import in_words
from polytmpd.placement import Placement
from polytmpd.presence import Presence
from polytmpd.questions import Questions
from polytmpd.sdlogin import SessionFiles
from polytmpd.slices import Slices
from polytmpd.tasks import Tasks

gc.freeze()  # what is imported stays
gc.enable()

log = logging.getLogger("polytmpd")

HELP: Final = """\
polytmpd [OPTIONS...]

Give each user a private /tmp and /var/tmp. systemd starts this daemon, see polytmpd.service(8). To manage
instances, use polytmpctl(1).

  -h --help     Show this help
     --version  Show package version
     --debug    Log debug messages
"""
RESTART: Final = "systemctl restart polytmpd.service"
STATE: Final = Path("/run/polytmpd/instances")


async def run() -> int:
    """Serve until SIGTERM (0), or until the bus goes away (1).

    The service manager then starts us again, and the FD store carries over what lives.
    """
    loop = asyncio.get_running_loop()
    tasks = Tasks()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    stacks.answer(loop)
    settings, problems = config.load()
    for problem in problems:
        log.error("%s", problem, extra=journal.fields(journal.MessageId.BAD_CONFIG))
    for problem in config.unfit(settings.directories):
        text = "Until this is corrected, logins of regular users are refused: %s"
        log.error(text, problem.fault, extra=journal.fields(journal.MessageId.BAD_CONFIG))
    state = StateDirectory(STATE)
    state.lock()
    connection = await Connection.open()
    passed = sdnotify.take_passed()
    listening = login.take_socket(passed)
    executor = Executor(state, _boot_id(), fdstore.take(passed), DisplayLocks())
    admission = Admission(settings.exemptions)
    presence = Presence(Logind(connection, SessionFiles()), Systemd(connection), Slices(), admission)
    views = Views(settings.paths)
    daemon = Daemon(settings, config.load, executor, presence, admission, views)
    questions = Questions(views, daemon.kept, executor.removed_entries)
    acquisition = Acquisition(daemon, Placement(connection, views))
    service = Service(connection, views, daemon, questions, acquisition.namespace)
    logins = login.Logins(listening, acquisition.namespace) if listening else None
    devices = Devices(executor.device_gone, executor.devices_missed)
    await daemon.start()
    await service.publish()
    if logins is not None:
        logins.start()
    else:
        log.error("Logins of regular users are refused: systemd passed no socket. Try: %s", RESTART)
    loop.add_signal_handler(signal.SIGHUP, lambda: tasks.start(_reload(daemon)))
    sdnotify.ready(f"Private directories: {' '.join(settings.paths)}")
    tasks.start(_feed_watchdog())
    devices.start()  # nobody waits for it: what goes away before is found by its first look
    closed = loop.create_task(connection.wait_closed())
    await asyncio.wait((closed, loop.create_task(stop.wait())), return_when=asyncio.FIRST_COMPLETED)
    sdnotify.stopping()
    if logins is not None:
        await logins.close()
    await tasks.close()
    await devices.close()
    questions.close()
    await daemon.stop()
    if stop.is_set():
        connection.close()
        return 0
    log.error("Lost the connection to the system bus, exiting to be restarted")
    return 1


async def _reload(daemon: Daemon) -> None:
    with contextlib.suppress(PolytmpError):  # it is in the journal
        await daemon.reload()


async def _feed_watchdog() -> None:
    interval = sdnotify.watchdog_interval()
    while interval is not None:
        sdnotify.watchdog()
        await asyncio.sleep(interval)


def _boot_id() -> str:
    # PID 1's: the sandbox has another /proc, which lacks a container's boot ID.
    path = Path(host.path("/proc/sys/kernel/random/boot_id"))
    return path.read_text(encoding="ascii").strip().replace("-", "")


def main() -> int:
    for word in sys.argv[1:]:
        if word == "--version":
            print(f"polytmpd {__version__}")  # noqa: T201
            return 0
        if word in {"-h", "--help"}:
            print(HELP, end="")  # noqa: T201
            return 0
        if word != "--debug":
            sys.stderr.write(f"polytmpd: unrecognized argument '{word}'\nSee: polytmpd --help\n")
            return 2  # INVALIDARGUMENT, see systemd.exec(5)
    journal.set_up(logging.DEBUG if "--debug" in sys.argv[1:] else logging.INFO)
    try:
        if directories := os.environ.get("RUNTIME_DIRECTORY"):  # from RuntimeDirectory= of the unit
            confinement.confine(directories.split(":"))
        return asyncio.run(run())
    except (BusError, OSError) as error:
        log.error("Cannot start: %s", in_words(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())

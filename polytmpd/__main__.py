# SPDX-License-Identifier: LGPL-2.1-or-later
"""The composition root of polytmpd: makes the parts, connects them, runs until told to stop."""

import asyncio
import contextlib
import logging
import signal
import sys
from pathlib import Path
from typing import Final

from polytmpd import __version__, config, journal, sdnotify
from polytmpd.blocking.state import StateDirectory
from polytmpd.bus.connection import BusError, Connection
from polytmpd.bus.logind import Logind
from polytmpd.bus.service import Service
from polytmpd.bus.systemd1 import Systemd
from polytmpd.daemon import Daemon
from polytmpd.devices import Devices
from polytmpd.displays.displaylocks import DisplayLocks
from polytmpd.errors import PolytmpError
from polytmpd.executor import Executor
from polytmpd.kernel import host
from polytmpd.kernel.host import in_words
from polytmpd.slices import Slices

log = logging.getLogger("polytmpd")

HELP: Final = """\
polytmpd [OPTIONS...]

Give each user a private /tmp and /var/tmp. It is run by systemd, see polytmpd.service(8); polytmpctl(1) is
for people.

  -h --help     Show this help
     --version  Show package version
     --debug    Write more to the journal
"""
STATE: Final = Path("/run/polytmpd/instances")


async def run() -> int:
    """Serve until SIGTERM (0), or until the bus goes away (1): the service manager starts us again then, and
    the FD store carries over what lives.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    settings, problems = config.load()
    for problem in problems:
        log.error("%s", problem, extra=journal.fields(journal.MessageId.BAD_CONFIG))
    boot_id = _boot_id()
    connection = await Connection.open()
    daemon: Daemon
    executor = Executor(StateDirectory(STATE), boot_id, lambda uid: daemon.namespace_ended(uid))
    daemon = Daemon(settings, executor, config.load)
    slices = Slices(daemon.slice_populated)
    logind, systemd = (
        Logind(connection, daemon),
        Systemd(connection, daemon.slice_changed, daemon.scope_changed, daemon.systemd_changed),
    )
    service = Service(connection, daemon)
    daemon.connect(service, logind, systemd, slices, DisplayLocks(executor.share_again))
    await daemon.restore()
    await logind.subscribe()
    await systemd.subscribe()
    await daemon.start()
    devices = Devices(daemon.device_gone, daemon.devices_missed)
    devices.start()
    daemon.devices_missed()
    await service.publish()
    loop.add_signal_handler(signal.SIGHUP, lambda: _reload(daemon))
    sdnotify.ready(f"Private directories: {' '.join(daemon.directories())}")
    watchdog = loop.create_task(_feed_watchdog())
    closed = loop.create_task(connection.wait_closed())
    await asyncio.wait((closed, loop.create_task(stop.wait())), return_when=asyncio.FIRST_COMPLETED)
    sdnotify.stopping()
    watchdog.cancel()
    await daemon.stop()
    devices.close()
    slices.close()
    if stop.is_set():
        connection.close()
        return 0
    log.error("The system bus went away; starting again")
    return 1


_background: set["asyncio.Task[None]"] = set()


def _reload(daemon: Daemon) -> None:
    async def reload() -> None:
        with contextlib.suppress(PolytmpError):  # it is in the journal
            await daemon.reload()

    task = asyncio.get_running_loop().create_task(reload())
    _background.add(task)
    task.add_done_callback(_background.discard)


async def _feed_watchdog() -> None:
    interval = sdnotify.watchdog_interval()
    while interval is not None:
        sdnotify.watchdog()
        await asyncio.sleep(interval)


def _boot_id() -> str:
    # PID 1's own: the sandbox's /proc is another one, which has not got a container's boot id.
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
            sys.stderr.write(
                f"polytmpd: unrecognized argument '{word}'; polytmpd --help lists the options\n"
            )
            return 2  # INVALIDARGUMENT, see systemd.exec(5)
    journal.set_up(logging.DEBUG if "--debug" in sys.argv[1:] else logging.INFO)
    try:
        return asyncio.run(run())
    except (BusError, OSError) as error:
        log.error("Cannot start: %s", in_words(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: LGPL-2.1-or-later
"""polytmpctl: runs one command, from the arguments to the exit status.

The exit status is 0 on success. It is 1 on failure, with the reason and a hint on standard error, and if
check finds a failure. `enter` exits with the status of its command.
Not here: the commands (commands.py, status.py, remove.py, enter.py, monitor.py, check.py).
"""

import contextlib
import gc
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from polytmpd.ctl import arguments, output
from polytmpd.ctl.arguments import Options
from polytmpd.ctl.output import Failure, Style

if TYPE_CHECKING:
    from polytmpd.bus.protocol import Asker
    from polytmpd.bus.sdbus import SdBus
    from polytmpd.ctl.commands import Answer, Context

T = TypeVar("T")

_ONE_BY_ONE: Final = frozenset({"list", "status", "ps", "usage", "path"})
"""Commands that make one call after the other, and need no descriptors or signals."""
_HINTS: Final = {
    ".ServiceUnknown": "Is polytmpd installed and running? See: systemctl status polytmpd.service",
    ".NameHasNoOwner": "Is polytmpd running? See: systemctl status polytmpd.service",
    ".Disconnected": "The connection to the bus was lost. See: systemctl status dbus.service",
    ".NoSuchInstance": "See: polytmpctl list",
    ".UnknownObject": "The instance has just been removed. See: polytmpctl list",
    ".AccessDenied": "Try again as root, for example with sudo",
    ".InteractiveAuthorizationRequired": "Try again as root, or on a terminal without --no-ask-password",
    ".UnknownMethod": "polytmpd and polytmpctl differ in version. Try: systemctl restart polytmpd.service",
    ".Failed": "See: journalctl --unit=polytmpd.service",
    ".NoReply": "polytmpd may have stopped. See: systemctl status polytmpd.service",
    ".Timeout": "polytmpd is busy or hung. See: systemctl status polytmpd.service",
    ".TimedOut": "polytmpd fails to start. See: systemctl status polytmpd.service",
    ".Spawn.ChildExited": "polytmpd fails to start. See: systemctl status polytmpd.service",
}


def main(words: Sequence[str] | None = None) -> int:
    _open_streams()
    try:
        options = arguments.parse(sys.argv[1:] if words is None else words)
        return _run(options)
    except Failure as failure:
        output.warn(str(failure))
        if failure.hint:
            sys.stderr.write(f"{failure.hint}\n")
        return 1
    except BrokenPipeError:
        output.discard()  # the reader has seen enough
        return 0
    except KeyboardInterrupt:
        return 130


def program() -> NoReturn:
    """Run main() and end at once: Python's own clean-up takes a tenth of a short command."""
    gc.disable()
    status = main()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _open_streams() -> None:
    """Open /dev/null for each standard stream that was closed at start, whose number open() would reuse."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(fd, True)
            setattr(sys, name, os.fdopen(fd, mode))


def _run(options: Options) -> int:
    style = Style(output.wants_colour(os.environ, sys.stdout.isatty()))
    if options.help:
        codes = {"bold": "\x1b[0;1;39m", "heading": "\x1b[0;4m", "reset": "\x1b[0m"}
        codes = codes if style.coloured else dict.fromkeys(codes, "")
        output.show(arguments.HELP.format(**codes).rstrip("\n"), pager=options.pager)
        return 0
    if options.version:
        from polytmpd import __version__

        output.write(f"polytmp {__version__}\n")
        return 0
    if options.host:
        _become_remote(options)
    if options.machine:
        _require_machine(options.machine.rpartition("@")[2])
        _become_remote(options)
    found = _on_bus(lambda bus: _command(options, style, bus), one_by_one=options.verb in _ONE_BY_ONE)
    if isinstance(found, list):
        from polytmpd.ctl import enter

        enter.run(found)
    return _print(options, found)


def _on_bus(work: "Callable[[Asker], Coroutine[Any, Any, T]]", *, one_by_one: bool) -> T:
    """What work returns, which gets a connection to the bus.

    one_by_one: it makes one call after the other, and nothing else. Then libsystemd is used, if installed:
    importing asyncio and the D-Bus library takes longer than all the rest.
    """
    if one_by_one:
        from polytmpd.bus import sdbus

        try:
            connection = sdbus.SdBus()
        except OSError:
            pass
        else:
            return _without_loop(work, connection)
    import asyncio

    return asyncio.run(_in_loop(work))


def _without_loop(work: "Callable[[Asker], Coroutine[Any, Any, T]]", connection: "SdBus") -> T:
    from polytmpd.bus import sdbus
    from polytmpd.bus.protocol import BusError

    with contextlib.closing(connection):
        try:
            connection.open()
        except (OSError, BusError) as error:
            raise _unreachable(error) from None
        return sdbus.run(work(connection))


async def _in_loop(work: "Callable[[Asker], Coroutine[Any, Any, T]]") -> T:
    from polytmpd.bus.connection import BusError, Connection

    gc.enable()  # this may take long
    try:
        connection = await Connection.open()
    except (OSError, BusError) as error:
        raise _unreachable(error) from None
    try:
        return await work(connection)
    finally:
        connection.close()


def _unreachable(error: Exception) -> Failure:
    text = f"Failed to connect to bus: {getattr(error, 'strerror', None) or error}"
    return Failure(text, "Is D-Bus running? See: systemctl status dbus.service")


async def _command(options: Options, style: Style, connection: "Asker") -> "Answer | list[str]":
    """Run a command. Returns what to print, or what to execute."""
    from polytmpd.bus.client import Polytmp
    from polytmpd.bus.protocol import BusError
    from polytmpd.ctl import commands

    interactive = options.ask_password and os.geteuid() != 0 and sys.stdin.isatty()
    context = commands.Context(Polytmp(connection, interactive=interactive), connection, options, style)
    agent = _start_agent() if interactive and options.verb != "list" else None
    try:
        if options.verb == "monitor":
            from polytmpd.bus.connection import Connection
            from polytmpd.ctl.monitor import Monitor

            assert isinstance(connection, Connection)
            await Monitor(context).run(connection)
            raise Failure("The connection to the bus was lost", "See: systemctl status dbus.service")
        if options.verb == "enter":
            from polytmpd.ctl import enter

            return await enter.prepare(context)
        return await _verb(options.verb)(context)
    except BusError as error:
        raise Failure(_text(error.name, str(error)), _hint(error.name)) from None
    finally:
        if agent is not None:
            _stop_agent(agent)


def _print(options: Options, answer: "Answer") -> int:
    is_path = options.verb == "path"  # output for a script, or to be copied
    if options.json != "off":
        if answer.json is not None:
            output.show(output.to_json(answer.json, options.json), pager=options.pager and not is_path)
    elif is_path:
        output.write(f"{answer.text}\n", exact=True)
    else:
        output.show(answer.text, pager=options.pager)
    return answer.status


def _verb(verb: str) -> "Callable[[Context], Awaitable[Answer]]":
    """The function of a command. Its module is imported only now, to start quickly."""
    from polytmpd.ctl import commands

    match verb:
        case "status":
            from polytmpd.ctl.status import status

            return status
        case "remove":
            from polytmpd.ctl.remove import remove

            return remove
        case "check":
            from polytmpd.ctl.check import check

            return check
        case "ps":
            return commands.ps
        case "usage":
            return commands.usage
        case "path":
            return commands.path
    return commands.list_instances


def _text(name: str, text: str) -> str:
    if name.endswith((".AccessDenied", ".InteractiveAuthorizationRequired")):
        return f"Access denied: {text}" if text else "Access denied"
    return text[:1].upper() + text[1:]


def _hint(name: str) -> str:
    if name.startswith("org.freedesktop.systemd1."):  # masked, gone, failed to start
        return "polytmpd cannot be started. See: systemctl status polytmpd.service"
    for ending, hint in _HINTS.items():
        if name.endswith(ending):
            return "" if ending == ".AccessDenied" and os.geteuid() == 0 else hint
    return ""


def _require_machine(name: str) -> None:
    """Raise Failure if the container is not running: systemd-run would report that the host is down."""
    from polytmpd.bus import machine1
    from polytmpd.bus.protocol import BusError

    if name == ".host":
        return
    try:
        _on_bus(lambda bus: machine1.require_machine(bus, name), one_by_one=True)
    except BusError as error:
        if error.name.endswith(".ServiceUnknown"):
            text = f"No container '{name}': systemd-machined is not installed"
            raise Failure(text, "Try: apt install systemd-container") from None
        if error.name.endswith(".NoSuchMachine"):
            raise Failure(f"No container '{name}'", "See: machinectl list") from None
        raise Failure(_text(error.name, str(error)), _hint(error.name)) from None


def _become_remote(options: Options) -> None:
    """Become ssh(1) or systemd-run(1), which run polytmpctl on the other host. Does not return."""
    remote = ["polytmpctl", *options.passed_on]
    if options.host:
        import shlex

        terminal = ["-t"] if sys.stdin.isatty() and sys.stdout.isatty() else []
        argv = ["ssh", *terminal, "--", options.host, shlex.join(remote)]
    else:
        terminal = ["--pty"] if sys.stdin.isatty() and sys.stdout.isatty() else ["--pipe"]
        argv = ["systemd-run", f"--machine={options.machine}", "--quiet", "--wait", "--collect", *terminal]
        argv += ["--", *remote]
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        raise Failure(f"Failed to execute {argv[0]}: {error.strerror}") from None


def _start_agent() -> Any:
    """Let polkit ask for passwords on this terminal, as systemd's tools do, unless a desktop agent does."""
    import select
    import subprocess

    read_fd, write_fd = os.pipe()
    try:
        process = subprocess.Popen(
            ("pkttyagent", f"--notify-fd={write_fd}", "--fallback"), pass_fds=(write_fd,)
        )
    except OSError:
        return None  # polkit is not installed; the daemon reports what that means
    finally:
        os.close(write_fd)
    select.select([read_fd], [], [], 5)  # readable or closed once the agent is registered
    os.close(read_fd)
    return process


def _stop_agent(process: Any) -> None:
    process.terminate()
    process.wait()


if __name__ == "__main__":
    program()

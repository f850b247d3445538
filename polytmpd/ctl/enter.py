# SPDX-License-Identifier: LGPL-2.1-or-later
"""enter: root in a user's view of the host, through nsenter(1).

Only /tmp and /var/tmp differ there; everything else, rights included, is root's own. Whoever is in it keeps
the instance, like any other process.
Not here: making an instance. Where the user has none, there is nothing to enter.
"""

import os
import pwd
from typing import Final, NoReturn

from polytmpd.bus.contract import InstanceProperty
from polytmpd.core.model import State
from polytmpd.ctl import users
from polytmpd.ctl.commands import Context
from polytmpd.ctl.output import Failure

_CAN_BE_ENTERED: Final = {State.ACTIVE, State.DRAINING}


async def prepare(context: Context) -> list[str]:
    """The command line to become. It holds a descriptor of the namespace, inherited by number."""
    if os.geteuid() != 0:
        raise Failure("Only root can enter an instance.", "Try again with sudo.")
    user, *command = context.options.words
    instances = await context.client.instances()
    uid = users.uid_of(user, instances)
    if uid not in {entry.uid for entry in instances}:
        raise users.no_instance(uid, user)
    state = (await context.client.properties(uid))[InstanceProperty.STATE]
    if state not in _CAN_BE_ENTERED:
        raise Failure(f"The instance of {user} is in the state '{state}': nobody can enter it now.")
    directories = await context.client.directories()
    fd = await context.client.acquire(uid)
    os.set_inheritable(fd, True)
    return command_line(
        fd, _working_directory(directories), command, users.name_of(uid) if context.options.as_user else None
    )


def _working_directory(directories: list[str]) -> str:
    """The present one where it is the same in there, else the root directory."""
    try:
        here = os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        return "/"
    return "/" if any(f"{here}/".startswith(f"{directory}/") for directory in directories) else here


def command_line(fd: int, directory: str, command: list[str], as_user: str | None) -> list[str]:
    """nsenter opens the namespace anew: the descriptor is of no use to the command."""
    argv = ["nsenter", f"--mount=/proc/self/fd/{fd}", f"--wdns={directory}", "--"]
    if as_user is not None:
        if not command:
            return [*argv, "runuser", "--login", as_user]
        return [*argv, "runuser", "-u", as_user, "--", *command]
    return [*argv, *(command or [_shell()])]


def _shell() -> str:
    shell = os.environ.get("SHELL", "")
    if not shell.startswith("/"):
        try:
            shell = pwd.getpwuid(0).pw_shell
        except KeyError:
            shell = ""
    return shell or "/bin/sh"


def run(argv: list[str]) -> NoReturn:
    """Become the command: its exit status is ours."""
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        raise Failure(f"{argv[0]} cannot be run: {error.strerror}", "It is part of util-linux.") from None

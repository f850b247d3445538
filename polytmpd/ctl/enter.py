# SPDX-License-Identifier: LGPL-2.1-or-later
"""enter: gives root a user's view of the host, through nsenter(1).

Only /tmp and /var/tmp differ; everything else, privileges included, stays root's. A process inside keeps the
instance, like any other.
Not here: creating an instance. If the user has none, there is nothing to enter.
"""

import os
import pwd
from typing import Final, NoReturn

from polytmpd.bus.contract import InstanceProperty
from polytmpd.core.states import State
from polytmpd.ctl import users
from polytmpd.ctl.commands import Context
from polytmpd.ctl.output import Failure

_CAN_BE_ENTERED: Final = {State.ACTIVE, State.DRAINING}


async def prepare(context: Context) -> list[str]:
    """The command line to execute. It names an inheritable descriptor of the namespace, which stays open."""
    if os.geteuid() != 0:
        raise Failure("Only root can enter an instance", "Try again as root, for example with sudo")
    user, *command = context.options.words
    instances = await context.client.instances()
    uid = users.uid_of(user, instances)
    if uid not in {entry.uid for entry in instances}:
        raise users.no_instance(uid, user)
    state = (await context.client.properties(uid))[InstanceProperty.STATE]
    if state not in _CAN_BE_ENTERED:
        raise Failure(f"Cannot enter the instance of {user} in state '{state}'")
    directories = await context.client.directories()
    fd = await context.client.acquire(uid)
    os.set_inheritable(fd, True)
    return command_line(
        fd, _working_directory(directories), command, users.name_of(uid) if context.options.as_user else None
    )


def _working_directory(directories: list[str]) -> str:
    """The current directory if it is the same inside, else the root directory."""
    try:
        here = os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        return "/"
    return "/" if any(f"{here}/".startswith(f"{directory}/") for directory in directories) else here


def command_line(fd: int, directory: str, command: list[str], as_user: str | None) -> list[str]:
    """The command line of nsenter. It opens the namespace again: the command cannot use the descriptor."""
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
    """Execute the command in place of polytmpctl, whose exit status it becomes."""
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        raise Failure(f"Failed to execute {argv[0]}: {error.strerror}", "It is part of util-linux") from None

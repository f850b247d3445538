# SPDX-License-Identifier: LGPL-2.1-or-later
"""commands.py ROUNDS COMMAND...: runs the commands in turn, in random order; prints command → milliseconds.

The first run of each warms up.
Not here: which commands.
"""

import json
import random
import subprocess
import sys
import time


def once(command: str) -> float:
    begin = time.perf_counter()
    subprocess.run(command.split(), stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter() - begin) * 1000


def main() -> None:
    rounds, commands = int(sys.argv[1]), sys.argv[2:]
    found: dict[str, list[float]] = {command: [] for command in commands}
    for number in range(rounds + 1):
        for command in random.sample(commands, len(commands)):
            spent = once(command)
            if number:
                found[command].append(spent)
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()

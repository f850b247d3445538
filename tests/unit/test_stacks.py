# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGUSR1: what the daemon is doing."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import asyncio, logging, os, signal, sys, time
from polytmpd import stacks

logging.basicConfig(level=logging.INFO, format="%(message)s")

async def a_login_that_waits(forever):
    await forever

async def main():
    loop = asyncio.get_running_loop()
    stacks.answer(loop)
    forever = loop.create_future()
    tasks = [asyncio.create_task(a_login_that_waits(forever)) for _ in range(3)]
    await asyncio.sleep(0)
    HOW
    forever.set_result(None)
    await asyncio.gather(*tasks)
    print("went on")

asyncio.run(main())
"""


def run(how: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", PROGRAM.replace("HOW", how)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)


def test_tasks_with_the_same_stack_are_written_once() -> None:
    done = run("os.kill(os.getpid(), signal.SIGUSR1); await asyncio.sleep(0.01)")
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
    assert "4 tasks, 2 different stacks\n" in done.stderr
    assert "3 x a_login_that_waits:" in done.stderr


def test_a_loop_that_hangs_shows_its_thread() -> None:
    """The program ends before the event loop has its turn."""
    hang = "os.kill(os.getpid(), signal.SIGUSR1); os._exit(3)"
    done = run(f"exec({hang!r})")
    assert done.returncode == 3
    assert "in main\n" in done.stderr
    assert "different stacks" not in done.stderr


def test_it_is_answered_again() -> None:
    done = run("[os.kill(os.getpid(), signal.SIGUSR1) for _ in range(2)]; await asyncio.sleep(0.01)")
    assert done.stderr.count("most recent call first") == 2
    assert done.returncode != -signal.SIGUSR1

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The same tests with the other library, on a host without dbus-next."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bus.conftest import LIBRARY

pytestmark = pytest.mark.bus

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.skipif(LIBRARY != "dbus_next", reason="this is the run with the other library")
@pytest.mark.timeout(300)
def test_everything_with_dbus_fast() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE)],
        env={**os.environ, "POLYTMP_TEST_BUS_LIBRARY": "dbus_fast"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def imported(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_dbus_next_is_the_library() -> None:
    assert imported("from polytmpd.bus.library import LIBRARY; print(LIBRARY)") == "dbus_next"


def test_the_glib_variant_is_not_imported() -> None:
    """If PyGObject is installed, dbus-next would load it: 3 MB for nothing."""
    code = """
import sys, types
sys.modules["gi"] = marker = types.ModuleType("gi")
import polytmpd.bus.library
glib = sys.modules.get("dbus_next.glib.message_bus")
print(hasattr(glib, "GLib"))
print(sys.modules["gi"] is marker)
"""
    assert imported(code).split() == ["False", "True"]
    assert imported("import sys, polytmpd.bus.library; print('gi' in sys.modules)") == "False"

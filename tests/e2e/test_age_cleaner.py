# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd-tmpfiles --clean with configured directories and names that the package's lines do not cover.

Not here: the defaults (test_attacks).
"""

import pytest

from tests import observe
from tests.bed import Machine, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.prepared(by=observe.quick_logouts)]

CONFIG = "/etc/polytmpd.conf.d/50-local.conf"
LINES = "/run/tmpfiles.d/polytmpd.conf"


def test_the_age_cleaner_leaves_configured_directories(machine: Machine) -> None:
    """/scratch, which no line of the package names; a persistent /tmp; one more shared directory."""
    assert machine.run("test", "-e", LINES, check=False).returncode == 1, "the defaults do not need it"
    machine.run("install", "-d", "-m", "1777", "/scratch")
    machine.write(
        CONFIG,
        "[Polytmp]\nDirectories=/tmp /var/tmp /scratch\nPersistentDirectories=/tmp /var/tmp\n"
        "SharedPaths=.X11-unix .ours\n",
    )
    machine.write(
        "/etc/tmpfiles.d/tmp.conf", "q /tmp 1777 - - 0\nq /var/tmp 1777 - - 0\nd /scratch 1777 - - 0\n"
    )
    machine.run("systemctl", "reload", "polytmpd")
    with machine.session("alice") as alice:
        for name in ("/tmp", "/var/tmp", "/scratch"):
            alice.run(f"touch {name}/old")
        places = list(observe.directories(machine, "alice").values())
        assert [place.rpartition("/polytmp-")[0] for place in places] == ["/tmp", "/var/tmp", "/scratch"]
        trusted = "stat -c '%n %i %u %g %a' /tmp/.ours /tmp/.X11-unix " + " ".join(
            f"{place} {place}/.." for place in places
        )
        before = machine.sh(trusted).stdout
        machine.run("touch", "/scratch/of-the-host", "/tmp/of-the-host")
        cleaned = machine.run("systemd-tmpfiles", "--clean")
        assert "polytmp" not in cleaned.stderr, "every line is valid, and none is a duplicate"
        assert machine.sh(trusted).stdout == before
        assert machine.sh("ls /scratch/of-the-host /tmp/of-the-host", check=False).stdout == ""
        assert alice.run("find /tmp /var/tmp /scratch -name old") == "", "aged as the directory itself is"
        mounted = "stat -c '%d %i' /tmp/.ours /tmp/.X11-unix"
        assert alice.run(mounted) == machine.sh(mounted).stdout
        machine.run("rm", CONFIG)
        machine.run("systemctl", "reload", "polytmpd")
        machine.run("systemd-tmpfiles", "--clean")
        assert machine.sh(trusted).stdout == before, "her instance still has the previous configuration"
    eventually(lambda: not observe.instances(machine), 30, "her instance is gone")
    machine.run("systemctl", "restart", "polytmpd")
    assert machine.run("test", "-e", LINES, check=False).returncode == 1, "no instance needs it any more"

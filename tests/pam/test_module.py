# SPDX-License-Identifier: LGPL-2.1-or-later
"""The module itself: its arguments, symbols, hardening, memory, and its profile for pam-auth-update."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.pam.outcomes import MakeDaemon, assert_joined
from tests.pam.pam_world import (
    PAM_BUF_ERR,
    PAM_IGNORE,
    PAM_PERM_DENIED,
    PAM_SUCCESS,
    PAM_SYSTEM_ERR,
    PAM_USER_UNKNOWN,
    Namespace,
    World,
    plain_build,
)

pytestmark = [pytest.mark.pam, pytest.mark.timeout(120)]


# Arguments

LOGIN = ("DEBUG", "service polytmp-test is a login (default): user alice gets their own directories")


def test_unknown_arguments_are_reported_and_ignored(
    world: World, daemon: MakeDaemon, private: Namespace
) -> None:
    world.module("timout=1", "nonsense", "debugging")
    daemon(open=[private.path])
    session = world.open_session()
    assert_joined(session, private)
    words = ("timout=1", "nonsense", "debugging")
    assert session.log == [("ERR", f"unknown module argument '{word}', ignoring") for word in words]


@pytest.mark.parametrize("value", ["0", "601", "-1", "+1", "1s", "", "x", "0x10", "99999999999999999999"])
def test_a_bad_timeout_is_reported_and_the_default_used(
    world: World, daemon: MakeDaemon, private: Namespace, value: str
) -> None:
    world.module(f"timeout={value}", "debug")
    daemon(open=[private.path])
    session = world.open_session()
    assert_joined(session, private)
    assert session.log[:3] == [
        ("ERR", f"'timeout={value}' is not a number of seconds from 1 to 600, using 20"),
        LOGIN,
        ("DEBUG", "requesting the namespace of user alice (20 s)"),
    ]


@pytest.mark.parametrize("value", ["1", "600", "020"])
def test_a_good_timeout(world: World, daemon: MakeDaemon, private: Namespace, value: str) -> None:
    world.module(f"timeout={value}", "debug")
    daemon(open=[private.path])
    session = world.open_session()
    assert_joined(session, private)
    assert session.log == [
        LOGIN,
        ("DEBUG", f"requesting the namespace of user alice ({int(value)} s)"),
        ("DEBUG", f"user alice is in mnt:[{private.inode}]"),
    ]


def test_debug_reports_that_a_user_is_exempt(world: World, daemon: MakeDaemon) -> None:
    world.module("debug")
    daemon(error="exempt", text="")
    session = world.open_session()
    assert session.log[2:] == [("DEBUG", "user alice is exempt")]


# The library


def test_only_the_session_functions_are_exported(build: Path) -> None:
    symbols = subprocess.check_output(["nm", "-D", "--defined-only", build / "pam_polytmp.so"], text=True)
    names = {line.split()[-1] for line in symbols.splitlines()}
    assert {name for name in names if not name.startswith("__odr_asan")} == {
        "pam_sm_open_session",
        "pam_sm_close_session",
    }


@plain_build
def test_hardening(build: Path) -> None:
    read = subprocess.check_output(["readelf", "-lWd", build / "pam_polytmp.so"], text=True)
    assert "GNU_RELRO" in read
    assert "BIND_NOW" in read
    assert re.search(r"GNU_STACK .* RW ", read)
    imported = subprocess.check_output(["nm", "-D", "--undefined-only", build / "pam_polytmp.so"], text=True)
    assert "__stack_chk_fail" in imported
    assert not re.search(r"\b(fork|vfork|system|popen|exec\w*|setenv|putenv|unsetenv|getenv)\b", imported)


@plain_build
def test_it_needs_libpam_and_libc_alone(build: Path) -> None:
    """What a PAM module links against is loaded into sshd (CVE-2024-3094)."""
    shown = subprocess.check_output(["readelf", "-d", build / "pam_polytmp.so"], text=True)
    assert set(re.findall(r"\(NEEDED\).*\[(\w+)\.so", shown)) == {"libpam", "libc"}


def test_each_source_file_stays_small(build: Path) -> None:
    sources = list((build.parent if build.name == "sanitize" else build).glob("*.c"))
    assert len(sources) == 4
    for source in sources:
        assert len(source.read_text().splitlines()) < 400


@plain_build
@pytest.mark.parametrize("reachable", [True, False], ids=["reply", "no-reply"])
def test_every_failing_allocation(
    world: World, daemon: MakeDaemon, private: Namespace, reachable: bool
) -> None:
    """Each allocation of a session fails once. Nothing crashes or leaks, and no session moves halfway."""
    if reachable:
        daemon(open=[private.path])
    expected = PAM_SUCCESS if reachable else PAM_PERM_DENIED
    total = world.open_session().allocations
    assert total > 5
    seen = set()
    for n in range(total):
        session = world.open_session("-a", str(n))
        seen.add(session.result)
        if session.result == PAM_SYSTEM_ERR:  # libpam has no memory for its audit message, after the module
            continue
        assert session.moved == (session.result == PAM_SUCCESS), n
        assert session.fds == session.fds_before, n
        assert session.result != PAM_IGNORE, n
    # libc finds no user if it has no memory to read /etc/passwd
    assert seen - {PAM_USER_UNKNOWN, PAM_SYSTEM_ERR} == {expected, PAM_BUF_ERR}


# The profiles of pam-auth-update

PAM_AUTH_UPDATE = """
cp -a /var/cache/debconf /tmp/debconf
mount --bind /tmp/debconf /var/cache/debconf
mkdir -p /tmp/root/etc/pam.d /tmp/root/var/lib/pam /tmp/root/usr/share
cp -a /usr/share/pam-configs /tmp/root/usr/share/
cd /tmp/root/usr/share/pam-configs
for name in $NAMES; do cp "$PROFILES/$name.pam-config" "$name"; done
[ -e systemd ] || printf '%s\n' > systemd 'Name: systemd' 'Default: yes' 'Priority: 0' \
    'Session-Interactive-Only: yes' 'Session-Type: Additional' 'Session:' '	optional	pam_systemd.so'
printf '%s\n' > tmpdir 'Name: tmpdir' 'Default: yes' 'Priority: 0' 'Session-Type: Additional' \
    'Session:' '	optional pam_tmpdir.so'
printf '%s\n' > libpam-mount 'Name: mount' 'Default: yes' 'Priority: 128' 'Session-Type: Additional' \
    'Session-Interactive-Only: yes' 'Session:' '	optional	pam_mount.so'
printf '%s\n' > ssh-pwd 'Name: ssh' 'Default: yes' 'Priority: 64' 'Session-Type: Additional' \
    'Session-Interactive-Only: yes' 'Session-Final:' '	optional	pam_ssh.so'
export DEBIAN_FRONTEND=noninteractive
pam-auth-update --root /tmp/root --package --force \
    --enable libpam-mount mkhomedir ssh-pwd systemd tmpdir unix $NAMES >&2
mkdir "$OUT"
cp /tmp/root/etc/pam.d/common-session* "$OUT"
"""


def modules(stack: Path) -> list[str]:
    lines = stack.read_text().splitlines()
    return [line.split("\t")[-1].split()[-1] for line in lines if line.startswith("session")]


@plain_build
def test_the_profile_comes_right_after_pam_systemd(world: World) -> None:
    """And before modules that start programs, also in the stacks of cron and sudo; without pam_tmpdir."""
    out = world.base / "stacks"
    world.shell(f"NAMES=polytmp\nPROFILES={world.build}\nOUT={out}\n{PAM_AUTH_UPDATE}")
    interactive = modules(out / "common-session")
    assert "required\tpam_polytmp.so" in (out / "common-session").read_text()
    after = interactive[interactive.index("pam_systemd.so") :]
    assert after[:3] == ["pam_systemd.so", "pam_polytmp.so", "pam_mkhomedir.so"]
    assert modules(out / "common-session-noninteractive")[-1] == "pam_polytmp.so"
    assert "pam_tmpdir.so" not in interactive


@plain_build
def test_the_early_profile_comes_before_modules_that_start_programs(world: World) -> None:
    """And after pam_mount: what is mounted on the host reaches every session."""
    out = world.base / "stacks"
    world.shell(f'NAMES="polytmp polytmp-early"\nPROFILES={world.build}\nOUT={out}\n{PAM_AUTH_UPDATE}')
    assert "optional\tpam_polytmp.so" in (out / "common-session").read_text()
    interactive = modules(out / "common-session")
    assert interactive[interactive.index("pam_mount.so") :] == [
        *("pam_mount.so", "pam_polytmp.so", "pam_ssh.so"),
        *("pam_systemd.so", "pam_polytmp.so", "pam_mkhomedir.so"),
    ]
    assert modules(out / "common-session-noninteractive").count("pam_polytmp.so") == 1

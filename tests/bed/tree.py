# SPDX-License-Identifier: LGPL-2.1-or-later
"""Cached Debian trees: a "host" to boot, an ext4 image; a "builder" to build the package in, a directory.

A tree is made once for each release, package list and recipe, and never changes afterwards.
Copying an image is one sequential copy (0.3 s); a directory is 13,000 files (2 s, or 10 s if the disk is
busy). An image also gives the machine a root file system of its own, as a real system has.

Not here: booting, building, and which tests want what.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

RELEASES = ("bookworm", "trixie")
IMAGE_SIZE = "8G"  # sparse
Kind = Literal["host", "builder"]

PROJECT = Path(__file__).resolve().parents[2]
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
APT_CONFIGURATION = Path("/etc/apt/apt.conf.d")

HOST_PACKAGES = [
    "acl",
    "ansible-core",
    "at",
    "attr",
    "bash-completion",
    "bubblewrap",
    "cockpit-bridge",
    "cockpit-ws",
    "cron",
    "dbus",
    "dbus-user-session",
    "dovecot-imapd",
    "e2fsprogs",
    "exim4-daemon-light",
    "fuse3",
    "iproute2",
    "less",
    "libglib2.0-bin",
    "libnss-extrausers",
    "libnss-systemd",
    "libpam-systemd",
    "mount",
    "opendoas",
    "openssh-server",
    "passwd",
    "pkexec",
    "polkitd",
    "postgresql",
    "procps",
    "python3",
    "python3-dbus-next",
    "python3-pyudev",
    "python3-systemd",
    "samba",
    "smbclient",
    "strace",
    "sudo",
    "systemd",
    "systemd-container",
    "systemd-sysv",
    "systemd-userdbd",
    "tmux",
    "udev",
    "util-linux",
    "x11-utils",
    "xauth",
    "xvfb",
]

# Mesa's drivers and LLVM are half of the tree, and Xvfb starts without them. Manual pages stay, because the
# tests read the package's.
PATH_EXCLUDES = (
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/lib/*/libLLVM*",
    "/usr/lib/*/libgallium*",
    "/usr/lib/*/dri/*",
    "/usr/lib/*/libz3.so*",
)

HOST_RECIPE = r"""
set -eu
root=$1
public_key=$2
release=$3

# Packages that would take part in every login. A test installs those of one directory while it runs.
keep() { # directory package...
    archives=$root/var/lib/bed/$1
    shift
    install -d "$archives/partial"
    APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get --quiet --yes --download-only \
        --option Dir::Cache::archives="$archives" --option APT::Keep-Downloaded-Packages=true install "$@"
    rm -rf "$archives/partial" "$archives/lock"
}
keep sssd sssd-proxy libpam-sss libnss-sss
keep homed systemd-homed

rm -f "$root"/etc/dpkg/dpkg.cfg.d/99mmdebstrap "$root"/etc/apt/apt.conf.d/99mmdebstrap

add_key() { # user home
    install -d -m 0700 "$root$2/.ssh"
    printf '%s\n' "$public_key" >"$root$2/.ssh/authorized_keys"
    chmod 0600 "$root$2/.ssh/authorized_keys"
    chroot "$root" chown -R "$1:" "$2/.ssh"
}
chroot "$root" useradd --create-home --shell /bin/bash --uid 1001 --password '*' alice
chroot "$root" useradd --create-home --shell /bin/bash --uid 1002 --password '*' bob
chroot "$root" useradd --system --create-home --home-dir /var/lib/svc --shell /bin/bash --password '*' svc
add_key root /root
add_key alice /home/alice
add_key bob /home/bob
add_key svc /var/lib/svc
printf '%s ALL=(ALL:ALL) NOPASSWD: ALL\n' alice bob >"$root/etc/sudoers.d/bed"
chmod 0440 "$root/etc/sudoers.d/bed"

echo bed >"$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 bed\n::1 localhost\n' >"$root/etc/hosts"
echo 'LANG=C.UTF-8' >"$root/etc/default/locale"
: >"$root/etc/fstab"

chroot "$root" ssh-keygen -A >/dev/null
{
    echo 'UseDNS no'
    echo 'MaxStartups 500'
    # OpenSSH 9.8 locks out a client for a while after its connection broke off.
    if [ "$release" != bookworm ]; then echo 'PerSourcePenalties no'; fi
} >"$root/etc/ssh/sshd_config.d/bed.conf"

# After a failure, the journal is all there is to read.
install -d "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nRateLimitBurst=0\n' >"$root/etc/systemd/journald.conf.d/bed.conf"

# Tests log users in and out more often than five times in ten seconds. If a user manager fails because of
# that, systemd 252 creates no session for the next login while the user's slice is being removed.
for unit in user-runtime-dir@ user@; do
    install -d "$root/etc/systemd/system/$unit.service.d"
    printf '[Unit]\nStartLimitIntervalSec=0\n' >"$root/etc/systemd/system/$unit.service.d/bed.conf"
done

# Left out: the network, nightly jobs, consoles, and whatever would write to the outer kernel (/proc/sys and
# /sys are writable inside).
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    e2scrub_reap.service fstrim.timer man-db.timer systemd-networkd.service \
    systemd-networkd-wait-online.service systemd-timesyncd.service systemd-resolved.service \
    networking.service console-getty.service getty@.service getty-static.service \
    container-getty@.service serial-getty@.service \
    systemd-sysctl.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount \
    systemd-udev-trigger.service sys-kernel-debug.mount sys-kernel-tracing.mount \
    systemd-modules-load.service systemd-pstore.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
# Here for the tests that start it.
chroot "$root" systemctl disable --quiet smbd.service nmbd.service samba-ad-dc.service \
    dovecot.service dovecot.socket exim4.service postgresql.service
# Cockpit is not there for others: polytmpctl check has a word to say about its PAM file and its units.
mv "$root/etc/pam.d/cockpit" "$root/usr/share/cockpit/pam"
for unit in cockpit.socket cockpit.service cockpit-session@.service cockpit-wsinstance-http.service \
    cockpit-wsinstance-https@.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
ln -sf /lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
install -d "$root/var/log/journal"
"""


class BedError(Exception):
    """The bed itself failed, not the program under test."""


def cache_directory() -> Path:
    path = Path(os.environ.get("POLYTMP_BED_CACHE", "/var/cache/polytmp-bed"))
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process in at a time. The kernel releases the lock if the process dies."""
    directory = cache_directory() / "locks"
    directory.mkdir(exist_ok=True)
    with (directory / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ssh_key() -> Path:
    """Return the private key of all users of all machines; it is made if there is none."""
    path = cache_directory() / "id_ed25519"
    with locked("key"):
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=cache_directory()) as directory:
                new = Path(directory, "key")
                argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "polytmp-bed", "-f", str(new)]
                subprocess.run(argv, check=True)
                new.with_suffix(".pub").rename(path.with_suffix(".pub"))
                new.rename(path)
    return path


def tree(kind: Kind, release: str) -> Path:
    """Return the image or directory; it is made, which takes a minute, if there is none. Do not write to it.

    Raises BedError.
    """
    if release not in RELEASES:
        raise BedError(f"{release}: not one of {', '.join(RELEASES)}")
    packages = HOST_PACKAGES if kind == "host" else builder_packages()
    public_key = ssh_key().with_suffix(".pub").read_text().strip() if kind == "host" else ""
    recipe = HOST_RECIPE if kind == "host" else ""
    parts = [kind, release, *packages, "", *PATH_EXCLUDES, recipe, public_key]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    trees = cache_directory() / "trees"
    trees.mkdir(exist_ok=True)
    path = trees / f"{kind}-{release}-{key}{'.img' if kind == 'host' else ''}"
    if path.exists():
        return path
    with locked(path.name):
        if not path.exists():
            for abandoned in trees.glob(f"new-{path.name}-*"):  # left by a run that was killed
                shutil.rmtree(abandoned)
            with tempfile.TemporaryDirectory(dir=trees, prefix=f"new-{path.name}-") as directory:
                # mmdebstrap wants to make its target itself, and the temporary directory is 0700
                new = Path(directory, "root")
                _make(new, release, packages, recipe, public_key)
                if kind == "host":
                    new = _image(new, Path(directory, "image"))
                new.rename(path)
    return path


def builder_packages() -> list[str]:
    return ["build-essential", *build_depends(PROJECT / "debian" / "control")]


def build_depends(control: Path) -> list[str]:
    """Return the names in Build-Depends, the first one of alternatives; none if there is no such file."""
    if not control.exists():
        return []
    text = re.sub(r"(?m)^#.*\n", "", control.read_text())
    source = text.split("\n\n", 1)[0]
    names = []
    for value in re.findall(r"(?mi)^Build-Depends(?:-Indep|-Arch)?:(.*(?:\n[ \t].*)*)", source):
        for clause in value.split(","):
            match = re.match(r"\s*([a-z0-9][a-z0-9+.-]+)", clause)
            if match:
                names.append("debhelper" if match[1] == "debhelper-compat" else match[1])
    return sorted(set(names))


def _make(target: Path, release: str, packages: list[str], recipe: str, public_key: str) -> None:
    with tempfile.TemporaryDirectory(prefix="polytmp-bed-") as scratch:
        hook = Path(scratch, "hook")
        hook.write_text(recipe)
        argv = [
            # A killed mmdebstrap leaves /proc and /sys mounted in the tree, so it gets its own namespace.
            *("setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"),
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            "--format=directory",
            f"--include={','.join(packages)}",
            "--aptopt=APT::Install-Recommends false",
            *(f"--aptopt={path}" for path in _apt_configuration()),
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in PATH_EXCLUDES),
        ]
        if recipe:
            argv.append(f"--customize-hook=sh {hook} \"$1\" '{public_key}' {release}")
        argv += [release, str(target), f"deb [signed-by={KEYRING}] {_mirror()} {release} main"]
        done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        # mmdebstrap leaves a half-made tree behind, which TemporaryDirectory removes
        raise BedError(f"mmdebstrap {release}: exit status {done.returncode}\n{done.stderr[-4000:]}")


def _image(root: Path, image: Path) -> Path:
    # no copy is mounted twice, so it needs no journal
    argv = [
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-O",
        "^has_journal",
        "-m",
        "0",
        "-d",
        str(root),
        str(image),
        IMAGE_SIZE,
    ]
    subprocess.run(argv, check=True, capture_output=True)
    return image


@functools.cache
def _mirror() -> str:
    """Return the URI of the Debian archive that this host uses. Raises BedError."""
    if mirror := os.environ.get("MIRROR"):
        return mirror
    fields = "$(IDENTIFIER) $(ORIGIN) $(LABEL) $(REPO_URI)"
    argv = ["apt-get", "indextargets", "--format", fields, "Created-By: Packages"]
    output = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    for line in output.splitlines():
        if match := re.fullmatch(r"Packages Debian Debian (\S+)", line):
            return match[1]
    if mirror := _mirror_of_sources():
        return mirror
    raise BedError("apt knows no Debian archive. Set MIRROR to the URI of one")


def _mirror_of_sources() -> str | None:
    """Read the URI from apt's sources: before the first apt-get update, apt does not know the origins."""
    configured = Path("/etc/apt")
    for path in [*sorted(configured.glob("sources.list.d/*.sources"))]:
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            fields = dict(re.findall(r"(?m)^([\w-]+):\s*(.*)$", stanza))
            if _is_debian(fields.get("Suites", ""), fields.get("Components", "")):
                return str(fields["URIs"].split()[0])
    for path in [configured / "sources.list", *sorted(configured.glob("sources.list.d/*.list"))]:
        if path.exists():
            for uri, suite, components in re.findall(
                r"(?m)^deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)\s+(.*)$", path.read_text()
            ):
                if _is_debian(suite, components):
                    return str(uri)
    return None


def _is_debian(suites: str, components: str) -> bool:
    known = {*RELEASES, "stable", "oldstable", "testing", "unstable", "sid", "forky"}
    return bool(known & set(suites.split())) and "main" in components.split()


def _apt_configuration() -> list[Path]:
    """Return this host's apt options that downloads may depend on (proxies, certificates, dates)."""
    # docker-clean and similar options make apt delete what mmdebstrap is about to unpack
    wanted = re.compile(r"^\s*Acquire::(?!Languages|GzipIndexes|CompressionTypes)", re.MULTILINE)
    unwanted = re.compile(r"^\s*(DPkg|APT|Dir)\b", re.MULTILINE | re.IGNORECASE)
    paths = sorted(path for path in APT_CONFIGURATION.glob("*") if path.is_file())
    return [path for path in paths if wanted.search(text := path.read_text()) and not unwanted.search(text)]

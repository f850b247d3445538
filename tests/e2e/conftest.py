# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures of the end-to-end tests: a booted Debian with the package, for each release.

Not here: what is tested, and how a system is booted (tests/bed).
"""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests import observe
from tests.bed import RELEASES, BedError, CommandError, Machine, Session, build, eventually
from tests.bed.nspawn import require_tools
from tests.faults.bed import Host

EVIDENCE = {
    "journal": "journalctl --no-pager --boot --output=short-monotonic --lines=200",
    "findmnt": "findmnt --output TARGET,SOURCE,FSTYPE,PROPAGATION",
    "/tmp and /var/tmp": "ls -la /tmp /var/tmp",
}
ELSEWHERE = "/sys/fs/cgroup/elsewhere"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--release", action="append", choices=RELEASES, help="only this Debian release")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): what pytest-xdist keeps on one worker")
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout")
    config.addinivalue_line(
        "markers", "prepared(by): a function that prepares the root of a module's machine"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "release" in metafunc.fixturenames:
        # the option is missing if pytest was started above tests/e2e and read this file late
        releases = metafunc.config.getoption("release", None) or RELEASES
        metafunc.parametrize("release", releases, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Send tests that share a machine to one worker (-n 2 --dist loadgroup)."""
    here = Path(__file__).parent
    for item in items:
        if not item.path.is_relative_to(here):
            continue
        item.add_marker(pytest.mark.e2e)
        if item.get_closest_marker("timeout") is None:
            # the first test of a module builds the package and boots
            item.add_marker(pytest.mark.timeout(600))
        callspec = getattr(item, "callspec", None)
        if callspec is not None and "release" in callspec.params:
            module = item.nodeid.partition("::")[0]
            item.add_marker(pytest.mark.xdist_group(f"{module}-{callspec.params['release']}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        fixtures = getattr(item, "funcargs", {}).values()
        for machine in {id(value): value for value in fixtures if isinstance(value, Machine)}.values():
            report.sections += evidence(machine)
    return report


def evidence(machine: Machine) -> list[tuple[str, str]]:
    """Return what a failed test's report shows of its machine."""
    if not machine.leader:
        return [(f"{machine.name}: console", machine.console[-8000:])]
    sections = []
    for title, script in EVIDENCE.items():
        try:
            text = machine.sh(script, check=False, timeout=20).stdout
        except (CommandError, OSError) as error:
            text = str(error)
        sections.append((f"{machine.name}: {title}", text))
    return sections


@pytest.fixture(scope="session")
def bed() -> None:
    """Fail if the bed cannot be used here: an end-to-end test that cannot run is not skipped."""
    try:
        require_tools()
    except BedError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def deb(bed: None, release: str) -> Path:
    """The package, built from the working tree."""
    return build(release)


@pytest.fixture(scope="module")
def machine(request: pytest.FixtureRequest, release: str, deb: Path) -> Iterator[Machine]:
    """A booted system with the package installed; all tests of a module share it.

    pytest.mark.prepared(by=…) on the module names what Machine(prepare=…) gets.
    """
    marker = request.node.get_closest_marker("prepared")
    with Machine(release, deb, prepare=marker and marker.kwargs["by"]) as booted:
        yield booted


@pytest.fixture
def alice(machine: Machine) -> Iterator[Session]:
    """alice is logged in, with a file in each directory."""
    with machine.session("alice") as session:
        session.run("echo hers >/tmp/file; echo kept >/var/tmp/file")
        yield session


@pytest.fixture(scope="module")
def package(machine: Machine, deb: Path) -> str:
    """The package as a file in the machine: its path there."""
    path = "/root/polytmp.deb"
    machine.write(path, deb.read_bytes())
    return path


@pytest.fixture
def quiet(machine: Machine) -> None:
    """No user is logged in when the test begins."""
    observe.log_everybody_out(machine)


@pytest.fixture
def host(machine: Machine, quiet: None) -> Host:
    """A quiet machine, with cheap looks at what is left of an instance."""
    return Host(machine)


@pytest.fixture
def unharmed(machine: Machine, quiet: None) -> Iterator[None]:
    """The daemon survives the test's attacks, which end with it."""
    before = observe.restarts(machine)
    yield
    machine.sh(
        "systemctl stop 'attack-*'; systemctl reset-failed 'attack-*'; pkill -u svc; true", check=False
    )
    assert machine.run("systemctl", "is-active", "polytmpd").stdout.strip() == "active"
    assert observe.restarts(machine) <= before


@pytest.fixture
def elsewhere(machine: Machine) -> Iterator[Callable[[list[str]], None]]:
    """A function that moves processes, given as PIDs, to a cgroup outside of all slices.

    They must have ended when the test ends.
    """

    def move(pids: list[str]) -> None:
        assert pids, "nothing to move"
        place = f"{ELSEWHERE}/cgroup.procs"
        # Some may have ended: a loop in a shell starts others.
        one = f"echo $pid >{place} || test ! -e /proc/$pid"
        machine.sh(f"set -e; mkdir -p {ELSEWHERE}; for pid in {' '.join(pids)}; do {one}; done")

    yield move
    empty = f"test ! -e {ELSEWHERE} || rmdir {ELSEWHERE}"
    eventually(lambda: not machine.sh(empty, check=False).returncode, 10, "the other cgroup is empty")


@pytest.fixture(scope="module")
def plain_machine(bed: None, release: str) -> Iterator[Machine]:
    """A booted system without the package."""
    with Machine(release) as booted:
        yield booted

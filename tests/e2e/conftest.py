# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures of the end-to-end tests: a booted Debian with the package, for each release.

Not the business of this file: what is tested, and how a system is booted (tests/bed).
"""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.bed import RELEASES, BedError, CommandError, Machine, build
from tests.bed.nspawn import require_tools

EVIDENCE = {
    "journal": "journalctl --no-pager --boot --output=short-monotonic --lines=200",
    "findmnt": "findmnt --output TARGET,SOURCE,FSTYPE,PROPAGATION",
    "/tmp and /var/tmp": "ls -la /tmp /var/tmp",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--release", action="append", choices=RELEASES, help="only this Debian release")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): what pytest-xdist keeps on one worker")
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "release" in metafunc.fixturenames:
        # the option is not there when pytest was started above tests/e2e and read this file late
        releases = metafunc.config.getoption("release", None) or RELEASES
        metafunc.parametrize("release", releases, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With -n 2 --dist loadgroup, tests that share a machine go to one worker."""
    here = Path(__file__).parent
    for item in items:
        if not item.path.is_relative_to(here):
            continue
        item.add_marker(pytest.mark.e2e)
        if item.get_closest_marker("timeout") is None:
            # the first one of a module builds the package and boots
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
    """What a failed test's report shows of its machine."""
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
    """The bed can be used here. An end-to-end test that cannot run has failed: it is not skipped."""
    try:
        require_tools()
    except BedError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def deb(bed: None, release: str) -> Path:
    """The package, built from the working tree."""
    return build(release)


@pytest.fixture(scope="module")
def machine(release: str, deb: Path) -> Iterator[Machine]:
    """A booted system with the package installed; all tests of a module share it."""
    with Machine(release, deb) as booted:
        yield booted


@pytest.fixture(scope="module")
def plain_machine(bed: None, release: str) -> Iterator[Machine]:
    """A booted system without the package."""
    with Machine(release) as booted:
        yield booted

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon dies at every single step: users who are logged in notice nothing, and nothing is left.

Not here: the steps (tests/faults/launcher), restarts (test_faults_restart), lost state (test_faults_state).
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests import observe
from tests.bed import Result, eventually
from tests.faults.bed import Host, Resident, prepare, resident
from tests.faults.launcher import Plan

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800), pytest.mark.prepared(by=prepare)]

ALICE = 1001
END_OF_REJOIN = ["Executor.let_go", "sdnotify.remove"]
LOGIN = f"{observe.NAMESPACE}; touch /tmp/first; ls /tmp"
RETRY = f"{observe.NAMESPACE}; ls -A /tmp; touch /tmp/again; rm /tmp/again"


def refused_or_private(host: Host, result: Result) -> str:
    """Return what the user saw: never the shared /tmp, and never silence."""
    if result.returncode == 0:
        assert result.stdout.split()[0] not in {"", host.host_namespace()}
        return "in"
    assert "polytmp: cannot give you a private /tmp" in result.stdout + result.stderr, str(result)
    return "refused"


def trace(host: Host, act: Callable[[], Result], is_over: Callable[[], bool]) -> list[str]:
    """Return the steps of an act that nothing disturbs."""
    with host.fault(Plan()):
        assert refused_or_private(host, act()) == "in"
        eventually(is_over, 60, "all steps are done")
        return host.trace()


def kill_at_each_step(
    host: Host, user: Resident, act: Callable[[], Result], is_over: Callable[[], bool], retry: str = RETRY
) -> list[tuple[str, str]]:
    """Repeat act() until is_over(), and kill the daemon right after each of its steps in turn.

    The steps are those of a first act that nothing disturbs. Returns [(step, what the user saw)].
    """
    kills: list[tuple[str, str]] = []
    baseline = host.traces()
    counted: Counter[str] = Counter()
    for name in trace(host, act, is_over):
        counted[name] += 1
        host.wait_for(baseline, f"all is as before after {len(kills)} kills, the last one {kills[-1:]}")
        host.plan(Plan(counted[name], "kill", name))
        result = act()
        eventually(
            lambda: host.fired() or is_over(), 60, f"step {counted[name]} {name} comes, or the act ends"
        )
        if not host.fired():  # logins race with each other, and some have fewer steps
            host.unplan()
            continue
        saw = refused_or_private(host, result)
        kills.append((name, saw))
        user.check()
        if saw == "refused" or "Executor.let_go" in host.trace():
            # Otherwise the new daemon has just answered the login that the previous one did not.
            assert refused_or_private(host, host.login("alice", retry)) == "in"
    host.wait_for(baseline, f"all is as before after {len(kills)} kills, the last one {kills[-1:]}")
    return kills


def report(kills: list[tuple[str, str]], begin: float) -> set[str]:
    seconds = time.monotonic() - begin
    print(f"{len(kills)} kills in {seconds:.0f} s")  # noqa: T201
    for (step, saw), count in Counter(kills).items():
        print(f"  {count} x {step}: {saw}")  # noqa: T201
    return {step for step, _ in kills}


def test_killed_at_each_step_of_a_life(host: Host) -> None:
    """From the first login to the removal of the instance: create, hand over, drain, remove."""
    begin = time.monotonic()
    with resident(host.machine) as bob:
        kills = kill_at_each_step(
            host,
            bob,
            lambda: host.login("alice", LOGIN, check=False),
            lambda: "StateDirectory.forget" in host.trace() and host.state(ALICE) is None,
        )
    assert {
        "storage.os.mkdir", "mountns.unshare", "mountns.build", "sdnotify.store", "state.replace",
        "Executor.hand_over", "Executor.let_go", "storage.syscalls.renameat2", "deletion.os.rmdir",
        "StateDirectory.forget",
    } <= report(kills, begin)  # fmt: skip
    host.wait_gone()


def test_killed_at_each_step_of_a_join(host: Host) -> None:
    """A second login, while the first is still in the same namespace."""
    begin = time.monotonic()
    with resident(host.machine) as bob, host.machine.session("alice") as alice:
        alice.run("touch /tmp/first")
        namespace = alice.run(observe.NAMESPACE).strip()
        join = f"{observe.NAMESPACE}; ls -A /tmp/first"

        def act() -> Result:
            result = host.login("alice", join, check=False)
            assert result.returncode or result.stdout.split() == [namespace, "/tmp/first"]
            assert alice.run(join).split() == [namespace, "/tmp/first"]
            return result

        kills = kill_at_each_step(host, bob, act, lambda: "Executor.hand_over" in host.trace(), join)
        assert report(kills, begin) == {"Executor.hand_over"}
    host.wait_gone()


@pytest.fixture
def straggler(host: Host, elsewhere: Callable[[list[str]], None]) -> Iterator[str]:
    """alice's namespace, with a single process in it that her slice does not know."""
    machine = host.machine
    with machine.session("alice") as alice:
        alice.run("touch /tmp/first")
        namespace = alice.run(observe.NAMESPACE).strip()
        alice.run("setsid -f sleep infinity >/dev/null 2>&1")
        elsewhere(eventually(lambda: observe.processes(machine, "sleep infinity"), what="sleep runs"))
    drains = lambda: host.state(ALICE) == "draining" and host.traces().held == 0  # noqa: E731
    eventually(drains, 60, "alice's instance drains, and its namespace is released")
    yield namespace
    machine.sh("pkill -x sleep; true")
    host.wait_gone()


def test_killed_at_each_step_of_a_rejoin(host: Host, straggler: str) -> None:
    """A login while the instance drains, and the logout."""
    begin = time.monotonic()
    with resident(host.machine) as bob:
        rejoin = f"{observe.NAMESPACE}; ls -A /tmp/first"

        def act() -> Result:
            result = host.login("alice", rejoin, check=False)
            assert result.returncode or result.stdout.split() == [straggler, "/tmp/first"]
            return result

        kills = kill_at_each_step(host, bob, act, lambda: host.trace()[-2:] == END_OF_REJOIN, rejoin)
    assert {"sdnotify.store", "state.write_text", "state.replace"} <= report(kills, begin)


def test_a_login_before_the_next_daemon_has_looked_around(host: Host) -> None:
    """The previous daemon died during a removal: a login must not join what it had set aside."""
    su = ("su", "-", "alice", "-c", f"{observe.NAMESPACE}; ls /tmp; touch /tmp/x")
    begin = host.machine.now()
    for _ in range(10):
        host.plan(Plan(1, "kill", "storage.syscalls.renameat2"))
        host.machine.run(*su)
        eventually(host.fired, 60, "it is killed")
        namespace, *files = host.machine.run(*su).stdout.split()
        assert files == []
        assert namespace != host.host_namespace()
        host.wait_gone()
    assert "no private /tmp" not in host.machine.journal("--since", begin), (
        "alice's manager was not refused either"
    )


@pytest.mark.parametrize("step", ["storage.os.mkdir", "mountns.build", "state.replace"])
def test_stands_still_at_a_step(host: Host, step: str) -> None:
    """Until the watchdog ends it: the waiting login gets an answer, and the next one works."""
    with host.watchdog(), resident(host.machine) as bob:
        before = host.running()
        host.plan(Plan(1, "stop", step))
        refused_or_private(host, host.login("alice", LOGIN, check=False))
        assert host.fired() == step
        eventually(lambda: host.running() not in {0, before}, 60, "another daemon runs")
        assert refused_or_private(host, host.login("alice", RETRY)) == "in"
        bob.check()
    host.wait_gone()

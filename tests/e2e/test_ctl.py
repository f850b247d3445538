# SPDX-License-Identifier: LGPL-2.1-or-later
"""polytmpctl as administrators and users type it, on a booted system; mistakes first."""

import json
import select

import pytest

from tests import observe
from tests.bed import Machine, Session, eventually
from tests.bed.tree import ssh_key
from tests.e2e.polytmpctl import ctl, refused, terminal, values

pytestmark = [pytest.mark.e2e, pytest.mark.prepared(by=observe.quick_logouts)]


# Mistakes


def test_wrong_arguments(machine: Machine) -> None:
    for words, text in (
        (["lst"], "Did you mean 'list'?"),
        (["status", "nosuchuser"], "No such user"),
        (["status", "99999999999"], "Invalid UID"),
        (["status", "bob"], "bob has no instance"),
        (["ps", "4242"], "4242 has no instance"),
        (["usage", "bob"], "bob has no instance"),
        (["enter", "bob"], "bob has no instance"),
        (["path", "/tmp/x"], "--user=USER"),
        (["path", "/tmp/x", "--user=bob"], "bob has no instance"),
        (["path", "--user=bob", ""], "path is empty"),
        (["remove", "bob"], "no files are kept for them"),
        (["remove", "root"], "root is never moved"),
        (["remove", "--persistent", "0"], "root is never moved"),
        (["status", "nobody"], "UID 65534 stands for nobody"),
        (["remove", "--persistent", "bob"], "no files are kept for them"),
        (["monitor", "--json=pretty"], "--json=short"),
    ):
        refused(ctl(machine, *words, check=False), text)


def test_without_the_daemon(machine: Machine) -> None:
    machine.run("systemctl", "mask", "--now", "--runtime", "polytmpd.service")
    try:
        refused(ctl(machine, "list", check=False), "systemctl status polytmpd")
        examined = json.loads(ctl(machine, "check", "--json=short", check=False).stdout)
        failed = {entry["name"] for entry in examined["results"] if entry["verdict"] == "fail"}
        assert "polytmpd.service" in failed
    finally:
        machine.run("systemctl", "unmask", "--runtime", "polytmpd.service")
        machine.run("systemctl", "start", "polytmpd.service")


def test_a_closed_pipe_is_no_error(machine: Machine, alice: Session) -> None:
    done = machine.sh("set -o pipefail; polytmpctl status | true; polytmpctl ps | head -n1; echo $?")
    assert done.stderr == ""


# Looking at instances


def test_no_instances(machine: Machine) -> None:
    observe.log_everybody_out(machine)
    assert ctl(machine).stdout == "No instances.\n"
    assert ctl(machine, "--no-legend").stdout == ""
    assert values(machine, "list") == []
    assert values(machine, "status") == []


def test_list(machine: Machine, alice: Session) -> None:
    lines = ctl(machine, "list").stdout.splitlines()
    assert lines[0].split() == ["UID", "USER", "STATE", "SINCE", "AGE"]
    assert lines[1].split()[:3] == ["1001", "alice", "active"]
    assert lines[-1] == "1 instance listed."
    assert ctl(machine, "--no-legend").stdout.split()[:3] == ["1001", "alice", "active"]
    assert alice.run("polytmpctl list --no-legend").split()[:3] == ["1001", "alice", "active"]
    # other users see that she has an instance, and nothing else
    assert machine.ssh("bob", "polytmpctl list --no-legend | grep alice").stdout.split() == [
        "1001",
        "alice",
        "-",
        "-",
        "-",
    ]


def test_status(machine: Machine, alice: Session) -> None:
    alice.run("unshare -Urm sleep 4321 >/dev/null 2>&1 & true")
    alice.run("mkdir /tmp/m && sudo mount -t tmpfs -o size=1m inner /tmp/m")
    eventually(lambda: machine.sh("pgrep -f -x 'sleep 4321'").stdout, what="unshare has started it")
    page = ctl(machine, "status", "alice").stdout
    assert page.startswith("● alice (1001)\n       State: active since ")
    host = values(machine, "path", "/tmp", "-u", "alice")[0]["host_path"]
    assert f"        /tmp: {host}\n" in page
    assert "removed with the instance" in page
    assert "kept between logins" in page
    assert "      Mounts: /tmp/m (tmpfs, inner)\n" in page
    assert "sleep 4321  (in a namespace made from it)" in page
    assert "├─session-" in page or "└─session-" in page
    assert "New instance of user alice" in page, "the last lines of the journal"
    found = values(machine, "status", "alice")
    assert found["sessions"][0]["service"] == "sshd"
    assert {process["how"] for process in found["processes"]} == {"namespace", "derived"}
    assert machine.ssh("alice", "polytmpctl status").stdout.startswith("● alice (1001)\n")
    assert "\x1b[" not in page
    assert "\x1b[" in machine.sh("SYSTEMD_COLORS=1 polytmpctl status alice").stdout
    alice.run("sudo umount /tmp/m; pkill -f -x 'sleep 4321'")


def test_ps_says_why(machine: Machine, alice: Session) -> None:
    alice.run("sudo systemd-run --quiet --unit=stray nsenter --mount=/proc/$$/ns/mnt sleep 1001")
    eventually(lambda: machine.sh("pgrep -f -x 'sleep 1001'").stdout, what="the stray process is there")
    holder = machine.popen("sh", "-c", f"exec 9</proc/{alice.pid}/ns/mnt; echo open; cat")
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"open\n"
    eventually(lambda: machine.run("pgrep", "-x", "cat", check=False).stdout, what="cat runs")
    try:
        rows = {row["command"]: row for row in values(machine, "ps", "alice")}
        assert (rows["sleep 1001"]["how"], rows["sleep 1001"]["where"]) == (
            "namespace",
            "unit stray.service",
        )
        assert rows["cat"]["how"] == "descriptor"
        shell = next(row for row in rows.values() if row["pid"] == alice.pid)
        assert shell["where"].startswith("session ")
        assert not [row for row in rows.values() if "polytmpd" in row["command"] or row["pid"] == 1]
        text = ctl(machine, "ps", "alice").stdout.splitlines()
        assert text[0].split() == ["PID", "HOW", "WHERE", "COMMAND"]
        assert text[-1] == f"{len(rows)} processes listed."
    finally:
        holder.communicate()
        machine.run("systemctl", "stop", "stray.service")


def test_usage(machine: Machine, alice: Session) -> None:
    before = {row["directory"]: row for row in values(machine, "usage", "alice")}
    alice.run("mkdir /tmp/d; head -c 3M /dev/zero >/tmp/d/big; ln /tmp/d/big /tmp/d/again")
    after = {row["directory"]: row for row in values(machine, "usage", "alice")}
    assert after["/tmp"]["bytes"] - before["/tmp"]["bytes"] in range(3 << 20, (3 << 20) + 65536)
    assert after["/tmp"]["inodes"] - before["/tmp"]["inodes"] == 2
    assert after["/var/tmp"] == before["/var/tmp"]
    assert "3.0M" in alice.run("polytmpctl usage")
    alice.run("rm -r /tmp/d")


def test_path_in_both_directions(machine: Machine, alice: Session) -> None:
    host = ctl(machine, "path", "-u", "alice", "/tmp/file").stdout.strip()
    assert machine.run("cat", host).stdout == "hers\n"
    assert ctl(machine, "path", host).stdout == "alice:/tmp/file\n"
    assert alice.run("cd /tmp && ln -sf file link && polytmpctl path link; rm link").strip() == host
    assert alice.run("sudo polytmpctl path /tmp/file").strip() == host, "with sudo, the user who runs it"
    same = ["/etc/passwd", "/tmp/.X11-unix/X0"]
    assert ctl(machine, "path", "-u", "alice", *same, "/tmp/../tmp/./file").stdout.split() == [*same, host]


def test_enter(machine: Machine, alice: Session) -> None:
    assert ctl(machine, "enter", "alice", "cat", "/tmp/file").stdout == "hers\n"
    inside = ctl(
        machine, "enter", "alice", "sh", "-c", "id -u; readlink /proc/self/ns/mnt; pwd"
    ).stdout.split()
    assert inside == ["0", alice.run(observe.NAMESPACE).strip(), "/"]
    assert machine.sh("cd /usr/bin && polytmpctl enter alice pwd").stdout == "/usr/bin\n"
    assert machine.sh("cd /tmp && polytmpctl enter alice pwd").stdout == "/\n"
    assert ctl(machine, "enter", "alice", "--as-user", "id", "-un").stdout == "alice\n"
    assert ctl(machine, "enter", "alice", "sh", "-c", "exit 42", check=False).returncode == 42
    assert ctl(machine, "enter", "alice", "nosuchcommand", check=False).returncode == 127
    assert (
        machine.run("env", "SHELL=/bin/sh", "polytmpctl", "enter", "alice", input="cat /tmp/file\n").stdout
        == "hers\n"
    )
    refused(alice.result("polytmpctl enter alice id", check=False), "sudo")


# Changing things


def test_remove_refuses_while_the_instance_is_in_use(machine: Machine, alice: Session) -> None:
    refused(
        ctl(machine, "remove", "--yes", "alice", check=False), "in use by", "loginctl terminate-user alice"
    )
    refused(ctl(machine, "remove", "--yes", "--persistent", "alice", check=False), "in use by")
    called = machine.run(
        *("busctl", "call", "org.polytmp1", "/org/polytmp1", "org.polytmp1.Manager"),
        *("RemoveInstanceWithFlags", "ut", "1001", "1"),
        check=False,
    )
    assert "processes live in it" in called.stderr
    assert alice.run("cat /tmp/file /var/tmp/file").split() == ["hers", "kept"]


def test_remove_persistent_files(machine: Machine) -> None:
    with machine.session("bob") as bob:
        bob.run("mkdir /var/tmp/d; head -c 2M /dev/zero >/var/tmp/d/big")
    eventually(lambda: "bob" not in observe.instances(machine), 30, "bob's instance is gone")
    kept = "/var/tmp/polytmp-1002/tmp/d/big"
    refused(ctl(machine, "remove", "bob", check=False), "remove --persistent bob")
    refused(ctl(machine, "remove", "--persistent", "bob", check=False), "--yes")
    assert "2.0M" in ctl(machine, "usage", "bob").stdout
    assert ("bob", "/var/tmp") in {(row["user"], row["directory"]) for row in values(machine, "usage")}
    asked = terminal(machine, "polytmpctl remove --persistent bob", "n")
    assert "2.0M" in asked
    assert "Nothing was removed" in asked
    assert machine.run("test", "-e", kept).returncode == 0
    terminal(machine, "polytmpctl remove --persistent bob", "y")
    assert machine.run("ls", "/var/tmp/polytmp-1002", check=False).returncode != 0
    with machine.session("bob") as bob:
        assert bob.run("ls /var/tmp") == ""
    eventually(lambda: "bob" not in observe.instances(machine), 30, "bob's instance is gone")
    ctl(machine, "remove", "--persistent", "--yes", "bob")
    refused(
        ctl(machine, "remove", "--persistent", "--yes", "bob", check=False), "no files are kept for them"
    )


def test_remove_retries_a_failed_deletion(machine: Machine) -> None:
    observe.log_everybody_out(machine)
    with machine.session("alice") as alice:
        alice.run("mkdir /tmp/m; touch /tmp/file")
        place = ctl(machine, "path", "-u", "alice", "/tmp/m").stdout.strip()
        machine.run("mount", "-t", "tmpfs", "-o", "size=1m", "in-the-way", place)
    try:
        eventually(lambda: observe.state(machine, "alice") == "failed", 30, "the removal has failed")
        refused(ctl(machine, "remove", "--yes", "alice", check=False), "resource busy", "/tmp/m")
        assert observe.state(machine, "alice") == "failed"
        assert {row["directory"] for row in values(machine, "usage", "alice")} == {"/var/tmp"}
        assert "what is left of it could not be deleted" in ctl(machine, "status", "alice").stdout
        refused(ctl(machine, "enter", "alice", "id", check=False), "in state 'failed'")
        assert "  /tmp: not counted\r\n" in terminal(machine, "polytmpctl remove alice", "n")
        examined = ctl(machine, "check", check=False)
        assert (examined.returncode, "polytmpctl remove alice" in examined.stdout) == (1, True)
    finally:
        machine.sh("umount $(findmnt -n -o TARGET -S in-the-way)")
    refused(ctl(machine, "remove", "alice", check=False), "--yes")
    ctl(machine, "remove", "--yes", "alice")
    assert observe.gone(machine, "alice")
    assert "Removed instance of user alice" in machine.journal("--unit=polytmpd", "--lines=1")


def test_removal_progress(machine: Machine) -> None:
    with machine.session("bob") as bob:
        bob.run("mkdir /var/tmp/many; cd /var/tmp/many; seq 120000 | xargs touch")
    eventually(lambda: "bob" not in observe.instances(machine), 30, "bob's instance is gone")
    script = (
        "polytmpctl remove --yes --persistent bob & while kill -0 $! 2>/dev/null; do "
        "busctl call org.polytmp1 /org/polytmp1 org.polytmp1.Manager GetRemovalProgress u 1002; done"
    )
    seen = [int(line.removeprefix("t ")) for line in machine.sh(script).stdout.splitlines()]
    assert max(seen) in range(1024, 120100), seen
    assert machine.sh(script.partition("do ")[2].partition(";")[0]).stdout == "t 0\n", "after the removal"


def test_monitor(machine: Machine) -> None:
    observe.log_everybody_out(machine)
    process = machine.popen("polytmpctl", "monitor", "--json=short")
    assert process.stdout is not None
    stdout = process.stdout

    def listens() -> bool:
        machine.run("su", "-", "bob", "-c", "true")
        return bool(select.select([stdout], [], [], 0.5)[0])

    try:
        eventually(listens, what="the monitor reports bob's logins")
        with machine.session("alice") as alice:
            alice.run("true")
        eventually(lambda: "alice" not in observe.instances(machine), 30, "alice's instance is gone")
    finally:
        process.terminate()
    events = [json.loads(line) for line in process.communicate()[0].splitlines()]
    seen = [(event["event"], event.get("state")) for event in events if event["user"] == "alice"]
    states = [entry for entry in seen if entry[0] != "changed"]
    assert states[0] == ("new", "preparing")
    assert ("state", "active") in states
    assert ("state", "draining") in states
    assert states[-1] == ("removed", None)


# On a terminal


def test_a_terminal_has_colours_and_a_pager(machine: Machine, alice: Session) -> None:
    shown = machine.ssh("root", "TERM=xterm polytmpctl --no-pager list", tty=True).stdout
    assert "\x1b[0;1;32mactive\x1b[0m" in shown
    assert (
        "\x1b[0;" not in machine.ssh("root", "TERM=xterm NO_COLOR=1 polytmpctl --no-pager", tty=True).stdout
    )
    pager = "TERM=xterm SYSTEMD_PAGER='tr a-z A-Z' polytmpctl"
    assert "ALICE" in machine.ssh("root", f"{pager} list", tty=True).stdout
    assert "ALICE" not in machine.ssh("root", f"{pager} --no-pager list", tty=True).stdout
    assert "ALICE" not in machine.ssh("root", f"{pager} list | cat", tty=True).stdout
    assert "FRSXMK" in machine.ssh("root", "TERM=xterm SYSTEMD_PAGER=env polytmpctl list", tty=True).stdout


def test_bash_completion(machine: Machine, alice: Session) -> None:
    script = (
        ". /usr/share/bash-completion/completions/polytmpctl; COMP_WORDS=(polytmpctl {}); "
        "COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _polytmpctl; echo ${{COMPREPLY[@]}}"
    )
    for words, expected in (("st", "status"), ("status ''", "alice"), ("remove --per", "--persistent")):
        assert machine.sh(script.format(words)).stdout.strip() == expected


# Other hosts


def test_another_host(machine: Machine, alice: Session) -> None:
    """The same host again, by ssh."""
    machine.write("/root/.ssh/id_ed25519", ssh_key().read_text(), 0o600)
    machine.write("/root/.ssh/config", "StrictHostKeyChecking accept-new\nLogLevel ERROR\n", 0o600)
    try:
        here = values(machine, "list")
        assert [row["user"] for row in here] == ["alice"]
        assert values(machine, "-H", "root@127.0.0.1", "list") == here
        words = ("--host=root@127.0.0.1", "enter", "alice", "sh", "-c", "cat /tmp/f*; exit 42")
        inside = ctl(machine, *words, check=False)
    finally:
        machine.run("rm", "-f", *(f"/root/.ssh/{name}" for name in ("id_ed25519", "config", "known_hosts")))
    assert (inside.returncode, inside.stdout) == (42, "hers\n")


def test_an_unknown_container(machine: Machine) -> None:
    """The test image has no systemd-machined, like many servers."""
    refused(ctl(machine, "-M", "nosuch", "list", check=False), "No container 'nosuch'")
    refused(ctl(machine, "-M", "alice@", "list", check=False), "Invalid container")

# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objection 1: users reach each other's sockets in /tmp/.X11-unix.

Not here: a real X server (test_x11).
"""

import pytest

from tests.bed import Machine, eventually

pytestmark = pytest.mark.e2e

SERVER = """python3 -c '
import socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
import os; os.chmod(sys.argv[1], 0o777)
server.listen()
while True:
    connection, _ = server.accept()
    connection.sendall(b"from alice")
    connection.close()
' {path} & echo $!"""
CLIENT = """python3 -c '
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
print(client.recv(100).decode())
' {path}"""


@pytest.mark.parametrize("name", [".X11-unix", ".ICE-unix", ".XIM-unix", ".font-unix"])
def test_a_socket_is_reached_by_another_user_and_by_the_host(machine: Machine, name: str) -> None:
    path = f"/tmp/{name}/X77"
    with machine.session("alice") as alice, machine.session("bob") as bob:
        alice.run(f"rm -f {path}")
        pid = alice.run(SERVER.format(path=path)).strip()
        eventually(
            lambda: machine.run("test", "-S", path, check=False).returncode == 0, what="the socket is there"
        )
        eventually(
            lambda: bob.run(CLIENT.format(path=path)).strip() == "from alice", what="it listens to bob"
        )
        assert machine.sh(CLIENT.format(path=path)).stdout.strip() == "from alice"
        alice.run(f"kill {pid}; rm {path}")
        assert bob.run(f"ls /tmp/{name}").split() == []


def test_a_socket_elsewhere_in_tmp_is_not_reached(machine: Machine) -> None:
    path = "/tmp/private-socket"
    with machine.session("alice") as alice, machine.session("bob") as bob:
        pid = alice.run(SERVER.format(path=path)).strip()
        eventually(
            lambda: alice.result(f"test -S {path}", check=False).returncode == 0, what="the socket is there"
        )
        assert bob.result(CLIENT.format(path=path), check=False).returncode != 0
        alice.run(f"kill {pid}")


@pytest.mark.parametrize("name", [".X11-unix", ".ICE-unix", ".XIM-unix", ".font-unix"])
def test_the_directory_is_what_x_servers_insist_on(machine: Machine, name: str) -> None:
    with machine.session("alice") as alice:
        show = f"stat -c '%F %a %u %g %d %i' /tmp/{name}"
        assert alice.run(show) == machine.sh(show).stdout
        assert alice.run(show).startswith("directory 1777 0 0 ")
        assert alice.result(f"rmdir /tmp/{name}; mv /tmp/{name} /tmp/x", check=False).returncode != 0

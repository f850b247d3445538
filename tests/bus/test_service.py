# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.polytmp1 as callers see it."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from polytmpd import __version__, errors
from polytmpd.acquisition import Acquisition
from polytmpd.bus.connection import BusError, Connection
from polytmpd.bus.contract import INSTANCE, MANAGER, PATH, SERVICE
from polytmpd.bus.library import Variant
from polytmpd.bus.service import Service
from polytmpd.core.model import State, View
from polytmpd.core.names import object_owner, object_path
from polytmpd.kernel.descriptor import Descriptor
from tests.bus.world import PROPERTIES, STRANGER, Backend, Client, as_stranger, run, view
from tests.unit.settled import eventually

pytestmark = [pytest.mark.bus, pytest.mark.usefixtures("root")]

GOLDEN = Path(__file__).parent / "golden"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
PEER = "org.freedesktop.DBus.Peer"
ERROR = "org.freedesktop.DBus.Error"


@pytest.fixture
def shown(service: Service, backend: Backend) -> Callable[..., str]:
    """Shows an instance, as the daemon does."""

    def show(uid: int = 1000, **more: Any) -> str:
        backend.views.show(view(uid, **more))
        return object_path(uid)

    return show


def plain(values: dict[str, Variant]) -> dict[str, Any]:
    return {name: value.value for name, value in values.items()}


async def introspect(client: Client, path: str) -> str:
    xml: str = await client.result("Introspect", path=path, interface=INTROSPECTABLE)
    return xml


# Introspection


@pytest.mark.parametrize("name", ["manager", "instance"])
async def test_introspection_matches_the_contract(
    name: str, shown: Callable[..., str], client: Client
) -> None:
    path = shown()
    found = await introspect(client, PATH if name == "manager" else path)
    golden = GOLDEN / f"{name}.xml"
    if os.environ.get("POLYTMP_TEST_GOLDEN") == "update":
        golden.write_text(found)
    assert found == golden.read_text(), (
        "if this is intended, run with POLYTMP_TEST_GOLDEN=update and check the diff"
    )


async def test_every_argument_has_a_name(shown: Callable[..., str], client: Client) -> None:
    for path in (PATH, shown()):
        root = ElementTree.fromstring(re.sub("(?s)<!DOCTYPE.*?>", "", await introspect(client, path)))
        arguments = list(root.iter("arg"))
        assert arguments
        assert all(argument.get("name") and argument.get("type") for argument in arguments)


async def test_children_are_paths_and_not_prefixes(shown: Callable[..., str], client: Client) -> None:
    for uid in (1000, 100, 10001):
        shown(uid)
    children = re.compile(r'<node name="(.*?)"')
    assert children.findall(await introspect(client, f"{PATH}/instance")) == ["_100", "_1000", "_10001"]
    assert children.findall(await introspect(client, object_path(100))) == []
    assert children.findall(await introspect(client, PATH)) == ["instance"]
    assert children.findall(await introspect(client, "/")) == ["org"]
    assert children.findall(await introspect(client, "/org")) == ["polytmp1"]


@pytest.mark.parametrize(
    ("path", "uid"),
    [
        (object_path(1000), 1000),
        (object_path(0), 0),
        (PATH, None),
        (f"{PATH}/instance", None),
        (f"{PATH}/instance/_x", None),
        (f"{PATH}/instance/_", None),
        (f"{PATH}/instance/_1/_2", None),
    ],
)
async def test_path_of_an_instance(path: str, uid: int | None) -> None:
    assert object_owner(path) == uid


# Objects and properties


async def test_managed_objects(shown: Callable[..., str], client: Client) -> None:
    assert await client.result("GetManagedObjects", interface=OBJECT_MANAGER) == {}
    path = shown()
    (found,) = (await client.result("GetManagedObjects", interface=OBJECT_MANAGER)).items()
    assert found[0] == path
    assert plain(found[1][INSTANCE]) == await properties(client, path)


async def properties(client: Client, path: str, interface: str = INSTANCE) -> dict[str, Any]:
    return plain(await client.result("GetAll", "s", [interface], path=path, interface=PROPERTIES))


async def test_properties(shown: Callable[..., str], client: Client) -> None:
    assert await properties(client, shown()) == {
        "UID": 1000,
        "User": "alice",
        "State": "active",
        "CreatedUSec": 11,
        "CreatedUSecMonotonic": 22,
        "ControlGroup": "/user.slice/user-1000.slice",
        "NamespaceID": 4026532000,
        "Directories": [
            ["/tmp", f"/tmp/polytmp-{'a' * 32}-1000-{'b' * 16}/tmp", "instance"],
            ["/var/tmp", "/var/tmp/polytmp-1000/tmp", "persistent"],
        ],
        "SharedPaths": ["/tmp/.X11-unix"],
    }
    assert await properties(client, PATH, MANAGER) == {
        "Version": __version__,
        "Directories": ["/tmp", "/var/tmp"],
    }
    assert await properties(client, PATH, PEER) == {}
    state = await client.result(
        "Get", "ss", [INSTANCE, "State"], path=object_path(1000), interface=PROPERTIES
    )
    assert (state.signature, state.value) == ("s", "active")


async def test_signals_over_the_life_of_an_instance(
    service: Service, backend: Backend, client: Client, connection: Connection
) -> None:
    await client.listen(f"type='signal',sender='{SERVICE}'")
    path = object_path(1000)
    made = view(1000)
    backend.views.show(View(1000, "alice", State.PREPARING, control_group=made.control_group))
    backend.views.show(made)
    backend.views.show(made)  # no change
    backend.views.hide(1000)
    backend.views.hide(1000)
    backend.views.show_directories(("/srv",))
    await eventually(lambda: len(client.named("PropertiesChanged")) == 2)
    seen = [
        (signal.member, signal.path) for signal in client.signals if signal.sender == connection.unique_name
    ]
    assert seen == [
        ("InterfacesAdded", PATH),
        ("InstanceNew", PATH),
        ("PropertiesChanged", path),
        ("InterfacesRemoved", PATH),
        ("InstanceRemoved", PATH),
        ("PropertiesChanged", PATH),
    ]
    (added,) = client.named("InterfacesAdded")
    assert added.body[0] == path
    assert plain(added.body[1][INSTANCE])["State"] == "preparing"
    assert "Directories" not in added.body[1][INSTANCE], (
        "every user receives signals, and the paths are private"
    )
    assert client.named("InstanceNew")[0].body == [1000, path]
    changed, manager = client.named("PropertiesChanged")
    assert (changed.body[0], plain(changed.body[1]), changed.body[2]) == (
        INSTANCE,
        {
            "State": "active",
            "CreatedUSec": 11,
            "CreatedUSecMonotonic": 22,
            "NamespaceID": 4026532000,
            "SharedPaths": ["/tmp/.X11-unix"],
        },
        ["Directories"],
    )
    assert (manager.body[0], plain(manager.body[1]), manager.body[2]) == (
        MANAGER,
        {"Directories": ["/srv"]},
        [],
    )
    assert client.named("InterfacesRemoved")[0].body == [path, [INSTANCE]]
    assert client.named("InstanceRemoved")[0].body == [1000, path]
    assert (await client.error("Get", "ss", [INSTANCE, "State"], path=path, interface=PROPERTIES))[0] == (
        f"{ERROR}.UnknownObject"
    )


async def test_an_undeclared_property_is_refused(service: Service, shown: Callable[..., str]) -> None:
    shown()
    with pytest.raises(KeyError):
        service._server.changed(object_path(1000), INSTANCE, ["Sate"])


# Methods


async def test_methods(shown: Callable[..., str], backend: Backend, client: Client) -> None:
    path = shown()
    assert await client.result("GetInstance", "u", [1000]) == path
    assert await client.result("GetInstanceByPID", "u", [os.getpid()]) == path
    assert await client.result("GetInstanceByPID", "u", [0]) == path, "0 is the caller"
    assert await client.result("ListInstances") == [[1000, "alice", path]]
    assert await client.result("ListInstancesEx") == [[1000, "alice", path, "active", 11]]
    assert await client.result("ResolvePath", "us", [1000, "/tmp/x"]) == "/host/tmp/x"
    assert await client.result("RemoveInstance", "u", [1000]) is None
    assert await client.result("RemoveInstanceWithFlags", "ut", [1000, 1]) is None
    assert backend.removed == [(1000, False), (1000, True)]
    assert (await client.error("RemoveInstanceWithFlags", "ut", [1000, 2]))[0] == f"{ERROR}.InvalidArgs"
    assert len(backend.removed) == 2
    assert await client.result("Reload") is None
    assert backend.reloads == 1
    assert await client.result("ListProcesses", path=path, interface=INSTANCE) == [
        [17, "sleep 1"],
        [18, "[x]"],
    ]
    assert await client.result("GetUsage", path=path, interface=INSTANCE) == [["/tmp", 1 << 40, 3]]
    assert await client.result("ListHolders", path=path, interface=INSTANCE) == [
        [17, "sleep 1", "/user.slice", "mount namespace"]
    ]
    assert await client.result("GetUserUsage", "u", [1000]) == [["/tmp", 1 << 40, 3]]
    assert await client.result("GetRemovalProgress", "u", [1000]) == 2048
    assert await client.result("Ping", interface=PEER) is None
    assert re.fullmatch("[0-9a-f]{32}", await client.result("GetMachineId", interface=PEER))
    assert await client.result("ListInstances", interface=None) == [[1000, "alice", path]]


@pytest.mark.parametrize(
    ("member", "signature", "body", "more", "name"),
    [
        ("NoSuch", "", [], {}, "UnknownMethod"),
        ("ListInstances", "", [], {"interface": "org.example.Other"}, "UnknownMethod"),
        ("ListProcesses", "", [], {"interface": INSTANCE}, "UnknownMethod"),
        ("ListInstances", "", [], {"path": "/org/polytmp2"}, "UnknownObject"),
        ("ListInstances", "", [], {"path": "/org"}, "UnknownMethod"),
        ("ListProcesses", "", [], {"path": object_path(100), "interface": INSTANCE}, "UnknownObject"),
        ("GetInstance", "s", ["1000"], {}, "InvalidArgs"),
        ("GetInstance", "", [], {}, "InvalidArgs"),
        ("GetInstance", "uu", [1, 2], {}, "InvalidArgs"),
        ("ListInstances", "v", [Variant("s", "x")], {}, "InvalidArgs"),
        ("Get", "ss", [MANAGER, "NoSuch"], {"interface": PROPERTIES}, "UnknownProperty"),
        ("Get", "ss", ["org.example", "Version"], {"interface": PROPERTIES}, "UnknownInterface"),
        ("GetAll", "s", ["org.example"], {"interface": PROPERTIES}, "UnknownInterface"),
        ("GetAll", "s", [MANAGER], {"interface": PROPERTIES, "path": "/org"}, "UnknownObject"),
        (
            "Set",
            "ssv",
            [MANAGER, "Version", Variant("s", "9")],
            {"interface": PROPERTIES},
            "PropertyReadOnly",
        ),
        ("Set", "ssv", [MANAGER, "NoSuch", Variant("s", "9")], {"interface": PROPERTIES}, "UnknownProperty"),
        ("Get", "ss", ["", "NoSuch"], {"interface": PROPERTIES}, "UnknownProperty"),
        ("Set", "ssv", ["", "Version", Variant("s", "9")], {"interface": PROPERTIES}, "PropertyReadOnly"),
    ],
)
async def test_errors_of_the_bus(
    shown: Callable[..., str],
    client: Client,
    member: str,
    signature: str,
    body: list[Any],
    more: dict[str, Any],
    name: str,
) -> None:
    shown(1000)
    found, text = await client.error(member, signature, body, **more)
    assert found == f"{ERROR}.{name}"
    assert text
    assert await client.result("Ping", interface=PEER) is None


async def test_an_empty_interface_name_means_any(shown: Callable[..., str], client: Client) -> None:
    path = shown(1000)
    found = await properties(client, path, "")
    assert found == await properties(client, path)
    version = await client.result("Get", "ss", ["", "Version"], interface=PROPERTIES)
    assert version.value == (await properties(client, PATH, ""))["Version"]


async def test_a_missing_instance(service: Service, client: Client) -> None:
    name, text = await client.error("GetInstance", "u", [1000])
    assert name == "org.polytmp1.Error.NoSuchInstance"
    assert "1000" in text


KINDS: list[type[errors.PolytmpError]] = [errors.PolytmpError, *errors.PolytmpError.__subclasses__()]


@pytest.mark.parametrize(
    "error", [kind("because") for kind in KINDS], ids=lambda error: type(error).__name__
)
async def test_errors_have_their_bus_names(
    service: Service, backend: Backend, client: Client, error: errors.PolytmpError
) -> None:
    backend.error = error
    expected = (error.name.value, "because")
    assert await client.error("AcquireNamespace", "u", [1000]) == expected
    assert await client.error("ResolvePath", "us", [1000, "/tmp"]) == expected
    assert await client.error("Reload") == expected


async def test_every_error_name_has_an_exception() -> None:
    assert {kind.name for kind in KINDS} == set(errors.ErrorName)


async def test_an_internal_error_stays_in_the_journal(
    service: Service, backend: Backend, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    backend.error = RuntimeError("a secret of line 17")
    name, text = await client.error("AcquireNamespace", "u", [1000])
    assert name == "org.polytmp1.Error.Failed"
    assert "secret" not in text
    assert "Traceback" not in text
    assert "a secret of line 17" in caplog.text, "it is logged for the administrator"


@pytest.mark.parametrize("text", ["a NUL \0 in it", "half a character \udcff in it", "", "x" * 100000])
async def test_any_error_text_can_be_sent(
    service: Service, backend: Backend, client: Client, text: str
) -> None:
    backend.error = errors.InvalidArgsError(text)
    name, found = await client.error("Reload")
    assert name == "org.freedesktop.DBus.Error.InvalidArgs"
    assert found == text.replace("\0", "?").replace("\udcff", "?")
    assert await client.result("Ping", interface=PEER) is None


async def test_a_reply_that_cannot_be_sent(
    service: Service, backend: Backend, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "resolve", lambda uid, path: 5)
    name, text = await client.error("ResolvePath", "us", [1000, "/tmp"])
    assert (name, "internal" in text) == ("org.polytmp1.Error.Failed", True)


async def test_an_exempt_user_who_comes_from_an_instance_gets_the_hosts_namespace(
    service: Service, backend: Backend, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.exempt = "user svc is exempt"
    assert await client.error("AcquireNamespace", "u", [999]) == (
        "org.polytmp1.Error.Exempt",
        "user svc is exempt",
    )
    null = Descriptor.open("/dev/null", os.O_PATH)
    device = os.fstat(null).st_rdev
    monkeypatch.setattr("polytmpd.kernel.host.open_namespace", lambda: null)
    backend.in_instance = True
    (fd,) = (await client.call("AcquireNamespace", "u", [999])).unix_fds
    assert os.fstat(fd).st_rdev == device
    os.close(fd)


async def test_only_one_service_owns_the_name(
    service: Service, connect: Callable[[], Any], backend: Backend
) -> None:
    second = Service(
        await connect(), backend.views, backend, backend, Acquisition(backend, backend).namespace
    )
    with pytest.raises(BusError, match="running twice"):
        await second.publish()


# Foreign tools


async def test_busctl(shown: Callable[..., str], bus: str) -> None:
    path = shown()
    tree = await run("busctl", f"--address={bus}", "tree", "--list", SERVICE)
    assert tree.stdout.split() == ["/", "/org", PATH, f"{PATH}/instance", path]
    called = await run("busctl", f"--address={bus}", "call", SERVICE, PATH, MANAGER, "ListInstances")
    assert called.stdout == f'a(uso) 1 1000 "alice" "{path}"\n'
    read = await run("busctl", f"--address={bus}", "get-property", SERVICE, path, INSTANCE, "UID", "State")
    assert read.stdout == 'u 1000\ns "active"\n'
    acquired = await run(
        "busctl", f"--address={bus}", "call", SERVICE, PATH, MANAGER, "AcquireNamespace", "u", "1000"
    )
    assert acquired.returncode == 0, acquired.stderr


# Permissions


async def test_root_only(shown: Callable[..., str], backend: Backend, bus: str) -> None:
    shown(STRANGER)
    for method, *arguments in (
        ("AcquireNamespace", f"uint32:{STRANGER}"),
        ("RemoveInstance", f"uint32:{STRANGER}"),
        ("Reload",),
    ):
        assert "Error org.freedesktop.DBus.Error.AccessDenied" in await as_stranger(
            bus, PATH, f"{MANAGER}.{method}", *arguments
        )
    assert backend.acquired == []
    assert backend.reloads == 0
    assert backend.removed == []


async def test_other_users_see_who_has_an_instance_and_nothing_else(
    shown: Callable[..., str], bus: str
) -> None:
    path = shown(1000)
    denied = "Error org.freedesktop.DBus.Error.AccessDenied"
    assert f'object path "{path}"' in await as_stranger(bus, PATH, f"{MANAGER}.ListInstances")
    in_full = (await as_stranger(bus, PATH, f"{MANAGER}.ListInstancesEx")).split()
    wanted = f'uint32 1000 string "alice" object path "{path}" string "" uint64 0 }} ]'.split()
    assert in_full[-len(wanted) :] == wanted
    assert __version__ in await as_stranger(bus, PATH, f"{PROPERTIES}.GetAll", f"string:{MANAGER}")
    for method, *arguments in (
        (f"{PROPERTIES}.GetAll", f"string:{INSTANCE}"),
        (f"{PROPERTIES}.Get", f"string:{INSTANCE}", "string:State"),
        (f"{INSTANCE}.ListProcesses",),
        (f"{INSTANCE}.GetUsage",),
        (f"{INSTANCE}.ListHolders",),
    ):
        assert denied in await as_stranger(bus, path, method, *arguments)
    resolved = await as_stranger(bus, PATH, f"{MANAGER}.ResolvePath", "uint32:1000", "string:/tmp/x")
    assert denied in resolved
    assert denied in await as_stranger(bus, PATH, f"{MANAGER}.GetUserUsage", "uint32:1000")
    assert denied in await as_stranger(bus, PATH, f"{MANAGER}.GetRemovalProgress", "uint32:1000")
    objects = await as_stranger(bus, PATH, f"{OBJECT_MANAGER}.GetManagedObjects")
    assert "method return" in objects
    assert path not in objects


async def test_users_can_read_their_own_instance(shown: Callable[..., str], bus: str) -> None:
    path = shown(STRANGER)
    shown(1000)
    assert f"/var/tmp/polytmp-{STRANGER}/tmp" in await as_stranger(
        bus, path, f"{PROPERTIES}.GetAll", f"string:{INSTANCE}"
    )
    assert "sleep 1" in await as_stranger(bus, path, f"{INSTANCE}.ListProcesses")
    assert "uint64 1099511627776" in await as_stranger(bus, path, f"{INSTANCE}.GetUsage")
    assert '"/host/tmp/x"' in await as_stranger(
        bus, PATH, f"{MANAGER}.ResolvePath", f"uint32:{STRANGER}", "string:/tmp/x"
    )
    objects = await as_stranger(bus, PATH, f"{OBJECT_MANAGER}.GetManagedObjects")
    assert f'"{path}"' in objects
    assert object_path(1000) not in objects

# SPDX-License-Identifier: LGPL-2.1-or-later
"""The floors that docs/ARCHITECTURE.md draws, against what the modules import."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in (ROOT / "polytmpd").rglob("*.py")
)
IMPURE = {"os", "asyncio", "time", "datetime", "threading", "subprocess", "socket", "pathlib", "random"}
BLOCKING = {"blocking", "kernel", "userdb"}
LIBRARIES = {"dbus_next", "dbus_fast"}


@dataclass(frozen=True, slots=True)
class Room:
    """A row of the table. modules: of a package; each may import those after it."""

    floor: int
    modules: tuple[str, ...]


def drawn() -> dict[str, Room]:
    """The rooms below polytmpd, by name, as ARCHITECTURE.md has them."""
    rooms: dict[str, Room] = {}
    for line in (ROOT / "docs/ARCHITECTURE.md").read_text().splitlines():
        if row := re.match(r"\| (\d+) \| `(\w+)/?` \|([^|]*)\|", line):
            assert row[2] not in rooms, f"{row[2]} stands on two floors"
            rooms[row[2]] = Room(int(row[1]), tuple(re.findall(r"`(\w+)`", row[3])))
    return rooms


def part(module: str) -> str:
    """The room of a module: polytmpd.bus.logind → bus."""
    return module.split(".")[1] if "." in module else ""


def imports(module: str) -> Iterator[str]:
    """Everything that a module imports, also within functions; submodules count by their own name."""
    path = ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            assert node.module
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in NAMES else node.module


def own_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name.partition(".")[0] == "polytmpd" and part(name)}


def test_the_import_walk_finds_imports() -> None:
    assert "polytmpd.kernel.syscalls" in own_imports("polytmpd.blocking.barriers")
    assert "polytmpd.blocking.instances" in own_imports("polytmpd.daemon"), "from polytmpd.blocking import …"
    assert len(NAMES) > 20


def test_every_module_is_listed_in_the_architecture() -> None:
    files: dict[str, set[str]] = {}
    for name in NAMES:
        _, _, rest = name.partition(".")
        room, _, module = rest.partition(".")
        if room:
            files.setdefault(room, set()).update({module} - {""})
    assert {name: set(room.modules) for name, room in drawn().items()} == files


@pytest.mark.parametrize("module", [name for name in NAMES if part(name)])
def test_no_module_imports_from_above_or_from_the_side(module: str) -> None:
    rooms = drawn()
    others = [name for name in own_imports(module) if part(name) != part(module)]
    assert [name for name in others if rooms[part(name)].floor >= rooms[part(module)].floor] == []


@pytest.mark.parametrize("module", [name for name in NAMES if name.count(".") == 2])
def test_imports_within_a_room_go_one_way(module: str) -> None:
    order = drawn()[part(module)].modules
    here = order.index(module.rpartition(".")[2])
    inside = [name for name in own_imports(module) if part(name) == part(module) and name.count(".") == 2]
    assert [name for name in inside if order.index(name.rpartition(".")[2]) <= here] == []


@pytest.mark.parametrize("module", [name for name in NAMES if part(name) == "core"])
def test_the_core_is_pure(module: str) -> None:
    assert {name.partition(".")[0] for name in imports(module)} & IMPURE == set()
    assert {part(name) for name in own_imports(module)} <= {"core"}


@pytest.mark.parametrize(
    "module", [name for name in NAMES if part(name) in {"blocking", "kernel", "userdb"}]
)
def test_blocking_code_does_not_import_asyncio(module: str) -> None:
    assert "asyncio" not in {name.partition(".")[0] for name in imports(module)}


def test_one_module_imports_the_bus_library() -> None:
    users = {name for name in NAMES if {used.partition(".")[0] for used in imports(name)} & LIBRARIES}
    assert users == {"polytmpd.bus.library"}


@pytest.mark.parametrize("module", [name for name in NAMES if part(name) == "ctl"])
def test_the_command_line_speaks_to_the_bus_and_reads_the_configuration(module: str) -> None:
    assert {part(name) for name in own_imports(module)} <= {
        "bus",
        "config",
        "core",
        "ctl",
        "errors",
        "userdb",
    }


def test_no_module_imports_the_composition_root() -> None:
    assert [name for name in NAMES if "polytmpd.__main__" in own_imports(name)] == []

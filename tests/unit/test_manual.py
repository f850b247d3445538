# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manual covers everything: options, settings, arguments, D-Bus members, messages.

The tests read the pages as man(1) renders them, so that text in the source that is not shown
counts as missing. Not here: whether the pages are true.
"""

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from polytmpd import config
from polytmpd.bus.polkit import PolkitAction
from polytmpd.ctl import arguments
from polytmpd.errors import ErrorName
from polytmpd.journal import MessageId

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
MAN = ROOT / "docs/man"
CATALOG = ROOT / "units/polytmp.catalog"
ALIASES = {"polytmpd.8": "polytmpd.service.8"}
PAGES = {"polytmpctl.1", "polytmpd.conf.5", "org.polytmp1.5", "polytmpd.service.8", "pam_polytmp.8"}


def run(*argv: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    tool = shutil.which(str(argv[0]))
    assert tool, f"{argv[0]} is not installed: make setup"
    return subprocess.run(
        [tool, *map(str, argv[1:])],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", **environment},
    )


@cache
def page(name: str) -> str:
    """The text of a page, rendered without line breaks in paragraphs."""
    done = run("man", "--no-hyphenation", "--no-justification", "-l", MAN / name, MANWIDTH="1000")
    assert done.returncode == 0, done.stderr
    return done.stdout


def is_entry(name: str, text: str, section: str = "") -> bool:
    """Whether a list item has that term: alone, among others, or followed by its argument."""
    shown = page(name)
    if section:
        shown = re.split(r"(?m)^(?=\S)", shown.partition(f"\n{section}\n")[2])[0]
    head = rf"^ {{5,}}(?:\S+, )*{re.escape(text)}(?:(?<==).*|[,\[= ].*)?$"
    return re.search(head, shown, re.MULTILINE) is not None


def test_all_pages_exist() -> None:
    assert {path.name for path in MAN.iterdir()} == PAGES | set(ALIASES)


@pytest.mark.parametrize(("alias", "target"), [*ALIASES.items()])
def test_an_alias_resolves_to_a_page(alias: str, target: str) -> None:
    assert (MAN / alias).read_text() == f".so man{target.rpartition('.')[2]}/{target}\n"
    assert alias.rpartition(".")[0] in described(target)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_page_is_clean(name: str) -> None:
    done = run("man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", MAN / name, MANWIDTH="80")
    assert (done.returncode, done.stderr) == (0, "")


def described(name: str) -> set[str]:
    done = run("lexgrog", MAN / name)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r': "(\S+) - \S', done.stdout))


@pytest.mark.parametrize("name", sorted(PAGES))
def test_page_is_found_by_apropos(name: str) -> None:
    assert name.rpartition(".")[0] in described(name)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_pages_that_are_referred_to_exist(name: str) -> None:
    ours = set(re.findall(r"\b((?:polytmp|pam_polytmp|org\.polytmp)[\w.]*)\((\d)\)", page(name)))
    assert ours
    assert {f"{title}.{section}" for title, section in ours} <= PAGES | set(ALIASES)


def test_the_unit_names_pages_that_exist() -> None:
    texts = [path.read_text() for path in (ROOT / "units").iterdir()]
    named = {found for text in texts for found in re.findall(r"man:([\w.]+)\((\d)\)", text)}
    assert named
    assert {f"{title}.{section}" for title, section in named} <= PAGES


# polytmpctl(1)


@pytest.mark.parametrize("verb", [*arguments.VERBS])
def test_each_command_is_explained(verb: str) -> None:
    assert is_entry("polytmpctl.1", verb, "COMMANDS")


@pytest.mark.parametrize(
    "option",
    sorted(set(re.findall(r"(?m)^ {2,5}(?:-\w )?(--[a-z-]+)|^ {2}(-\w) +\S", arguments.HELP))),
    ids="".join,
)
def test_each_option_in_the_help_is_explained(option: tuple[str, str]) -> None:
    assert is_entry("polytmpctl.1", "".join(option), "OPTIONS")


def test_help_and_page_list_the_same_options() -> None:
    known = {f"--{name}" for name in (*arguments._FLAGS, *arguments._VALUES, *arguments._OPTIONAL)}
    known |= {f"-{letter}" for letter in (*arguments._SHORT, "j")}
    explained = set(re.findall(r"(?m)^ {5}(-\w)?(?:, )?(--[a-z-]+)?(?=[\[= ]|$)", page("polytmpctl.1")))
    assert {option for pair in explained for option in pair if option} == known


@pytest.mark.parametrize("letter", [*arguments._SHORT])
def test_short_options_are_listed_with_the_long_ones(letter: str) -> None:
    assert re.search(rf"(?m)^ +-{letter}, --{arguments._SHORT[letter]}\b", page("polytmpctl.1"))


# polytmpd.conf(5)


@pytest.mark.parametrize("key", [*config._KEYS])
def test_each_setting_is_explained(key: str) -> None:
    assert is_entry("polytmpd.conf.5", f"{key}=")


def test_no_other_setting_is_explained() -> None:
    explained = re.findall(r"(?m)^ {5}([A-Z]\w+)=$", page("polytmpd.conf.5"))
    assert explained == list(config._KEYS)


def defaults() -> dict[str, str]:
    settings = config.Config()
    persistent = [entry.path for entry in settings.directories if entry.lifetime.value == "persistent"]
    return {
        "Directories": " ".join(entry.path for entry in settings.directories),
        "PersistentDirectories": " ".join(persistent),
        "UncheckedDirectories": "",
        "SharedPaths": " ".join(config.SOCKET_DIRECTORIES),
        "RegularUIDs": "",
        "ExemptUsers": "",
        "ExemptGroups": "",
        "OnlyGroups": "",
    }


def test_defaults_are_as_the_page_says() -> None:
    said = re.findall("Default: (?:\u2018(.*?)\u2019|empty)[.]", page("polytmpd.conf.5"))
    assert dict(zip(config._KEYS, said, strict=True)) == defaults()


def test_the_shipped_file_shows_the_defaults(tmp_path: Path) -> None:
    text = (ROOT / "units/polytmpd.conf").read_text()
    assert dict(re.findall(r"(?m)^#(\w+)=(.*)$", text)) == defaults()
    etc = tmp_path / "etc"
    etc.mkdir()
    for shown in (text, re.sub(r"(?m)^#(\w+=)", r"\1", text)):
        (etc / "polytmpd.conf").write_text(shown)
        assert config.load(tmp_path) == (config.Config(), [])


# pam_polytmp(8)


def test_each_argument_of_the_module_is_explained() -> None:
    source = (ROOT / "pam/pam_polytmp.c").read_text()
    parser = source[source.index("static void parse_arguments") : source.index("static int find_user")]
    known = re.findall(r'strn?cmp\(argv\[i\], "(\w+=?)"', parser)
    assert {"debug", "timeout=", "caller", "user"} <= set(known)
    for argument in known:
        assert is_entry("pam_polytmp.8", argument)
    limits = {
        name: re.search(rf"#define {name} (\d+)", source) for name in ("TIMEOUT_DEFAULT", "TIMEOUT_MAX")
    }
    for name, match in limits.items():
        assert match, name
        assert re.search(rf"\b{match[1]}\b", page("pam_polytmp.8")), name


def test_each_return_value_of_the_module_is_explained() -> None:
    source = "".join(path.read_text() for path in (ROOT / "pam").glob("*.c"))
    returned = set(re.findall(r"\bPAM_[A-Z_]+\b", source))
    returned -= {"PAM_USER", "PAM_SERVICE", "PAM_SILENT", "PAM_DATA_SILENT"}  # items and flags
    assert {value for value in returned if not is_entry("pam_polytmp.8", value)} == set()


# org.polytmp1(5)


def members() -> Iterator[tuple[str, str, str]]:
    """(interface, member, how the page writes it) for everything in the golden XML."""
    for name in ("manager", "instance"):
        tree = ET.fromstring(
            (ROOT / f"tests/bus/golden/{name}.xml").read_text()
        )  # a file of this repository
        for interface in tree.iter("interface"):
            for member in interface:
                if member.tag in {"method", "signal", "property"}:
                    yield interface.get("name", ""), member.get("name", ""), written(member)


def written(member: ET.Element) -> str:
    if member.tag == "property":
        return f"readonly {member.get('type')} {member.get('name')} = "
    parts = [
        " ".join(filter(None, (argument.get("direction"), argument.get("type"), argument.get("name"))))
        for argument in member.iter("arg")
    ]
    return f"{member.get('name')}({', '.join(parts)});"


@pytest.mark.parametrize(("interface", "member", "text"), [*members()], ids=str)
def test_each_member_is_explained(interface: str, member: str, text: str) -> None:
    shown = page("org.polytmp1.5")
    assert interface in shown
    if interface.startswith("org.polytmp1."):
        assert text in re.sub(r"\s+", " ", shown)
        assert is_entry("org.polytmp1.5", member) or is_entry("org.polytmp1.5", f"{member}()")
    else:
        assert f"{member}()" in shown


@pytest.mark.parametrize("name", [*ErrorName, *PolkitAction])
def test_each_error_and_action_is_explained(name: str) -> None:
    assert is_entry("org.polytmp1.5", name)


# The journal


@pytest.mark.parametrize("message", [*MessageId])
def test_each_message_is_in_the_manual(message: MessageId) -> None:
    assert is_entry("polytmpd.service.8", message.value, "JOURNAL")


def test_the_catalog_has_each_message_once() -> None:
    listed = re.findall(r"(?m)^-- (\S+)$", CATALOG.read_text())
    assert sorted(listed) == sorted(message.value for message in MessageId)


def test_the_catalog_is_understood(tmp_path: Path) -> None:
    """journalctl compiles it, as it does when the package is installed."""
    for directory in ("usr/lib/systemd/catalog", "var/lib/systemd/catalog"):
        (tmp_path / directory).mkdir(parents=True)
    shutil.copy(CATALOG, tmp_path / "usr/lib/systemd/catalog")
    done = run("journalctl", f"--root={tmp_path}", "--update-catalog")
    assert (done.returncode, done.stderr) == (0, "")
    for message in MessageId:
        shown = run("journalctl", f"--root={tmp_path}", "--dump-catalog", message.value).stdout
        assert re.search(r"(?m)^Subject: \S", shown)
        assert re.search(r"(?m)^Defined-By: polytmp$", shown)
        assert len(shown.partition("\n\n")[2]) > 100, f"{message.name} is not explained"
        assert set(re.findall(r"@(\w+)@", shown)) <= {"POLYTMP_UID", "POLYTMP_USER"}


# docs/*.md


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub and others derive from headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", path.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda path: str(path.name)
)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_readme_links_to_all_documents() -> None:
    text = (ROOT / "README.md").read_text()
    assert {path.name for path in ROOT.glob("docs/*.md") if f"(docs/{path.name})" not in text} <= {
        "lifecycle.md"  # ARCHITECTURE.md leads there
    }

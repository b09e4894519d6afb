"""Rules of the source layout: floors, sizes of modules, functions and folders, unique and documented names.

CONTRIBUTING.md has the table of floors.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from old_torch import NEEDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lars_train"
# A room imports from lower floors, and from rooms of the same floor without a cycle.
FLOORS = (
    {"errors", "extensions", "fsutil", "messages", "optim", "signals", "targets"},
    {"config", "models"},
    {"data", "given", "launch", "networks", "rendezvous", "run_plan"},
    {"monitoring", "pack", "report"},
    {"training"},
    {"export", "preflight"},
    {"commands"},
    {"__main__", "api", "cli"},
)
# The floors within data. The lowest, "", are the modules directly in the folder.
DATA_FLOORS = ("", "decode", "sources", "loading", "open")
LINES, FUNCTION_LINES, MODULES = 400, 60, 16
NAME_LENGTH = 60

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
STUBS = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE.rglob("*.pyi")}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
# Without the root's __init__, which imports the public names.
MODULES_OF_ROOMS = [name for name in SOURCES if "." in name]


def imported_names(name: str) -> set[str]:
    """Return the full names that a module imports, including imports within functions."""
    package = name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def imported(name: str) -> set[str]:
    """Return the modules of the package that a module imports, C extensions excepted."""
    names = imported_names(name) - STUBS
    modules = {whole if whole in SOURCES else whole.rpartition(".")[0] for whole in names}
    return {module for module in modules if module in SOURCES and module != name}


IMPORTS = {name: imported(name) for name in SOURCES}


def room(name: str) -> str:
    """Return the room of a module: its folder or module directly below the package."""
    return name.split(".")[1] if "." in name else name


def test_every_room_has_its_floor_and_imports_nothing_from_above() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    assert set(floor) == {room(name) for name in MODULES_OF_ROOMS}
    upward = [
        f"{name} imports {other}"
        for name in MODULES_OF_ROOMS
        for other in IMPORTS[name]
        if floor[room(other)] > floor[room(name)]
    ]
    assert not upward


def test_data_modules_import_only_from_the_same_or_lower_floors() -> None:
    def floor(name: str) -> int:
        part = name.split(".")[2]
        return DATA_FLOORS.index(part) if part in DATA_FLOORS else 0

    inside = [name for name in SOURCES if name.startswith("lars_train.data.")]
    upward = [
        f"{name} imports {other}"
        for name in inside
        for other in IMPORTS[name].intersection(inside)
        if floor(other) > floor(name)
    ]
    assert len(inside) > 20
    assert not upward


def test_no_import_cycles_between_modules_or_rooms() -> None:
    rooms = defaultdict(set)
    for name in MODULES_OF_ROOMS:
        rooms[room(name)] |= {room(other) for other in IMPORTS[name] if "." in other} - {room(name)}
    for graph in (IMPORTS, rooms):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(" imports ".join(reversed(error.args[1])))


def test_optim_and_models_do_not_import_the_config() -> None:
    for name in MODULES_OF_ROOMS:
        if room(name) == "optim":
            assert {other for other in IMPORTS[name] if room(other) != "optim"} <= {"lars_train.extensions"}, name
            roots = {whole.partition(".")[0] for whole in imported_names(name)}
            assert roots - {"lars_train", "torch"} <= sys.stdlib_module_names, name
        if room(name) == "models":
            assert not {other for other in IMPORTS[name] if room(other) == "config"}, name


def test_only_signals_installs_signal_handlers() -> None:
    installing = {name for name, path in SOURCES.items() if re.search(r"\bsignal\.signal\(", path.read_text())}
    assert installing == {"lars_train.signals"}


@pytest.mark.parametrize("name", SOURCES)
def test_modules_and_functions_are_short(name: str) -> None:
    assert len(SOURCES[name].read_text().splitlines()) <= LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno
        and node.end_lineno - node.lineno >= FUNCTION_LINES
    ]
    assert not long


def test_no_folder_has_too_many_modules() -> None:
    counts = Counter(path.parent for path in SOURCES.values() if path.name != "__init__.py")
    assert {str(folder): count for folder, count in counts.items() if count > MODULES} == {}


def test_names_of_modules_and_public_classes_are_unique() -> None:
    modules = Counter(path.stem for path in SOURCES.values() if path.stem != "__init__")
    classes = Counter(
        node.name
        for tree in TREES.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for names in (modules, classes) for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("name", SOURCES)
def test_public_names_are_documented(name: str) -> None:
    tree = TREES[name]
    assert ast.get_docstring(tree) or name.endswith("__main__")
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare


def test_contributing_has_the_same_floors() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = re.findall(r"^\| (\d) \| (.+) \|$", text, re.MULTILINE)
    assert [int(number) for number, _ in table] == list(range(1, len(FLOORS) + 1))
    assert [set(re.findall(r"`(\w+)`", names)) for _, names in table] == list(FLOORS)
    assert f"at most {LINES} lines, a function {FUNCTION_LINES}, a folder {MODULES} modules" in text


def test_contributing_names_files_that_exist() -> None:
    there = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where things are")[2].partition("\n## ")[0]
    paths = re.findall(r"`((?:\w+/)+\w*(?:\.\w+)?)`", there)
    assert len(paths) > 20
    assert [path for path in paths if not any((root / path).exists() for root in (ROOT, PACKAGE))] == []


def test_names_of_tests_are_short() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    ]
    assert [entry for entry in found if len(entry.split(": ")[1]) > NAME_LENGTH] == []
    # old_torch.py refers to tests by name.
    names = {entry.split(": ")[1] for entry in found}
    parts = (part.partition("[")[0].rpartition("::")[2] for part in NEEDS)
    assert [part for part in parts if not any(part in name for name in names)] == []

"""The package's rooms: arrows between them point down, and no files import each other in a circle
(docs/architecture.md)."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hymeg"
FLOORS = (  # a room imports from itself and from the floors below
    {"errors", "__version__"},
    {"files", "flag_table", "progress"},
    {"checksums"},
    {"platform", "hf", "reporting"},
    {"launch", "checkpoint", "data"},
    {"models", "generation", "planning"},
    {"training"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    """The package's modules that `tree` imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules or node.module == "hymeg" else node.module for name in inside]
        else:
            continue
        yield from (name for name in names if name.startswith("hymeg."))


MODULES = {module_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    own = module_of(path)
    if own == "hymeg":
        return
    for name in imported(ast.parse(path.read_text()), MODULES):
        to = room(name)
        assert to == room(own) or FLOOR[to] < FLOOR[room(own)], f"{own} imports {name}"


def test_no_circle():
    """Of imports at the head of files: what a function imports is for later."""
    graph = {}
    for path in FILES:
        head = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        graph[module_of(path)] = set(imported(ast.Module(head, []), MODULES))
    graphlib.TopologicalSorter(graph).prepare()


def test_what_must_be_light_imports_nothing_heavy():
    """`hf` knows no Megatron; the table of names and the planner's layout know no torch; a report is made without."""
    for place, heavy in {
        "hf": "megatron",
        "checkpoint/mapping.py": "torch",
        "planning/layout.py": "torch",
        "reporting": "torch",
    }.items():
        for path in FILES:
            if path.is_relative_to(PACKAGE / place):
                text = path.read_text()
                assert f"import {heavy}" not in text and f"from {heavy}" not in text, path


def test_a_room_that_imports_megatron_installs_the_platform_before():
    """Or, where a file does so that another room imports when it is needed, that room has done it."""
    rooms = {
        path.relative_to(PACKAGE).parts[0]
        for path in FILES
        if any(line.startswith(("import megatron", "from megatron")) for line in path.read_text().splitlines())
    }
    installing = {path.parent.name for path in FILES if "\nplatform.install()\n" in path.read_text()}
    assert installing == {"generation", "models", "training"}
    assert rooms - installing == {"platform", "data", "checkpoint"}

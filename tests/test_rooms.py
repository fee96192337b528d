"""The house: what lies above imports what lies below, never the reverse, and nothing imports in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import token_pruning

ROOT = Path(token_pruning.__file__).parent
# A room may import from those of lower floors.
FLOORS = (
    {"errors", "interrupts"},
    {"checks"},
    {"ragged"},
    {"pruners", "families"},
    {"runtime"},
    {"engine"},
    {"budget", "checkpoint"},
    {"integrations"},
    {"lab"},
)
LAB = (("data", "training"), ("evaluation", "training"), ("training", "analysis"), ("demo", "cli"))


def imported(file: Path) -> set[str]:
    """Dotted names, within the package, of what a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("token_pruning.") for name in names if name.startswith("token_pruning.")}


def graph_below(folder: Path) -> dict[str, set[str]]:
    """The folders and modules directly below one, each with those that it imports."""
    prefix = ".".join(folder.relative_to(ROOT).parts)
    prefix = prefix + "." if prefix else ""
    graph: dict[str, set[str]] = {}
    for part in folder.iterdir():
        files = list(part.rglob("*.py")) if part.is_dir() else [part]
        if part.name.startswith("__") or not files or part.suffix not in ("", ".py"):
            continue
        names = set().union(*map(imported, files))
        inside = {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
        graph[part.stem] = inside - {part.stem}
    return {name: used & graph.keys() for name, used in graph.items()}


def test_rooms_import_from_lower_floors_only() -> None:
    graph = graph_below(ROOT)
    assert graph.keys() == set().union(*FLOORS)
    for floor, rooms in enumerate(FLOORS):
        below = set().union(*FLOORS[:floor])
        for room in rooms:
            assert graph[room] <= below, f"{room} imports {graph[room] - below}"


@pytest.mark.parametrize("folder", [path for path in [ROOT, *ROOT.rglob("*")] if (path / "__init__.py").is_file()])
def test_nothing_below_a_folder_imports_in_a_circle(folder: Path) -> None:
    graph = graph_below(folder)
    order = list(TopologicalSorter(graph).static_order())  # names the circle where there is one
    if folder.name == "lab":
        for lower, higher in LAB:
            assert order.index(lower) < order.index(higher)

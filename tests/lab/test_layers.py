"""The lab's folders and modules import each other in one direction."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import token_pruning.lab

LAB = Path(token_pruning.lab.__file__).parent
PREFIX = "token_pruning.lab."


def imports_of(part: Path) -> set[str]:
    """The folders and modules directly below the lab that one of them imports, wherever in its files."""
    files = part.rglob("*.py") if part.is_dir() else [part]
    names = [
        name
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module
        for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    ]
    return {name.removeprefix(PREFIX).split(".")[0] for name in names if name.startswith(PREFIX)}


def test_imports_between_folders_have_no_circle() -> None:
    parts = [part for part in LAB.iterdir() if part.suffix == ".py" or (part / "__init__.py").exists()]
    graph = {part.stem: imports_of(part) - {part.stem} for part in parts if part.name != "__init__.py"}
    assert set().union(*graph.values()) <= graph.keys()
    order = list(TopologicalSorter(graph).static_order())  # names the circle where there is one
    for lower, higher in (("data", "training"), ("evaluation", "training"), ("training", "analysis"), ("demo", "cli")):
        assert order.index(lower) < order.index(higher)

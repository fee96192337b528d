"""A classification task that every Python brings along: which standard module does a docstring come from?"""

import ast
import math
import random
import sysconfig
import warnings
from collections import Counter
from pathlib import Path

from token_pruning.errors import ConfigError, DataError
from token_pruning.lab.data.tasks import Task, TaskData, TextExamples

MIN_WORDS = 6
MAX_WORDS = 100
_LEFT_OUT = frozenset(
    {"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
)


def load_docstrings(*, max_labels: int = 20, validation_fraction: float = 0.2, seed: int = 0) -> TaskData:
    """Build the task from the standard library's source files; nothing is imported and nothing downloaded.

    A text is the docstring of a module, class or function of six words or more, white space collapsed, cut
    after 100 words; its label is the top-level module or package it stands in. Exact duplicates are dropped and
    the ``max_labels`` modules with the most docstrings kept, labels in alphabetical order. The examples are
    shuffled by ``seed`` and ``validation_fraction`` of them, rounded up, held out. The result is the same in
    every run on one Python, and differs somewhat between Python versions.

    Settings out of range raise :class:`~token_pruning.errors.ConfigError`, a Python without its source files
    :class:`~token_pruning.errors.DataError`.
    """
    if max_labels < 2:
        raise ConfigError(f"max_labels is {max_labels}; allowed: 2 or more")
    if not 0.0 < validation_fraction < 1.0:
        raise ConfigError(f"validation_fraction is {validation_fraction}; allowed: above 0 and below 1")
    root = Path(sysconfig.get_paths()["stdlib"])
    found = _collect(root)
    counts = Counter(found.values())
    labels = tuple(sorted(sorted(counts, key=lambda name: (-counts[name], name))[:max_labels]))
    pairs = [(text, labels.index(name)) for text, name in found.items() if name in labels]
    random.Random(seed).shuffle(pairs)
    held_out = math.ceil(len(pairs) * validation_fraction)
    if len(labels) < 2 or held_out == len(pairs):
        raise DataError(f"{root}: docstrings of {len(labels)} modules found; the .py files of at least 2 are needed")
    return TaskData(
        task=Task(name="docstrings", folder="", hub_name="", labels=labels, best_metric="accuracy"),
        train=_examples(pairs[held_out:]),
        validation={"validation": _examples(pairs[:held_out])},
    )


def _examples(pairs: list[tuple[str, int]]) -> TextExamples:
    return TextExamples(first=[text for text, _ in pairs], second=None, labels=[label for _, label in pairs])


def _collect(root: Path) -> dict[str, str]:
    """Each text below ``root`` with the module it first stands in, files in the order of their paths."""
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not all(part.isidentifier() and part not in _LEFT_OUT for part in parts):
            continue
        for text in _file_texts(path):
            found.setdefault(text, parts[0])
    return found


def _file_texts(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as invalid escapes in somebody else's strings
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    texts: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node, clean=False) or "").split()
            if len(words) >= MIN_WORDS:
                texts.append(" ".join(words[:MAX_WORDS]))
    return texts

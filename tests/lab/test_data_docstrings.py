import random
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from token_pruning.errors import ConfigError, DataError
from token_pruning.lab.data.docstrings import load_docstrings
from token_pruning.lab.data.tasks import TaskData


@pytest.fixture(scope="module")
def real() -> TaskData:
    return load_docstrings()


def texts_and_labels(data: TaskData) -> list[tuple[str, str]]:
    assert data.train is not None and data.task.labels is not None
    pairs: list[tuple[str, str]] = []
    for split in (data.validation["validation"], data.train):
        assert split.labels is not None and split.second is None
        pairs += [(text, data.task.labels[int(label)]) for text, label in zip(split.first, split.labels, strict=True)]
    return pairs


def test_the_standard_library(real: TaskData) -> None:
    assert real.task.name == "docstrings"
    assert real.task.best_metric == "accuracy"
    assert real.task.labels is not None
    assert real.task.num_labels == 20
    assert list(real.task.labels) == sorted(real.task.labels)
    assert {"asyncio", "email", "unittest", "xml"} < set(real.task.labels)
    assert not {"test", "idlelib", "lib2to3", "site-packages", "pip"} & set(real.task.labels)
    pairs = texts_and_labels(real)
    assert len(pairs) > 2000
    assert len({text for text, _ in pairs}) == len(pairs)
    assert all(6 <= len(text.split(" ")) <= 100 and text == " ".join(text.split()) for text, _ in pairs)
    held_out = len(real.validation["validation"])
    assert held_out - 1 < len(pairs) * 0.2 <= held_out
    assert Counter(label for _, label in pairs).keys() == set(real.task.labels)
    shares = Counter(label for _, label in texts_and_labels(real)[:held_out])
    assert len(shares) == 20  # shuffled: the held-out part knows every module


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def add(root: Path, name: str, *docstrings: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"def f{number}():\n    {text!r}\n" for number, text in enumerate(docstrings)), "utf-8")


def test_which_docstrings(library: Path) -> None:
    (library / "alpha.py").write_text(
        '"""module   one two\n\n    three four five."""\n'
        'class A:\n    """class one two three four five"""\n'
        '    async def f(self):\n        """method one two three four five"""\n'
        '        def inner():\n            """only five words in here"""\n'
        'def long():\n    """' + "w " * 150 + '"""\n'
        'x = "a string that is no docstring at all"\n'
    )
    add(library, "beta/sub/deep.py", "class one two three four five", "deep one two three four five")
    for name in ("test/a.py", "beta/tests/b.py", "idlelib/c.py", "site-packages/pip/d.py", "config-3/e.py"):
        add(library, name, f"left out for its place {name}")
    (library / "broken.py").write_text('"""one two three four five six"""\ndef (\n')
    (library / "null.py").write_bytes(b'"""one two three four five six"""\n\0')
    (library / "latin.py").write_bytes(b'# coding: latin-1\n"""caf\xe9 one two three four five"""\n')
    (library / "escape.py").write_text('"""escape \\d one two three four"""\n')
    assert Counter(texts_and_labels(load_docstrings())) == Counter(
        [
            ("module one two three four five.", "alpha"),
            ("class one two three four five", "alpha"),
            ("method one two three four five", "alpha"),
            ("w " * 99 + "w", "alpha"),
            ("deep one two three four five", "beta"),
            ("café one two three four five", "latin"),
            ("escape \\d one two three four", "escape"),
        ]
    )


def test_the_largest_modules_and_the_split(library: Path) -> None:
    sizes = {"a": 3, "b": 10, "c": 7, "d": 3}
    for name, size in sizes.items():
        add(library, f"{name}.py", *(f"{name} has the docstring number {number}" for number in range(size)))
    data = load_docstrings(max_labels=3, validation_fraction=0.25, seed=3)
    assert data.task.labels == ("a", "b", "c")
    assert data.train is not None
    assert (len(data.train), len(data.validation["validation"])) == (15, 5)
    assert load_docstrings(max_labels=3, validation_fraction=0.25, seed=3) == data
    assert load_docstrings(max_labels=3, validation_fraction=0.25, seed=4) != data
    expected = [(f"{name} has the docstring number {n}", name) for name in "abc" for n in range(sizes[name])]
    random.Random(3).shuffle(expected)
    assert texts_and_labels(data) == expected


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match="max_labels is 1; allowed: 2 or more"):
        load_docstrings(max_labels=1)
    for fraction in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=r"validation_fraction is .*; allowed: above 0 and below 1"):
            load_docstrings(validation_fraction=fraction)


def test_no_sources(library: Path) -> None:
    with pytest.raises(DataError, match="docstrings of 0 modules found"):
        load_docstrings()
    add(library, "a.py", "one two three four five six")
    with pytest.raises(DataError) as caught:
        load_docstrings()
    assert str(caught.value).startswith(f"{library}: docstrings of 1 modules found")

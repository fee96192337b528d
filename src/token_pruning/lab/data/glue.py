"""GLUE, from the official folders of tab-separated files or from the hub."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from token_pruning.errors import ConfigError, DataError
from token_pruning.lab.data.reading import counted, listed, read_text, shown, split_lines
from token_pruning.lab.data.tasks import GLUE_TASKS, Note, Task, TaskData, TextExamples

logger = logging.getLogger(__name__)

HUB_DATASET = "nyu-mll/glue"
_SCORES = (0.0, 5.0)  # STS-B
_LISTED_LINES = 10


def load_glue_folder(task: Task, data_dir: Path, *, need_train: bool = True) -> TaskData:
    """Read ``data_dir/<folder>/train.tsv`` and ``dev.tsv`` (MNLI: ``dev_matched.tsv``, ``dev_mismatched.tsv``).

    ``data_dir`` may be the task's own folder as well. Without ``need_train`` the training file is not read and
    need not exist. Files are UTF-8, with or without a byte-order mark, tab-separated and unquoted (a quotation
    mark is an ordinary character). The official QQP training file is known to hold a few rows that lack columns: those
    are left out, with a warning that names their lines. Anything else missing or malformed raises
    :class:`~token_pruning.errors.DataError` with the file, the line, the value and what is allowed.
    """
    _check_glue(task)
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise DataError(f"{data_dir}: no such folder; it must hold the official GLUE folder {task.folder}")
    folder = data_dir / task.folder
    own_files = [task.train_file, *(name for _, name in task.validation_files)]
    if not folder.is_dir() and any((data_dir / name).is_file() for name in own_files):
        folder = data_dir
    train = _read_split(task, folder / task.train_file) if need_train else None
    return TaskData(
        task=task,
        train=train,
        validation={split: _read_split(task, folder / name) for split, name in task.validation_files},
    )


def load_glue_hub(task: Task) -> TaskData:
    """Read the task from the hub's ``nyu-mll/glue``, from the local cache where the hub is offline.

    Raises :class:`~token_pruning.errors.DataError` where it cannot be had (no network and nothing in the
    cache, or ``datasets`` not installed) or is not what is expected.
    """
    _check_glue(task)
    name = f"{HUB_DATASET} ({task.hub_name})"
    hint = "--data_dir takes the official GLUE folder instead"
    try:
        import datasets

        splits = datasets.load_dataset(HUB_DATASET, task.hub_name)  # nosec B615  # tables, checked when read
    except ImportError as error:
        raise DataError(
            f"{name} needs the package datasets ({_first_line(error)}): pip install token-pruning[train]; {hint}"
        ) from None
    except Exception as error:  # the hub, its client and the cache fail with exceptions of many kinds
        raise DataError(f"{name} cannot be loaded: {type(error).__name__}: {_first_line(error)}; {hint}") from None
    return TaskData(
        task=task,
        train=_hub_split(task, splits, "train"),
        validation={split: _hub_split(task, splits, split) for split, _ in task.validation_files},
    )


def _check_glue(task: Task) -> None:
    if task.name not in GLUE_TASKS:
        raise ConfigError(f"{task.name!r} is no GLUE task; allowed: {', '.join(GLUE_TASKS)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# Official files


def _read_split(task: Task, path: Path) -> TextExamples:
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected the official GLUE file of {task.name}")
    lines = split_lines(read_text(path))
    header = lines[0].split("\t") if lines else []
    for column in (*task.text_columns, task.label_column) if lines else ():
        if column not in header:
            raise DataError(f"{path}, line 1: no column {column!r}; columns found: {listed(header)}")
    rows = [line.split("\t") for line in lines[1:]]
    if not rows:
        raise DataError(f"{path}: the file holds no rows; at least one is needed")
    numbers = list(range(2, len(rows) + 2))
    if task.short_train_rows and path.name == task.train_file:
        short = [number for number, row in zip(numbers, rows, strict=True) if len(row) < len(header)]
        if short:
            logger.warning(
                "%s: left out, for lack of columns: line %s", path, listed([*map(str, short)], _LISTED_LINES)
            )
        numbers = [number for number in numbers if number not in short]
        rows = [rows[number - 2] for number in numbers]
    _check_widths(path, header, rows, numbers)

    texts = [[row[header.index(column)] for row in rows] for column in task.text_columns]
    values = [row[header.index(task.label_column)] for row in rows]
    return TextExamples(
        first=texts[0],
        second=texts[1] if len(texts) == 2 else None,
        labels=(
            _class_ids(path, values, numbers, task.file_labels) if task.file_labels else _scores(path, values, numbers)
        ),
        note=_note(task, str(path), len(rows), task.text_columns, task.label_column),
    )


def _note(task: Task, name: str, rows: int, texts: Sequence[str], label: str) -> Note:
    meaning = "scores" if task.labels is None else f"{len(task.labels)} classes: {', '.join(task.labels)}"
    return Note(f"{name}: {counted(rows, 'row')}; text: {' and '.join(texts)}; label: {label} ({meaning})")


def _check_widths(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> None:
    widths = {line: len(row) for line, row in zip(numbers, rows, strict=True)}
    wrong = [line for line, width in widths.items() if width != len(header)]
    if not wrong:
        return
    more = ""
    if len(wrong) > 1:
        rest = listed([str(line) for line in wrong[1:]], _LISTED_LINES)
        more = f"; also wrong: line{'s' if len(wrong) > 2 else ''} {rest}"
    found = widths[wrong[0]]
    raise DataError(
        f"{path}, line {wrong[0]}: columns found: {found}; expected: {len(header)} ({listed(header)}){more}"
    )


def _class_ids(path: Path, values: Sequence[str], numbers: Sequence[int], allowed: tuple[str, ...]) -> list[int]:
    ids = {name: index for index, name in enumerate(allowed)}
    labels: list[int] = []
    for line, value in zip(numbers, values, strict=True):
        if value not in ids:
            raise DataError(f"{path}, line {line}: unknown label {shown(value)}; allowed: {', '.join(allowed)}")
        labels.append(ids[value])
    return labels


def _scores(path: Path, values: Sequence[str], numbers: Sequence[int]) -> list[float]:
    low, high = _SCORES
    scores: list[float] = []
    for line, value in zip(numbers, values, strict=True):
        try:
            score = float(value)
        except ValueError:
            score = float("nan")
        if not low <= score <= high:
            raise DataError(f"{path}, line {line}: score {shown(value)}; allowed: a number from {low:g} to {high:g}")
        scores.append(score)
    return scores


# The hub


def _hub_split(task: Task, splits: Any, split: str) -> TextExamples:
    place = f"{HUB_DATASET} ({task.hub_name})"
    if split not in splits:
        raise DataError(f"{place}: no split {split!r}; splits found: {', '.join(splits)}")
    table = splits[split]
    for column in (*task.hub_text_columns, "label"):
        if column not in table.column_names:
            raise DataError(f"{place}, {split}: no column {column!r}; columns found: {', '.join(table.column_names)}")
    names = getattr(table.features["label"], "names", None)
    if task.labels is not None and names is not None and tuple(names) != task.labels:
        raise DataError(f"{place}, {split}: labels {', '.join(names)}; expected {', '.join(task.labels)}")
    texts = [[str(text) for text in table[column]] for column in task.hub_text_columns]
    labels: list[int] | list[float]
    if task.labels is None:
        labels = [float(label) for label in table["label"]]
    else:
        labels = [int(label) for label in table["label"]]
        for row, label in enumerate(labels):
            if not 0 <= label < len(task.labels):
                raise DataError(f"{place}, {split}, row {row}: label {label}; allowed: 0 to {len(task.labels) - 1}")
    if not labels:
        raise DataError(f"{place}, {split}: no rows; at least one is needed")
    return TextExamples(
        first=texts[0],
        second=texts[1] if len(texts) == 2 else None,
        labels=labels,
        note=_note(task, f"{place}, {split}", len(labels), task.hub_text_columns, "label"),
    )

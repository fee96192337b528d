"""A user's own CSV, TSV, JSON and JSON Lines files."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from token_pruning.errors import DataError
from token_pruning.lab.data.tasks import Task, TaskData, TextExamples

LABEL_COLUMNS = ("label", "labels")
_PAIRS = (
    ("sentence1", "sentence2"),
    ("sentence", "sentence2"),
    ("text", "sentence2"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("query", "document"),
    ("query", "passage"),
)
_SINGLES = ("sentence", "text", "sentence1")
_ROW_NUMBERS = ("", "id", "idx", "index")  # never text, though they stand in many files
_FORMATS = (".csv", ".tsv", ".json", ".jsonl")
_FIELD_LIMIT = 2**31 - 1
_INTEGER = re.compile(r"[+-]?[0-9]{1,300}")
_FLOAT = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class _Table:
    """A file's rows, each with the place it stands at (``line 3``, ``row 3``) for messages."""

    path: Path
    columns: list[str]
    places: list[str]
    rows: list[dict[str, object]]


def load_files(train_file: Path | None, validation_file: Path, *, labels: Sequence[str] | None = None) -> TaskData:
    """Read a task from a user's own files (``.csv``, ``.tsv``, ``.json``, ``.jsonl``).

    Text columns are known by name (``sentence``, ``text``, ``sentence1``, ``sentence2``, and the pairs
    question/sentence, question1/question2, premise/hypothesis, query/document, query/passage); where no name
    is known, they are the columns that are neither label nor row number (``id``, ``idx``, ``index``), in file
    order, one or two of them. The label column is ``label`` or ``labels``.

    Labels that are all numbers, one of them no integer, are a regression task. Others are classes, in natural
    order (integers as numbers), taken from the training file or, without one, from the validation file.
    ``labels`` (say, a checkpoint's) gives the classes in the order of their ids instead; an empty sequence
    asks for regression. Labels of the form ``LABEL_0``, ``LABEL_1``, … also match plain ids.

    A file that cannot be read or holds something not allowed raises :class:`~token_pruning.errors.DataError`.
    """
    validation = _read_table(Path(validation_file), _FORMATS)
    train = None if train_file is None else _read_table(Path(train_file), _FORMATS)
    source = validation if train is None else train
    columns = _text_columns(source)
    if train is not None and (found := _text_columns(validation)) != columns:
        raise DataError(f"{validation.path}: text columns {listed(found)}; those of {train.path} are {listed(columns)}")

    if labels is None:
        known = _label_texts(source)
        classes = None if _is_regression(known) else _class_names(source.path, known)
    else:
        classes = tuple(labels) or None
        if classes is not None:
            _check_two(f"{source.path}: the labels given", classes)
    task = Task(
        name="custom",
        folder="",
        hub_name="",
        labels=classes,
        best_metric="combined_score" if classes is None else "accuracy",
    )
    return TaskData(
        task=task,
        train=None if train is None else _examples(train, columns, classes),
        validation={"validation": _examples(validation, columns, classes)},
    )


def load_unlabelled(path: Path) -> TextExamples:
    """Read texts without labels; a label column is optional and ignored.

    The formats are those of :func:`load_files`, and ``.txt`` with one sentence per line, of which empty lines
    before the last sentence count, so that the n-th result belongs to the n-th line. Raises
    :class:`~token_pruning.errors.DataError` where the file cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
        while lines and not lines[-1].strip():
            lines.pop()
        if not lines:
            raise DataError(f"{path}: the file holds no sentences; at least one is needed")
        return TextExamples(first=lines, second=None, labels=None)
    table = _read_table(path, (*_FORMATS, ".txt"))
    first, second = _texts(table, _text_columns(table))
    return TextExamples(first=first, second=second, labels=None)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark and with line ends as they are.

    Raises :class:`~token_pruning.errors.DataError` for a file that is missing, unreadable or not UTF-8.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{path}: cannot be read: {reason}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise DataError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8; files must be UTF-8") from None


def shown(value: object) -> str:
    """A value as messages show it: one line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def listed(names: Sequence[str], limit: int = 20) -> str:
    """Names as messages show them, on one line: at most ``limit`` of them, and each cut where it is long."""
    plain = [name if name.isprintable() else repr(name) for name in names[:limit]]
    text = ", ".join(name if len(name) <= 40 else name[:37] + "..." for name in plain)
    return text if len(names) <= limit else f"{text}, ... ({len(names)} in all)"


# Reading a file into a table


def _read_table(path: Path, allowed: Sequence[str]) -> _Table:
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise DataError(f"{path}: unknown file type {suffix!r}; allowed: {', '.join(allowed)}")
    text = read_text(path)
    if suffix in (".csv", ".tsv"):
        table = _read_separated(path, text, "," if suffix == ".csv" else "\t")
    elif suffix == ".json":
        table = _read_json(path, text)
    else:
        table = _read_json_lines(path, text)
    if not table.rows:
        raise DataError(f"{path}: the file holds no rows; at least one is needed")
    return table


def _read_separated(path: Path, text: str, separator: str) -> _Table:
    columns: list[str] | None = None
    table = _Table(path, [], [], [])
    # A quotation mark that opens a field and is never closed would swallow rows: `strict` makes it an error.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    limit = csv.field_size_limit(_FIELD_LIMIT)
    line = 1
    try:
        for fields in reader:
            if not fields:
                pass
            elif columns is None:
                columns = [field.strip() for field in fields]
                _check_header(path, columns)
                table.columns.extend(columns)
            elif len(fields) != len(columns):
                expected = f"{len(columns)} ({listed(columns)})"
                raise DataError(f"{path}, line {line}: columns found: {len(fields)}; expected: {expected}")
            else:
                table.places.append(f"line {line}")
                table.rows.append(dict(zip(columns, fields, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: {error}; a field with quotation marks must be quoted, the marks in it doubled"
        ) from None
    finally:
        csv.field_size_limit(limit)
    return table


def _check_header(path: Path, columns: Sequence[str]) -> None:
    for column in columns:
        if columns.count(column) > 1:
            raise DataError(f"{path}, line 1: the column {shown(column)} stands twice; columns: {listed(columns)}")


def _read_json(path: Path, text: str) -> _Table:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, list):
        raise DataError(f"{path}: a {type(content).__name__} at the top; allowed: a list of objects")
    return _objects(path, [(f"row {number}", row) for number, row in enumerate(content, start=1)])


def _read_json_lines(path: Path, text: str) -> _Table:
    rows: list[tuple[str, object]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((f"line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from None
    return _objects(path, rows)


def _objects(path: Path, rows: Sequence[tuple[str, object]]) -> _Table:
    table = _Table(path, [], [], [])
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}, {place}: {shown(row)}; allowed: an object such as {{'text': ..., 'label': ...}}")
        if not table.rows:
            table.columns.extend(row)
        table.places.append(place)
        table.rows.append(row)
    return table


# Texts


def _text_columns(table: _Table) -> tuple[str, ...]:
    names = [column for column in table.columns if column not in LABEL_COLUMNS]
    for pair in _PAIRS:
        if pair[0] in names and pair[1] in names:
            return pair
    for single in _SINGLES:
        if single in names:
            return (single,)
    others = [column for column in names if column.lower() not in _ROW_NUMBERS]
    if len(others) not in (1, 2):
        raise DataError(
            f"{table.path}: cannot tell the text columns; columns found: {listed(table.columns) or 'none'}; "
            f"allowed: one or two besides the label, or {', '.join(_SINGLES)}, {', '.join(map('/'.join, _PAIRS))}"
        )
    return tuple(others)


def _texts(table: _Table, columns: tuple[str, ...]) -> tuple[list[str], list[str] | None]:
    first = _text_column(table, columns[0])
    return first, (_text_column(table, columns[1]) if len(columns) == 2 else None)


def _text_column(table: _Table, column: str) -> list[str]:
    texts: list[str] = []
    for place, row in zip(table.places, table.rows, strict=True):
        value = _value(table, place, row, column)
        if not isinstance(value, str):
            raise DataError(f"{table.path}, {place}: {listed([column])} is {shown(value)}; allowed: a string")
        if not _is_unicode(value):
            raise DataError(f"{table.path}, {place}: {listed([column])} is {shown(value)}; allowed: Unicode text")
        texts.append(value)
    return texts


def _is_unicode(text: str) -> bool:
    """Whether no half of a surrogate pair is in ``text``; JSON can write one, tokenizers fail on it."""
    return _SURROGATE.search(text) is None


def _value(table: _Table, place: str, row: dict[str, object], column: str) -> object:
    if column not in row:
        raise DataError(f"{table.path}, {place}: no {column!r}; keys found: {listed([str(key) for key in row])}")
    return row[column]


# Labels


def _label_texts(table: _Table) -> list[str]:
    column = next((name for name in LABEL_COLUMNS if name in table.columns), None)
    if column is None:
        raise DataError(
            f"{table.path}: no label column; columns found: {listed(table.columns)}; "
            f"allowed: {' or '.join(LABEL_COLUMNS)}"
        )
    texts: list[str] = []
    for place, row in zip(table.places, table.rows, strict=True):
        value = _value(table, place, row, column)
        usable = isinstance(value, str | int | float) and not isinstance(value, bool)
        text = str(value).strip() if usable else ""
        if not text or not _is_unicode(text):
            raise DataError(f"{table.path}, {place}: the label is {shown(value)}; allowed: a name or a number")
        texts.append(text)
    return texts


def _number(text: str) -> int | float | None:
    """The number that ``text`` writes (an integer also where it is written ``1.0``), ``None`` if it is none."""
    if _INTEGER.fullmatch(text):
        return int(text)
    if not _FLOAT.fullmatch(text):
        return None
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _is_regression(texts: Sequence[str]) -> bool:
    numbers = [_number(text) for text in texts]
    return None not in numbers and any(isinstance(number, float) for number in numbers)


def _class_names(path: Path, texts: Sequence[str]) -> tuple[str, ...]:
    integers = {number for number in map(_number, texts) if isinstance(number, int)}
    if all(isinstance(_number(text), int) for text in texts):
        names = tuple(str(number) for number in sorted(integers))
    else:
        names = tuple(sorted(set(texts), key=_natural))
    _check_two(f"{path}: the labels", names)
    return names


def _check_two(what: str, names: Sequence[str]) -> None:
    if len(set(names)) < 2:
        raise DataError(f"{what} are all {shown(names[0])}; at least two different ones are needed")


def _natural(text: str) -> tuple[list[str | int], str]:
    """A sort key that puts ``class2`` before ``class10``: text and numbers take turns, text first."""
    parts = re.split(r"([0-9]{1,300})", text)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], text


def _examples(table: _Table, columns: tuple[str, ...], classes: tuple[str, ...] | None) -> TextExamples:
    first, second = _texts(table, columns)
    texts = _label_texts(table)
    if classes is None:
        return TextExamples(first=first, second=second, labels=_scores(table, texts))
    return TextExamples(first=first, second=second, labels=_class_ids(table, texts, classes))


def _scores(table: _Table, texts: Sequence[str]) -> list[float]:
    scores: list[float] = []
    for place, text in zip(table.places, texts, strict=True):
        number = _number(text)
        score = math.nan if number is None else float(text)
        if not math.isfinite(score):
            raise DataError(f"{table.path}, {place}: label {shown(text)}; allowed: a finite number (regression)")
        scores.append(score)
    return scores


def _class_ids(table: _Table, texts: Sequence[str], classes: tuple[str, ...]) -> list[int]:
    ids = {name: index for index, name in enumerate(classes)}
    if classes == tuple(f"LABEL_{index}" for index in range(len(classes))):
        ids |= {str(index): index for index in range(len(classes))}
    labels: list[int] = []
    for place, text in zip(table.places, texts, strict=True):
        label = ids.get(text)
        if label is None and isinstance(number := _number(text), int):
            label = ids.get(str(number))
        if label is None:
            raise DataError(f"{table.path}, {place}: unknown label {shown(text)}; allowed: {listed(classes)}")
        labels.append(label)
    return labels

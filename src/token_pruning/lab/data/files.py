"""A user's own files: which columns are texts, and what the labels mean."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from token_pruning.errors import DataError
from token_pruning.lab.data.reading import (
    FORMATS,
    Table,
    counted,
    is_missing,
    listed,
    read_table,
    read_text,
    shown,
    split_lines,
)
from token_pruning.lab.data.tasks import Note, Task, TaskData, TextExamples

LABEL_COLUMNS = ("label", "labels")
OTHER_LABEL_COLUMNS = (
    "target", "class", "score", "stars", "rating", "sentiment", "gold_label", "is_duplicate", "quality",
)  # fmt: skip
_LABEL_NAMES = ("label_text", "label_name", "label_names", "label_str", "text_label", "class_name", "target_text")
_PAIRS = (
    ("sentence1", "sentence2"),
    ("sentence", "sentence2"),
    ("text", "sentence2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("#1 string", "#2 string"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("query", "document"),
    ("query", "passage"),
)
_SINGLES = ("sentence", "text", "sentence1")
_LIKELY = ("review", "content", "comment", "tweet", "body", "document")  # where several columns could be the text
_ROW_NUMBERS = re.compile(r"(|_?id|idx|index|guid|uuid|level_\d+|unnamed: \d+(\.\d+)*|__index_level_\d+__)")
_INTEGER = re.compile(r"[+-]?[0-9]{1,300}")
_FLOAT = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_SURROGATE = re.compile("[\ud800-\udfff]")


def load_files(train_file: Path | None, validation_file: Path, *, labels: Sequence[str] | None = None) -> TaskData:
    """Read a task from a user's own files (``.csv``, ``.tsv``, ``.json``, ``.jsonl``, ``.parquet``).

    Text columns are known by name (``sentence``, ``text``, ``sentence1``, ``sentence2``, and the pairs
    question/sentence, question1/question2, premise/hypothesis, query/document, query/passage and the like), in any
    case. Where no name is known, they are the columns that hold words and are neither label nor row number (``id``,
    ``idx``, ``index``, what pandas calls its index), in file order, one or two of them. The label column is ``label``
    or ``labels``, or else the only one of ``target``, ``class``, ``score`` and the like. ``label_text`` beside it
    names the classes.

    Labels that are all numbers, one of them no integer, are a regression task. Others are classes, in natural
    order (integers as numbers), taken from the training file or, without one, from the validation file.
    ``labels`` (say, a checkpoint's) gives the classes in the order of their ids instead; an empty sequence
    asks for regression. Labels of the form ``LABEL_0``, ``LABEL_1``, … also match plain ids.

    A row without a label is left out: an empty cell, null or NaN, or -1 where the other labels are integers of 0 or
    more. Each split's ``note`` says in one line what was taken for what.

    A file that cannot be read or holds something not allowed raises :class:`~token_pruning.errors.DataError`.
    """
    validation = read_table(Path(validation_file))
    train = None if train_file is None else read_table(Path(train_file))
    source = validation if train is None else train
    columns = _text_columns(source)
    if train is not None:
        _check_same_columns(train, columns, validation)
    if labels is None:
        classes = _classes_of(source)
    elif len(labels) == 0:
        classes = None
    else:
        _check_two(f"{source.path}: the labels given", labels)
        classes = _Classes.given(tuple(labels))
    task = Task(
        name="custom",
        folder="",
        hub_name="",
        labels=None if classes is None else classes.names,
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
    before the last sentence count, so that the n-th result belongs to the n-th line. A text that is null is read as an
    empty one, for the same reason. Raises :class:`~token_pruning.errors.DataError` where the file cannot be read.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        lines = split_lines(read_text(path))
        if not lines:
            raise DataError(f"{path}: the file holds no sentences; at least one is needed")
        empty = sum(not line.strip() for line in lines)
        extra = f", {empty} of them empty" if empty else ""
        note = Note(f"{_printable(path)}: {counted(len(lines), 'text')}, one per line{extra}")
        return TextExamples(first=lines, second=None, labels=None, note=note)
    table = read_table(path, (*FORMATS, ".txt"))
    columns = _text_columns(table)
    texts = [_text_column(table, column, missing="") for column in columns]
    label = _label_column(table)
    note = _note(table, columns, texts, label, None if label is None else "not used")
    return TextExamples(first=texts[0], second=texts[1] if len(texts) == 2 else None, labels=None, note=note)


# Texts


def _by_lower_name(table: Table) -> dict[str, str]:
    """The columns by their names in lower case; one written so comes before others."""
    found: dict[str, str] = {}
    for column in table.columns:
        found.setdefault(column.strip().lower(), column)
    return found | {column: column for column in table.columns if column == column.lower()}


def _known_text_columns(table: Table) -> tuple[str, ...]:
    names = _by_lower_name(table)
    for pair in _PAIRS:
        if pair[0] in names and pair[1] in names:
            return names[pair[0]], names[pair[1]]
    return next(((names[single],) for single in _SINGLES if single in names), ())


def _text_columns(table: Table) -> tuple[str, ...]:
    if known := _known_text_columns(table):
        return known
    labels = {*LABEL_COLUMNS, *OTHER_LABEL_COLUMNS, *_LABEL_NAMES}
    others = [column for column in table.columns if column.lower() not in labels and not _is_row_number(column)]
    words = [column for column in others if _holds_words(table, column)]
    if not words and len(others) == 1:
        words = others
    if len(words) > 2:
        likely = [column for column in words if column.lower() in _LIKELY]
        words = likely if len(likely) == 1 else words
    if len(words) not in (1, 2):
        raise DataError(
            f"{table.path}: cannot tell the text columns; columns found: {listed(table.columns) or 'none'}; "
            f"allowed: one or two besides the label, or {', '.join(_SINGLES)}, {', '.join(map('/'.join, _PAIRS))}"
        )
    return tuple(words)


def _is_row_number(column: str) -> bool:
    return _ROW_NUMBERS.fullmatch(column.strip().lower()) is not None


def _holds_words(table: Table, column: str) -> bool:
    """Whether every value is text, and one of them neither empty nor a number."""
    values = [value for row in table.rows if not is_missing(value := row.get(column))]
    return all(isinstance(value, str) for value in values) and any(
        _number(text) is None for value in values if (text := str(value).strip())
    )


def _check_same_columns(train: Table, columns: tuple[str, ...], validation: Table) -> None:
    known = _known_text_columns(validation)
    if known == columns or (not known and set(columns) <= set(validation.columns)):
        return
    found = known or _text_columns(validation)
    raise DataError(f"{validation.path}: text columns {listed(found)}; those of {train.path} are {listed(columns)}")


def _text_column(table: Table, column: str, missing: str | None = None) -> list[str]:
    """The texts of a column; ``missing`` stands for null where it is allowed."""
    texts: list[str] = []
    for place, row in zip(table.places, table.rows, strict=True):
        value = table.value(place, row, column)
        if missing is not None and is_missing(value):
            value = missing
        if not isinstance(value, str):
            raise DataError(f"{table.path}, {place}: {listed([column])} is {shown(value)}; allowed: a string")
        if not _is_unicode(value):
            raise DataError(f"{table.path}, {place}: {listed([column])} is {shown(value)}; allowed: Unicode text")
        texts.append(value)
    return texts


def _is_unicode(text: str) -> bool:
    """Whether no half of a surrogate pair is in ``text``; JSON can write one, tokenizers fail on it."""
    return _SURROGATE.search(text) is None


# Labels


@dataclass(frozen=True)
class _Classes:
    """The names of the classes in the order of their ids, and how else a file may write each."""

    names: tuple[str, ...]
    ids: Mapping[str, int]

    @classmethod
    def given(cls, names: tuple[str, ...]) -> "_Classes":
        ids = {name: index for index, name in enumerate(names)}
        if names == tuple(f"LABEL_{index}" for index in range(len(names))):
            ids |= {str(index): index for index in range(len(names))}
            if len(names) == 2:
                ids |= {"False": 0, "True": 1, "false": 0, "true": 1}
        return cls(names, ids)

    def id_of(self, text: str) -> int | None:
        found = self.ids.get(text)
        if found is None and isinstance(number := _number(text), int):
            found = self.ids.get(str(number))
        return found


@dataclass(frozen=True)
class _Labels:
    """A table's labels as they are written, None for a row without.

    Attributes:
        column: where they stand.
        texts: one per row.
        names: a name for each id, where a column beside it, or the file itself, gives one.
        names_column: that column.
        unnamed: that column where it does not fit the labels.
    """

    column: str
    texts: list[str | None]
    names: dict[str, str] = field(default_factory=dict)
    names_column: str | None = None
    unnamed: str | None = None

    @property
    def found(self) -> list[str]:
        return [text for text in self.texts if text is not None]


def _label_column(table: Table) -> str | None:
    names = _by_lower_name(table)
    for name in LABEL_COLUMNS:
        if name in names:
            return names[name]
    others = [names[name] for name in OTHER_LABEL_COLUMNS if name in names]
    if len(others) > 1:
        raise DataError(f"{table.path}: {listed(others)} may each be the label; call the one that is: label")
    return others[0] if others else next((names[name] for name in _LABEL_NAMES if name in names), None)


def _labels(table: Table) -> _Labels:
    column = _label_column(table)
    if column is None:
        raise DataError(
            f"{table.path}: no label column; columns found: {listed(table.columns)}; "
            f"allowed: {' or '.join(LABEL_COLUMNS)}, or one of {', '.join(OTHER_LABEL_COLUMNS)}"
        )
    texts = [_label_text(table, place, row, column) for place, row in zip(table.places, table.rows, strict=True)]
    present = [text for text in texts if text is not None]
    if _all_numbers(present):  # a program's word for no number
        texts = [None if text is not None and text.lower() in ("nan", "+nan", "-nan") else text for text in texts]
    names = {str(number): name for number, name in enumerate(table.class_names.get(column, ()))}
    beside = next((name for name in table.columns if name.lower() in _LABEL_NAMES and name != column), None)
    if beside is None:
        return _Labels(column, texts, names)
    found = _names_beside(table, texts, beside)
    return _Labels(column, texts, found or names, beside if found else None, None if found else beside)


def _label_text(table: Table, place: str, row: dict[str, object], column: str) -> str | None:
    value = table.value(place, row, column)
    if is_missing(value):
        return None
    text = str(value).strip() if isinstance(value, str | int | float | Decimal) else None
    if text is None or not _is_unicode(text):
        raise DataError(f"{table.path}, {place}: the label is {shown(value)}; allowed: a name or a number")
    return text or None


def _names_beside(table: Table, texts: Sequence[str | None], beside: str) -> dict[str, str]:
    """What a column calls each id; nothing unless every id has one name and every name one id."""
    names: dict[str, str] = {}
    for row, text in zip(table.rows, texts, strict=True):
        number, name = (None if text is None else _number(text)), row.get(beside)
        if text is None or number == -1:
            continue
        if not isinstance(number, int) or not isinstance(name, str) or not name.strip() or not _is_unicode(name):
            return {}
        if names.setdefault(str(number), name.strip()) != name.strip():
            return {}
    return names if len(set(names.values())) == len(names) else {}


def _number(text: str) -> int | float | None:
    """The number that ``text`` writes (an integer also where it is written ``1.0``), ``None`` if it is none."""
    if _INTEGER.fullmatch(text):
        return int(text)
    if not _FLOAT.fullmatch(text):
        return None
    number = float(text)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _all_numbers(texts: Sequence[str]) -> bool:
    return all(_number(text) is not None for text in texts)


def _is_minus_one(labels: _Labels, classes: _Classes | None) -> list[bool]:
    """The rows whose -1 says that there is no label, as in GLUE's test files: the others are 0 or more.

    A regression's -1 is a score, unless there is nothing else.
    """
    numbers = [None if text is None else _number(text) for text in labels.texts]
    known = [number for number in numbers if number is not None]
    integers = len(known) == len(labels.found) and all(isinstance(number, int) and number >= -1 for number in known)
    is_class = classes is not None and "-1" in classes.ids
    is_score = classes is None and any(number != -1 for number in known)
    if not integers or is_class or is_score:
        return [False] * len(numbers)
    return [number == -1 for number in numbers]


def _classes_of(table: Table) -> _Classes | None:
    """The classes that stand in a table, or None for a regression."""
    labels = _labels(table)
    no_classes = _Classes((), {})
    unlabelled = _is_minus_one(labels, no_classes)
    texts = [text for text, none in zip(labels.texts, unlabelled, strict=True) if text is not None and not none]
    if not texts:
        raise _nothing_labelled(table, labels)
    numbers = [_number(text) for text in texts]
    if None not in numbers and any(isinstance(number, float) for number in numbers):
        return None
    _refuse_decimal_commas(table, texts)
    integers = sorted({number for number in numbers if isinstance(number, int)})
    if not all(isinstance(number, int) for number in numbers):
        found = tuple(sorted(set(texts), key=_natural))
        classes = _Classes(found, {name: index for index, name in enumerate(found)})
    elif labels.names and integers[0] >= 0 and all(str(number) in labels.names for number in integers):
        ids = sorted(map(int, labels.names))
        names = tuple(labels.names[str(number)] for number in ids)
        classes = _Classes(
            names, {**{str(number): i for i, number in enumerate(ids)}, **{name: i for i, name in enumerate(names)}}
        )
    else:
        found = tuple(map(str, integers))
        classes = _Classes(found, {name: index for index, name in enumerate(found)})
    more = " (rows with -1 have no label)" if any(unlabelled) else ""
    _check_two(f"{table.path}: the labels", classes.names, more)
    return classes


def _refuse_decimal_commas(table: Table, texts: Sequence[str]) -> None:
    commas = [text for text in texts if _DECIMAL_COMMA.fullmatch(text)]
    if commas and all(_number(text.replace(",", ".")) is not None for text in texts):
        raise DataError(f"{table.path}: label {shown(commas[0])} has a decimal comma; write a point")


def _nothing_labelled(table: Table, labels: _Labels) -> DataError:
    found = f"all labels in {listed([labels.column])} are -1" if labels.found else f"{listed([labels.column])} is empty"
    return DataError(f"{table.path}: no row has a label: {found}; only predict takes such a file")


def _check_two(what: str, names: Sequence[str], more: str = "") -> None:
    if len(set(names)) < 2:
        raise DataError(f"{what} are all {shown(names[0])}{more}; at least two different ones are needed")


def _natural(text: str) -> tuple[list[str | int], str]:
    """A sort key that puts ``class2`` before ``class10``: text and numbers take turns, text first."""
    parts = re.split(r"([0-9]{1,300})", text)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], text


def _examples(table: Table, columns: tuple[str, ...], classes: _Classes | None) -> TextExamples:
    labels = _labels(table)
    minus_one = _is_minus_one(labels, classes)
    labelled = [
        row
        for row, (text, none) in enumerate(zip(labels.texts, minus_one, strict=True))
        if text is not None and not none
    ]
    if not labelled:
        raise _nothing_labelled(table, labels)
    whole = len(table.rows)
    left_out = list(table.left_out)
    if len(labelled) < whole:
        what = "rows" if whole - len(labelled) > 1 else "row"
        left_out.append(f"{whole - len(labelled)} {what} without a label{' (-1)' if any(minus_one) else ''}")
    places = [table.places[row] for row in labelled]
    texts = [labels.texts[row] or "" for row in labelled]
    chosen = Table(table.path, table.columns, places, [table.rows[row] for row in labelled])
    values = [_text_column(chosen, column) for column in columns]
    found: list[int] | list[float]
    if classes is None:
        found = _scores(chosen, texts)
        meaning = f"scores from {min(found):g} to {max(found):g}"
    else:
        found = _class_ids(chosen, texts, labels, classes)
        meaning = f"{len(classes.names)} classes: {listed(classes.names, 10)}"
        if labels.names_column is not None and set(labels.names.values()) <= set(classes.names):
            meaning += f"; named by {listed([labels.names_column])}"
    if labels.unnamed is not None:
        left_out.append(f"{listed([labels.unnamed])} (no name for each label)")
    used = {column for column in (labels.names_column, labels.unnamed) if column is not None}
    note = _note(table, columns, values, labels.column, meaning, left_out=left_out, used=used)
    return TextExamples(first=values[0], second=values[1] if len(values) == 2 else None, labels=found, note=note)


def _scores(table: Table, texts: Sequence[str]) -> list[float]:
    scores: list[float] = []
    for place, text in zip(table.places, texts, strict=True):
        number = _number(text)
        score = math.nan if number is None else float(text)
        if not math.isfinite(score):
            raise DataError(f"{table.path}, {place}: label {shown(text)}; allowed: a finite number (regression)")
        scores.append(score)
    return scores


def _class_ids(table: Table, texts: Sequence[str], labels: _Labels, classes: _Classes) -> list[int]:
    """Ids by the names beside the labels where all of these are classes, else by the labels themselves."""
    by_name = bool(labels.names) and all(
        (name := labels.names.get(str(_number(text)))) is not None and name in classes.ids for text in set(texts)
    )
    ids: list[int] = []
    for place, text in zip(table.places, texts, strict=True):
        label = classes.ids[labels.names[str(_number(text))]] if by_name else classes.id_of(text)
        if label is None:
            raise DataError(f"{table.path}, {place}: unknown label {shown(text)}; allowed: {listed(classes.names)}")
        ids.append(label)
    return ids


# What was taken for what


def _note(
    table: Table,
    columns: tuple[str, ...],
    texts: Sequence[Sequence[str]],
    label: str | None,
    meaning: str | None,
    *,
    left_out: Sequence[str] | None = None,
    used: set[str] | None = None,
) -> Note:
    remarks = f" ({', '.join(table.remarks)})" if table.remarks else ""
    empty = sum(not text.strip() for text in texts[0])
    some_empty = f" ({empty} empty)" if empty else ""
    words = [
        f"{_printable(table.path)}: {counted(len(table.rows), 'row')}{remarks}",
        f"text: {' and '.join(listed([column]) for column in columns)}{some_empty}",
    ]
    if label is not None:
        words.append(f"label: {listed([label])} ({meaning})")
    skip = {*columns, label, *(used or ())}
    unused = [
        f"{listed([column])} (row numbers)" if _is_row_number(column) else listed([column])
        for column in table.columns
        if column not in skip
    ]
    shown_unused = unused if len(unused) <= 8 else [*unused[:8], f"... ({len(unused)} columns in all)"]
    rest = [*shown_unused, *(table.left_out if left_out is None else left_out)]
    if rest:
        words.append(f"left out: {', '.join(rest)}")
    return Note("; ".join(words))


def _printable(path: Path) -> str:
    return str(path) if str(path).isprintable() else repr(str(path))

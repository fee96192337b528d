"""From a file to a table of rows: CSV, TSV, JSON, JSON Lines and Parquet, as programs really write them."""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from token_pruning.errors import DataError

FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_FIELD_LIMIT = 2**31 - 1
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_BOMS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_QUOTED = re.compile(r'"(?:[^"]|"")*+"')
_FIELD = re.compile(r'(?:"((?:[^"]|"")*+)"|([^"\t\r\n]*+))(\t|\r\n|\r|\n|\Z)')
_CONVERT = 'save it as "CSV UTF-8", or convert it: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW'


@dataclass
class Table:
    """A file's rows.

    Attributes:
        path: the file.
        columns: their names, each once.
        places: where each row stands, for messages (``line 3``, ``row 3``).
        rows: values by column; a row of JSON may lack some.
        left_out: columns and rows that were left out while reading, in words.
        remarks: what else a reader of the file should know.
        class_names: of columns with class ids whose names the file brings along, in the order of the ids.
    """

    path: Path
    columns: list[str]
    places: list[str] = field(default_factory=list)
    rows: list[dict[str, object]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    class_names: dict[str, list[str]] = field(default_factory=dict)

    def value(self, place: str, row: Mapping[str, object], column: str) -> object:
        """One cell.

        Raises:
            DataError: if the row lacks the column.
        """
        if column not in row:
            raise DataError(f"{self.path}, {place}: no {column!r}; keys found: {listed(list(row))}")
        return row[column]


def read_table(path: Path, allowed: Sequence[str] = FORMATS) -> Table:
    """Read a file by what its name ends in.

    Args:
        path: the file.
        allowed: endings to name where this one is unknown.

    Raises:
        DataError: for a file that cannot be read, is malformed or holds no rows.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise DataError(f"{path}: unknown file type {suffix!r}; allowed: {', '.join(allowed)}")
    if suffix == ".parquet":
        table = _read_parquet(path)
    elif suffix in (".csv", ".tsv"):
        table = _read_separated(path, read_text(path), suffix)
    else:
        table = _read_json(path, read_text(path), lines=suffix == ".jsonl")
    if not table.rows:
        raise DataError(f"{path}: the file holds no rows; at least one is needed")
    return table


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, or a UTF-16 one with a byte-order mark, without the mark, line ends as they are.

    Raises :class:`~token_pruning.errors.DataError` for a file that is missing, unreadable or in another encoding.
    """
    content = _read_bytes(path)
    encoding = _BOMS.get(content[:2], "utf-8-sig")
    if encoding == "utf-8-sig" and len(content) > 3 and content[:4].count(0) == 2 and content[0] != content[1]:
        raise DataError(f"{path}: looks like UTF-16 without a byte-order mark; files must be UTF-8; {_CONVERT}")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        if encoding == "utf-16":
            raise DataError(f"{path}, line {line}: not UTF-16, though the file begins as if it were") from None
        byte = error.object[error.start]
        raise DataError(
            f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8; files must be UTF-8; {_CONVERT}"
        ) from None


def split_lines(text: str) -> list[str]:
    r"""The lines of a text that ends them with ``\n``, ``\r\n``, or ``\r`` alone; empty ones at the end left out.

    Other characters that ``str.splitlines`` knows may stand in a text.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n" if "\n" in text else "\r")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def shown(value: object) -> str:
    """A value as messages show it: one line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def listed(names: Sequence[str], limit: int = 20) -> str:
    """Names as messages show them, on one line: at most ``limit`` of them, and each cut where it is long."""
    plain = [name if name.isprintable() else repr(name) for name in names[:limit]]
    text = ", ".join(name if len(name) <= 40 else name[:37] + "..." for name in plain)
    return text if len(names) <= limit else f"{text}, ... ({len(names)} in all)"


def counted(number: int, what: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def is_missing(value: object) -> bool:
    """Whether it is None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _plain(error: Exception) -> str:
    """What an error says, on one line and without control characters."""
    return "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in str(error))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _plain(error)
        raise DataError(f"{path}: cannot be read: {reason}") from None


# Separated values


def _read_separated(path: Path, text: str, suffix: str) -> Table:
    table = Table(path, [])
    if suffix == ".tsv":
        return _with_header(table, _tab_separated(table, text))
    separator, text, start = _separator(text)
    if separator != ",":
        table.remarks.append(f"separated by {_SEPARATORS[separator]}")
    return _with_header(table, _csv_rows(path, text, separator, start, spaced=_is_spaced(text, separator)))


def _separator(text: str) -> tuple[str, str, int]:
    """A CSV's separator, its text without Excel's ``sep=`` line, and the number of its first line."""
    first = text.lstrip("\r\n")
    head = re.match(r'"?sep=([,;\t])"?[ ,;\t]*(?:\r\n|\r|\n)', first)
    if head:
        return head[1], first[head.end() :], 2
    header = _bare_header(text)
    found = next((mark for mark in _SEPARATORS if mark in header), ",")
    return found, text, 1


def _bare_header(text: str) -> str:
    """The first line without what is quoted in it."""
    return re.split("[\r\n]", _QUOTED.sub("", text.lstrip("\r\n")[:100_000]), maxsplit=1)[0]


def _is_spaced(text: str, separator: str) -> bool:
    """Whether a space follows every separator of the header, as people write by hand; it is no part of the fields."""
    _, *others = _bare_header(text).split(separator)
    return bool(others) and all(column.startswith(" ") for column in others)


def _csv_rows(
    path: Path, text: str, separator: str, line: int = 1, *, spaced: bool = False
) -> list[tuple[int, list[str]]]:
    # Where rows end with \n, Python's writer (and so pandas) leaves a \r in a text unquoted, and the reverse.
    end = re.match(r"[^\r\n]*(\r\n|\r|\n)", text)
    inner, bare = {"\n": ("\r", r"\r(?!\n)"), "\r": ("\n", r"(?<!\r)\n")}.get(end[1] if end else "", ("", ""))
    stand_in = ""
    if inner and inner in text:
        stand_in = next(mark for mark in map(chr, range(0xE000, 0x110000)) if mark not in text)
        text = re.sub(bare, stand_in, text)
    # A quotation mark that opens a field and is never closed would swallow rows: `strict` makes it an error.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=spaced, strict=True)
    limit = csv.field_size_limit(_FIELD_LIMIT)
    rows: list[tuple[int, list[str]]] = []
    before = line - 1
    try:
        for fields in reader:
            if stand_in:
                fields = [field.replace(stand_in, inner) for field in fields]
            rows.append((line, fields))
            line = before + reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: {_plain(error)}; "
            "a field with quotation marks must be quoted, the marks in it doubled"
        ) from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _tab_separated(table: Table, text: str) -> list[tuple[int, list[str]]]:
    """GLUE's files do not quote: a mark is a character. A file that a CSV writer wrote quotes, and shows it."""
    if '"' in text:
        if _is_quoted(text):
            table.remarks.append("quoted")
            return _csv_rows(table.path, text, "\t")
        table.remarks.append("quotation marks are characters")
    lines = enumerate(split_lines(text), start=1)
    return [(number, line.split("\t") if line else []) for number, line in lines]


def _is_quoted(text: str) -> bool:
    """Whether a CSV writer wrote the fields: none has a bare mark, and what is quoted needs it, or the header is."""
    place, in_header, quoted_header, needless, bare_comma, commas = 0, True, True, False, False, False
    while place < len(text):
        found = _FIELD.match(text, place)
        if found is None:
            return False
        quoted, bare, end = found.groups()
        if quoted is None:
            bare_comma |= "," in bare
            quoted_header &= not (in_header and bare)
        elif not any(mark in quoted for mark in '"\t\r\n'):
            commas |= "," in quoted  # Excel quotes these
            needless |= "," not in quoted and not in_header
            needless |= in_header and not quoted_header
        in_header &= end == "\t"
        place = found.end()
    return quoted_header or not (needless or (commas and bare_comma))


def _with_header(table: Table, rows: Iterable[tuple[int, list[str]]]) -> Table:
    """The rows below their header, without what a spreadsheet or an index leaves behind."""
    filled = [(line, fields) for line, fields in rows if fields]
    while filled and not any(field.strip() for field in filled[-1][1]):
        filled.pop()
    if not filled:
        return table
    (header_line, header), *body = filled
    columns = [column.strip() for column in header]
    del columns[max(_last_filled(fields) for fields in [columns, *(fields for _, fields in body)]) :]
    _check_names(table.path, columns, f", line {header_line}")
    named = [(place, column) for place, column in enumerate(columns) if column]
    table.left_out += [
        "a column without a name"
        for place, column in enumerate(columns)
        if not column and any(len(fields) > place and fields[place] for _, fields in body)
    ]
    table.columns += [column for _, column in named]
    for line, fields in body:
        if len(fields) < len(columns) or any(fields[len(columns) :]):
            expected = f"{len(columns)} ({listed(columns)})"
            raise DataError(f"{table.path}, line {line}: columns found: {len(fields)}; expected: {expected}")
        table.places.append(f"line {line}")
        table.rows.append({column: fields[place] for place, column in named})
    return table


def _last_filled(fields: Sequence[str]) -> int:
    """How many fields there are up to the last one that is not empty."""
    return next((place for place in range(len(fields), 0, -1) if fields[place - 1]), 0)


def _check_names(path: Path, columns: Sequence[str], place: str = "") -> None:
    for column, count in Counter(columns).items():
        if count > 1 and column:
            raise DataError(f"{path}{place}: the column {shown(column)} stands twice; columns: {listed(columns)}")


# JSON


class _TwiceError(ValueError):
    """A key that stands twice in an object."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _TwiceError(f"the key {shown(twice)} stands twice in an object")
    return found


def _parse(path: Path, text: str, line: int | None = None) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {line or error.lineno}: not JSON: {error.msg}") from None
    except _TwiceError as error:
        raise DataError(f"{path}{'' if line is None else f', line {line}'}: {error}") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else _plain(error)
        raise DataError(f"{path}{'' if line is None else f', line {line}'}: not JSON: {reason}") from None


def _read_json(path: Path, text: str, *, lines: bool) -> Table:
    if lines and text.lstrip()[:1] == "[":  # a list under the other name
        lines = False
    elif not lines and _holds_lines(text):  # `datasets` calls these .json
        lines = True
    if not lines:
        return _oriented(path, _parse(path, text))
    return _objects(
        path,
        [
            (f"line {number}", _parse(path, line, number))
            for number, line in enumerate(split_lines(text), start=1)
            if line.strip()
        ],
    )


def _holds_lines(text: str) -> bool:
    """Whether the first line is an object by itself, and something follows it."""
    lines = split_lines(text.lstrip())
    if len(lines) < 2 or not lines[0].startswith("{"):
        return False
    try:
        return isinstance(json.loads(lines[0]), dict)
    except (ValueError, RecursionError):
        return False


def _oriented(path: Path, content: object) -> Table:
    """The rows of a list of objects, or of what pandas' to_json writes for another `orient`."""
    allowed = "allowed: a list of objects such as {'text': ..., 'label': ...}"
    if isinstance(content, list):
        if content and all(isinstance(row, list) for row in content):
            raise DataError(f"{path}: lists without names of columns (orient 'values'); {allowed} (orient 'records')")
        return _objects(path, [(f"row {number}", row) for number, row in enumerate(content, start=1)])
    if not isinstance(content, dict):
        raise DataError(f"{path}: {'null' if content is None else shown(content)} at the top; {allowed}")
    keys = set(content)
    if keys == {"data"} or keys == {"schema", "data"}:
        return _without_index(_oriented(path, content["data"]), content.get("schema"))
    if {"columns", "data"} <= keys <= {"columns", "index", "data"}:
        return _split(path, content["columns"], content["data"])
    values = list(content.values())
    if values and all(isinstance(value, list) for value in values):
        return _by_column(path, content)
    if values and all(isinstance(value, dict) for value in values):
        return _dict_of_dicts(path, content)
    if values and not any(isinstance(value, dict | list) for value in values):
        return _objects(path, [("row 1", content)])  # JSON Lines with one line
    raise DataError(f"{path}: an object with the keys {listed(list(content)) or 'none'} at the top; {allowed}")


def _without_index(table: Table, schema: object) -> Table:
    """Without the columns that a table schema calls the index."""
    key = schema.get("primaryKey") if isinstance(schema, dict) else None
    for column in key if isinstance(key, list) else []:
        if column in table.columns:
            table.columns.remove(column)
            table.left_out.append(f"{listed([column])} (the index)")
    return table


def _split(path: Path, columns: object, data: object) -> Table:
    if not isinstance(columns, list) or not all(isinstance(column, str) for column in columns):
        raise DataError(f"{path}: 'columns' is {shown(columns)}; allowed: a list of names")
    _check_names(path, columns)
    if not isinstance(data, list):
        raise DataError(f"{path}: 'data' is {shown(data)}; allowed: a list of lists")
    rows: list[tuple[str, object]] = []
    for number, row in enumerate(data, start=1):
        if not isinstance(row, list) or len(row) != len(columns):
            raise DataError(f"{path}, row {number}: {shown(row)}; allowed: a list of {len(columns)} values")
        rows.append((f"row {number}", dict(zip(columns, row, strict=True))))
    return _objects(path, rows)


def _by_column(path: Path, content: Mapping[str, Any]) -> Table:
    lengths = {name: len(values) for name, values in content.items()}
    if len(set(lengths.values())) > 1:
        found = listed([f"{name} {length}" for name, length in lengths.items()])
        raise DataError(f"{path}: columns of different lengths: {found}; they must be equal")
    rows = zip(*content.values(), strict=True)
    return _objects(
        path, [(f"row {number}", dict(zip(content, row, strict=True))) for number, row in enumerate(rows, start=1)]
    )


def _dict_of_dicts(path: Path, content: Mapping[str, Any]) -> Table:
    """Columns of rows (`orient="columns"`, pandas' default), or rows of columns (`orient="index"`).

    Row numbers tell which; they are digits, and names of columns are not.
    """
    outer = all(key.isdecimal() for key in content)
    inner = all(key.isdecimal() for value in content.values() for key in value)
    if outer == inner:
        raise DataError(
            f"{path}: an object of objects; without row numbers (0, 1, ...) columns and rows cannot be told apart; "
            "allowed: a list of objects (orient 'records')"
        )
    if outer:
        return _objects(path, [(f"row {number}", row) for number, row in enumerate(content.values(), start=1)])
    first, *others = content.values()
    if any(list(other) != list(first) for other in others):
        raise DataError(f"{path}: the columns {listed(list(content))} have different rows; they must have the same")
    return _by_column(path, {name: list(values.values()) for name, values in content.items()})


def _objects(path: Path, rows: Sequence[tuple[str, object]]) -> Table:
    table = Table(path, [])
    columns: dict[str, None] = {}
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}, {place}: {shown(row)}; allowed: an object such as {{'text': ..., 'label': ...}}")
        columns.update(dict.fromkeys(row))
        table.places.append(place)
        table.rows.append(row)
    table.columns.extend(columns)
    return table


# Parquet


def _read_parquet(path: Path) -> Table:
    content = _read_bytes(path)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs the package pyarrow: pip install token-pruning[train]") from None
    try:
        found = pyarrow.parquet.read_table(pyarrow.BufferReader(content), page_checksum_verification=True)
        found.validate(full=True)
        names = [str(name) for name in found.column_names]
        columns = [column.to_pylist() for column in found.columns]
        metadata = {key: json.loads(value) for key, value in (found.schema.metadata or {}).items() if key in _METADATA}
    except Exception as error:  # a damaged file fails in many ways
        reason = _plain(error)[:200] or type(error).__name__
        raise DataError(f"{path}: cannot be read as Parquet: {reason}") from None
    _check_names(path, names)
    table = _by_column(path, dict(zip(names, columns, strict=True)))
    if not table.rows:
        table.columns.extend(names)
    table.class_names = _class_features(metadata.get(b"huggingface"))
    return _without_index(table, {"primaryKey": _pandas_index(metadata.get(b"pandas"))})


_METADATA = (b"huggingface", b"pandas")


def _at(value: object, *keys: str) -> Any:
    """What stands under the keys, one below the other; None where something else does."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _class_features(metadata: object) -> dict[str, list[str]]:
    """The names of the classes that `datasets` writes into a file, by column."""
    features = _at(metadata, "info", "features")
    names = {column: _at(feature, "names") for column, feature in _items(features)}
    return {
        column: found
        for column, found in names.items()
        if isinstance(found, list) and all(isinstance(name, str) for name in found)
    }


def _pandas_index(metadata: object) -> list[str]:
    found = _at(metadata, "index_columns")
    return [column for column in found if isinstance(column, str)] if isinstance(found, list) else []


def _items(value: object) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, dict) else ()

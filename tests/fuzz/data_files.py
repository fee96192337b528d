"""Random data files, written as programs write them and then damaged: read right, or refused with one line.

``python -m tests.fuzz.data_files --seconds 600 --seed 0``
"""

import argparse
import csv
import io
import json
import random
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from token_pruning.errors import ConfigError, DataError
from token_pruning.lab.data import GLUE_TASKS, load_files, load_glue_folder, load_unlabelled
from token_pruning.lab.data.files import _number

try:
    import pandas
except ImportError:
    pandas = None
try:
    import pyarrow
    import pyarrow.parquet
except ImportError:
    pyarrow = None

PAIRS = [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("Query", "Passage")]
SINGLES = ["sentence", "text", "Text", "review", "abstract"]
PIECES = [
    "good", "bad", "a", "naïve", "שלום", "日本", "😀", "e\u0301", "\u2028", "\x85", "\x0b", "\x0c", "\x1c",
    "\0", "\ufeff", " ", "  ", ",", ";",
    "'", '"', '""', "\\", "\\n", "|", "=", "sep=;", "#", "null", "nan", "NaN", "None", "{", "[", "}",
    "-", "\u200f", "\xa0",
]  # fmt: skip
BREAKS = ["\n", "\r\n", "\t", "\r"]
LABELS: list[list[Any]] = [
    [0, 1], [0, 1, 2], [1, 2, 3, 4, 5], [0.0, 1.0], [0.5, 1.25, -1.0], [-2, -1, 0], [True, False],
    ["neg", "pos"], ["entailment", "neutral", "contradiction"], ["B", "class10", "class2"],
    ["a,b", 'say "x"'], ["ä", "ß"],
]  # fmt: skip


MARKS = [
    b'"', b",", b"\t", b"\n", b"\r", b";", b"\0", b"\xff", b"{", b"}", b"[", b"]", b":", b"-1", b"null", b"NaN",
    b"1e999", b"9" * 400, b"\\ud800", b"\xed\xa0\x80", b"\xff\xfe", b"\xef\xbb\xbf", b'""',
]  # fmt: skip
ODD: list[Any] = [
    None, -1, "", "nan", float("nan"), float("inf"), "-1", 1e300, 10**30, "1,5", [1], {"a": 1}, " ", "\t", "x" * 5000,
    True,
]  # fmt: skip


@dataclass
class Rows:
    """A table and what should be read from it."""

    texts: tuple[str, ...]
    label: str
    columns: list[str]
    rows: list[dict[str, Any]]

    def texts_of(self, rows: list[dict[str, Any]]) -> list[list[str]]:
        return [[row[name] for row in rows] for name in self.texts]

    def labelled(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row[self.label] is not None and not self.without_label(row)]

    def without_label(self, row: dict[str, Any]) -> bool:
        return row[self.label] == -1 and all(_at_least_minus_one(other[self.label]) for other in self.rows)


@dataclass
class Tally:
    """What became of the cases."""

    cases: int = 0
    read: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def summary(self) -> str:
        return (
            f"{self.cases} cases: {self.read} read, {self.refused.total()} refused with one line, "
            f"{len(self.failures)} failures"
        )


def _at_least_minus_one(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and value >= -1 and value == int(value))


def random_text(rng: random.Random, breaks: bool) -> str:
    pieces = PIECES + BREAKS if breaks else PIECES
    return "".join(rng.choice(pieces) for _ in range(rng.randint(0, 6)))


def random_rows(rng: random.Random, *, breaks: bool = True, plain: bool = False) -> Rows:
    """A table; ``plain`` has nothing that a format writes in several ways."""
    texts = rng.choice(PAIRS) if rng.random() < 0.4 else (rng.choice(SINGLES),)
    label = rng.choice(["label", "label", "labels", "target", "class", "Label"])
    labels = rng.choice(LABELS)
    extra = [] if plain else rng.sample(["idx", "id", "", "Unnamed: 0", "__index_level_0__"], rng.choice([0, 0, 1, 2]))
    columns = [*texts, label]
    rng.shuffle(columns)
    columns = [*extra, *columns] if rng.random() < 0.7 else [*columns, *extra]
    rows = []
    for number in range(rng.randint(2, 6)):
        row: dict[str, Any] = dict.fromkeys(extra, number)
        row |= {name: random_text(rng, breaks) + rng.choice(["x", "good", "é"]) for name in texts}
        row[label] = labels[number % len(labels)] if number < 2 else rng.choice(labels)
        if number >= 2 and rng.random() < 0.15:
            whole = all(type(value) is int and value >= 0 for value in labels)
            row[label] = -1 if whole and rng.random() < 0.5 else None
        rows.append({name: row[name] for name in columns})
    return Rows(texts, label, columns, rows)


# Writers: bytes, and the ending of a name


def write_csv(rng: random.Random, table: Rows) -> tuple[bytes, str]:
    suffix, delimiter = rng.choice([(".csv", ","), (".csv", ";"), (".tsv", "\t"), (".csv", "\t")])
    out = io.StringIO()
    quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
    # Python does not quote a bare line feed in a file whose rows end with \r; nothing that ends them so does that.
    no_feeds = not any("\n" in str(value) for row in table.rows for value in row.values())
    end = rng.choice(["\n", "\r\n", "\r" if no_feeds else "\n"])
    writer = csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator=end)
    trailing = [""] * rng.choice([0, 0, 0, 1, 3])
    writer.writerow([*table.columns, *trailing])
    for row in table.rows:
        writer.writerow([*row.values(), *trailing])
    for _ in range(rng.choice([0, 0, 1, 2])):
        writer.writerow([""] * max(2, len(table.columns)))
    return encoded(rng, out.getvalue()), suffix


def encoded(rng: random.Random, text: str) -> bytes:
    return text.encode(rng.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"]))


def write_json(rng: random.Random, table: Rows) -> tuple[bytes, str]:
    kind = rng.choice(["records", "lines", "lines", "columns", "index", "split", "lists", "table"])
    numbered = {str(number): row for number, row in enumerate(table.rows)}
    if kind == "lines":
        lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in table.rows]
        end = rng.choice(["\n", "\r\n", "\n\n", "\r"])
        return encoded(rng, end.join(lines) + rng.choice(["", end])), rng.choice([".jsonl", ".jsonl", ".json"])
    contents: dict[str, Any] = {
        "records": table.rows,
        "columns": {name: {number: row[name] for number, row in numbered.items()} for name in table.columns},
        "index": numbered,
        "lists": {name: [row[name] for row in table.rows] for name in table.columns},
        "split": {
            "columns": table.columns, "index": list(numbered), "data": [list(row.values()) for row in table.rows]
        },
        "table": {
            "schema": {"primaryKey": ["number"]},
            "data": [{"number": number, **row} for number, row in enumerate(table.rows)],
        },
    }  # fmt: skip
    text = json.dumps(contents[kind], ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
    return encoded(rng, text), rng.choice([".json", ".json", ".jsonl" if kind == "records" else ".json"])


def write_pandas(rng: random.Random, table: Rows) -> tuple[bytes, str]:
    frame = pandas.DataFrame(table.rows, columns=table.columns)
    how = rng.choice(["csv", "tsv", "records", "columns", "index", "split", "table", "lines", "parquet"])
    if how in ("csv", "tsv"):
        separator = "," if how == "csv" else "\t"
        text = frame.to_csv(index=rng.random() < 0.5, sep=separator, lineterminator=rng.choice(["\n", "\r\n"]))
        return encoded(rng, text), f".{how}"
    if how == "parquet":
        out = io.BytesIO()
        frame.to_parquet(out, index=rng.choice([None, True, False]))
        return out.getvalue(), ".parquet"
    if how == "lines":
        return frame.to_json(orient="records", lines=True).encode(), ".jsonl"
    return frame.to_json(orient=how, force_ascii=rng.random() < 0.5).encode(), ".json"


def write_parquet(rng: random.Random, table: Rows) -> tuple[bytes, str]:
    columns = {name: [row[name] for row in table.rows] for name in table.columns}
    found = pyarrow.table(columns)
    if rng.random() < 0.3:
        place = found.column_names.index(table.texts[0])
        found = found.set_column(place, table.texts[0], found[place].dictionary_encode())
    out = io.BytesIO()
    compression = rng.choice(["snappy", "none", "gzip", "zstd"])
    pyarrow.parquet.write_table(found, out, compression=compression, write_page_checksum=True)
    return out.getvalue(), ".parquet"


# Damage


def damage(rng: random.Random, content: bytes) -> bytes:
    """Bytes flipped, cut out, put in, doubled or moved."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        place = rng.randrange(len(data) + 1)
        end = min(len(data), place + rng.randint(1, 9))
        how = rng.randrange(7)
        if how == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[place:end]
        elif how == 2:
            data[place:place] = data[place:end]
        elif how == 3:
            del data[place:]
        elif how == 4:
            data[place:place] = rng.choice(MARKS)
        elif how == 5:
            data[place:end] = bytes(rng.randrange(256) for _ in range(end - place))
        else:
            names = [b"label", b"text", b"sentence", b"idx", b"label_text", b"data", b"columns", b"score"]
            old, new = rng.sample(names, 2)
            data = bytearray(bytes(data).replace(old, new, 1))
    return bytes(data)


def odd_values(rng: random.Random, table: Rows) -> None:
    """Values and columns that a table should not have, or need not."""
    for _ in range(rng.randint(1, 3)):
        row = rng.choice(table.rows)
        how = rng.randrange(5)
        if how == 0:
            row[rng.choice(table.columns)] = rng.choice(ODD)
        elif how == 1:
            row[table.label] = rng.choice(ODD)
        elif how == 2 and "label_text" not in table.columns:
            table.columns.append("label_text")
            for each in table.rows:
                each["label_text"] = rng.choice(ODD) if rng.random() < 0.1 else f"name of {each[table.label]}"
        elif how == 3:
            value = rng.choice(ODD)
            for each in table.rows:
                each[table.label] = value
        else:
            name = rng.choice(["score", "title", "label", "text", "sentence2", "labels", "\n", "x" * 300, " text "])
            if name not in table.columns:
                table.columns.append(name)
                for each in table.rows:
                    each[name] = rng.choice([1, "words here", None])


# Oracles


def as_names(values: list[Any]) -> list[Any]:
    """Labels as a reader of text sees them: numbers by their value, names by their text."""
    return [number if (number := _number(str(value).strip())) is not None else str(value).strip() for value in values]


def differences(table: Rows, path: Path) -> str | None:
    """How what is read differs from what was written; None if it does not."""
    texts = table.texts_of(table.labelled())
    labels = [row[table.label] for row in table.labelled()]
    data = load_files(None, path)
    examples = data.validation["validation"]
    found_texts = [examples.first] if examples.second is None else [examples.first, examples.second]
    if found_texts != texts:
        return f"texts are {found_texts}, not {texts}"
    names = data.task.labels
    found = list(examples.labels or []) if names is None else [names[int(label)] for label in examples.labels or []]
    if as_names(found) != as_names(labels):
        return f"labels are {found}, not {labels}"
    unlabelled, texts = load_unlabelled(path), table.texts_of(table.rows)
    if [unlabelled.first, *([] if unlabelled.second is None else [unlabelled.second])] != texts:
        return "load_unlabelled reads other texts"
    note = examples.note.text
    if not note or len(note.splitlines()) != 1 or table.label not in note:
        return f"the note is {note!r}"
    # pandas ends a row at a bare carriage return, also where it wrote one itself.
    plain = not any(mark in text for column in texts for text in column for mark in "\r\0")
    if path.suffix == ".csv" and pandas is not None and plain:
        return pandas_reads_otherwise(path, table, texts, note)
    return None


def pandas_reads_otherwise(path: Path, table: Rows, texts: list[list[str]], note: str) -> str | None:
    separator = ";" if "semicolons" in note else "\t" if "tabs" in note else ","
    encoding = "utf-16" if path.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    frame = pandas.read_csv(
        path, sep=separator, dtype=str, keep_default_na=False, encoding=encoding, engine="python", on_bad_lines="error"
    )
    rows = len(texts[0])
    for name, values in zip(table.texts, texts, strict=True):
        if name in frame and frame[name].tolist()[:rows] != values:
            return f"pandas reads {name} as {frame[name].tolist()}, not {values}"
    return None


def one_line(call: Callable[[], Any], tally: Tally) -> str | None:
    """Run it: None if it gave a result, or an error with one line; else what is wrong."""
    try:
        call()
    except (DataError, ConfigError) as error:
        message = str(error)
        if len(message.splitlines()) != 1 or not message.isprintable() or len(message) > 2000:
            return f"the message is {message!r}"
        tally.refused[message.split(": ", 1)[-1][:20]] += 1
    except Exception:
        return traceback.format_exc()
    else:
        tally.read += 1
    return None


def run_case(seed: int, folder: Path, tally: Tally) -> None:
    """One file: whole and read again, or damaged."""
    rng = random.Random(seed)
    tally.cases += 1
    writers = [write_csv, write_json]
    if pandas is not None:
        writers.append(write_pandas)
    if pyarrow is not None:
        writers.append(write_parquet)
    writer = rng.choice(writers)
    whole = rng.random() < 0.4
    table = random_rows(rng, plain=rng.random() < 0.3)
    if not whole and rng.random() < 0.4:
        odd_values(rng, table)
    try:
        content, suffix = writer(rng, table)
    except Exception as error:  # a format cannot hold every odd value
        if not whole and (
            isinstance(error, ValueError | TypeError | OverflowError) or type(error).__module__.startswith("pyarrow")
        ):
            return
        raise
    if not whole and rng.random() < 0.8:
        content = damage(rng, content)
    path = folder / f"case{suffix}"
    path.write_bytes(content)
    wrong: str | None
    if whole:
        try:
            wrong = differences(table, path)
            tally.read += 1
        except Exception:
            wrong = traceback.format_exc()
    else:
        labels: list[str] | None = rng.choice([None, None, [], ["LABEL_0", "LABEL_1"], ["neg", "pos"]])
        wrong = one_line(lambda: load_files(path if seed % 3 == 0 else None, path, labels=labels), tally)
        wrong = wrong or one_line(lambda: load_unlabelled(path), Tally())
    if wrong is not None:
        tally.failures.append(f"seed {seed}, {writer.__name__}, {path.name}: {wrong}\n  {content[:400]!r}")


def glue_case(rng: random.Random, folder: Path, tally: Tally) -> None:
    """A damaged file in GLUE's layout, or one with another line end, read as the task and as a file of one's own."""
    task = GLUE_TASKS["SST2"]
    tally.cases += 1
    rows = [(random_text(rng, False).replace("\t", " ") + "x", rng.choice("01") if i > 1 else str(i)) for i in range(5)]
    end = rng.choice(["\n", "\r\n", "\r"])
    content = end.join(["sentence\tlabel", *("\t".join(row) for row in rows)]).encode() + end.encode()
    path = folder / task.folder / "dev.tsv"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    found = [load_glue_folder(task, folder, need_train=False), load_files(None, path)]
    for data in found:
        examples = data.validation["validation"]
        if list(zip(examples.first, map(str, examples.labels or []), strict=True)) != rows:
            tally.failures.append(f"GLUE: {rows} is read as {examples.first}, {examples.labels}")
    path.write_bytes(damage(rng, content))
    wrong = one_line(lambda: load_glue_folder(task, folder, need_train=False), tally)
    if wrong is not None:
        tally.failures.append(f"GLUE: {wrong}\n  {path.read_bytes()!r}")


def fuzz(seeds: Any, seconds: float | None = None) -> Tally:
    """Run cases until they, or the time, end."""
    tally, end = Tally(), None if seconds is None else time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        for seed in seeds:
            if end is not None and time.monotonic() > end:
                break
            if seed % 20:
                run_case(seed, Path(name), tally)
            else:
                glue_case(random.Random(seed), Path(name), tally)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    first = arguments.seed * 10**9
    tally = fuzz(range(first, first + 10**9), arguments.seconds)
    for failure in tally.failures[:20]:
        print(failure)
    print(tally.summary())
    raise SystemExit(bool(tally.failures))


if __name__ == "__main__":
    main()

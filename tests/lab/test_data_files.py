import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from token_pruning.errors import DataError
from token_pruning.lab.data.files import load_files, load_unlabelled
from token_pruning.lab.data.tasks import TextExamples

Writer = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def failure(train: Path | None, validation: Path, labels: Sequence[str] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        load_files(train, validation, labels=labels)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Formats


ROWS = [
    {"sentence1": 'He said "no",\nthen left.', "sentence2": "A\tb", "label": "yes"},
    {"sentence1": "Größe", "sentence2": "", "label": "no"},
]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".CSV"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
def test_formats(tmp_path: Path, suffix: str, mark: str) -> None:
    path = tmp_path / f"dev{suffix}"
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        if suffix == ".json":
            json.dump(ROWS, file)
        elif suffix == ".jsonl":
            file.write("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
        else:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    data = load_files(None, path)
    assert data.task.name == "custom"
    assert data.task.labels == ("no", "yes")
    assert data.task.best_metric == "accuracy"
    assert data.train is None
    expected = TextExamples(['He said "no",\nthen left.', "Größe"], ["A\tb", ""], [1, 0])
    assert data.validation == {"validation": expected}
    unlabelled = load_unlabelled(path)
    assert (unlabelled.first, unlabelled.second, unlabelled.labels) == (expected.first, expected.second, None)


@given(
    st.lists(
        st.tuples(st.text(st.characters(codec="utf-8"), max_size=12), st.sampled_from(["a", "b"])), min_size=2
    ).filter(lambda rows: len({label for _, label in rows}) == 2)
)
def test_csv_and_json_hold_any_text(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    with (folder / "dev.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    (folder / "dev.jsonl").write_text("\n".join(lines))
    expected = TextExamples([text for text, _ in rows], None, ["ab".index(label) for _, label in rows])
    for name in ("dev.csv", "dev.jsonl"):
        assert load_files(None, folder / name).validation["validation"] == expected


def test_a_field_may_be_long(write: Writer) -> None:
    path = write("dev.csv", "text,label\n" + "x" * 200_000 + ",a\ny,b\n")
    limit = csv.field_size_limit(1000)
    try:
        assert len(load_files(None, path).validation["validation"].first[0]) == 200_000
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(limit)


# Columns


@pytest.mark.parametrize(
    ("header", "first", "second"),
    [
        ("idx,sentence,label", 1, None),
        ("label,text,title,url", 1, None),
        ("id,sentence1,label", 1, None),
        ("sentence2,sentence1,label", 1, 0),
        ("sentence2,label,text", 2, 0),
        ("sentence,question,label", 1, 0),
        ("question2,question1,label,extra", 1, 0),
        ("hypothesis,premise,labels", 1, 0),
        ("query,document,label", 0, 1),
        ("x,passage,query,label", 2, 1),
        ("review,label", 0, None),
        ("label,body,head", 1, 2),
        ("review,labels", 0, None),
        (",idx,review,label", 2, None),
    ],
)
def test_text_columns(write: Writer, header: str, first: int, second: int | None) -> None:
    names = header.split(",")
    rows = [",".join(f"{label}" if name.startswith("label") else f"{name}!" for name in names) for label in "ab"]
    path = write("dev.csv", "\n".join([header, *rows]))
    examples = load_files(None, path).validation["validation"]
    assert examples.first == [f"{names[first]}!"] * 2
    assert examples.second == (None if second is None else [f"{names[second]}!"] * 2)
    assert examples.labels == [0, 1]


def test_columns_that_do_not_fit(write: Writer) -> None:
    path = write("dev.csv", "a,b,c,label\n1,2,3,x\n")
    assert failure(None, path).startswith(
        f"{path}: cannot tell the text columns; columns found: a, b, c, label; allowed"
    )
    path = write("dev.csv", "label\nx\n")
    assert failure(None, path).startswith(f"{path}: cannot tell the text columns; columns found: label; allowed")
    path = write("dev.csv", "text,kind\na,x\n")
    assert failure(None, path).startswith(
        f"{path}: no label column; columns found: text, kind; allowed: label or labels"
    )
    path = write("dev.csv", "text,class,score\na,x,1\n")
    assert failure(None, path) == f"{path}: class, score may each be the label; call the one that is: label"
    path = write("dev.csv", "text,text,label\na,b,x\n")
    assert failure(None, path) == f"{path}, line 1: the column 'text' stands twice; columns: text, text, label"


def test_train_and_validation_must_agree(write: Writer) -> None:
    train = write("train.csv", "premise,hypothesis,label\na,b,0\na,b,1\n")
    dev = write("dev.csv", "premise,label\na,0\n")
    assert failure(train, dev) == f"{dev}: text columns premise; those of {train} are premise, hypothesis"


# Labels


@pytest.mark.parametrize(
    ("values", "classes", "ids"),
    [
        (["10", "9", "-2", "-1"], ("-2", "-1", "9", "10"), [3, 2, 0, 1]),
        (["1.0", "0", "2"], ("0", "1", "2"), [1, 0, 2]),
        (["class10", "class2", "B"], ("B", "class2", "class10"), [2, 1, 0]),
        (["yes", "1", "0.5"], ("0.5", "1", "yes"), [2, 1, 0]),
        ([" b", "a ", "b"], ("a", "b"), [1, 0, 1]),
        (["1_0", "1", "2"], ("1", "1_0", "2"), [1, 0, 2]),
    ],
)
def test_classes_in_natural_order(write: Writer, values: list[str], classes: tuple[str, ...], ids: list[int]) -> None:
    data = load_files(None, write("dev.csv", "text,label\n" + "".join(f"t,{value}\n" for value in values)))
    assert data.task.labels == classes
    assert data.task.num_labels == len(classes)
    assert data.validation["validation"].labels == ids


def test_json_labels_may_be_numbers(write: Writer) -> None:
    rows = [{"text": "a", "label": 3}, {"text": "b", "label": 1.0}, {"text": "c", "label": "3"}]
    data = load_files(None, write("dev.json", json.dumps(rows)))
    assert data.task.labels == ("1", "3")
    assert data.validation["validation"].labels == [1, 0, 1]


def test_classes_come_from_the_training_file(write: Writer) -> None:
    train = write("train.csv", "text,label\nx,c\ny,a\nz,b\n")
    dev = write("dev.jsonl", '{"text": "t", "label": "c"}\n\n{"text": "u", "label": "d"}\n')
    assert failure(train, dev) == f"{dev}, line 3: unknown label 'd'; allowed: a, b, c"
    dev = write("dev.json", '[{"text": "t", "label": "c"}]')
    data = load_files(train, dev)
    assert data.train == TextExamples(["x", "y", "z"], None, [2, 0, 1])
    assert data.validation["validation"].labels == [2]


def test_given_labels_keep_their_order(write: Writer) -> None:
    dev = write("dev.csv", "text,label\nx,pos\ny,neg\n")
    data = load_files(None, dev, labels=["pos", "neutral", "neg"])
    assert data.task.labels == ("pos", "neutral", "neg")
    assert data.validation["validation"].labels == [0, 2]
    assert failure(None, dev, ["a", "b"]) == f"{dev}, line 2: unknown label 'pos'; allowed: a, b"
    assert failure(dev, dev, ["pos"]) == (
        f"{dev}: the labels given are all 'pos'; at least two different ones are needed"
    )


def test_given_default_labels_match_ids(write: Writer) -> None:
    dev = write("dev.csv", "text,label\nx,1\ny,LABEL_0\nz,0.0\n")
    data = load_files(None, dev, labels=["LABEL_0", "LABEL_1"])
    assert data.task.labels == ("LABEL_0", "LABEL_1")
    assert data.validation["validation"].labels == [1, 0, 0]
    assert "unknown label '1'; allowed: yes, no" in failure(None, dev, ["yes", "no"])


def test_regression(write: Writer) -> None:
    train = write("train.csv", "text,label\nx,1\ny,2.5\nz,-1e-1\n")
    dev = write("dev.csv", "text,label\nx,1\ny,3\n")
    data = load_files(train, dev)
    assert data.task.labels is None
    assert data.task.num_labels == 1
    assert data.task.best_metric == "combined_score"
    assert data.train is not None
    assert data.train.labels == [1.0, 2.5, -0.1]
    assert data.validation["validation"].labels == [1.0, 3.0]
    assert load_files(None, dev).task.labels == ("1", "3")
    assert load_files(None, dev, labels=[]).task.labels is None


@pytest.mark.parametrize("value", ["much", "inf", "1e999"])
def test_regression_needs_numbers(write: Writer, value: str) -> None:
    train = write("train.csv", "text,label\nx,1\ny,2.5\n")
    dev = write("dev.csv", f"text,label\nx,1\ny,{value}\n")
    assert failure(train, dev) == f"{dev}, line 3: label {value!r}; allowed: a finite number (regression)"


def test_a_missing_score_does_not_turn_regression_into_classes(write: Writer) -> None:
    data = load_files(None, write("train.csv", "text,label\nx,1\ny,2.5\nz,nan\n"))
    assert data.validation["validation"] == TextExamples(["x", "y"], None, [1.0, 2.5])


@pytest.mark.parametrize("value", ["[1]", '"\\udfff"'])
def test_labels_that_are_none(write: Writer, value: str) -> None:
    dev = write("dev.json", f'[{{"text": "a", "label": "x"}}, {{"text": "b", "label": {value}}}]')
    message = failure(None, dev)
    assert message.startswith(f"{dev}, row 2: the label is ")
    assert message.endswith("; allowed: a name or a number")


def test_one_class_is_not_enough(write: Writer) -> None:
    dev = write("dev.csv", "text,label\nx,a\ny,a\n")
    assert failure(None, dev) == f"{dev}: the labels are all 'a'; at least two different ones are needed"


def test_many_allowed_labels_are_cut(write: Writer) -> None:
    train = write("train.csv", "text,label\n" + "".join(f"x,{label}\n" for label in range(500)))
    dev = write("dev.csv", "text,label\nx,500\n")
    assert failure(train, dev).endswith(
        "unknown label '500'; allowed: " + ", ".join(map(str, range(20))) + ", ... (500 in all)"
    )


def test_line_numbers_count_physical_lines(write: Writer) -> None:
    train = write("train.csv", "text,label\nx,a\ny,b\n")
    dev = write("dev.csv", 'text,label\r\n"two\r\nlines",a\r\n\r\nz,c\r\n')
    assert failure(train, dev) == f"{dev}, line 5: unknown label 'c'; allowed: a, b"


# Files that cannot be used


def test_missing_and_unknown_files(tmp_path: Path, write: Writer) -> None:
    good = write("good.csv", "text,label\nx,a\ny,b\n")
    missing = tmp_path / "none.csv"
    assert failure(None, missing) == f"{missing}: no such file"
    assert failure(missing, good) == f"{missing}: no such file"
    (tmp_path / "folder.csv").mkdir()
    assert failure(None, tmp_path / "folder.csv").startswith(f"{tmp_path / 'folder.csv'}: cannot be read: ")
    path = write("dev.xlsx", "")
    assert failure(None, path) == f"{path}: unknown file type '.xlsx'; allowed: .csv, .tsv, .json, .jsonl, .parquet"
    assert "cannot be read" in failure(None, Path("a\0b.csv"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", ""), ("a.tsv", "text\tlabel\n\n"), ("a.json", "[]"), ("a.jsonl", "\n \n")],
)
def test_empty_files(write: Writer, name: str, content: str) -> None:
    path = write(name, content)
    assert failure(None, path) == f"{path}: the file holds no rows; at least one is needed"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\nx,a\n\xff,b\n", ", line 3: byte 0xff is not UTF-8"),
        ("a.csv", b"text,label\nx,a\ny\n", ", line 3: columns found: 1; expected: 2 (text, label)"),
        ("a.csv", b"text,label\nx,y,a\n", ", line 2: columns found: 3; expected: 2 (text, label)"),
        ("a.csv", b'text,label\nx,a\n"open,b\nz,c\n', ", line 3: unexpected end of data; a field with quotation"),
        ("a.csv", b'text,label\n"x" y,a\n', ", line 2: ',' expected after '\"'; a field with quotation"),
        ("a.json", b'[{"text": "x",\n "label": }]', ", line 2: not JSON: "),
        ("a.json", b'"text"', ": 'text' at the top; allowed: a list of objects"),
        (
            "a.json",
            b'{"a": {"b": "x"}}',
            ": an object of objects; without row numbers (0, 1, ...) columns and rows",
        ),
        ("a.json", b'[["x", 1]]', ": lists without names of columns (orient 'values'); allowed: a list of objects"),
        ("a.json", b'{"columns": ["text"], "data": [["x", 1]]}', ", row 1: ['x', 1]; allowed: a list of 1 values"),
        ("a.json", b'{"text": ["x", "y"], "label": [1]}', ": columns of different lengths: text 2, label 1; they must"),
        ("a.json", b'[{"text": "x", "text": "y"}]', ": the key 'text' stands twice in an object"),
        ("a.csv", b"t\0e\0x\0t\0", ": looks like UTF-16 without a byte-order mark; files must be UTF-8; save it as"),
        ("a.csv", b"\xff\xfet\0e", ", line 1: not UTF-16, though the file begins as if it were"),
        ("a.csv", b"text;label\nx;1,5\ny;2\n", ": label '1,5' has a decimal comma; write a point"),
        ("a.csv", b"text,label\nx,-1\ny,-1\n", ": no row has a label: all labels in label are -1; only predict takes"),
        ("a.csv", b"text,label\nx,\ny,\n", ": no row has a label: label is empty; only predict takes such a file"),
        ("a.csv", b"text,label\nx,-1\ny,1\n", ": the labels are all '1' (rows with -1 have no label); at least two"),
        ("a.parquet", b"PAR1", ": cannot be read as Parquet: "),
        ("a.json", b'[{"text": "x", "label": "a"}, 7]', ", row 2: 7; allowed: an object such as {'text': "),
        ("a.json", b'[{"text": "x", "label": "a"}, {"label": "b"}]', ", row 2: no 'text'; keys found: label"),
        (
            "a.json",
            b'[{"text": "", "label": 0}, {"text": null, "label": 1}]',
            ", row 2: text is None; allowed: a string",
        ),
        (
            "a.json",
            b'[{"text": "\\ud800", "label": 0}, {"text": "", "label": 1}]',
            ", row 1: text is '\\ud800'; allowed: Unicode",
        ),
        ("a.json", b"[" * 100_000, ": not JSON: "),
        ("a.json", b"[" + b"1" * 5000 + b"]", ": not JSON: "),
        ("a.jsonl", b'{"text": "x", "label": "a"}\n{"text": \n', ", line 2: not JSON: "),
        ("a.jsonl", b'{"text": "x", "label": "a"}\n{"text": "y"}\n', ", line 2: no 'label'; keys found: text"),
        ("a.jsonl", b'{"text": "x", "label": 1' + b"0" * 400 + b"}\n", ", line 1: label '1000"),
        ("a.json", b'[{"a\\nb": 1, "label": 0}, {"a\\nb": 2, "label": 1}]', ", row 1: 'a\\nb' is 1; allowed: a string"),
    ],
)
def test_malformed_files(write: Writer, name: str, content: bytes, message: str) -> None:
    path = write(name, content)
    assert failure(None, path).startswith(f"{path}{message}")


# Texts without labels


def test_unlabelled_text(write: Writer) -> None:
    path = write("a.txt", '\ufeffone\r\n\r\nthree, "x"\ttab\u2028same\n\n\n')
    assert load_unlabelled(path) == TextExamples(["one", "", 'three, "x"\ttab\u2028same'], None, None)
    assert load_unlabelled(write("b.txt", "one")) == TextExamples(["one"], None, None)


def test_unlabelled_ignores_labels(write: Writer) -> None:
    path = write("a.csv", "premise,label,hypothesis\na,,b\nc,?,d\n")
    assert load_unlabelled(path) == TextExamples(["a", "c"], ["b", "d"], None)
    path = write("a.jsonl", '{"text": "x", "label": null}\n{"text": "y"}\n')
    assert load_unlabelled(path) == TextExamples(["x", "y"], None, None)


def test_unlabelled_failures(tmp_path: Path, write: Writer) -> None:
    for path, message in (
        (write("a.txt", " \n\n"), ": the file holds no sentences; at least one is needed"),
        (
            write("b.txt", b"ok\n\xfe"),
            ", line 2: byte 0xfe is not UTF-8; files must be UTF-8; save it as "
            '"CSV UTF-8", or convert it: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW',
        ),
        (write("a.pdf", ""), ": unknown file type '.pdf'; allowed: .csv, .tsv, .json, .jsonl, .parquet, .txt"),
        (tmp_path / "none.txt", ": no such file"),
    ):
        with pytest.raises(DataError) as caught:
            load_unlabelled(path)
        assert str(caught.value) == f"{path}{message}"


# What programs leave behind, and what is said of it


def parquet(path: Path, columns: dict[str, list[Any]], metadata: dict[str, Any] | None = None) -> Path:
    table = pyarrow.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({key: json.dumps(value) for key, value in metadata.items()})
    pyarrow.parquet.write_table(table, path)
    return path


CLASSES = "label: label (2 classes: 0, 1)"


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("a.csv", ",text,label\n0,x,0\n1,y,1\n", f"text: text; {CLASSES}; left out: a column without a name"),
        ("a.csv", "Unnamed: 0.1,idx,Text,label\n0,0,x,0\n1,1,y,1\n",
         f"text: Text; {CLASSES}; left out: Unnamed: 0.1 (row numbers), idx (row numbers)"),
        ("a.csv", "__index_level_0__,review,label\n7,x,0\n9,y,1\n",
         f"text: review; {CLASSES}; left out: __index_level_0__ (row numbers)"),
        ("a.csv", "year,review,label\n1999,x,0\n2001,y,1\n", f"text: review; {CLASSES}; left out: year"),
        ("a.csv", "title,review,year,tag,label\na,x,1,b,0\nb,y,2,c,1\n",
         f"text: review; {CLASSES}; left out: title, year, tag"),
        ("a.csv", "text,label,,\r\nx,0,,\r\ny,1,,\r\n,,,\r\n,,,\r\n", f"text: text; {CLASSES}"),
        ("a.csv", "sep=;\r\ntext;label\r\nx;0\r\ny;1\r\n", f"text: text; {CLASSES}"),
        ("a.csv", 'label, text\n0, "x"\n1, y\n', f"text: text; {CLASSES}"),
        ("a.csv", "text|label\nx|0\ny|1\n", f"text: text; {CLASSES}"),
        ("a.csv", "text\tlabel\rx\t0\ry\t1\r", f"text: text; {CLASSES}"),
        ("a.csv", "text;label\nx;0\ny;1\nz;-1\n", f"text: text; {CLASSES}; left out: 1 row without a label (-1)"),
        ("a.csv", "text,label\nx,0.0\ny,1.0\nz,\n,\nw,nan\n",
         f"text: text; {CLASSES}; left out: 3 rows without a label"),
        ("a.csv", "text,label,label_text\nx,0,neg\ny,1,pos\nz,-1,\n",
         "text: text; label: label (2 classes: neg, pos; named by label_text); left out: 1 row without a label (-1)"),
        ("a.csv", "text,label,label_text\nx,0,neg\ny,1,neg\n",
         f"text: text; {CLASSES}; left out: label_text (no name for each label)"),
        ("a.csv", "text,class\nx,True\ny,False\n", "text: text; label: class (2 classes: False, True)"),
        ("a.tsv", "#1 String\t#2 String\tQuality\nx\tx\t0\ny\ty\t1\n",
         "text: #1 String and #2 String; label: Quality (2 classes: 0, 1)"),
        ("a.csv", "text,score\nx,0.5\ny,1\n", "text: text; label: score (scores from 0.5 to 1)"),
        ("a.json", '{"text": "x", "label": 0}\n{"text": "y", "label": 1}\n{"text": "z", "label": null}\n',
         f"text: text; {CLASSES}; left out: 1 row without a label"),
        ("a.json", '{"text": {"0": "x", "1": "y"}, "label": {"0": 0, "1": 1}}', f"text: text; {CLASSES}"),
        ("a.json", '{"0": {"text": "x", "label": 0}, "1": {"text": "y", "label": 1}}', f"text: text; {CLASSES}"),
        ("a.json", '{"columns": ["text", "label"], "index": [0, 1], "data": [["x", 0], ["y", 1]]}',
         f"text: text; {CLASSES}"),
        ("a.json", '{"schema": {"primaryKey": ["n"]}, "data": [{"n": 0, "a": "x", "label": 0}, '
         '{"n": 1, "a": "y", "label": 1}]}', f"text: a; {CLASSES}; left out: n (the index)"),
        ("a.json", '{"text": ["x", "y"], "label": [0, 1]}', f"text: text; {CLASSES}"),
        ("a.jsonl", '[{"text": "x", "label": 0}, {"text": "y", "label": 1}]', f"text: text; {CLASSES}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_files_as_programs_write_them(tmp_path: Path, name: str, content: str, note: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode(encoding))
    examples = load_files(None, path).validation["validation"]
    assert [text.lower() for text in examples.first] == ["x", "y"]
    assert examples.labels == ([0.5, 1.0] if "scores" in note else [1, 0] if "True" in note else [0, 1])
    said = examples.note.text.split("; ", 1)
    assert said[0].startswith(f"{path}: ")
    assert said[1] == note


def test_parquet(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"text": ["x", "y", "z"], "label": [1, 0, None], "ids": [[1], [2], [3]]}
    path = parquet(tmp_path / "a.parquet", columns)
    examples = load_files(None, path).validation["validation"]
    assert examples == TextExamples(["x", "y"], None, [1, 0])
    assert examples.note.text.endswith("label: label (2 classes: 0, 1); left out: ids, 1 row without a label")
    named = {"huggingface": {"info": {"features": {"label": {"names": ["no", "maybe", "yes"]}}}}}
    data = load_files(None, parquet(tmp_path / "b.parquet", columns, named))
    assert data.task.labels == ("no", "maybe", "yes")
    assert data.validation["validation"].labels == [1, 0]
    nested = parquet(tmp_path / "c.parquet", {"text": [["x"], ["y"]], "label": [0, 1]})
    assert failure(None, nested) == f"{nested}, row 1: text is ['x']; allowed: a string"
    pandas = parquet(
        tmp_path / "d.parquet", {**columns, "key": ["a", "b", "c"]}, {"pandas": {"index_columns": ["key"]}}
    )
    assert "left out: ids, key (the index)" in load_files(None, pandas).validation["validation"].note.text


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": ["x"]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"Parquet needs the package pyarrow: pip install token-pruning\[train\]"):
        load_unlabelled(path)


def test_quotation_marks_in_tab_separated_files(write: Writer) -> None:
    glue = write("a.tsv", 'sentence\tlabel\n"Yes, he said.\t0\nsay "no"\t1\n"quoted"\t1\n')
    examples = load_files(None, glue).validation["validation"]
    assert examples.first == ['"Yes, he said.', 'say "no"', '"quoted"']
    assert "3 rows (quotation marks are characters); " in examples.note.text
    pandas = write("b.tsv", 'sentence\tlabel\n"say ""no"""\t0\n"a\tb"\t1\nplain\t1\n')
    examples = load_files(None, pandas).validation["validation"]
    assert examples.first == ['say "no"', "a\tb", "plain"]
    assert "3 rows (quoted); " in examples.note.text
    everything = write("c.tsv", '"sentence"\t"label"\n"x"\t"0"\n"y"\t"1"\n')
    assert load_files(None, everything).validation["validation"].first == ["x", "y"]
    excel = write("d.tsv", 'sentence\tlabel\r\n"Yes, he said."\t0\r\nNo.\t1\r\n')
    assert load_files(None, excel).validation["validation"].first == ["Yes, he said.", "No."]
    bare_comma = write("e.tsv", 'sentence\tlabel\n"Yes, he said."\t0\nNo, he said.\t1\n')
    assert load_files(None, bare_comma).validation["validation"].first == ['"Yes, he said."', "No, he said."]


def test_a_carriage_return_that_pandas_leaves_unquoted(write: Writer) -> None:
    path = write("a.csv", 'text,label\na\rb,0\n"c\rd, e",1\n')
    assert load_files(None, path).validation["validation"].first == ["a\rb", "c\rd, e"]


def test_names_of_classes_hold_for_the_other_file_and_for_a_checkpoint(write: Writer) -> None:
    train = write("train.csv", "text,label,label_text\nx,0,pos\ny,1,neg\n")
    dev = write("dev.csv", "text,label\nx,1\ny,0\n")
    data = load_files(train, dev)
    assert data.task.labels == ("pos", "neg")
    assert data.validation["validation"].labels == [1, 0]
    data = load_files(train, train, labels=["neg", "pos"])  # a checkpoint that has them in another order
    assert data.validation["validation"].labels == [1, 0]
    assert load_files(None, train, labels=["LABEL_0", "LABEL_1"]).validation["validation"].labels == [0, 1]
    minus = write("minus.csv", "text,label\nx,-1\ny,1\nz,0\n")
    assert load_files(None, minus, labels=["-1", "0", "1"]).validation["validation"].labels == [0, 2, 1]
    assert load_files(None, minus, labels=[]).validation["validation"].labels == [-1.0, 1.0, 0.0]


def test_texts_to_be_labelled_keep_their_places(write: Writer) -> None:
    found = load_unlabelled(write("a.jsonl", '{"text": "x", "label": -1}\n{"text": null}\n{"text": "z"}\n'))
    assert found.first == ["x", "", "z"]
    assert found.note.text.endswith("3 rows; text: text (1 empty); label: label (not used)")
    assert load_unlabelled(write("b.csv", 'text\nx\n""\nz\n')).first == ["x", "", "z"]
    assert load_unlabelled(write("c.txt", "x\r\ry\r")).first == ["x", "", "y"]
    assert load_unlabelled(write("d.csv", "words\n12\n13\n")).first == ["12", "13"]


def test_a_file_is_told_of_once(capsys: pytest.CaptureFixture[str], write: Writer) -> None:
    examples = load_unlabelled(write("a.txt", "x\n\ny\n"))
    examples.note.say()
    examples.select([0]).note.say()
    assert capsys.readouterr().err.endswith("a.txt: 3 texts, one per line, 1 of them empty\n")


def test_only_the_first_process_tells(
    capsys: pytest.CaptureFixture[str], write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    load_unlabelled(write("a.txt", "x\n")).note.say()
    assert capsys.readouterr().err == ""


def test_a_wide_header_takes_no_time_to_speak_of(write: Writer) -> None:
    commas = "," * 100_000
    assert len(load_unlabelled(write("b.csv", f"text{commas}\nx{commas}\n"))) == 1
    names = [f"c{number}" for number in range(100_000)]  # quadratic time would be minutes
    assert len(load_unlabelled(write("a.csv", ",".join([*names, "text"]) + "\n" + "x," * 100_000 + "y\n"))) == 1

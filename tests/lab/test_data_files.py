import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

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
    path = write("dev.csv", "text,class\na,x\n")
    assert failure(None, path) == f"{path}: no label column; columns found: text, class; allowed: label or labels"
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
        (["10", "9", "-1"], ("-1", "9", "10"), [2, 1, 0]),
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


@pytest.mark.parametrize("value", ["much", "nan", "1e999"])
def test_regression_needs_numbers(write: Writer, value: str) -> None:
    train = write("train.csv", "text,label\nx,1\ny,2.5\n")
    dev = write("dev.csv", f"text,label\nx,1\ny,{value}\n")
    assert failure(train, dev) == f"{dev}, line 3: label {value!r}; allowed: a finite number (regression)"


def test_a_missing_score_does_not_turn_regression_into_classes(write: Writer) -> None:
    train = write("train.csv", "text,label\nx,1\ny,2.5\nz,nan\n")
    assert failure(train, train) == f"{train}, line 4: label 'nan'; allowed: a finite number (regression)"


@pytest.mark.parametrize("value", ["null", "true", '""', "[1]", '"  "', '"\\udfff"'])
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
    assert failure(None, path) == f"{path}: unknown file type '.xlsx'; allowed: .csv, .tsv, .json, .jsonl"
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
        ("a.tsv", b'text\tlabel\nx\ta\n"open\tb\nz\tc\n', ", line 3: unexpected end of data; a field with quotation"),
        ("a.csv", b'text,label\n"x" y,a\n', ", line 2: ',' expected after '\"'; a field with quotation"),
        ("a.json", b'[{"text": "x",\n "label": }]', ", line 2: not JSON: "),
        ("a.json", b'{"text": "x"}', ": a dict at the top; allowed: a list of objects"),
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
        (write("b.txt", b"ok\n\xfe"), ", line 2: byte 0xfe is not UTF-8; files must be UTF-8"),
        (write("a.pdf", ""), ": unknown file type '.pdf'; allowed: .csv, .tsv, .json, .jsonl, .txt"),
        (tmp_path / "none.txt", ": no such file"),
    ):
        with pytest.raises(DataError) as caught:
            load_unlabelled(path)
        assert str(caught.value) == f"{path}{message}"

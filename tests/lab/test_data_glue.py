import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from token_pruning.errors import ConfigError, DataError
from token_pruning.lab.data.glue import load_glue_folder, load_glue_hub
from token_pruning.lab.data.tasks import GLUE_TASKS, Task, TextExamples, glue_task

MNLI_TEXTS = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
STSB_HEADER = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
FILES: dict[str, tuple[str, list[str], list[str]]] = {  # header, two training rows, one row of each dev file
    "RTE": (
        "index|sentence1|sentence2|label",
        ["0|A b.|C d.|not_entailment", "1|E|F|entailment"],
        ["0|G|H|entailment"],
    ),
    "MRPC": (
        "Quality|#1 ID|#2 ID|#1 String|#2 String",
        ['1|702876|702977|He said "yes".|"Yes, he said.', "0|1|2|E|F"],
        ["0|3|4|G|H"],
    ),
    "STSB": (
        STSB_HEADER.replace(" ", "|"),
        ["0|main|MSRvid|2012|0001|none|none|A|B|5.000", "1|main|MSRvid|2012|0002|none|none|C|D|3.8"],
        ["0|main|MSRvid|2012|0003|none|none|E|F|0"],
    ),
    "SST2": ("sentence|label", ["hide new secretions |0", "it 's charming |1"], ["bleak |0"]),
    "QNLI": (
        "index|question|sentence|label",
        ["0|Who?|Me.|entailment", "1|Why?|No.|not_entailment"],
        ["0|How?|So.|not_entailment"],
    ),
    "QQP": (
        "id|qid1|qid2|question1|question2|is_duplicate",
        ["0|1|2|Why?|How?|0", "1|3|4|Who?|Who is it?|1"],
        ["2|5|6|Where?|When?|1"],
    ),
    "MNLI": (
        MNLI_TEXTS.replace(" ", "|") + "|sentence1|sentence2|label1|gold_label",
        [
            "0|p|q|fiction|( A )|( B )|(ROOT A)|(ROOT B)|A|B|neutral|neutral",
            "1|p|q|g|x|x|x|x|C|D|entailment|contradiction",
        ],
        [],
    ),
}
MNLI_DEV = (
    MNLI_TEXTS.replace(" ", "|") + "|sentence1|sentence2|label1|label2|label3|label4|label5|gold_label",
    "0|p|q|slate|x|x|x|x|E|F|neutral|neutral|entailment|entailment|entailment|entailment",
    "0|p|q|verbatim|x|x|x|x|G|H|neutral|contradiction|contradiction|neutral|neutral|neutral",
)
EXPECTED: dict[str, tuple[TextExamples, list[TextExamples]]] = {
    "RTE": (
        TextExamples(["A b.", "E"], ["C d.", "F"], [1, 0]),
        [TextExamples(["G"], ["H"], [0])],
    ),
    "MRPC": (
        TextExamples(['He said "yes".', "E"], ['"Yes, he said.', "F"], [1, 0]),
        [TextExamples(["G"], ["H"], [0])],
    ),
    "STSB": (TextExamples(["A", "C"], ["B", "D"], [5.0, 3.8]), [TextExamples(["E"], ["F"], [0.0])]),
    "SST2": (
        TextExamples(["hide new secretions ", "it 's charming "], None, [0, 1]),
        [TextExamples(["bleak "], None, [0])],
    ),
    "QNLI": (TextExamples(["Who?", "Why?"], ["Me.", "No."], [0, 1]), [TextExamples(["How?"], ["So."], [1])]),
    "QQP": (TextExamples(["Why?", "Who?"], ["How?", "Who is it?"], [0, 1]), [TextExamples(["Where?"], ["When?"], [1])]),
    "MNLI": (
        TextExamples(["A", "C"], ["B", "D"], [1, 2]),
        [TextExamples(["E"], ["F"], [0]), TextExamples(["G"], ["H"], [1])],
    ),
}


def write(path: Path, *lines: str, start: str = "", end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((start + "".join(line.replace("|", "\t") + end for line in lines)).encode())
    return path


def write_task(task: Task, root: Path, *, start: str = "", end: str = "\n") -> Path:
    folder = root / task.folder
    header, train, dev = FILES[task.name]
    write(folder / "train.tsv", header, *train, start=start, end=end)
    if task.name == "MNLI":
        write(folder / "dev_matched.tsv", MNLI_DEV[0], MNLI_DEV[1], start=start, end=end)
        write(folder / "dev_mismatched.tsv", MNLI_DEV[0], MNLI_DEV[2], start=start, end=end)
    else:
        write(folder / "dev.tsv", header, *dev, start=start, end=end)
    return folder


def failure(task_name: str, root: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_glue_folder(GLUE_TASKS[task_name], root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Tasks


def test_the_seven_tasks() -> None:
    assert list(GLUE_TASKS) == ["RTE", "MRPC", "STSB", "SST2", "QNLI", "QQP", "MNLI"]
    assert [task.folder for task in GLUE_TASKS.values()] == ["RTE", "MRPC", "STS-B", "SST-2", "QNLI", "QQP", "MNLI"]
    assert [task.hub_name for task in GLUE_TASKS.values()] == ["rte", "mrpc", "stsb", "sst2", "qnli", "qqp", "mnli"]
    assert [task.num_labels for task in GLUE_TASKS.values()] == [2, 2, 1, 2, 2, 2, 3]
    assert [name for name, task in GLUE_TASKS.items() if task.is_regression] == ["STSB"]
    assert [task.labels for task in GLUE_TASKS.values()] == [
        ("entailment", "not_entailment"),
        ("not_equivalent", "equivalent"),
        None,
        ("negative", "positive"),
        ("entailment", "not_entailment"),
        ("not_duplicate", "duplicate"),
        ("entailment", "neutral", "contradiction"),
    ]
    combined = [name for name, task in GLUE_TASKS.items() if task.best_metric == "combined_score"]
    assert combined == ["MRPC", "STSB", "QQP"]
    assert all(task.best_metric in ("accuracy", "combined_score") for task in GLUE_TASKS.values())


@pytest.mark.parametrize(
    ("spelling", "name"), [("rte", "RTE"), ("STS-B", "STSB"), ("sst-2", "SST2"), ("Mnli", "MNLI"), ("stsb", "STSB")]
)
def test_glue_task_takes_any_spelling(spelling: str, name: str) -> None:
    assert glue_task(spelling) is GLUE_TASKS[name]


def test_glue_task_lists_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"'CoLA'; allowed: RTE, MRPC, STSB, SST2, QNLI, QQP, MNLI$"):
        glue_task("CoLA")


def test_examples_select_and_lengths() -> None:
    examples = TextExamples(["a", "b", "c"], ["x", "y", "z"], [0, 1, 2])
    assert len(examples) == 3
    assert examples.select([2, 0]) == TextExamples(["c", "a"], ["z", "x"], [2, 0])
    assert TextExamples(["a", "b"], None, None).select(range(1)) == TextExamples(["a"], None, None)
    with pytest.raises(DataError, match="labels has 1 entries, first has 2"):
        TextExamples(["a", "b"], None, [1])


# Official folders


@pytest.mark.parametrize("name", GLUE_TASKS)
@pytest.mark.parametrize(("start", "end"), [("", "\n"), ("\ufeff", "\r\n")], ids=["plain", "bom-crlf"])
def test_folder(tmp_path: Path, name: str, start: str, end: str) -> None:
    task = GLUE_TASKS[name]
    folder = write_task(task, tmp_path, start=start, end=end)
    train, validation = EXPECTED[name]
    data = load_glue_folder(task, tmp_path)
    assert data.task is task
    assert data.train == train
    splits = ["validation_matched", "validation_mismatched"] if name == "MNLI" else ["validation"]
    assert data.validation == dict(zip(splits, validation, strict=True))
    assert load_glue_folder(task, folder) == data


def test_folder_without_train(tmp_path: Path) -> None:
    folder = write_task(GLUE_TASKS["RTE"], tmp_path)
    (folder / "train.tsv").unlink()
    for place in (tmp_path, folder):
        data = load_glue_folder(GLUE_TASKS["RTE"], place, need_train=False)
        assert data.train is None
        assert len(data.validation["validation"]) == 1
    assert failure("RTE", tmp_path).startswith(f"{folder / 'train.tsv'}: no such file")


def test_only_line_feeds_and_tabs_separate(tmp_path: Path) -> None:
    folder = write_task(GLUE_TASKS["SST2"], tmp_path)
    texts = ["next\x85line", "a\u2028b\x0cc", '"open', "x" * 200_000]
    write(folder / "train.tsv", "sentence|label", *(f"{text}|1" for text in texts))
    train = load_glue_folder(GLUE_TASKS["SST2"], tmp_path).train
    assert train is not None
    assert train.first == texts


def test_missing_folder_and_file(tmp_path: Path) -> None:
    assert failure("MRPC", tmp_path / "none") == (
        f"{tmp_path / 'none'}: no such folder; it must hold the official GLUE folder MRPC"
    )
    assert failure("MNLI", tmp_path).startswith(f"{tmp_path / 'MNLI' / 'train.tsv'}: no such file")
    (write_task(GLUE_TASKS["MNLI"], tmp_path) / "dev_mismatched.tsv").unlink()
    assert failure("MNLI", tmp_path).startswith(f"{tmp_path / 'MNLI' / 'dev_mismatched.tsv'}: no such file")


def test_missing_column(tmp_path: Path) -> None:
    path = write_task(GLUE_TASKS["QNLI"], tmp_path) / "train.tsv"
    write(path, "index|question|text|label", "0|a|b|entailment")
    assert failure("QNLI", tmp_path) == (
        f"{path}, line 1: no column 'sentence'; columns found: index, question, text, label"
    )


def test_short_and_long_rows(tmp_path: Path) -> None:
    path = write_task(GLUE_TASKS["QNLI"], tmp_path) / "train.tsv"
    header, rows, _ = FILES["QNLI"]
    columns = header.replace("|", ", ")
    write(path, header, rows[0], "|Was he real?|", rows[1])
    assert failure("QNLI", tmp_path) == f"{path}, line 3: columns found: 3; expected: 4 ({columns})"
    write(path, header, "0", rows[0], "", rows[0] + "|1", rows[0])
    assert failure("QNLI", tmp_path) == (
        f"{path}, line 2: columns found: 1; expected: 4 ({columns}); also wrong: lines 4, 5"
    )


def test_short_rows_of_qqps_official_training_file_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_task(GLUE_TASKS["QQP"], tmp_path)
    whole = load_glue_folder(GLUE_TASKS["QQP"], tmp_path).train
    header, rows, _ = FILES["QQP"]
    write(folder / "train.tsv", header, rows[0], "|Was he real?|0", *rows[1:])
    assert load_glue_folder(GLUE_TASKS["QQP"], tmp_path).train == whole
    assert f"{folder / 'train.tsv'}: left out, for lack of columns: line 3" in caplog.text
    write(folder / "train.tsv", header, "short", rows[0].rpartition("|")[0] + "|7")
    assert failure("QQP", tmp_path).startswith(f"{folder / 'train.tsv'}, line 3: unknown label")
    write(folder / "dev.tsv", header, "|Was he real?|0")
    write(folder / "train.tsv", header, *rows)
    assert "line 2: columns found: 3" in failure("QQP", tmp_path)


@pytest.mark.parametrize(
    ("name", "row", "value", "allowed"),
    [
        ("RTE", "0|a|b|0", "'0'", "entailment, not_entailment"),
        ("MNLI", "0|p|q|g|x|x|x|x|A|B|-|-", "'-'", "entailment, neutral, contradiction"),
        ("MRPC", "2|1|2|a|b", "'2'", "0, 1"),
        ("QQP", "0|1|2|a|b|", "''", "0, 1"),
        ("SST2", "fine|positive", "'positive'", "0, 1"),
    ],
)
def test_unknown_label(tmp_path: Path, name: str, row: str, value: str, allowed: str) -> None:
    path = write_task(GLUE_TASKS[name], tmp_path) / "train.tsv"
    header, rows, _ = FILES[name]
    write(path, header, *rows, row)
    assert failure(name, tmp_path) == f"{path}, line 4: unknown label {value}; allowed: {allowed}"


@pytest.mark.parametrize("score", ["five", "", "5.1", "-0.1", "nan", "inf"])
def test_score_out_of_range(tmp_path: Path, score: str) -> None:
    path = write_task(GLUE_TASKS["STSB"], tmp_path) / "dev.tsv"
    header, rows, _ = FILES["STSB"]
    write(path, header, rows[0], rows[0].replace("5.000", score))
    assert failure("STSB", tmp_path) == f"{path}, line 3: score {score!r}; allowed: a number from 0 to 5"


def test_not_utf8_and_empty(tmp_path: Path) -> None:
    path = write_task(GLUE_TASKS["SST2"], tmp_path) / "train.tsv"
    path.write_bytes(b"sentence\tlabel\nfine\t1\ncaf\xe9\t1\n")
    assert failure("SST2", tmp_path).startswith(f"{path}, line 3: byte 0xe9 is not UTF-8; files must be UTF-8; save it")
    for content in (b"", b"\n", b"sentence\tlabel\n", b"\xef\xbb\xbf"):
        path.write_bytes(content)
        assert failure("SST2", tmp_path) == f"{path}: the file holds no rows; at least one is needed"


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    path = write_task(GLUE_TASKS["SST2"], tmp_path) / "train.tsv"
    write(path, "sentence|label", "fine|" + "y" * 1000)
    assert len(failure("SST2", tmp_path)) < len(str(path)) + 200


def test_other_tasks_have_no_folder(tmp_path: Path) -> None:
    custom = replace(GLUE_TASKS["RTE"], name="custom")
    with pytest.raises(ConfigError, match="'custom' is no GLUE task; allowed: RTE"):
        load_glue_folder(custom, tmp_path)
    with pytest.raises(ConfigError, match="'custom' is no GLUE task"):
        load_glue_hub(custom)


# The hub


def hub_split(task: Task, labels: list[int] | list[float], names: tuple[str, ...] | None = None) -> datasets.Dataset:
    columns = {name: [f"{name} {row}" for row in range(len(labels))] for name in task.hub_text_columns}
    names = names or task.labels
    kind = datasets.Value("float32") if names is None else datasets.ClassLabel(names=list(names))
    features = datasets.Features({name: datasets.Value("string") for name in columns} | {"label": kind})
    return datasets.Dataset.from_dict(columns | {"label": labels}, features=features)


def serve(monkeypatch: pytest.MonkeyPatch, splits: dict[str, datasets.Dataset]) -> list[tuple[str, ...]]:
    calls: list[tuple[str, ...]] = []

    def load_dataset(*arguments: str) -> datasets.DatasetDict:
        calls.append(arguments)
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


HUB_COLUMNS = {
    "RTE": ("sentence1", "sentence2"),
    "MRPC": ("sentence1", "sentence2"),
    "STSB": ("sentence1", "sentence2"),
    "SST2": ("sentence",),
    "QNLI": ("question", "sentence"),
    "QQP": ("question1", "question2"),
    "MNLI": ("premise", "hypothesis"),
}


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    task = GLUE_TASKS[name]
    assert task.hub_text_columns == HUB_COLUMNS[name]
    names = ["validation_matched", "validation_mismatched"] if name == "MNLI" else ["validation"]
    labels: list[int] | list[float] = [0.5, 5.0] if name == "STSB" else [0, 1]
    calls = serve(monkeypatch, {split: hub_split(task, labels) for split in ["train", *names]})
    data = load_glue_hub(task)
    assert calls == [("nyu-mll/glue", task.hub_name)]
    assert list(data.validation) == names
    columns = task.hub_text_columns
    second = [f"{columns[1]} 0", f"{columns[1]} 1"] if len(columns) == 2 else None
    expected = TextExamples([f"{columns[0]} 0", f"{columns[0]} 1"], second, labels)
    assert data.train == expected
    assert all(split == expected for split in data.validation.values())


def test_hub_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    task = GLUE_TASKS["RTE"]
    good = hub_split(task, [0, 1])
    for splits, message in (
        ({"train": good}, "no split 'validation'; splits found: train"),
        (
            {"train": good.remove_columns("sentence2"), "validation": good},
            "train: no column 'sentence2'; columns found: ",
        ),
        (
            {"train": hub_split(task, [0, 1], ("not_entailment", "entailment")), "validation": good},
            "train: labels not_",
        ),
        ({"train": good, "validation": hub_split(task, [0, -1])}, "validation, row 1: label -1; allowed: 0 to 1"),
        ({"train": hub_split(task, []), "validation": good}, "train: no rows"),
    ):
        serve(monkeypatch, splits)
        with pytest.raises(DataError) as caught:
            load_glue_hub(task)
        assert message in str(caught.value)


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: str) -> None:
        raise ConnectionError("cannot reach the hub\nmore\nlines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        load_glue_hub(GLUE_TASKS["RTE"])
    assert str(caught.value) == (
        "nyu-mll/glue (rte) cannot be loaded: ConnectionError: cannot reach the hub; "
        "--data_dir takes the official GLUE folder instead"
    )


def test_hub_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package datasets .*pip install token-pruning\[train\]; --data_dir"):
        load_glue_hub(GLUE_TASKS["RTE"])


def test_hub_offline(tmp_path: Path) -> None:
    code = (
        "from token_pruning.lab.data.glue import load_glue_hub\n"
        "from token_pruning.lab.data.tasks import glue_task\n"
        "from token_pruning.errors import DataError\n"
        "try:\n    load_glue_hub(glue_task('sst2'))\n"
        "except DataError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_DATASETS_OFFLINE"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("nyu-mll/glue (sst2) cannot be loaded: ")
    assert done.stdout.endswith("; --data_dir takes the official GLUE folder instead\n")
    assert done.stdout.count("\n") == 1

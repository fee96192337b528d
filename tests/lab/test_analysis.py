"""Where tokens go: quantities against plain loops, files, pages, mistakes, and training on short inputs only."""

import errno
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import token_pruning as tp
from tests.workspace import edit_config, write_checkpoint, write_sst2, write_stsb
from token_pruning.lab.analysis import plots, run
from token_pruning.lab.analysis.page import markdown, trajectories
from token_pruning.lab.cli import main
from token_pruning.lab.files import write_files
from token_pruning.lab.quantities import (
    correlation,
    kept_fractions,
    quantile_groups,
    spread,
    spread_over_lengths,
)
from token_pruning.lab.training import train
from token_pruning.lab.training.features import length_quantile

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

THRESHOLDS = {"prune_mode": "absolute_threshold", "final_token_threshold": 0.01, "scoring_mode": "mean"}
TOPK = {"prune_mode": "topk", "token_keep_rate": 0.5}
FILES = {"analysis.json", "analysis.md", "length.png", "layers.png", "outcome.png", "trajectories.html"}
LINE = "--task SST2 --data-dir glue --output-dir out --bs 4 --samples 3 --restore"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_sst2(tmp_path / "glue")
    write_stsb(tmp_path / "glue")
    write_checkpoint(tmp_path / "CKPT", **THRESHOLDS)
    return tmp_path


def found(out: str = "out") -> dict[str, Any]:
    assert {file.name for file in Path(out).iterdir()} == FILES
    loaded: dict[str, Any] = json.loads(Path(out, "analysis.json").read_text(encoding="utf-8"))
    return loaded


# Quantities.


@pytest.mark.parametrize("q", [0.001, 0.1, 0.25, 0.3, 0.5, 2 / 3, 0.99, 1.0])
@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [3, 1, 2], list(range(30)), [9, 2, 2, 2, 4, 4, 7, 1, 1, 1]])
def test_the_quantile_is_the_smallest_length_that_enough_examples_do_not_exceed(lengths: list[int], q: float) -> None:
    enough = [a for a in lengths if sum(b <= a for b in lengths) >= q * len(lengths) - 1e-9]
    assert length_quantile(lengths, q) == min(enough)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize("seed", range(4))
def test_quantile_groups_against_a_loop(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(3, 3 + 4 * (seed + 1), 23)
    expected: dict[int, list[int]] = {}
    for i, value in enumerate(values):
        number = 1  # the first quantile whose edge the value does not exceed
        while value > length_quantile(values, number / count):
            number += 1
        expected.setdefault(number, []).append(i)
    groups = [group.tolist() for group in quantile_groups(values, count)]
    assert groups == [expected[number] for number in sorted(expected)]
    assert sorted(i for group in groups for i in group) == list(range(23))
    for group in groups:  # equal lengths are never split
        assert not {values[i] for i in group} & {values[i] for other in groups if other is not group for i in other}


def test_quantile_groups_without_ties_are_of_one_size() -> None:
    assert [len(group) for group in quantile_groups(np.arange(12)[::-1], 4)] == [3, 3, 3, 3]
    assert [group.tolist() for group in quantile_groups(np.array([5, 5, 5]), 4)] == [[0, 1, 2]]


def test_kept_fractions_and_spread_against_a_loop() -> None:
    left = np.array([[4, 9, 2], [2, 9, 1], [1, 3, 1]])
    tokens = np.array([4, 10, 2])
    expected = [sum(left[layer][i] / tokens[i] for layer in range(3)) / 3 for i in range(3)]
    assert kept_fractions(tokens, left) == pytest.approx(expected)
    box = spread(np.arange(101) / 100)
    assert box == pytest.approx({"mean": 0.5, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95})
    assert set(spread(np.array([])).values()) == {None}


def test_correlation() -> None:
    x = np.array([1.0, 2.0, 4.0])
    assert correlation(x, -3 * x) == pytest.approx(-1)
    assert correlation(x, np.ones(3)) is None
    assert correlation(np.ones(1), np.ones(1)) is None


def test_samples_are_spread_over_the_lengths() -> None:
    lengths = np.array([5, 9, 1, 7, 3])
    assert spread_over_lengths(lengths, 3) == [2, 0, 1]
    assert spread_over_lengths(lengths, 1) == [0]
    assert spread_over_lengths(lengths, 9) == [2, 4, 0, 3, 1]
    assert spread_over_lengths(np.array([4]), 2) == [0]
    for count in range(1, 40):
        assert len(set(spread_over_lengths(np.ones(37), count))) == min(count, 37)


# The command.


def test_classification(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(folder / "dense")
    write_checkpoint(folder / "topk", **TOPK)
    assert main(["analyze", *LINE.split(), "dense", "CKPT", "topk", "--names", "dense", "a|b", "topk"]) == 0
    analysis = found()
    dense, learned, topk = analysis["checkpoints"]
    assert [m["prune_mode"] for m in (dense, learned, topk)] == [None, "absolute_threshold", "topk"]
    assert analysis["examples"] == 12

    model, tokenizer = tp.from_pretrained("topk"), hf.AutoTokenizer.from_pretrained("topk")
    lines = (folder / "glue/SST-2/dev.tsv").read_text().splitlines()[1:]
    for i, line in enumerate(lines):  # one at a time
        text, label = line.split("\t")
        with tp.record(model) as trace, torch.inference_mode():
            prediction = int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())
        survived = trace.survived_layers[0]
        left = [int((survived >= layer).sum()) for layer in range(1, 5)]
        assert [row[i] for row in topk["examples"]["tokens_left"]] == left
        assert topk["examples"]["tokens"][i] == len(survived)
        assert topk["examples"]["kept_fraction"][i] == pytest.approx(sum(left) / 4 / len(survived))
        assert topk["examples"]["labels"][i] == ("negative", "positive")[int(label)]
        assert topk["examples"]["predictions"][i] == ("negative", "positive")[prediction]
        if i in analysis["samples"]:
            sample = topk["samples"][analysis["samples"].index(i)]
            left_after = [None if layers == 4 else layers + 1 for layers in survived.tolist()]
            assert [token["left_after"] for token in sample["tokens"]] == left_after
            assert [token["text"] for token in sample["tokens"]] == ["[CLS]", *text.split(), "[SEP]"]

    for method in (dense, learned, topk):
        right = [a == b for a, b in zip(method["examples"]["labels"], method["examples"]["predictions"], strict=True)]
        assert method["metrics"]["accuracy"] == pytest.approx(np.mean(right))
        kept = np.array(method["examples"]["kept_fraction"])
        for row, expected in zip(method["by_outcome"], (True, False), strict=True):
            chosen = kept[np.array(right) == expected]
            assert row["examples"] == len(chosen)
            assert row["mean"] == (pytest.approx(chosen.mean()) if len(chosen) else None)
        assert sum(row["examples"] for row in method["by_length"]) == 12
        tokens = np.array(method["examples"]["tokens"])
        for row in method["by_length"]:
            inside = (tokens >= row["shortest"]) & (tokens <= row["longest"])
            assert inside.sum() == row["examples"]
            assert row["kept_fraction"] == pytest.approx(kept[inside].mean())
            assert row["metrics"]["accuracy"] == pytest.approx(np.array(right)[inside].mean())
        assert [row["layer"] for row in method["by_layer"]] == [1, 2, 3, 4]
    assert dense["relative_flops"] == dense["kept_fraction"] == 1
    assert learned["kept_fraction"] < 1

    text = Path("out/analysis.md").read_text(encoding="utf-8")
    assert text.splitlines()[2].strip().startswith("token-pruning analyze --restore dense CKPT topk --names dense")
    assert r"a\|b" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith(" |") for line in tables)
    for image in re.findall(r"!\[.*\]\((.*)\)", text):
        assert Path("out", image).read_bytes().startswith(b"\x89PNG")
    assert "relative FLOPs" in capsys.readouterr().out


def test_the_same_figures_as_an_evaluation(folder: Path) -> None:
    assert main(["analyze", *LINE.split(), "CKPT"]) == 0
    assert main(["eval", *["--task", "SST2", "--data-dir", "glue", "--bs", "4", "--restore"], "CKPT"]) == 0
    evaluation = json.loads(Path("CKPT/eval/eval_results.json").read_text())
    (method,) = found()["checkpoints"]
    assert method["metrics"] == evaluation["metrics"]
    assert method["relative_flops"] == pytest.approx(evaluation["relative_flops"])


def test_regression(folder: Path) -> None:
    write_checkpoint(folder / "REG", labels=1, **THRESHOLDS)
    write_checkpoint(folder / "REGTOPK", labels=1, **TOPK)
    line = LINE.replace("SST2", "STSB").split()
    assert main(["analyze", *line, "REG", "REGTOPK", "--quantiles", "2", "--bf16"]) == 0
    analysis = found()
    assert analysis["regression"]
    for method in analysis["checkpoints"]:
        examples = method["examples"]
        error = np.abs(np.array(examples["labels"]) - np.array(examples["predictions"]))
        assert [row["examples"] for row in method["by_outcome"]] == [4, 3, 3]
        ordered = np.sort(error)
        means = [part.mean() for part in (ordered[:4], ordered[4:7], ordered[7:])]
        assert [row["mean_absolute_error"] for row in method["by_outcome"]] == pytest.approx(means, abs=1e-3)
        expected = correlation(np.array(examples["kept_fraction"]), error)
        assert method["error_correlation"] == (None if expected is None else pytest.approx(expected, abs=1e-2))
    assert "largest errors" in Path("out/analysis.md").read_text()


def test_own_file_and_models_of_two_depths(folder: Path) -> None:
    shallow = write_checkpoint(folder / "shallow", **TOPK)
    hf.AutoModelForSequenceClassification.from_config(
        hf.AutoConfig.from_pretrained(shallow, num_hidden_layers=2)
    ).save_pretrained(shallow)
    edit_config(shallow, **THRESHOLDS)
    rows = ["sentence,label", *(f"{'good ' * (1 + i % 5)},{i % 2}" for i in range(9))]
    Path("dev.csv").write_text("\n".join(rows) + "\n")
    line = "--validation-file dev.csv --output-dir out --samples 2 --quantiles 3 --restore shallow CKPT"
    assert main(["analyze", *line.split()]) == 0
    assert [m["layers"] for m in found()["checkpoints"]] == [2, 4]
    page = Path("out/trajectories.html").read_text(encoding="utf-8")
    assert page.count("[CLS] stays to the end") == 4


def test_without_samples_no_text_is_written(folder: Path) -> None:
    assert main(["analyze", *LINE.replace("--samples 3", "--samples 0").split(), "CKPT"]) == 0
    assert not Path("out/trajectories.html").exists()
    assert "Samples" not in Path("out/analysis.md").read_text(encoding="utf-8")
    assert "[CLS]" not in Path("out/analysis.json").read_text(encoding="utf-8")


def test_names_are_the_shortest_ends_that_differ(folder: Path) -> None:
    write_checkpoint(folder / "a/same", **TOPK)
    write_checkpoint(folder / "b/same")
    assert main(["analyze", *LINE.split(), "a/same", "b/same/"]) == 0
    assert [m["name"] for m in found()["checkpoints"]] == ["a/same", "b/same"]


def test_a_checkpoint_for_several_budgets_at_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = [
        {"relative_flops": 0.5, "thresholds": [1.0] * 4},
        {"relative_flops": 0.9, "thresholds": [0.5] * 4},
    ]
    several = {"prune_mode": "absolute_threshold", "thresholds": [1.0] * 4, "scoring_mode": "relative"}
    write_checkpoint(folder / "ELASTIC", initializer_range=0.5, **several, budgets=table)
    asked = ["--budgets", "1.0", "0.7"]
    assert main(["analyze", *LINE.split(), "ELASTIC", "CKPT", *asked, "--names", "mine", "other"]) == 0
    methods = found()["checkpoints"]
    assert [m["name"] for m in methods] == ["mine at 1", "mine at 0.7", "other"]
    assert [m["budget"] for m in methods] == [1.0, 0.7, None]
    for method, budget in zip(methods, ["1.0", "0.7"], strict=False):
        line = f"--task SST2 --data-dir glue --bs 4 --restore ELASTIC --budget {budget} --output-dir at"
        assert main(["eval", *line.split()]) == 0
        evaluation = json.loads(Path("at/eval_results.json").read_text())
        assert method["metrics"] == evaluation["metrics"]
        assert method["relative_flops"] == pytest.approx(evaluation["relative_flops"])
    assert methods[1]["relative_flops"] < methods[0]["relative_flops"] < 1
    for option in ("--thresholds 9 9 9 9", "--final-token-threshold 0.5", "--vocabulary-threshold 0.1"):
        assert main(["eval", *f"{line} {option}".split()]) == 2
        assert "--budget sets the thresholds: leave one of them out" in capsys.readouterr().err
    assert "mine at 0.7" in Path("out/trajectories.html").read_text(encoding="utf-8")


def test_the_same_command_writes_the_same_bytes(folder: Path) -> None:
    kept: list[dict[str, bytes]] = []
    for _ in range(2):
        assert main(["analyze", *LINE.split(), "CKPT"]) == 0
        kept.append({file.name: file.read_bytes() for file in Path("out").iterdir() if file.suffix != ".json"})
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{LINE} NOWHERE", ["NOWHERE", "not a folder"]),
        (f"{LINE} CKPT NOWHERE", ["NOWHERE", "not a folder"]),
        (f"{LINE} ENCODER", ["--restore", "ENCODER", "BertModel", "sequence-classification"]),
        (f"{LINE} CKPT ./CKPT", ["--restore", "CKPT", "twice"]),
        (f"{LINE} CKPT --names a b", ["--names", "2", "a, b", "1"]),
        (f"{LINE} CKPT ENCODER --names a a", ["--names", "'a'", "twice"]),
        (f"{LINE} CKPT --budgets 0.5", ["--budgets", "several", "CKPT"]),
        (f"{LINE} CKPT ELASTIC --budgets 0.8 0.3", ["--budgets", "0.3", "ELASTIC", "0.5"]),
        (f"{LINE} ELASTIC --budgets 0.8 0.8", ["--budgets", "0.8", "twice"]),
        (f"{LINE} ELASTIC --budgets 1.5", ["--budgets", "1.5", "1"]),
        (f"{LINE} CKPT --quantiles 0", ["--quantiles", "0", ">= 1"]),
        (f"{LINE} CKPT --quantiles few", ["--quantiles", "few"]),
        (f"{LINE} CKPT --samples -1", ["--samples", "-1", ">= 0"]),
        (f"{LINE} CKPT --bs 0", ["--bs", "0", ">= 1"]),
        (f"{LINE} CKPT --max-length 500", ["--max-length", "500", "130"]),
        (f"{LINE} CKPT --output-dir CKPT/config.json", ["--output-dir", "config.json", "folder"]),
        (f"{LINE} CKPT --task COLA", ["COLA", "MNLI"]),
        (f"{LINE} CKPT --validation-file dev.csv", ["--task", "--validation-file"]),
        ("--output-dir out --restore CKPT", ["--task", "--validation-file"]),
        ("--output-dir out --restore CKPT --data-dir glue --validation-file x.csv", ["--data-dir", "glue"]),
        ("--output-dir out --restore CKPT --validation-file x.csv", ["x.csv"]),
        (f"{LINE} CKPT --data-dir CKPT", ["CKPT", "dev.tsv"]),
        ("--task SST2 --restore CKPT", ["--output-dir"]),
        ("--restore CKPT REG --validation-file dev.csv --output-dir out", ["REG", "a regression", "a classification"]),
    ],
)
def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], line: str, words: list[str]) -> None:
    write_checkpoint(folder / "ENCODER", head="encoder")
    write_checkpoint(folder / "REG", labels=1)
    table = [{"relative_flops": 0.5, "thresholds": [0.01] * 4}]
    write_checkpoint(folder / "ELASTIC", **THRESHOLDS | {"thresholds": [0.01] * 4}, budgets=table)
    Path("dev.csv").write_text("sentence,label\ngood,0\nbad,1\n")
    capsys.readouterr()
    try:
        status = main(["analyze", *line.split()])
    except SystemExit as exit_:  # argparse
        status = int(exit_.code or 0)
    error = capsys.readouterr().err.strip()
    assert status == 2, error
    assert len(error.splitlines()) == 1, error
    for word in words:
        assert word in error
    assert not Path("out").exists()


def test_files_are_written_whole_or_not_at_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any) -> bytes:
        raise RuntimeError("no plot")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no plot"):
        patch.setattr(run, "outcome_plot", fail)
        main(["analyze", *LINE.split(), "CKPT"])
    assert not Path("out").exists()

    assert main(["analyze", *LINE.split(), "CKPT"]) == 0
    before = {file: file.read_bytes() for file in Path("out").iterdir()}
    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(["analyze", *LINE.split(), "CKPT", "--quantiles", "2"]) == 2
    assert "out/layers.png cannot be written: no space left" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in Path("out").iterdir()} == before


def test_write_files_makes_folders_and_takes_text_and_bytes(tmp_path: Path) -> None:
    write_files(tmp_path / "a/b", {"x.txt": "θ", "y.bin": b"\x00"})
    assert (tmp_path / "a/b/x.txt").read_text(encoding="utf-8") == "θ"
    assert (tmp_path / "a/b/y.bin").read_bytes() == b"\x00"
    assert len(list((tmp_path / "a/b").iterdir())) == 2


# Pages and plots.

EVIL = ["[CLS]", "<script>alert(1)</script>", "&amp;", "a|b", "`*_", "##x", "[SEP]"]


def made_up(name: str = "<b>name</b>", prune_mode: str | None = "topk") -> dict[str, Any]:
    box = {"mean": 0.5, "p5": 0.1, "p25": 0.3, "median": 0.5, "p75": 0.6, "p95": 0.9}
    tokens = [
        {"text": text, "left_after": layer, "decided_by": "probe", "decided_in": layer or 0, "value": 0.25}
        for text, layer in zip(EVIL, [None, 1, 2, None, 1, 0, 1], strict=True)
    ]
    sample = {"tokens": tokens, "label": "<i>", "prediction": "<i>"}
    metrics = {"accuracy": 0.5, "f1": 0.4}
    length = {"shortest": 3, "longest": 9, "examples": 2, "metrics": metrics, "kept_fraction": 0.5}
    method = {
        "name": name, "checkpoint": "<u>", "prune_mode": prune_mode, "layers": 2, "metrics": metrics,
        "kept_fraction": 0.5, "relative_flops": 0.6, "by_length": [{**length, "relative_flops": 0.6}],
        "by_layer": [{"layer": layer, **box} for layer in (1, 2)],
        "by_outcome": [{"group": "right", "examples": 2, **box},
                       {"group": "wrong", "examples": 0, **dict.fromkeys(box)}],
        "samples": [sample],
    }  # fmt: skip
    return {
        "command": "token-pruning analyze --restore '<x>'", "task": "<task>", "split": "validation",
        "regression": False, "metric": "accuracy", "examples": 2, "quantiles": 4, "samples": [1], "batch_size": 4,
        "max_length": 128, "dtype": "float32", "checkpoints": [method],
    }  # fmt: skip


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_escapes_text_and_stands_alone() -> None:
    page = trajectories(made_up())
    reader = Reader()
    reader.feed(page)
    assert not reader.tags & {"script", "b>name", "i", "u", "task", "img", "link", "iframe"}
    assert not reader.attributes & {"src", "href", "onload", "style"}
    assert "http:" not in page and "https:" not in page and "url(" not in page
    for text in (*EVIL[1:5], "<b>name</b>", "<i>", "<task>", "'<x>'"):
        assert text in reader.text
    evil = "&lt;script&gt;alert(1)&lt;/script&gt;"
    assert f'<span class="piece s11" title="{evil} left after layer 1: probe 0.25">{evil}</span>' in page
    assert '<span class="piece s32" title="[CLS] stays to the end: probe 0.25">' in page


def test_the_tables_escape_text() -> None:
    text = markdown(made_up())
    body = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert not re.search(r"<[a-z/]", body)
    assert "| &lt;b&gt;name&lt;/b&gt; |" in body
    assert r"| never entered | ##x |" in body
    assert r"| left after layer 1 | &lt;script&gt;alert(1)&lt;/script&gt; \`\*\_ [SEP] |" in body
    assert r"| stays to the end | [CLS] a\|b |" in body


@pytest.mark.parametrize("count", [1, 3, 7])
def test_plots_of_any_number_of_methods(count: int) -> None:
    methods = [made_up(f"method $x_{i} 名", "topk" if i else None)["checkpoints"][0] for i in range(count)]
    for image in (plots.length_plot(methods, "accuracy"), plots.layer_plot(methods), plots.outcome_plot(methods)):
        assert image.startswith(b"\x89PNG")


# Training on short inputs.


@pytest.mark.parametrize("mode", ["none", "soft --lambda 0.1", "hard"])
def test_training_on_short_inputs_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    seen: list[int] = []

    class Spy(train.PruningTrainer):
        def training_step(self, model: Any, inputs: Any, *more: Any) -> Any:
            seen.extend(inputs["attention_mask"].sum(1).tolist())
            return super().training_step(model, inputs, *more)

    monkeypatch.setattr(train, "PruningTrainer", Spy)
    lines = (folder / "glue/SST-2/train.tsv").read_text().splitlines()[1:]
    lengths = sorted(len(line.split("\t")[0].split()) + 2 for line in lines)
    limit = lengths[len(lengths) // 2 - 1]
    expected = [length for length in lengths if length <= limit]
    assert len(expected) < len(lengths)
    line = f"--task SST2 --data-dir glue --restore CKPT --output-dir out --epoch 1 --bs 4 --masking-mode {mode}"
    assert main(["train", *line.split(), "--train-length-quantile", "0.5"]) == 0
    assert sorted(seen) == expected
    printed = capsys.readouterr().out
    assert f"training on {len(expected)} of {len(lengths)} examples; the longest has {limit} tokens" in printed
    assert json.loads(Path("out/run.json").read_text())["options"]["train_length_quantile"] == 0.5
    assert json.loads(Path("out/eval_results.json").read_text())["examples"] == 12  # evaluated on all lengths


@pytest.mark.parametrize("value", ["0", "-0.5", "1.01", "nan", "half"])
def test_a_quantile_that_is_none(folder: Path, capsys: pytest.CaptureFixture[str], value: str) -> None:
    line = "--task SST2 --data-dir glue --restore CKPT --output-dir out --epoch 1"
    try:
        status = main(["train", *line.split(), f"--train-length-quantile={value}"])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    error = capsys.readouterr().err.strip()
    assert status == 2
    assert len(error.splitlines()) == 1
    assert "--train-length-quantile" in error and value in error

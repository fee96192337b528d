"""The demo from end to end, on a tiny model and few docstrings."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.workspace import write_checkpoint
from token_pruning.lab.cli import main
from token_pruning.lab.data import Task, TaskData, TextExamples
from token_pruning.lab.demo import run as demo


def few_texts() -> TaskData:
    task = Task(name="docstrings", folder="", hub_name="", labels=("cat", "dog"), best_metric="accuracy")
    texts = [" ".join(["good", "cat" if n % 2 else "dog", *["sat on the mat"] * (1 + n % 7)]) for n in range(48)]
    labels = [1 - n % 2 for n in range(48)]
    train, held_out = TextExamples(texts[:32], None, labels[:32]), TextExamples(texts[32:], None, labels[32:])
    return TaskData(task=task, train=train, validation={"validation": held_out})


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    start = write_checkpoint(tmp_path / "START", head="encoder")
    monkeypatch.setattr(demo, "find_minilm", lambda prefer_hub: start)
    monkeypatch.setattr(demo, "load_docstrings", few_texts)
    monkeypatch.setattr(demo, "_PASSES", 1)
    return tmp_path / "out"


def test_table_report_and_results_agree(small_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output-dir", str(small_demo)]) == 0
    results = json.loads((small_demo / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == ["dense", "soft", "hard"]
    dense, _, hard = results["stages"]
    assert dense["relative_flops"] == 1
    assert hard["thresholds"] == json.loads((small_demo / "hard" / "eval_results.json").read_text())["thresholds"]
    assert all(stage["seconds"] > 0 for stage in results["stages"])
    assert results["samples"]
    for sample in results["samples"]:
        assert len(sample["tokens"]) == len(sample["survived_layers"])
        assert sample["survived_layers"][0] == results["num_layers"]  # [CLS]
    table = capsys.readouterr().out
    page = (small_demo / "report.html").read_text()
    for stage in results["stages"]:
        assert f"{stage['relative_flops']:.3f}" in table
        assert f"{stage['relative_flops']:.3f}" in page


def test_complete_stages_are_not_run_again(
    small_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []
    original = demo.train

    def train(options, load_data):  # type: ignore[no-untyped-def]
        trained.append(options.masking_mode)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return original(options, load_data)

    monkeypatch.setattr(demo, "train", train)
    assert main(["demo", "--output-dir", str(small_demo)]) == 130
    assert "continues" in capsys.readouterr().err
    assert main(["demo", "--output-dir", str(small_demo)]) == 0
    assert trained == ["none", "soft", "soft", "hard"]


def test_another_demo_is_not_overwritten(small_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["demo", "--output-dir", str(small_demo)]) == 0
    dense, *others = demo._STAGES
    monkeypatch.setattr(demo, "_STAGES", (replace(dense, options=dense.options | {"lr": 1e-3}), *others))
    assert main(["demo", "--output-dir", str(small_demo)]) == 2

"""The demo from end to end, on a tiny model and few docstrings."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workspace import write_checkpoint
from token_pruning.lab.cli import main
from token_pruning.lab.data import Task, TaskData, TextExamples
from token_pruning.lab.demo import run as demo
from token_pruning.lab.demo.sizing import Pace, Size, choose_size, describe, duration, stratified


def few_texts(count: int = 32) -> TaskData:
    task = Task(name="docstrings", folder="", hub_name="", labels=("cat", "dog"), best_metric="accuracy")
    texts = [
        " ".join(["good", "cat" if n % 2 else "dog", *["sat on the mat"] * (1 + n % 7)]) for n in range(count + 16)
    ]
    labels = [1 - n % 2 for n in range(count + 16)]
    train, held_out = (
        TextExamples(texts[:count], None, labels[:count]),
        TextExamples(texts[count:], None, labels[count:]),
    )
    return TaskData(task=task, train=train, validation={"validation": held_out})


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    start = write_checkpoint(tmp_path / "START", head="encoder")
    monkeypatch.setattr(demo, "find_minilm", lambda prefer_hub: start)
    monkeypatch.setattr(demo, "load_docstrings", lambda: few_texts())
    monkeypatch.setattr(demo, "PASSES", 1)
    monkeypatch.setattr(demo, "step_seconds", lambda *_, **__: 0.01)  # nothing is timed here
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
        assert sample["tokens"][0] == {
            "text": "[CLS]", "left_after": None, "decided_by": "first token", "decided_in": None, "value": None,
            "threshold": None,
        }  # fmt: skip
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


def test_a_resumed_demo_keeps_its_size(
    small_demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "load_docstrings", lambda: few_texts(400))
    monkeypatch.setattr(demo, "step_seconds", lambda *_, **__: 100.0)  # a very slow machine
    original, sizes = demo.train, []

    def train(options, load_data):  # type: ignore[no-untyped-def]
        sizes.append((len(load_data(None).train), options.epochs))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return original(options, load_data)

    monkeypatch.setattr(demo, "train", train)
    assert main(["demo", "--output-dir", str(small_demo)]) == 130
    first = (small_demo / "size.json").read_text()
    assert "about 100 s a step here: training on 320 of 400 texts, 1 + 1 + 1 epochs" in capsys.readouterr().out
    monkeypatch.setattr(demo, "step_seconds", lambda *_, **__: 0.01)  # it has become fast, which changes nothing
    assert main(["demo", "--output-dir", str(small_demo)]) == 0
    assert sizes == [(320, 1)] * 4
    assert (small_demo / "size.json").read_text() == first
    out = capsys.readouterr().out
    assert "training on 320 of 400 texts" in out
    assert out.count(" left\n") == 4  # at each stage, and before the comparison
    (small_demo / "size.json").write_text("{")
    assert main(["demo", "--output-dir", str(small_demo)]) == 2
    assert "size.json cannot be read" in capsys.readouterr().err


def test_a_step_is_timed_without_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    start = write_checkpoint(tmp_path / "START", head="encoder")
    assert demo.step_seconds(str(start), few_texts(400), bf16=False) > 0
    assert capsys.readouterr().out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["START"]


# The arithmetic


@pytest.mark.parametrize("step", [0.001, 0.05, 0.1])
def test_a_fast_machine_uses_everything(step: float) -> None:
    assert choose_size(step, 5360, 1340) == Size(5360, 1340, {"dense": 3, "soft": 2, "hard": 1}, step)


@pytest.mark.parametrize("step", [0.2, 0.31, 0.5, 1.0, 1.2, 2.0, 3.0, 4.0, 6.0])
def test_a_demo_takes_about_six_minutes(step: float) -> None:
    size = choose_size(step, 5360, 1340)
    assert 320 <= size.train_texts <= 5360 and 200 <= size.validation_texts <= 1340
    assert size.seconds <= 480
    assert size.train_texts == 5360 or size.seconds > 200


def test_slower_machines_use_no_more() -> None:
    steps = [0.01 * 1.2**n for n in range(40)]
    work = [size.train_texts * size.epochs["dense"] for size in (choose_size(step, 5360, 1340) for step in steps)]
    assert work == sorted(work, reverse=True)


def test_few_texts_are_all_used_however_slow_the_machine() -> None:
    assert choose_size(1000.0, 200, 50) == Size(200, 50, {"dense": 1, "soft": 1, "hard": 1}, 1000.0)


def test_what_is_left_follows_what_was_measured() -> None:
    size = Size(3200, 320, {"dense": 2, "soft": 1, "hard": 1}, 0.5)
    pace = Pace(size)
    whole = pace.left("dense")
    assert whole == pytest.approx(sum(map(size.stage_seconds, size.epochs)) + size.comparison_seconds)
    pace.took("dense", 2 * size.stage_seconds("dense"))
    assert pace.left("soft") == pytest.approx(2 * (whole - size.stage_seconds("dense")))
    assert pace.left() == pytest.approx(2 * size.comparison_seconds)


def test_a_line_says_what_was_chosen_and_why() -> None:
    size = choose_size(0.31, 6700, 1675)
    assert describe(size, 6700).startswith(f"about 0.31 s a step here: training on {size.train_texts:,} of 6,700 texts")
    spoken = {4: "0 s", 38: "40 s", 60: "1 minute", 338: "5 minutes 40 s"}
    assert {seconds: duration(seconds) for seconds in spoken} == spoken


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_labels_keep_their_proportions(labels: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(labels)))
    places = stratified(labels, count)
    assert places == sorted(set(places)) and len(places) == count
    assert places == stratified(labels, count)
    for label in set(labels):
        expected = labels.count(label) * count / len(labels)
        assert abs(sum(labels[place] == label for place in places) - expected) <= 1.5

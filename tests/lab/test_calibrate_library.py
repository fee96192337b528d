"""``token-pruning calibrate`` on folders of every kind, sentence-transformers' included."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer

import token_pruning as tp
from tests.integrations.test_sentence_transformers import embedder, ranker
from tests.integrations.test_sentence_transformers import home as home  # a fixture
from tests.integrations.test_sentence_transformers import texts as some_texts
from tests.workspace import edit_config, write_checkpoint, write_sst2
from token_pruning.budget import comparison
from token_pruning.lab.cli import main
from token_pruning.lab.training import calibrated

TEXTS = some_texts(48, 40, seed=3)


@pytest.fixture
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """E, an embedding model, R, a reranker, one.txt and two.csv, and what is slow in a search left out."""
    monkeypatch.chdir(tmp_path)
    embedder(home).save_pretrained("E")
    ranker(home).save_pretrained("R")
    Path("one.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    with Path("two.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [(query, passage) for query in some_texts(12, 8, seed=1) for passage in some_texts(4, seed=len(query))]
        random.Random(0).shuffle(rows)
        csv.writer(file).writerows([("query", "passage"), *rows])
    monkeypatch.setattr(comparison, "further_rules", lambda *_: [])
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """What a command prints that succeeds."""
    capsys.readouterr()
    status = main(line.split())
    found = capsys.readouterr()
    assert status == 0, found.err
    return found.out


def refused(capsys: pytest.CaptureFixture[str], line: str) -> str:
    capsys.readouterr()
    assert main(line.split()) == 2
    lines = [text for text in capsys.readouterr().err.splitlines() if "%|" not in text and text.strip()]
    (error,) = (text for text in lines if "one per line" not in text)  # what was taken for what in a file
    return error


def report(out: str) -> Any:
    return json.loads((Path(out) / "calibration.json").read_text(encoding="utf-8"))


def test_an_embedding_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "calibrate E --texts one.txt --target-flops 0.6 --output OUT")
    found = report("OUT")
    chosen = found["chosen"]
    assert found["candidates"][0] == chosen and not any("method" in fit for fit in found["candidates"])
    first, *_ = out.splitlines()
    assert first.startswith(f"{chosen['rule']}: relative FLOPs {chosen['relative_flops']:.3f} ")
    assert first.endswith(f"divergence {chosen['divergence']:.4f} ± {chosen['divergence_error']:.4f}")
    assert chosen["relative_flops"] == pytest.approx(0.6, abs=0.015)

    model = tp.from_pretrained("OUT")
    assert type(model) is SentenceTransformer
    pruner = model[0].model.token_pruner.pruner
    settings = {key: value for key, value in pruner.config().items() if value is not None}
    assert json.loads(json.dumps(settings)) == found["pruner"]
    dense, pruned = SentenceTransformer("E", device="cpu").encode(TEXTS), model.encode(TEXTS)
    assert np.abs(dense - pruned).max() > 1e-3 and (dense * pruned).sum(1).mean() > 0.9
    assert SentenceTransformer("OUT", device="cpu").encode(TEXTS) == pytest.approx(dense, abs=1e-5)  # stock: dense
    again = refused(capsys, "calibrate E --texts one.txt --target-flops 0.6 --output OUT")
    assert "OUT holds a finished run" in again
    said(capsys, "calibrate E --texts one.txt --target-flops 0.8 --output OUT --overwrite-output-dir --no-vocabulary")
    assert report("OUT")["chosen"]["relative_flops"] == pytest.approx(0.8, abs=0.015)
    assert not any(fit["vocabulary_threshold"] for fit in report("OUT")["candidates"])
    assert not list(Path("OUT").glob("incomplete-*"))


def test_what_was_pruned_is_calibrated_anew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "calibrate E --texts one.txt --target-flops 0.5 --output ONE")
    said(capsys, "calibrate ONE --texts one.txt --target-flops 0.7 --output TWO")
    said(capsys, "calibrate E --texts one.txt --target-flops 0.7 --output THREE")
    two, three = (tp.from_pretrained(out).encode(TEXTS) for out in ("TWO", "THREE"))
    assert two == pytest.approx(three, abs=1e-5)


def test_a_reranker_keeps_its_queries_together(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    own = calibrated.calibrate

    def calibrate(model: Any, examples: Any, *args: Any, **options: Any) -> Any:
        seen.extend(examples)
        return own(model, examples, *args, **options)

    monkeypatch.setattr(calibrated, "calibrate", calibrate)
    said(capsys, "calibrate --restore R --input two.csv --target-flops 0.6 --output-dir OUT --examples 40")
    queries = [query for query, _ in seen]
    assert len(queries) == 40 and len(set(queries)) == 10
    assert all(queries[i] == queries[i - i % 4] for i in range(40))
    model = tp.from_pretrained("OUT")
    assert type(model) is CrossEncoder
    assert model.predict(seen[:3]).shape == (3,)


def test_several_budgets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "calibrate --texts one.txt --output OUT --target-flops 0.75 0.5 0.6 E")
    found = report("OUT")
    targets = [0.5, 0.6, 0.75]
    assert [fit["relative_flops"] for fit in found["fits"]] == pytest.approx(targets, abs=0.015)
    assert found["chosen"]["thresholds"] == found["fits"][0]["thresholds"]
    for fit in found["fits"]:
        assert f"  budget: relative FLOPs {fit['relative_flops']:.3f} ({fit['relative_flops_held_out']:.3f} on" in out
    assert {*targets} < {entry["relative_flops"] for entry in found["pruner"]["budgets"]}
    assert json.loads(Path("OUT/run.json").read_text(encoding="utf-8"))["options"]["target_flops"] == [0.75, 0.5, 0.6]
    model = tp.from_pretrained("OUT")
    at_lowest = model.encode(TEXTS)
    tp.set_budget(model, 0.75)
    assert np.abs(model.encode(TEXTS) - at_lowest).max() > 1e-4


def test_one_budget_has_no_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "calibrate --texts one.txt --output OUT --target-flops 0.6 E")
    found = report("OUT")
    assert "budgets" not in found["pruner"] and found["fits"] == [] and "budget:" not in out
    assert json.loads(Path("OUT/run.json").read_text(encoding="utf-8"))["options"]["target_flops"] == 0.6


def test_a_classifier_runs_at_each_of_its_budgets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path("C"), initializer_range=0.3)
    write_sst2(folder)
    said(capsys, "calibrate C --task SST2 --data-dir . --target-flops 0.7 0.8 --examples 32 --output OUT")
    budgets = [entry["relative_flops"] for entry in report("OUT")["pruner"]["budgets"]]
    assert budgets[:1] == [0.7] and 0.8 in budgets
    run = "eval --restore OUT --task SST2 --data-dir . --output-dir"
    costs = {}
    for budget in ("", "--budget 0.7", "--budget 0.8", "--budget 1"):
        said(capsys, f"{run} AT {budget}")
        found = json.loads(Path("AT/eval_results.json").read_text(encoding="utf-8"))
        assert found.get("budget") == (float(budget.split()[1]) if budget else None)
        costs[budget] = found["relative_flops"]
    assert costs[""] == costs["--budget 0.7"] < costs["--budget 0.8"] < costs["--budget 1"]
    Path("in.txt").write_text("\n".join(["good bad cat film good bad"] * 3), encoding="utf-8")
    predict = "predict --restore OUT --input in.txt"
    at = [said(capsys, f"{predict} {budget}") for budget in ("", "--budget 0.7", "--budget 1")]
    assert at[0] == at[1] != at[2]
    for line, message in {
        f"{predict} --budget 0.2": "budget is 0.2",
        f"{predict} --budget 2": "--budget is 2.0",
        f"{predict} --budget 0.7 --dense": "give either --budget or --dense",
        f"{run} AT --budget 0.2": "budget is 0.2",
        f"{run} AT --budget 0.8 --masking-mode none": "--budget applies to pruning, not to masking mode 'none'",
    }.items():
        assert message in refused(capsys, line)
    said(capsys, "calibrate C --task SST2 --data-dir . --target-flops 0.7 --examples 32 --output ONE")
    assert "not pruned for several budgets" in refused(capsys, "predict --restore ONE --input in.txt --budget 0.7")


def test_long_texts_in_spans_and_windows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("one.txt").write_text("\n".join(some_texts(40, 200, shortest=80)), encoding="utf-8")
    for number, options in enumerate(("--max-tokens 32", "--max-tokens 32 --chunks")):
        said(capsys, f"calibrate E --texts one.txt --target-flops 0.7 --output {number} {options}")
        pruner = tp.from_pretrained(str(number))[0].model.token_pruner.pruner
        assert (pruner.max_tokens, pruner.chunks) == (32, "chunks" in options)


def test_a_classifier_reads_long_texts_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path("C"))
    Path("long.txt").write_text("\n".join(" ".join(["good cat"] * (80 + n)) for n in range(40)), encoding="utf-8")
    said(capsys, "calibrate C --texts long.txt --target-flops 0.7 --output OUT --max-tokens 24")
    assert tp.from_pretrained("OUT").token_pruner.pruner.max_tokens == 24
    lines = said(capsys, "predict --restore OUT --input long.txt").splitlines()
    assert len(lines) == 40


def test_an_encoder_is_read_as_its_config_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path("B"), head="encoder")
    edit_config(Path("B"), reads="mean")
    said(capsys, "calibrate B --texts one.txt --target-flops 0.7 --output OUT")
    assert json.loads((folder / "OUT" / "config.json").read_text(encoding="utf-8"))["reads"] == "mean"
    assert tp.from_pretrained("OUT").token_pruner is not None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("E --restore E --texts one.txt --target-flops 0.6", "give either MODEL or --restore"),
        ("E --input one.txt --texts one.txt --target-flops 0.6", "give either --texts or --input"),
        ("E --texts one.txt --target-flops 0.6 --output A --output-dir B", "give either --output or --output-dir"),
        ("--texts one.txt --target-flops 0.6", "MODEL is missing"),
        ("E --target-flops 0.6", "give one of --task"),
        ("E --task SST2 --target-flops 0.6", "E is calibrated on texts without labels; give --texts"),
        ("E --texts one.txt --max-drop 1", "--max-drop needs labelled examples"),
        ("E --texts one.txt --target-flops 0.6 --max-length 64", "--max-length is 64; E has its own"),
        ("E --texts one.txt --target-flops 0.6 --chunks", "--chunks needs --max-tokens"),
        ("E --texts one.txt --target-flops 0.6 --max-tokens 3", "max_tokens is 3"),
        ("E --texts two.csv --target-flops 0.6", "a SentenceTransformer takes single texts, in one column"),
        ("R --texts one.txt --target-flops 0.6", "a CrossEncoder takes pairs, in two columns"),
        ("E --texts one.txt --target-flops 0.6 --output E", "is the --restore folder"),
        ("E --texts one.txt --target-flops 0.01", "the lowest that can be reached"),
        ("E --texts one.txt --target-flops 0.6 0.01", "target_flops is 0.01; the lowest that can be reached"),
        ("E --texts one.txt --target-flops 0.6 1.5", "--target-flops is 1.5"),
        ("E --texts one.txt --target-flops 0.6 0.6", "target_flops names 0.6 twice"),
        ("MISSING --texts one.txt --target-flops 0.6", "MISSING is not a folder"),
    ],
)
def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert message in refused(capsys, f"calibrate {line}")
    assert not (folder / "E" / "calibrated").exists() and not (folder / "A").exists()


def test_a_folder_is_read_strictly(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "calibrate E --texts one.txt --target-flops 0.6 --output OUT"
    file = Path("E/model.safetensors")
    weights = load_file(file)
    name = next(name for name in weights if "layer.0" in name)
    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
    assert f"weight {name} is missing" in refused(capsys, line)
    save_file(weights | {name: torch.zeros(3)}, file, {"format": "pt"})
    assert name in refused(capsys, line)
    save_file(weights, file, {"format": "pt"})
    modules = json.loads(Path("E/modules.json").read_text(encoding="utf-8"))
    modules[1]["type"] = "somebody.Pooling"
    Path("E/modules.json").write_text(json.dumps(modules), encoding="utf-8")
    assert "type is 'somebody.Pooling'" in refused(capsys, line)
    assert not Path("OUT").exists()


def test_what_cannot_be_written_leaves_no_model(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    line = "calibrate E --texts one.txt --target-flops 0.6 --output OUT"
    with monkeypatch.context() as patch:
        patch.setattr(SentenceTransformer, "save_pretrained", full)
        assert "model cannot be written to OUT" in refused(capsys, line)
    assert not Path("OUT/modules.json").exists() and not Path("OUT/config.json").exists()
    said(capsys, line)  # the same again takes its place
    assert type(tp.from_pretrained("OUT")) is SentenceTransformer

"""``token-pruning train`` on folders of sentence-transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import token_pruning as tp
from tests.integrations.test_sentence_transformers import home as home  # a fixture
from tests.integrations.test_sentence_transformers import texts as some_texts
from tests.lab.test_calibrate_library import TEXTS, refused, said
from tests.lab.test_calibrate_library import folder as folder  # a fixture
from tests.workspace import assert_same_training, killed_before_publishing, write_checkpoint
from token_pruning.budget.distillation import Course
from token_pruning.lab.cli import main
from token_pruning.lab.training.run_dir import RunDir

FEW = "--examples 40 --lr 1e-4 --batch-size 16"


@pytest.fixture(autouse=True)
def _more_texts(folder: Path) -> None:
    Path("one.txt").write_text("\n".join([*TEXTS, *some_texts(72, 40, seed=4)]), encoding="utf-8")


def test_a_folder_learns_what_it_gave(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, f"train E --texts one.txt --target-flops 0.6 --output OUT --epoch 2 {FEW}")
    found = json.loads(Path("OUT/distillation.json").read_text(encoding="utf-8"))
    assert found["relative_flops"] == pytest.approx(0.6, abs=0.02)
    assert found["calibration"]["chosen"]["rule"] in out and "of them that were" not in out
    assert f"divergence {found['divergence']:.4f}, before training {found['divergence_before']:.4f}" in out
    model = tp.from_pretrained("OUT")
    dense = tp.prune(embedder_of("E"), tp.Unpruned())
    assert (model.encode(TEXTS) * dense.encode(TEXTS)).sum(1).mean() > 0.9
    assert "OUT holds a finished run" in refused(capsys, "train E --texts one.txt --target-flops 0.6 --output OUT")

    out = said(capsys, f"train OUT --texts one.txt --output MORE --epoch 1 {FEW}")  # learns from E still
    more = json.loads(Path("MORE/distillation.json").read_text(encoding="utf-8"))
    assert more["calibration"] is None
    assert more["divergence_before"] == pytest.approx(found["divergence"], rel=0.05)


@pytest.mark.parametrize(("given", "rate"), [("", 2e-4), ("--lr 3e-5", 3e-5)])
def test_the_learning_rate_is_the_one_given(
    given: str, rate: float, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    train = Course.train
    monkeypatch.setattr(
        Course,
        "train",
        lambda self, trainer, **how: (rates.append(trainer.args.learning_rate), train(self, trainer))[1],
    )
    said(capsys, f"train E --texts one.txt --target-flops 0.6 --output OUT --examples 40 --epoch 0.2 {given}")
    assert rates == [rate]


def embedder_of(folder: str) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device="cpu")


def test_a_calibrated_reranker(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{query},{text}" for query in some_texts(20, 8, seed=1) for text in some_texts(5, seed=len(query))]
    Path("two.csv").write_text("\n".join(["query,passage", *rows]), encoding="utf-8")
    said(capsys, "calibrate R --texts two.csv --target-flops 0.6 --output C --examples 40")
    said(capsys, f"train C --texts two.csv --output OUT {FEW} --bf16")
    assert type(tp.from_pretrained("OUT")).__name__ == "CrossEncoder"
    assert json.loads(Path("OUT/distillation.json").read_text(encoding="utf-8"))["calibration"] is None


@pytest.mark.parametrize("budgets", ["0.6", "0.5 0.7"])
def test_a_killed_run_continues_to_the_same_result(
    budgets: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"train E --texts one.txt --target-flops {budgets} --epoch 2 --save-step 2 {FEW} --output"
    said(capsys, f"{line} WHOLE")
    with killed_before_publishing(3):
        main(f"{line} OUT".split())
    assert [each.name for each in RunDir(Path("OUT")).checkpoints()] == ["checkpoint-2", "checkpoint-4"]
    assert tp.from_pretrained("OUT/checkpoint-4")[0].model.token_pruner is not None
    assert "continuing from OUT/checkpoint-4" in said(capsys, f"{line} OUT")
    assert not list(Path("OUT").glob("incomplete-*"))
    assert_same_training(load_file("WHOLE/model.safetensors"), load_file("OUT/model.safetensors"))
    one, two = (load_file(f"{out}/token_pruner.safetensors") for out in ("WHOLE", "OUT"))
    assert_same_training(one, two)
    tables = [tp.from_pretrained(out)[0].model.token_pruner.pruner.budgets for out in ("WHOLE", "OUT")]
    assert (tables[0] is None) == (" " not in budgets)
    for whole, killed in zip(*(table or () for table in tables), strict=True):
        assert killed.relative_flops == whole.relative_flops
        assert killed.thresholds == pytest.approx(whole.thresholds, abs=1e-4)


def test_several_budgets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, f"train --texts one.txt --target-flops 0.7 0.5 --output OUT {FEW} E")
    found = json.loads(Path("OUT/distillation.json").read_text(encoding="utf-8"))
    run = json.loads(Path("OUT/run.json").read_text(encoding="utf-8"))
    assert run["options"]["target_flops"] == [0.7, 0.5]
    table = tp.from_pretrained("OUT")[0].model.token_pruner.pruner.budgets
    assert [each["budget"] for each in found["budgets"]] == [each.relative_flops for each in table]
    assert {0.5, 0.7} < {each["budget"] for each in found["budgets"]}
    for each in found["budgets"]:
        assert each["relative_flops"] == pytest.approx(each["budget"], abs=0.02)
        assert f"budget {each['budget']:.3f}: relative FLOPs {each['relative_flops']:.3f}, divergence" in out
    lowest = found["budgets"][0]
    assert (found["relative_flops"], found["divergence"]) == (lowest["relative_flops"], lowest["divergence"])
    assert "pruned for several budgets already" in refused(capsys, "train OUT --texts one.txt --target-flops 0.5 0.7")

    said(capsys, f"train OUT --texts one.txt --output MORE {FEW}")  # for the same ones
    more = json.loads(Path("MORE/distillation.json").read_text(encoding="utf-8"))
    assert [each["budget"] for each in more["budgets"]] == [each["budget"] for each in found["budgets"]]
    said(capsys, f"train E --texts one.txt --target-flops 0.6 --output ONE {FEW}")
    assert "budgets" not in json.loads(Path("ONE/distillation.json").read_text(encoding="utf-8"))


def test_what_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path("B"))
    for line, message in {
        "train E --target-flops 0.6": "E learns from texts without labels; give --texts, not a task",
        "train E --texts one.txt": "target_flops is missing",
        "train E --texts two.csv --target-flops 0.6": "a SentenceTransformer takes single texts, in one column",
        "train E --texts one.txt --task SST2": "--task is for training on labels",
        "train E --texts one.txt --masking-mode soft": "--masking-mode is for training on labels",
        "train E --texts one.txt --scoring-mode mean": "--scoring-mode is for training on labels",
        "train E --texts one.txt --output E --target-flops 0.6": "output directory E is the --restore folder",
        "train E --restore E --texts one.txt": "give either MODEL or --restore",
        "train B --texts one.txt --target-flops 0.6": "--texts is for models of sentence-transformers; B is none",
        "train --texts one.txt --target-flops 0.6": "MODEL is missing",
    }.items():
        assert message in refused(capsys, line)
    said(capsys, f"train E --texts one.txt --target-flops 0.6 --output OUT {FEW}")
    Path("E").rename("GONE")
    assert "the dense model it started from is gone; give --teacher" in refused(capsys, "train OUT --texts one.txt")
    said(capsys, f"train OUT --texts one.txt --teacher GONE --output MORE {FEW}")

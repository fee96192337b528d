"""The paper's commands as written, on tiny data: folders, files, figures, and what must not have to be done by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import token_pruning as tp
from tests.workspace import assert_same_training, edit_config, write_checkpoint, write_mnli, write_sst2, write_stsb
from token_pruning.lab.cli import main, paper_main

THRESHOLDS = {"prune_mode": "absolute_threshold", "final_token_threshold": 0.01, "scoring_mode": "mean"}


@pytest.fixture
def glue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_sst2(tmp_path / "glue")


def run(line: str, *more: object) -> int:
    return paper_main([*line.split(), *map(str, more)])


def results(folder: Path | str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((Path(folder) / "eval_results.json").read_text(encoding="utf-8"))
    return loaded


def soft_stage(checkpoint: Path, glue: Path) -> Path:
    status = run(
        "--arch pibert-base --task SST2 --lr 2e-5 --temperature 1e-3 --lambda 0.15 --weight_decay 0 --bs 8 "
        "--masking_mode soft --epoch 2 --save_step 2 --no_load --lr_threshold 1e-2",
        "--restore", checkpoint, "--data_dir", glue,
    )  # fmt: skip
    assert status == 0
    return Path("checkpoints/base/SST2/absolute_threshold/rate_0.01/temperature_0.001/lambda_0.15/lr_2e-05")


def test_soft_then_hard_lands_in_the_papers_folders(glue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(Path("CKPT"), **THRESHOLDS)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 99}')  # left over; does no harm
    soft = soft_stage(checkpoint, glue)
    learned = tp.from_pretrained(soft).token_pruner.thresholds
    assert isinstance(learned, torch.nn.Parameter)
    assert not torch.allclose(learned, torch.tensor([0.0025, 0.005, 0.0075, 0.01]))
    assert (soft / "trainer_state.json").exists()

    assert run("--arch pibert-base --task SST2 --lr 1e-5 --bs 8 --masking_mode hard --epoch 1",
               "--restore", soft, "--data_dir", glue) == 0  # fmt: skip
    hard = tp.from_pretrained(soft / "hard" / "lr_1e-05")
    assert torch.equal(hard.token_pruner.thresholds, learned.detach())  # fixed in the hard stage
    found = results(soft / "hard" / "lr_1e-05")
    assert found["thresholds"] == learned.tolist()
    assert found["masking_mode"] == "hard"
    assert set(found["gflops_per_example"]) == {"padded", "dense", "pruned"}
    assert found["gflops_per_example"]["padded"] > found["gflops_per_example"]["dense"]
    assert found["relative_flops"] == pytest.approx(
        found["gflops_per_example"]["pruned"] / found["gflops_per_example"]["dense"]
    )
    assert len(found["tokens_kept_per_layer"]) == 4
    assert found["examples"] == 12
    assert 0 <= found["metrics"]["accuracy"] <= 1
    printed = capsys.readouterr().out
    for words in ("accuracy", "padded", "dense on valid tokens", "relative FLOPs", "kept per layer", "thresholds"):
        assert words in printed


def test_training_logs_thresholds_and_kept_fractions(glue: Path) -> None:
    soft = soft_stage(write_checkpoint(Path("CKPT"), **THRESHOLDS), glue)
    state = json.loads((soft / "trainer_state.json").read_text())
    entries = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(entries) == 4  # 8 steps, every 2
    for entry in entries:
        assert all(f"threshold_{layer}" in entry and 0 < entry[f"kept_{layer}"] <= 1 for layer in range(1, 5))
    assert entries[0]["threshold_4"] != entries[-1]["threshold_4"]
    assert any("eval_relative_flops" in entry for entry in state["log_history"])
    assert list((soft / "runs").rglob("events.out.tfevents.*"))  # TensorBoard is installed with the tests


def test_topk_and_manual_thresholds_by_configuration_alone(glue: Path) -> None:
    checkpoint = write_checkpoint(Path("CKPT"), prune_mode="topk", token_keep_rate=0.2)
    line = "--arch pibert-base --task SST2 --lr 1e-5 --bs 8 --masking_mode hard --epoch 1 --save_step 3"
    assert run(line, "--restore", checkpoint, "--data_dir", glue) == 0
    topk = tp.from_pretrained(checkpoint / "topk" / "lr_1e-05")
    assert topk.token_pruner.pruner == tp.TopK(token_keep_rate=0.2)
    assert results(checkpoint / "topk" / "lr_1e-05")["thresholds"] is None

    edit_config(checkpoint, **THRESHOLDS | {"final_token_threshold": 0.02})
    assert run(line, "--restore", checkpoint, "--data_dir", glue) == 0
    manual = results(checkpoint / "hard" / "lr_1e-05")
    assert manual["thresholds"] == pytest.approx([0.005, 0.01, 0.015, 0.02])


def test_an_encoder_that_was_never_fine_tuned_gets_a_dense_stage(glue: Path) -> None:
    start = write_checkpoint(Path("START"), head="encoder")
    write_sst2(glue, train=160)
    line = "--task SST2 --lr 1e-3 --bs 8 --epoch 4 --masking_mode none --data_dir"
    assert run(line, glue, "--restore", start) == 0
    dense = Path("checkpoints/base/SST2/dense/lr_0.001")
    config = json.loads((dense / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert "prune_mode" not in config
    assert results(dense)["relative_flops"] == 1
    assert results(dense)["metrics"]["accuracy"] > 0.9  # the first word gives it away
    edit_config(dense, **THRESHOLDS)
    soft_stage(dense, glue)


def test_mixed_is_soft_then_hard_in_one_run(glue: Path) -> None:
    checkpoint = write_checkpoint(Path("CKPT"), **THRESHOLDS)
    line = "--task SST2 --lr 2e-5 --lambda 0.1 --bs 8 --masking_mode mixed --epoch 2 --save_step 1 --lr_threshold 1e-2"
    assert run(line, "--no_load", "--output_dir", "out", "--restore", checkpoint, "--data_dir", glue) == 0
    entries = [e for e in json.loads(Path("out/trainer_state.json").read_text())["log_history"] if "loss" in e]
    thresholds = [entry["threshold_4"] for entry in entries]
    assert len(set(thresholds[:4])) == 4  # trained for half of the 8 steps
    assert len(set(thresholds[3:])) == 1  # then fixed
    model = tp.from_pretrained("out")
    assert isinstance(model.token_pruner.pruner, tp.FixedThreshold)
    assert not model.token_pruner.pruner.learned
    assert model.token_pruner.thresholds[3].item() == pytest.approx(thresholds[-1])


def test_regression_and_two_validation_sets(tmp_path: Path, glue: Path) -> None:
    line = "--lr 1e-4 --bs 8 --masking_mode hard --epoch 1 --output_dir"
    write_stsb(glue)
    checkpoint = write_checkpoint(Path("ONE"), labels=1, **THRESHOLDS)
    assert run(line, "stsb", "--task", "STSB", "--restore", checkpoint, "--data_dir", glue) == 0
    metrics = results("stsb")["metrics"]
    assert metrics["combined_score"] == pytest.approx((metrics["pearson"] + metrics["spearmanr"]) / 2)

    write_mnli(glue)
    checkpoint = write_checkpoint(Path("THREE"), labels=3, **THRESHOLDS)
    assert run(line, "mnli", "--task", "MNLI", "--restore", checkpoint, "--data_dir", glue) == 0
    found = results("mnli")
    assert (found["split"], found["examples"]) == ("validation_matched", 9)
    assert found["other_splits"]["validation_mismatched"]["examples"] == 6
    history = json.loads(Path("mnli/trainer_state.json").read_text())["log_history"]
    assert any("eval_accuracy" in e and "eval_validation_mismatched_accuracy" in e for e in history)


def test_evaluation_only(glue: Path) -> None:
    checkpoint = write_checkpoint(Path("CKPT"), **THRESHOLDS | {"final_token_threshold": 0.05})
    before = sorted(p.name for p in checkpoint.iterdir())
    assert run("--task SST2 --eval", "--restore", checkpoint, "--data_dir", glue) == 0
    pruned = results(checkpoint / "eval")
    assert pruned["relative_flops"] < 1
    assert (
        run("--task SST2 --eval --masking_mode none --output_dir dense", "--restore", checkpoint, "--data_dir", glue)
        == 0
    )
    assert results("dense")["relative_flops"] == 1
    assert results("dense")["gflops_per_example"]["dense"] == pruned["gflops_per_example"]["dense"]
    assert sorted(p.name for p in checkpoint.iterdir()) == [*sorted([*before, "eval"])]


def test_later_spellings_and_large(glue: Path) -> None:
    checkpoint = write_checkpoint(Path("CKPT"), **THRESHOLDS)
    line = "--arch=ltp-large --task=SST2 --lambda-threshold=0.1 --save-steps=4 --bs=16 --masking-mode=soft --epoch=1"
    assert main(["train", *line.split(), "--lr=1e-5", f"--restore={checkpoint}", f"--data-dir={glue}"]) == 0
    assert Path("checkpoints/large/SST2/absolute_threshold/rate_0.01/temperature_0.001/lambda_0.1/lr_1e-05").is_dir()


def test_at_most_three_checkpoints_unless_all_are_wanted(glue: Path) -> None:
    checkpoint = write_checkpoint(Path("CKPT"), **THRESHOLDS)
    line = "--task SST2 --lr 1e-5 --bs 8 --masking_mode hard --epoch 2 --save_step 1 --data_dir"
    assert run(line, glue, "--restore", checkpoint, "--output_dir", "few") == 0
    assert len(list(Path("few").glob("checkpoint-*"))) == 3
    assert run(line, glue, "--restore", checkpoint, "--output_dir", "all", "--save_all") == 0
    assert len(list(Path("all").glob("checkpoint-*"))) == 8
    assert not list(Path("few").glob("incomplete-*"))


def test_best_model_is_loaded_at_the_end_unless_told_otherwise(glue: Path) -> None:
    checkpoint = write_checkpoint(Path("CKPT"), **THRESHOLDS)
    line = "--task SST2 --lr 1e-3 --bs 8 --masking_mode hard --epoch 4 --save_step 2 --data_dir"
    assert run(line, glue, "--restore", checkpoint, "--output_dir", "best") == 0
    history = json.loads(Path("best/trainer_state.json").read_text())["log_history"]
    scores = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry]
    assert results("best")["metrics"]["accuracy"] == max(scores)
    assert run(line, glue, "--restore", checkpoint, "--output_dir", "last", "--no_load") == 0
    last = tp.from_pretrained("last").state_dict()
    final = tp.from_pretrained("last/checkpoint-16").state_dict()
    assert all(torch.equal(last[name], final[name]) for name in last)


def test_seed_decides_everything(glue: Path) -> None:
    checkpoint = write_checkpoint(Path("CKPT"), head="encoder")
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        line = (
            f"--task SST2 --lr 1e-3 --bs 8 --masking_mode none --epoch 1 --seed {seed} --output_dir {folder} --data_dir"
        )
        assert run(line, glue, "--restore", checkpoint) == 0
    a, b, c = (tp.from_pretrained(folder, tp.Unpruned()).state_dict() for folder in "abc")
    assert_same_training(a, b, 2e-4)
    assert (a["classifier.weight"] - c["classifier.weight"]).abs().max() > 1e-2


def test_own_files_and_prediction(tmp_path: Path, glue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f'{{"text": "{word} cat", "label": "{label}"}}' for word, label in [("good", "yes"), ("bad", "no")] * 16]
    Path("train.jsonl").write_text("\n".join(rows))
    Path("dev.csv").write_text("text,label\ngood cat,yes\nbad cat,no\n")
    start = write_checkpoint(Path("START"), head="encoder")
    line = "--train-file train.jsonl --validation-file dev.csv --masking-mode none --lr 1e-3 --epoch 10 --bs 8"
    assert main(["train", *line.split(), "--restore", str(start), "--output-dir", "own"]) == 0
    assert results("own")["metrics"]["accuracy"] == 1
    edit_config(Path("own"), **THRESHOLDS)
    Path("new.txt").write_text("bad cat\ngood cat\n\nbad cat\n")
    capsys.readouterr()
    assert main(["predict", "--restore", "own", "--input", "new.txt"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["label"] for line in lines][:2] == ["no", "yes"]
    assert len(lines) == 4
    assert all(0.5 <= line["probability"] <= 1 for line in lines)
    assert main(["predict", "--restore", "own", "--input", "new.txt", "--output", "out/labels.jsonl"]) == 0
    assert [json.loads(line) for line in Path("out/labels.jsonl").read_text().splitlines()] == lines

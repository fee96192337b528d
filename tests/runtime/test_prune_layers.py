"""Pruning at some layers only, and layers that need no importance scores."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import token_pruning as tp
from tests.tiny import assert_close, assert_equal, outputs, pruned, ragged_batch, same_survivors, tiny_model
from tests.workspace import write_checkpoint, write_sst2
from token_pruning.errors import ConfigError
from token_pruning.lab.cli import main

METHODS: dict[str, tuple[type[tp.Pruner], dict[str, Any]]] = {
    "absolute": (tp.FixedThreshold, {"final_token_threshold": 1.1, "scoring_mode": "relative"}),
    "learned": (tp.LearnedThreshold, {"final_token_threshold": 1.1, "scoring_mode": "relative"}),
    "topk": (tp.TopK, {"token_keep_rate": 0.1, "keep_all_layers": 1}),
    "relative": (tp.RelativeThreshold, {"token_threshold": 0.5}),
    "rising": (tp.RisingThreshold, {"final_token_threshold": 0.8}),
}


def make(method: str, **more: Any) -> tp.Pruner:
    cls, settings = METHODS[method]
    return cls(**settings, **more)


@pytest.mark.parametrize("summary_tokens", ["none", "segment"])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_leave_at_the_layers_named_only(method: str, summary_tokens: Any) -> None:
    model, batch = tiny_model("bert", "token"), ragged_batch([30, 9, 1, 17])
    pruner = make(method, prune_layers=[2, 3], summary_tokens=summary_tokens)
    found = {}
    for execution in ("packed", "masked"):
        with pruned(model, pruner, execution), torch.no_grad(), tp.record(model) as trace:
            found[execution] = outputs(model(**batch)), trace
        leaves = (trace.ffn_lengths < trace.attention_lengths).any(1)
        assert leaves.tolist() == [False, True, True, False]
    with pruned(model, pruner):
        engine = tp.compile(model, dtype="float32", threads=1)
    with tp.record(engine) as trace:
        found["engine"] = outputs(engine(**batch)), trace
    found["engine, unrecorded"] = outputs(engine(**batch)), trace
    expected, expected_trace = found.pop("masked")
    mask = batch["attention_mask"].bool()
    for name, (output, trace) in found.items():
        assert same_survivors(trace, expected_trace), name
        assert_close(output["logits"][mask], expected["logits"][mask], message=name)


def test_all_layers_named_are_all_layers() -> None:
    model, batch = tiny_model("bert", "token"), ragged_batch([30, 9])
    results = []
    for prune_layers in (None, [4, 2, 1, 3, 3]):
        with pruned(model, make("absolute", prune_layers=prune_layers)), torch.no_grad():
            results.append(model(**batch).logits)
    assert_equal(*results)


def test_the_soft_stage_masks_at_the_layers_named_only() -> None:
    model = tiny_model().train()
    tp.prune(model, tp.LearnedThreshold(final_token_threshold=0.01, temperature=1e-2, prune_layers=[2]))
    with tp.record(model) as trace:
        loss = model(**ragged_batch([30, 9]), labels=torch.tensor([0, 1])).loss
    full = torch.tensor([30.0, 9.0])
    assert torch.equal(trace.soft_lengths[[0, 2, 3]], full.expand(3, 2))
    assert (trace.soft_lengths[1] < full).all()
    (loss + trace.soft_rates.sum()).backward()
    assert [bool(g) for g in model.token_pruner.thresholds.grad.abs() > 0] == [False, True, False, False]


def test_layers_travel_with_the_model(tmp_path: Path) -> None:
    model = tp.prune(tiny_model(), make("topk", prune_layers=(3, 2)))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["prune_layers"] == [2, 3]
    assert tp.from_pretrained(tmp_path).token_pruner.pruner == make("topk", prune_layers=[2, 3])
    assert "prune_layers" not in tp.prune(tiny_model(), make("topk")).config.to_dict()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2", "prune_layers is '2'; it must be a list of layers"),
        (2, "prune_layers is 2; it must be a list of layers"),
        ([1, 0], r"prune_layers\[1\] is 0; it must be a whole number >= 1"),
        ([1.5], r"prune_layers\[0\] is 1.5"),
    ],
)
def test_wrong_layers_are_named(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tp.TopK(prune_layers=value)


def test_a_layer_the_model_has_not_is_named_and_leaves_it_alone() -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="prune_layers names layer 5; the model has 4 layers"):
        tp.prune(model, make("topk", prune_layers=[2, 5]))


# Which layers compute scores


@pytest.mark.parametrize(
    ("pruner", "expected"),
    [
        (tp.FixedThreshold(thresholds=[0.0, 0.2, -1.0, 0.1]), [False, True, False, True]),
        (tp.FixedThreshold(thresholds=[0.0, 0.2, 0.2, 0.1], prune_layers=[1, 2]), [False, True, False, False]),
        (tp.FixedThreshold(final_token_threshold=0), [False] * 4),
        (tp.TopK(token_keep_rate=0.5), [False, False, False, True]),
        (tp.Unpruned(), [False] * 4),
    ],
)
def test_layers_that_can_drop_something(pruner: tp.Pruner, expected: list[bool]) -> None:
    model = tp.prune(tiny_model(), pruner)
    assert model.token_pruner.dropping_layers() == expected


def test_thresholds_that_change_are_seen() -> None:
    model = tp.prune(tiny_model("bert", "token"), tp.FixedThreshold(thresholds=[0.0] * 4, scoring_mode="relative"))
    batch = ragged_batch([30])
    with torch.no_grad():
        dense = model(**batch).logits
        model.token_pruner.thresholds.data.fill_(1.0)
        assert not torch.equal(model(**batch).logits, dense)
        model.token_pruner.thresholds.data.zero_()
        assert_equal(model(**batch).logits, dense)


# Calibration


def examples() -> dict[str, torch.Tensor]:
    return ragged_batch(torch.randint(4, 40, (48,), generator=torch.Generator().manual_seed(0)).tolist())


@pytest.mark.parametrize("layers", [[1], [2, 3], [3, 1]])
def test_calibration_prunes_at_the_layers_named(layers: list[int]) -> None:
    model = tiny_model(initializer_range=0.3)
    found = tp.calibrate(model, examples(), 0.8, prune_layers=layers)
    assert found.chosen.relative_flops == pytest.approx(0.8, abs=0.02)
    for fit in found.candidates:
        assert all(threshold == 0 for layer, threshold in enumerate(fit.thresholds, 1) if layer not in layers)
    assert any(found.chosen.thresholds)


@pytest.mark.parametrize(
    ("layers", "more", "message"),
    [
        ([], {}, r"prune_layers is \[\]; it must name at least one layer from 1 to 3"),
        ([4], {}, r"prune_layers is \[4\]; it must name at least one layer from 1 to 3"),
        ([3], {"target_flops": 0.3}, "only first tokens are left after layer 3"),
        ([3], {"search": [tp.Schedule("mine", (0.5, 0.0, 0.5))]}, "schedule 'mine' has weights in layers that"),
    ],
)
def test_layers_that_calibration_cannot_prune_at(layers: list[int], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tp.calibrate(tiny_model(), examples(), **{"target_flops": 0.8, **more}, prune_layers=layers)


# The commands


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_sst2(tmp_path / "glue", train=80, dev=12)
    write_checkpoint(tmp_path / "CKPT")
    return tmp_path


TASK = ["--task", "SST2", "--data-dir", "glue", "--restore", "CKPT", "--output-dir", "OUT"]


def test_the_commands_take_layers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["--prune-mode", "absolute_threshold", "--final-token-threshold", "0.01", "--prune-layers", "2", "4"]
    assert main(["train", *TASK, *keys, "--epoch", "1"]) == 0
    assert json.loads((folder / "OUT" / "config.json").read_text(encoding="utf-8"))["prune_layers"] == [2, 4]
    line = ["calibrate", *TASK, "--target-flops", "0.75", "--prune-layers", "3", "--overwrite-output-dir"]
    assert main(line) == 0
    thresholds = tp.from_pretrained(folder / "OUT").token_pruner.thresholds
    assert [bool(value) for value in thresholds > 0] == [False, False, True, False]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["train", *TASK, "--prune-layers", "2", "--target-flops", "0.6"], "it is --schedule that says where"),
        (["train", *TASK, "--prune-mode", "topk", "--token-keep-rate", "0.5", "--prune-layers", "9"], "names layer 9"),
        (["calibrate", *TASK, "--target-flops", "0.6", "--prune-layers", "9"], "at least one layer from 1 to 3"),
    ],
)
def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], line: list[str], message: str) -> None:
    assert main(line) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and message in errors[0]

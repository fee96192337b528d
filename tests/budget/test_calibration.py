"""Thresholds for a budget: what they cost, how they are chosen, and when there are none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import token_pruning as tp
from tests.tiny import FAMILIES, HEADS, pruned, ragged_batch, shared_model, tiny_model
from tests.workspace import WORDS, write_checkpoint, write_sst2
from token_pruning.budget import calibration
from token_pruning.budget.divergence import Divergence, Spans, drawn_spans
from token_pruning.budget.examples import as_batch
from token_pruning.budget.fitting import (
    Fit,
    fit_profile,
    fit_to_budget,
    lowest_flops,
    predicted_flops,
    profile_of,
    using,
)
from token_pruning.budget.schedules import schedules
from token_pruning.errors import ConfigError
from token_pruning.lab.cli import main
from token_pruning.runtime.prune import attachment_of

ZEROS = tp.FixedThreshold(thresholds=[0.0] * 4, scoring_mode="relative")
SUMMARIES = tp.FixedThreshold(thresholds=[0.0] * 4, scoring_mode="relative", summary_tokens="segment")
FEW = schedules(3)[:2]  # where it does not matter which; every one searched takes its time
SCHEDULES = [schedule.name for schedule in schedules(3)]


def examples(count: int = 48, **extra: Any) -> dict[str, Tensor]:
    lengths = torch.randint(4, 40, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return {**ragged_batch(lengths), **extra}


def sharp_model(family: str = "bert", head: str = "sequence") -> Any:
    """Attention that differs between tokens, so that there is something to choose."""
    return tiny_model(family, head, initializer_range=0.3)


def test_schedules_say_what_part_leaves_where() -> None:
    found = {schedule.name: schedule for schedule in schedules(3)}
    assert found["step-2"].profile(0.75) == [1.0, 0.25, 0.25]
    assert found["linear"].profile(0.6) == pytest.approx([0.8, 0.6, 0.4])
    assert found["geometric"].profile(0.7) == pytest.approx([0.6, 0.4, 0.3])
    assert found["late"].profile(0.5) == pytest.approx([1.0, 0.75, 0.5])
    for schedule in found.values():
        assert sum(schedule.weights) == pytest.approx(1)
        assert schedule.profile(1.0)[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("pruner", [ZEROS, SUMMARIES])
@settings(max_examples=10)
@given(name=st.sampled_from(SCHEDULES), strength=st.floats(0, 1))
def test_a_fit_keeps_the_fractions_asked_for(pruner: tp.Pruner, name: str, strength: float) -> None:
    schedule = next(s for s in schedules(3) if s.name == name)
    batch = examples(12)
    with pruned(shared_model("bert", "sequence"), pruner) as model:
        fit = fit_profile(model, batch, schedule, strength)
        tp.set_thresholds(model, fit.thresholds)
        with torch.no_grad(), tp.record(model) as trace:
            model(**batch)
        assert tp.count_flops(model, trace).relative == pytest.approx(fit.relative_flops)
    ordinary = int(batch["attention_mask"].sum()) - 12
    kept = (trace.ffn_lengths - trace.summary_lengths).sum(1)[:3] - 12
    for layer, fraction in enumerate(schedule.profile(strength)):
        assert kept[layer] == round(fraction * ordinary)


@pytest.mark.parametrize("target", [0.35, 0.5, 0.7])
@pytest.mark.parametrize("name", ["step-1", "linear", "geometric"])
@pytest.mark.parametrize("pruner", [ZEROS, SUMMARIES])
def test_a_fit_costs_what_was_asked(pruner: tp.Pruner, name: str, target: float) -> None:
    schedule = next(s for s in schedules(3) if s.name == name)
    with pruned(sharp_model(), pruner) as model:
        if predicted_flops(model, examples(), schedule.profile(1)) > target:
            return
        fit = fit_to_budget(model, examples(), schedule, target)
    assert fit is not None
    assert fit.relative_flops == pytest.approx(target, abs=0.01)


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_prediction_is_the_cost_of_sequences_that_all_keep_the_same_fraction(head: str) -> None:
    model, batch = shared_model("bert", head), ragged_batch([21, 41])
    layers = 3 if head == "sequence" else 4
    with pruned(model, tp.TopK(token_keep_rate=0.5)):
        with torch.no_grad(), tp.record(model) as trace:
            model(**batch)
        measured = tp.count_flops(model, trace).relative
        profile = [1.0, 1.0, 1.0, 0.5][:layers]
        # Twenty and forty tokens beside the first: top-k keeps half of all, the prediction the first and half the rest.
        assert predicted_flops(model, batch, profile) == pytest.approx(measured, abs=0.005)


def test_thresholds_learned_are_a_schedule() -> None:
    model, batch = shared_model("bert", "sequence"), examples(12)
    with pruned(model, tp.FixedThreshold(thresholds=[0.9, 0.0, 1.0, 0.0], scoring_mode="relative")):
        with torch.no_grad(), tp.record(model) as trace:
            model(**batch)
        schedule = profile_of(model, batch)
        kept = schedule.profile(1.0)
        again = fit_profile(model, batch, schedule, 1.0)
    total = int(batch["attention_mask"].sum()) - 12
    assert kept == pytest.approx(((trace.ffn_lengths.sum(1)[:3] - 12) / total).tolist())
    assert kept[1] == kept[0] > kept[2]
    assert again.relative_flops == pytest.approx(tp.count_flops(model, trace).relative, abs=0.002)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_any_head_is_pruned_to_its_budget(family: str, head: str) -> None:
    model = sharp_model(family, head)
    batch = {**ragged_batch([30, 12, 25, 8] * 40, family=family)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = tp.calibrate(model, batch, 0.6)
    assert found.chosen.relative_flops == pytest.approx(0.6, abs=0.02)
    assert found.candidates[0] is found.chosen
    with torch.no_grad(), tp.record(model) as trace:
        model(**ragged_batch([30, 12, 25, 8] * 40, family=family, seed=1))  # new texts
    assert tp.count_flops(model, trace).relative == pytest.approx(0.6, abs=0.1)
    pruner = attachment_of(model).token_pruner.pruner
    assert pruner == found.pruner and pruner.scoring_mode == "relative"
    tp.unprune(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def assert_same_fit(one: Fit, two: Fit) -> None:
    """The same but for rounding."""
    assert (one.schedule, one.vocabulary_threshold) == (two.schedule, two.vocabulary_threshold)
    assert one.thresholds == pytest.approx(two.thresholds, abs=1e-5)
    assert one.kept == pytest.approx(two.kept, abs=1e-5) and one.relative_flops == pytest.approx(two.relative_flops)
    assert one.divergence == pytest.approx(two.divergence, rel=1e-3, abs=1e-5)


def test_the_same_seed_gives_the_same_thresholds() -> None:
    first, again, other = (
        tp.calibrate(sharp_model(), examples(), 0.5, seed=seed, summary_tokens="segment") for seed in (3, 3, 4)
    )
    assert_same_fit(first.chosen, again.chosen)
    assert first.pruner.thresholds != other.pruner.thresholds


def test_training_mode_and_weights_are_left_alone() -> None:
    model = sharp_model().train()
    tp.calibrate(model, examples(), 0.5)
    assert model.training and model.bert.training


def test_lists_of_examples_are_padded() -> None:
    whole = examples(40)
    rows = [
        {"input_ids": ids[mask.bool()].tolist(), "attention_mask": [1] * int(mask.sum())}
        for ids, mask in zip(whole["input_ids"], whole["attention_mask"], strict=True)
    ]
    batch = as_batch(rows, 0)
    assert torch.equal(batch["input_ids"], whole["input_ids"])
    assert torch.equal(batch["attention_mask"], whole["attention_mask"])
    assert torch.equal(
        as_batch([{"input_ids": row["input_ids"]} for row in rows], 0)["attention_mask"], batch["attention_mask"]
    )
    of_rows, of_whole = (tp.calibrate(sharp_model(), each, 0.5) for each in (rows, whole))
    assert_same_fit(of_rows.chosen, of_whole.chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_can_be_reached_is_said_and_can_be_reached(family: str) -> None:
    model = tiny_model(family)
    batch = ragged_batch([30, 12, 25, 8] * 10, family=family)
    with pytest.raises(
        ConfigError, match=r"target_flops is 0.1; the lowest that can be reached .* is 0\.\d\d\d"
    ) as caught:
        tp.calibrate(model, batch, 0.1)
    lowest = float(str(caught.value).split(" is ")[2][:5])
    found = tp.calibrate(model, batch, lowest + 0.0006)
    assert found.chosen.relative_flops == pytest.approx(lowest, abs=0.015)


def test_an_embedding_model_with_cls_pooling_is_judged_by_first_tokens() -> None:
    model, batch = tiny_model(head="encoder"), examples(64)
    with torch.no_grad():
        dense = model(**batch).last_hidden_state[:, 0]
    found = tp.calibrate(model, batch, 0.6, reads="first", search=FEW, seed=3)
    held_out = torch.randperm(64, generator=torch.Generator().manual_seed(3))[32:]
    with torch.no_grad():
        pruned = model(**batch).last_hidden_state
    assert pruned.shape[1] == 1
    drawn = drawn_spans(batch, held_out, 0, seed=3)
    assert drawn is not None
    with torch.no_grad():
        vectors = tiny_model(head="encoder")(**drawn[0]).last_hidden_state[:, 0]
    compared = Divergence("embedding", torch.arange(64), Spans(vectors, drawn[1]))
    expected, _ = compared.between(dense[held_out], pruned[held_out, 0], held_out)
    assert found.chosen.divergence == pytest.approx(expected, rel=1e-3)


def test_a_budget_above_the_cost_of_everything_prunes_nothing() -> None:
    model = sharp_model()
    found = tp.calibrate(model, examples(), 1.0)
    probed = found.pruner.probes.layers if found.pruner.probes else ()
    assert all(
        threshold == (-1e6 if layer in probed else 0) for layer, threshold in enumerate(found.pruner.thresholds, 1)
    )
    assert found.chosen.divergence == pytest.approx(0, abs=1e-6)


def test_max_drop_takes_the_cheapest_that_keeps_the_metric() -> None:
    model = sharp_model()
    batch = examples(64)
    with torch.no_grad():
        model.classifier.bias -= model(**batch).logits.mean(0)  # else all would be of one class
        labels = model(**batch).logits.argmax(-1)
    generous = tp.calibrate(model, {**batch, "labels": labels}, max_drop=100.0)
    tp.unprune(model)
    strict = tp.calibrate(model, {**batch, "labels": labels}, max_drop=0.5, search=FEW)
    assert generous.metric_dense == strict.metric_dense == 100.0
    assert generous.drop_bound is not None and generous.drop_bound <= 100
    assert strict.drop_bound is not None and strict.drop_bound <= 0.5
    assert generous.chosen.relative_flops < strict.chosen.relative_flops
    with pruned(tiny_model(), ZEROS) as other:
        assert generous.chosen.relative_flops == pytest.approx(lowest_flops(other, batch), abs=0.05)


def test_max_drop_searches_everything_that_a_budget_does() -> None:
    model = sharp_model()
    batch = examples(64)
    with torch.no_grad():
        model.classifier.bias -= model(**batch).logits.mean(0)
        labels = model(**batch).logits.argmax(-1)
    found = tp.calibrate(model, {**batch, "labels": labels}, max_drop=100.0)
    assert any("probe" in fit.rule for fit in found.candidates)
    assert any("gate" in fit.rule for fit in found.candidates)
    budgets = {round(fit.relative_flops, 1) for fit in found.candidates}
    assert len(budgets) > 2  # halving


def test_another_metric_and_a_regression() -> None:
    model = tiny_model(num_labels=1, initializer_range=0.3)
    batch = examples(40)
    with torch.no_grad():
        labels = model(**batch).logits[:, 0]
    found = tp.calibrate(model, {**batch, "labels": labels}, max_drop=20.0, search=FEW)
    assert found.metric_dense == pytest.approx(100, abs=1e-3)
    tp.unprune(model)
    asked: list[tuple[int, ...]] = []

    def metric(logits: Tensor, truth: Tensor) -> float:
        asked.append((*logits.shape, *truth.shape))
        return 0.5

    assert (
        tp.calibrate(model, {**batch, "labels": labels}, max_drop=1.0, metric=metric, search=FEW).metric_dense == 50.0
    )
    assert set(asked) == {(20, 1, 20)}


def test_a_loss_that_cannot_be_estimated_is_refused_and_one_that_is_no_number_is_not_inside_the_bound() -> None:
    model = tiny_model(num_labels=1, initializer_range=0.3)
    batch = examples(40)
    with pytest.raises(ConfigError, match=r"the 20 held-out examples all have the label 2\.5;"):
        tp.calibrate(model, {**batch, "labels": torch.full((40,), 2.5)}, max_drop=1.0)
    labelled = {**batch, "labels": torch.arange(40.0)}
    with pytest.raises(ConfigError, match="metric of the dense model on 20 held-out examples is not a number"):
        tp.calibrate(model, labelled, max_drop=1.0, metric=lambda *_: float("nan"))
    asked = iter([0.5])  # the dense model's

    with pytest.raises(ConfigError, match="metric of the dense model on 20 held-out examples is not a number"):
        tp.calibrate(model, labelled, max_drop=1.0, metric=lambda *_: next(asked, float("nan")), search=FEW)
    with torch.no_grad():
        dense = {round(float(value), 4) for value in model(**batch).logits[:, 0]}

    def metric(logits: Tensor, truth: Tensor) -> float:
        return 0.5 if {round(float(value), 4) for value in logits[:, 0]} <= dense else float("nan")

    found = tp.calibrate(model, labelled, max_drop=100.0, metric=metric, search=FEW)
    assert found.drop_bound == 0.0 and set(found.pruner.thresholds) == {0.0}


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("accuracy", "metric is 'accuracy'; it must be a function from logits and labels"),
        (lambda logits, labels: None, "metric gives None; it must give a fraction"),
    ],
)
def test_a_metric_is_a_function_that_gives_a_number(metric: Any, message: str) -> None:
    labelled = {**examples(), "labels": torch.arange(48) % 2}
    with pytest.raises(ConfigError, match=message):
        tp.calibrate(tiny_model(), labelled, max_drop=5.0, metric=metric)
    found = tp.calibrate(
        tiny_model(), labelled, 0.8, max_drop=100.0, search=schedules(3)[:1],
        metric=lambda logits, labels: (logits.argmax(-1) == labels).float().mean(),
    )  # fmt: skip
    assert isinstance(found.drop_bound, float)


def test_labels_are_classes_of_the_model() -> None:
    labelled = {**examples(), "labels": torch.arange(48) % 7}
    with pytest.raises(ConfigError, match="labels go from 0 to 6; the model has the classes 0 to 2"):
        tp.calibrate(tiny_model(), labelled, max_drop=5.0)


def test_max_drop_is_for_one_answer_per_example() -> None:
    with pytest.raises(ConfigError, match=r"one class or score per example; labels has the shape \[48, 3\]"):
        tp.calibrate(shared_model("bert", "sequence"), examples(labels=torch.ones(48, 3)), max_drop=1.0)


def test_a_correlation_with_a_constant_is_zero() -> None:
    model = tiny_model(num_labels=1)
    nn.init.zeros_(model.classifier.weight)
    found = tp.calibrate(model, {**examples(40), "labels": torch.arange(40.0)}, max_drop=1.0, search=FEW)
    assert found.metric_dense == found.metric_pruned == 0.0


def test_another_method_for_a_while() -> None:
    model = tp.prune(tiny_model(), tp.LearnedThreshold(final_token_threshold=0.01)).train()
    token_pruner = model.token_pruner
    parameter, pruner = token_pruner.thresholds, token_pruner.pruner
    with using(model, tp.FixedThreshold(thresholds=[1, 2, 3, 4])):
        assert not model.training and model.token_pruner.thresholds.tolist() == [1, 2, 3, 4]
    assert model.training and token_pruner.thresholds is parameter and token_pruner.pruner is pruner
    assert dict(model.named_parameters())["token_pruner.thresholds"] is parameter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give target_flops, target_ms or max_drop"),
        ({"target_flops": 0.5, "max_drop": 1.0}, "labels is missing"),
        ({"target_flops": 1.5}, "target_flops is 1.5; it must be a finite number > 0 and <= 1"),
        ({"target_flops": "half"}, "target_flops is 'half'"),
        ({"max_drop": 1.0}, "labels is missing"),
        ({"max_drop": -1.0}, "max_drop is -1.0"),
        ({"target_flops": 0.5, "summary_tokens": "many"}, "summary_tokens is 'many'.*none, shared, segment"),
        ({"target_flops": 0.5, "seed": "a"}, "seed is 'a'; it must be a whole number"),
        ({"target_flops": 0.5, "seed": 1.5}, "seed is 1.5"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tp.calibrate(tiny_model(), examples(), **arguments)


def test_too_few_examples_or_none_at_all() -> None:
    with pytest.raises(ConfigError, match="31 examples were given; calibration needs at least 32"):
        tp.calibrate(tiny_model(), examples(31), 0.5)
    with pytest.raises(ConfigError, match="0 examples"):
        tp.calibrate(tiny_model(), [], 0.5)
    with pytest.raises(ConfigError, match="examples is a NoneType; it must be a list"):
        as_batch(None, 0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"examples\[1\]'s input_ids holds 1.5, a torch.float32 number"):
        as_batch([{"input_ids": [1, 2]}, {"input_ids": [1.5]}], 0)
    for odd, message in {
        "input_ids": r"examples\[1\] has no input_ids",
        "token_type_ids": r"examples\[1\] has no token_type_ids; examples\[0\] has",
        "labels": r"examples\[1\] has no labels; examples\[0\] has",
    }.items():
        whole = {"input_ids": [1, 2], "token_type_ids": [0, 0], "labels": 1}
        with pytest.raises(ConfigError, match=message):
            as_batch([whole, {name: value for name, value in whole.items() if name != odd}], 0)
    with pytest.raises(ConfigError, match=r"examples\[1\]'s token_type_ids has 1 values; its input_ids has 2"):
        as_batch([{"input_ids": [1], "token_type_ids": [0]}, {"input_ids": [1, 2], "token_type_ids": [0]}], 0)
    with pytest.raises(ConfigError, match="examples' labels, such as 'good', cannot be a tensor"):
        as_batch([{"input_ids": [1], "labels": "good"}], 0)
    with pytest.raises(ConfigError, match="examples has list for input_ids; it must be a list of tokenized texts"):
        as_batch({"input_ids": [[1, 2], [3]]}, 0)  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"examples\[1\] has no input_ids"):
        tp.calibrate(tiny_model(), [{"input_ids": [1]}, {}], 0.5)
    with pytest.raises(ConfigError, match=r"examples\[1\] has no tokens"):
        tp.calibrate(tiny_model(), [{"input_ids": [1]}, {"input_ids": []}], 0.5)
    padding_only = examples()
    padding_only["attention_mask"][5] = 0
    with pytest.raises(ConfigError, match=r"examples\[5\] has no tokens"):
        tp.calibrate(tiny_model(), padding_only, 0.5)
    with pytest.raises(ConfigError, match="pruned already"):
        tp.calibrate(tp.prune(tiny_model(), ZEROS), examples(), 0.5)
    with pytest.raises(tp.UnsupportedModelError):
        tp.calibrate(torch.nn.Linear(2, 2), examples(), 0.5)


def test_schedules_of_ones_own() -> None:
    found = tp.calibrate(sharp_model(), examples(), 0.7, search=[tp.Schedule("mine", (0.25, 0.25, 0.5))])
    assert found.chosen.relative_flops == pytest.approx(0.7, abs=0.01)
    with pytest.raises(ConfigError, match="schedule 'short' has 2 weights; the model can drop tokens after 3 layers"):
        tp.calibrate(sharp_model(), examples(), 0.7, search=[tp.Schedule("short", (0.5, 0.5))])
    with pytest.raises(ConfigError, match=r"none of the schedules searched \(late\) can reach it"):
        tp.calibrate(sharp_model(), examples(), 0.3, search=[tp.Schedule("late", (0.0, 0.0, 1.0))])


def test_setting_thresholds_needs_some() -> None:
    model = tp.prune(tiny_model(), tp.TopK())
    with pytest.raises(ConfigError, match="thresholds cannot be set"):
        tp.set_thresholds(model, [1.0] * 4)
    with pytest.raises(ConfigError, match="thresholds has 3 values; the model has 4 layers"):
        tp.set_thresholds(tp.prune(tiny_model(), ZEROS), [1.0] * 3)


# The command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_sst2(tmp_path / "glue", train=80, dev=12)
    write_checkpoint(tmp_path / "CKPT")
    return tmp_path


def calibrated(folder: Path, *arguments: str) -> int:
    return main(["calibrate", "--restore", "CKPT", "--output-dir", "OUT", *arguments])


TASK = ("--task", "SST2", "--data-dir", "glue")


def test_the_command_saves_a_pruned_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrated(folder, *TASK, "--target-flops", "0.6", "--summary-tokens", "segment") == 0
    said = capsys.readouterr().out
    assert "attention received" in said and "divergence" in said and "relative FLOPs" in said
    config = json.loads((folder / "OUT" / "config.json").read_text(encoding="utf-8"))
    assert (config["prune_mode"], config["scoring_mode"], config["summary_tokens"]) == (
        "absolute_threshold", "relative", "segment",
    )  # fmt: skip
    report = json.loads((folder / "OUT" / "calibration.json").read_text(encoding="utf-8"))
    assert report["chosen"]["thresholds"] == report["pruner"]["thresholds"]
    model = tp.from_pretrained(folder / "OUT")
    assert model.token_pruner.thresholds.tolist() == pytest.approx(report["chosen"]["thresholds"])
    results = json.loads((folder / "OUT" / "eval_results.json").read_text(encoding="utf-8"))
    assert results["relative_flops"] == pytest.approx(0.6, abs=0.1)
    assert calibrated(folder, *TASK, "--target-flops", "0.6", "--summary-tokens", "segment") == 2
    assert "finished run" in capsys.readouterr().err


def test_the_command_takes_unlabelled_texts(folder: Path) -> None:
    (folder / "texts.txt").write_text("\n".join(" ".join(WORDS[: n % 9 + 2]) for n in range(40)), encoding="utf-8")
    assert calibrated(folder, "--input", "texts.txt", "--target-flops", "0.6") == 0
    assert not (folder / "OUT" / "eval_results.json").exists()
    assert tp.from_pretrained(folder / "OUT").config.prune_mode == "absolute_threshold"


def test_the_command_keeps_the_metric(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "schedules", lambda *_: FEW)
    assert calibrated(folder, *TASK, "--max-drop", "60") == 0
    assert "loss at most" in capsys.readouterr().out


def test_the_command_meets_a_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--prune-layers", "1", "--engine-batch-size", "2", "--engine-threads", "1", "--engine-dtype", "float32")
    assert calibrated(folder, *TASK, "--target-ms", "1e6", *few) == 0
    assert "ms in the engine, unpruned" in capsys.readouterr().out
    report = json.loads((folder / "OUT" / "calibration.json").read_text(encoding="utf-8"))
    assert 0 < report["pruned_ms"] < 1e6 and report["dense_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*TASK,), "give --target-flops, --target-ms or --max-drop"),
        ((*TASK, "--target-flops", "0.5", "--target-ms", "1"), "give --target-flops or --target-ms, not both"),
        ((*TASK, "--target-flops", "0.5", "--engine-threads", "1"), "--engine-threads needs --target-ms"),
        ((*TASK, "--target-ms", "1", "--engine-dtype", "half"), "--engine-dtype is 'half'"),
        ((*TASK, "--target-flops", "0.01"), "the lowest that can be reached"),
        ((*TASK, "--target-flops", "0.5", "--examples", "20"), "--examples is 20; it must be a whole number >= 32"),
        ((*TASK, "--target-flops", "0.5", "--examples", "0"), "--examples is 0"),
        ((*TASK, "--input", "texts.txt", "--target-flops", "0.5"), "give one of --task"),
        (("--target-flops", "0.5"), "give one of --task"),
        (("--input", "none.txt", "--target-flops", "0.5"), "none.txt"),
        (("--input", "texts.txt", "--max-drop", "1"), "texts.txt has none"),
        (("--input", "texts.txt", "--target-flops", "0.5", "--bs", "4"), "--bs is 4; texts without labels are not"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    (folder / "texts.txt").write_text("a\nb\n", encoding="utf-8")
    assert calibrated(folder, *arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and message in errors[0]
    assert not (folder / "OUT").exists()

"""Training to a budget: the controller, thresholds that follow the weights, and whole runs from the command line."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, TrainerControl, TrainerState

import token_pruning as tp
from tests.tiny import pruned, ragged_batch, tiny_model
from tests.workspace import WORDS, edit_config, write_checkpoint, write_sst2, write_stsb
from token_pruning.budget import elastic_holding
from token_pruning.budget.elastic_holding import ElasticHolder
from token_pruning.budget.fitting import fit_to_budget
from token_pruning.budget.holding import BudgetHolder, CalibratedHolder
from token_pruning.budget.schedules import named_schedule, schedules
from token_pruning.checkpoint import read_checkpoint
from token_pruning.errors import ConfigError
from token_pruning.families import Family, family_of
from token_pruning.lab.cli import main, paper_main
from token_pruning.lab.data import glue_task, load_glue_folder
from token_pruning.lab.training import context
from token_pruning.lab.training.budget import (
    BudgetController,
    fitting_examples,
    soft_relative_flops,
    with_budget_table,
    with_relative_scores,
)
from token_pruning.lab.training.context import with_context
from token_pruning.lab.training.load import load_tokenizer
from token_pruning.lab.training.options import TrainOptions
from token_pruning.lab.training.plan import plan_training
from token_pruning.runtime.prune import attachment_of

STATE, CONTROL = TrainerState(), TrainerControl()


# The controller


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_the_controller_converges_on_a_synthetic_problem(target: float) -> None:
    """A cost that rises with a parameter, and a task loss that wants it high."""
    parameter = torch.tensor(3.0, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    controller = BudgetController(target)
    generator = torch.Generator().manual_seed(0)
    costs = []
    for step in range(600):
        controller.progress = step / 600
        noise = 0.02 * torch.randn((), generator=generator)
        cost = parameter.sigmoid()
        loss = -cost + controller.loss(cost + noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        costs.append(cost.item())
    assert sum(costs[-50:]) / 50 == pytest.approx(target, abs=0.01)
    assert costs[60] > target + 0.05 or target == 0.8  # the target falls over the first half


def test_the_controller_goes_on_where_it_stopped() -> None:
    controller = BudgetController(0.5)
    for cost in (0.9, 0.8):
        controller.loss(torch.tensor(cost))
    again = BudgetController(0.5)
    state = TrainerState(stateful_callbacks={"BudgetController": json.loads(json.dumps(controller.state()))})
    again.on_train_begin(None, state, CONTROL)
    assert (again.multiplier, again.start) == (controller.multiplier, controller.start)
    again.on_step_begin(None, TrainerState(global_step=30, max_steps=40), CONTROL)
    assert again.progress == 0.75


def test_soft_costs_are_hard_costs_where_masks_are_sharp() -> None:
    batch, thresholds = ragged_batch([30, 12, 25, 8]), [0.9, 0.95, 0.9, 0.9]
    model = tiny_model()
    with torch.no_grad(), pruned(model, tp.FixedThreshold(thresholds=[0.9, 0, 0, 0], scoring_mode="relative")):
        with tp.record(model) as hard:
            model(**batch)
        expected = tp.count_flops(model, hard).relative
    thresholds = [0.9, -9.0, -9.0, -9.0]  # later masks see other scores while nothing is removed
    tp.prune(model, tp.LearnedThreshold(thresholds=thresholds, scoring_mode="relative", temperature=1e-6)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with tp.record(model) as soft:
        model(**batch)
    found = soft_relative_flops(attachment_of(model).shape, soft)
    # The mean over sequences of one, the sum over sequences of the other: both weigh sequences by their cost.
    assert found.item() == pytest.approx(expected, abs=1e-3)


def test_soft_costs_have_a_gradient() -> None:
    model = tp.prune(tiny_model(), tp.LearnedThreshold(scoring_mode="relative", temperature=0.2)).train()
    with tp.record(model) as trace:
        model(**ragged_batch([30, 12]))
    soft_relative_flops(attachment_of(model).shape, trace).backward()
    gradient = model.token_pruner.thresholds.grad
    assert (gradient[:3] < 0).all() and gradient[3] == 0  # the last layer's decision costs nothing


# The holder


def test_the_holder_keeps_the_budget_while_weights_change() -> None:
    model = tp.prune(tiny_model(), tp.FixedThreshold(thresholds=[0.0] * 4, scoring_mode="relative")).train()
    batch = ragged_batch([30, 12, 25, 8] * 8)
    holder = BudgetHolder(batch, 0.5, schedules(3)[1], bf16=False)
    for step in range(3):
        with torch.no_grad():
            for parameter in model.bert.parameters():
                parameter.mul_(1.3)
        holder.on_step_begin(None, TrainerState(global_step=step * 10, max_steps=30), CONTROL, model=model)
        assert model.training
        model.eval()
        with torch.no_grad(), tp.record(model) as trace:
            model(**batch)
        model.train()
        assert tp.count_flops(model, trace).relative == pytest.approx(0.5, abs=0.01)
    assert model.token_pruner.pruner.thresholds == tuple(model.token_pruner.thresholds.tolist())
    assert model.config.thresholds == model.token_pruner.pruner.thresholds


def test_the_holder_waits_for_the_end_of_the_soft_half() -> None:
    pruner = tp.LearnedThreshold(thresholds=[0.9, 0.9, 1.0, 1.0], scoring_mode="relative")
    model = tp.prune(tiny_model(), pruner).train()
    holder = BudgetHolder(ragged_batch([30, 12] * 16), 0.5, None, bf16=False)
    holder.on_step_begin(None, TrainerState(global_step=0, max_steps=10), CONTROL, model=model)
    assert model.token_pruner.thresholds.tolist() == pytest.approx([0.9, 0.9, 1.0, 1.0])
    tp.freeze_thresholds(model)
    holder.on_step_begin(None, TrainerState(global_step=5, max_steps=10), CONTROL, model=model)
    assert holder.schedule is not None and holder.schedule.name == "learned"
    assert next(weight for weight in holder.schedule.weights if weight) == 1
    assert model.token_pruner.thresholds.tolist() != pytest.approx([0.9, 0.9, 1.0, 1.0])


def test_a_soft_stage_starts_from_fitted_thresholds_and_ends_where_it_has_learned_to() -> None:
    """The Trainer's first call comes while the model is still in evaluation mode."""
    model = tp.prune(tiny_model(), tp.LearnedThreshold(thresholds=[0.0] * 4, scoring_mode="relative"))
    holder = BudgetHolder(ragged_batch([30, 12] * 16), 0.5, None, bf16=False)
    holder.on_step_begin(None, TrainerState(global_step=0, max_steps=10), CONTROL, model=model.eval())
    assert max(model.token_pruner.thresholds.tolist()) > 0.1 and holder.schedule is None
    learned = [0.0, 1.2, 1.2, 1.2]
    tp.set_thresholds(model, learned)
    tp.freeze_thresholds(model.train())
    holder.on_step_begin(None, TrainerState(global_step=5, max_steps=10), CONTROL, model=model)
    assert holder.schedule is not None and holder.schedule.weights[0] == 0 < holder.schedule.weights[1]


@pytest.mark.parametrize(("layers", "target"), [(4, 0.6), (2, 0.5)])
def test_where_nothing_leaves_yet_it_leaves_as_late_as_can_be(layers: int, target: float) -> None:
    method = tp.FixedThreshold(thresholds=[0.0] * layers, scoring_mode="relative")
    holder = BudgetHolder(ragged_batch([30, 12] * 16), target, None, bf16=False)
    fit = holder.fit(tp.prune(tiny_model(layers=layers), method))
    assert fit.relative_flops == pytest.approx(target, abs=0.01)
    assert holder.schedule is not None and holder.schedule.name == "drain"


def test_a_schedule_that_cannot_reach_the_budget_gives_way_to_the_one_that_can(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tp.prune(tiny_model(), tp.FixedThreshold(thresholds=[0.0] * 4, scoring_mode="relative"))
    holder = BudgetHolder(ragged_batch([30, 12] * 16), 0.32, schedules(3)[2], bf16=False)
    assert holder.fit(model).relative_flops == pytest.approx(0.32, abs=0.01)
    assert holder.schedule is not None and holder.schedule.name == "drain"
    assert "no token leaves early enough for a budget of 0.32" in caplog.text


@pytest.mark.parametrize("target", [0.6, 0.55, 0.4])
def test_tokens_go_on_leaving_where_they_do(target: float) -> None:
    """Also for a budget that is lower, or on texts that cost a little more: more leave in each layer, in none else."""
    model = tp.prune(tiny_model(), tp.FixedThreshold(thresholds=[0.0] * 4, scoring_mode="relative"))
    drained = fit_to_budget(model.eval(), ragged_batch([30, 12] * 16), named_schedule("drain", 3), 0.6)
    assert drained is not None and drained.thresholds[0] == 0 < drained.thresholds[1] < drained.thresholds[2]
    tp.set_thresholds(model, drained.thresholds)
    holder = BudgetHolder(ragged_batch([29, 13, 8] * 12, seed=7), target, None, bf16=False)
    fit = holder.fit(model)
    assert fit.relative_flops == pytest.approx(target, abs=0.02)
    assert fit.thresholds[0] == 0 < fit.thresholds[1] and max(fit.thresholds) > 1e5


def test_examples_are_held_out() -> None:
    features = [{"number": number} for number in range(1000)]
    rest, held = fitting_examples(features, seed=1)
    assert (len(rest), len(held)) == (900, 100)
    assert sorted(row["number"] for row in rest + held) == list(range(1000))
    assert held == fitting_examples(features, seed=1)[1] != fitting_examples(features, seed=2)[1]
    assert len(fitting_examples(features[:64], seed=1)[1]) == 32
    with pytest.raises(ConfigError, match="63 training examples; a budget needs at least 64"):
        fitting_examples(features[:63], seed=1)


def test_schedules_by_name_and_by_parts() -> None:
    assert named_schedule("late", 3).name == "late"
    assert named_schedule("3,1", 3).weights == (0.75, 0.25, 0.0)
    for wrong in ("step-4", "1,1,1,1", "-1,2", "0,0", "a,b", "", "nan", "inf,1"):
        with pytest.raises(ConfigError, match=r"--schedule is .* must be one of step-1, step-2, step-3, linear"):
            named_schedule(wrong, 3)


@pytest.mark.parametrize(
    ("keys", "thresholds"),
    [
        ({"final_token_threshold": 0.01, "scoring_mode": "mean"}, (0.64, 1.28)),
        ({"final_token_threshold": 0.01, "max_seq_length": 64}, (0.32, 0.64)),
        ({"final_token_threshold": 0.5, "scoring_mode": "relative"}, (0.25, 0.5)),
        ({"final_token_threshold": 0.7, "scoring_mode": "mean_norm"}, (0.64, 1.28)),
        ({}, (0.64, 1.28)),
    ],
)
def test_thresholds_are_converted(tmp_path: Path, keys: dict[str, Any], thresholds: tuple[float, float]) -> None:
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "CKPT", **keys))
    pruner = with_relative_scores(checkpoint).pruner()
    assert checkpoint == read_checkpoint(tmp_path / "CKPT")
    assert pruner.scoring_mode == "relative"
    assert pruner.initial_thresholds(2) == pytest.approx(thresholds)


# Whole runs

LINE = "--arch pibert-base --lr 1e-3 --bs 8 --epoch 2 --data_dir glue --output_dir out"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_sst2(tmp_path / "glue", train=96, dev=40)
    write_stsb(tmp_path / "glue")
    write_checkpoint(tmp_path / "CKPT")
    write_checkpoint(tmp_path / "REGRESSION", labels=1)
    return tmp_path


def run(line: str) -> int:
    return paper_main(f"{LINE} {line}".split())


def results(folder: Path, name: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name / "eval_results.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("mode", ["soft", "mixed", "hard"])
def test_a_run_ends_at_its_budget(folder: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"--task SST2 --restore CKPT --masking_mode {mode} --target_flops 0.6") == 0
    said = capsys.readouterr().out
    fitted = next(line for line in said.splitlines() if "thresholds fitted to" in line)
    assert float(fitted.split()[3]) == pytest.approx(0.6, abs=0.01)
    assert results(folder)["relative_flops"] == pytest.approx(0.6, abs=0.06)
    config = json.loads((folder / "out" / "config.json").read_text(encoding="utf-8"))
    assert (config["prune_mode"], config["scoring_mode"]) == ("absolute_threshold", "relative")
    assert list((folder / "CKPT" / "teacher_logits").glob("*.safetensors"))  # the dense start teaches
    model = tp.from_pretrained(folder / "out")
    assert model.token_pruner.thresholds.tolist() == pytest.approx(results(folder)["thresholds"])


def test_soft_then_hard_in_two_runs_has_the_same_teacher(folder: Path) -> None:
    assert run("--task SST2 --restore CKPT --masking_mode soft --target_flops 0.6") == 0
    line = "--restore out --masking_mode hard --target_flops 0.6 --output_dir out2"
    assert paper_main(other_line(line)) == 0
    assert not (folder / "out" / "teacher_logits").exists()
    assert results(folder, "out2")["relative_flops"] == pytest.approx(0.6, abs=0.06)
    (folder / "out" / "run.json").unlink()
    assert paper_main(other_line(f"{line}3")) == 2


def other_line(line: str) -> list[str]:
    return f"{LINE.replace('--output_dir out', '')} --task SST2 {line}".split()


def test_the_teacher_is_the_dense_checkpoint_whatever_was_edited(folder: Path) -> None:
    keys = "--prune_mode absolute_threshold --final_token_threshold 0.01 --scoring_mode mean_norm"
    assert run(f"--task SST2 --restore CKPT --masking_mode soft --lambda 0.1 {keys}") == 0
    assert read_checkpoint(folder / "out").thresholds is not None
    # Thresholds in mean_norm cannot be converted to the budget's mode, and are left out of what this run starts with.
    assert paper_main(other_line("--restore out --masking_mode hard --target_flops 0.6 --output_dir out2")) == 0
    assert not (folder / "out" / "teacher_logits").exists()
    assert list((folder / "CKPT" / "teacher_logits").glob("*.safetensors"))
    edit_config(folder / "out2", scoring_mode="mean_norm")
    shutil.rmtree(folder / "CKPT" / "teacher_logits")  # a pruned one that came from a pruned one
    assert paper_main(other_line("--restore out2 --masking_mode hard --target_flops 0.6 --output_dir out3")) == 0
    assert list((folder / "CKPT" / "teacher_logits").glob("*.safetensors"))


def test_folders_that_name_each_other_have_no_teacher(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        write_checkpoint(folder / name)
        run_file = {"options": {"restore": other, "masking_mode": "hard"}, "finished": True}
        (folder / name / "run.json").write_text(json.dumps(run_file), encoding="utf-8")
    assert paper_main(other_line("--restore a --masking_mode hard --target_flops 0.6 --output_dir out")) == 2
    assert "a is pruned already and does not say by which dense model" in capsys.readouterr().err


def test_a_plan_leaves_the_checkpoint_alone_and_writes_nothing(folder: Path) -> None:
    checkpoint = write_checkpoint(folder / "PRUNED", prune_mode="topk", token_keep_rate=0.5)
    before = {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
    options = TrainOptions(
        restore=str(checkpoint), task="SST2", masking_mode="hard", target_flops=0.6, output_dir="out",
        pruning={"prune_mode": "absolute_threshold"},
    )  # fmt: skip
    plan = plan_training(options, lambda _: load_glue_folder(glue_task("SST2"), folder / "glue"))
    assert plan.start.config["scoring_mode"] == "relative"
    assert isinstance(plan.pruner, tp.FixedThreshold) and plan.pruner.thresholds is not None
    assert plan.teacher is not None and plan.teacher.path == checkpoint
    assert {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()} == before


def test_summary_tokens_and_a_schedule_from_the_command_line(folder: Path) -> None:
    line = "--task SST2 --restore CKPT --masking_mode hard --target_flops 0.6 --no_teacher"
    assert run(f"{line} --summary_tokens shared --schedule step-2") == 0
    config = json.loads((folder / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["summary_tokens"] == "shared"
    assert [value > 0 for value in config["thresholds"]] == [False, True, False, False]
    assert not (folder / "CKPT" / "teacher_logits").exists()


def test_the_cost_of_other_texts_can_be_held_to_the_budget(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(1)
    long = [" ".join(rng.choices(WORDS, k=rng.randint(40, 60))) for _ in range(50)]
    (folder / "long.txt").write_text("\n".join(long) + "\n", encoding="utf-8")
    labelled = [f"{text}\t{number % 2}" for number, text in enumerate(long)]
    (folder / "long" / "SST-2").mkdir(parents=True)
    dev = folder / "long" / "SST-2" / "dev.tsv"
    dev.write_text("\n".join(["sentence\tlabel", *labelled]) + "\n", encoding="utf-8")
    assert run("--task SST2 --restore CKPT --masking_mode hard --target_flops 0.6 --budget_input long.txt") == 0
    fitted = next(line for line in capsys.readouterr().out.splitlines() if "thresholds fitted to" in line)
    assert fitted.endswith("of the FLOPs on long.txt")
    line = "eval --task SST2 --restore out --data-dir long --output-dir on-long"
    assert main(line.split()) == 0
    assert results(folder, "on-long")["relative_flops"] == pytest.approx(0.6, abs=0.01)
    assert abs(results(folder)["relative_flops"] - 0.6) > 0.02  # the task's own texts are shorter


def write_calibrated(folder: Path) -> Tensor:
    """CALIBRATED, like CKPT but pruned by a probe; returns its weights."""
    write_checkpoint(folder / "CALIBRATED")  # with a tokenizer
    weights = torch.cat([torch.linspace(-0.05, 0.05, 32), torch.tensor([0.5])])[None]
    model = AutoModelForSequenceClassification.from_pretrained(folder / "CKPT")
    thresholds = [0.0, 0.5] + [0.0] * (model.config.num_hidden_layers - 2)
    pruner = tp.FixedThreshold(thresholds=thresholds, scoring_mode="relative", probes=tp.Probes([2], weights))
    tp.prune(model, pruner).save_pretrained(folder / "CALIBRATED")
    return weights


@pytest.mark.parametrize("budgets", ["0.7", "0.7 0.8"])
def test_training_goes_on_from_what_calibration_left(folder: Path, budgets: str) -> None:
    """Where tokens leave stays; probes say of the trained states what they said of the dense model's."""
    before = write_calibrated(folder)
    line = "--task SST2 --restore CALIBRATED --teacher CKPT --masking_mode hard --lr 3e-3 --target_flops"
    assert run(f"{line} {budgets}") == 0
    assert results(folder)["relative_flops"] == pytest.approx(0.7, abs=0.06)
    trained = tp.from_pretrained(folder / "out").eval()
    pruner = trained.token_pruner.pruner
    assert pruner.probes.layers == (2,)
    if budgets == "0.7":
        assert pruner.vocabulary is None  # calibration found that none is better
        assert [value != 0 for value in pruner.thresholds[:3]] == [False, True, False]
    after = pruner.probes.weights
    texts = load_glue_folder(glue_task("SST2"), folder / "glue").train
    inputs = load_tokenizer(read_checkpoint(folder / "out"))(list(texts.first), padding=True, return_tensors="pt")
    dense = AutoModelForSequenceClassification.from_pretrained(folder / "CKPT").eval()

    def said(model: Any, weights: Tensor) -> Tensor:
        seen: list[Tensor] = []
        joined = model.bert.encoder.layer[1].attention.output  # a probe is asked there
        hook = joined.register_forward_hook(lambda module, given, states: seen.append(states))
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        return seen[0][inputs["attention_mask"].bool()] @ weights[0, :-1] + weights[0, -1]

    tp.unprune(trained)
    wanted, got, stale = said(dense, before), said(trained, after), said(trained, before)
    assert (got - wanted).square().mean() < 0.8 * (stale - wanted).square().mean()


def test_a_budget_out_of_reach_of_a_calibrated_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_calibrated(folder)
    line = "--task SST2 --restore CALIBRATED --teacher CKPT --masking_mode hard --target_flops 0.35"
    assert run(line) == 2
    assert "--target-flops is 0.35, which is out of reach where tokens of CALIBRATED leave" in capsys.readouterr().err
    assert not (folder / "out" / "run.json").exists()
    assert run(f"{line} --schedule drain") == 0
    assert results(folder)["relative_flops"] == pytest.approx(0.35, abs=0.05)


@pytest.mark.parametrize(
    ("start", "holder", "budgets", "last"),
    [
        ("CKPT", BudgetHolder, "0.6", 14),
        ("CKPT", ElasticHolder, "0.6 0.8", 6),
        ("CALIBRATED", CalibratedHolder, "0.6", 14),
    ],
)
def test_a_killed_run_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, start: str, holder: type[BudgetHolder], budgets: str, last: int
) -> None:
    write_calibrated(folder)
    fit, seen = holder.fit, []

    def fail(self: BudgetHolder, model: Any) -> Any:
        seen.append(None)
        if len(seen) == last:
            raise KeyboardInterrupt
        return fit(self, model)

    monkeypatch.setattr(holder, "fit", fail)
    line = f"--task SST2 --restore {start} --teacher CKPT --masking_mode hard --target_flops {budgets}"
    assert run(line) == 130
    assert (folder / "out" / "checkpoint-8").exists()
    monkeypatch.setattr(holder, "fit", fit)
    assert run(line) == 0
    assert results(folder)["relative_flops"] == pytest.approx(0.6, abs=0.06)
    if holder is ElasticHolder:
        assert cost_at(folder, 0.8) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--restore CKPT --masking_mode none --target_flops 0.5", "--target-flops applies to pruning"),
        (
            "--restore CKPT --masking_mode soft --target_flops 0.5 --lambda 0.1",
            "give either --lambda or",
        ),
        ("--restore CKPT --masking_mode soft --target_flops 0.5 --schedule late", "--schedule applies to masking mode"),
        ("--restore CKPT --masking_mode hard --target_flops 1.5", "--target-flops is 1.5"),
        ("--restore CKPT --masking_mode hard --target_flops 0.02", "the lowest that can be reached"),
        ("--restore CKPT --masking_mode hard --target_flops 0.5 --schedule never", "--schedule is 'never'"),
        ("--restore CKPT --masking_mode hard --target_flops 0.5 --teacher CKPT --no_teacher", "either --teacher or"),
        ("--restore CKPT --masking_mode hard --target_flops 0.5 --prune_mode topk", "prune_mode is 'topk'"),
        ("--restore CKPT --masking_mode soft --target_flops 0.5 0.6", "--target-flops 0.5 0.6, it must be hard"),
        ("--restore CKPT --masking_mode hard --target_flops 0.5 0.5", "--target-flops names 0.5 twice"),
        (
            "--restore CKPT --masking_mode hard --target_flops 0.5 0.99",
            "--target-flops names 0.99; with no token dropped",
        ),
        ("--restore CKPT --masking_mode hard --target_flops 0.3 0.6 --schedule step-3", "step-3 cannot reach"),
        (
            "--restore CKPT --masking_mode hard --target_flops 0.5 0.6 --vocabulary_keep_rate 0.5",
            "--vocabulary-keep-rate is 0.5; with several budgets",
        ),
        (
            "--restore CKPT --masking_mode hard --target_flops 0.5 0.6 --vocabulary_threshold 0.5",
            "--vocabulary-threshold is 0.5; with several budgets",
        ),
        ("--restore CKPT --masking_mode hard --target_flops 0.5 --scoring_mode max", "scoring_mode is 'max'"),
        (
            "--restore CKPT --masking_mode soft --no_teacher --lambda 0.1",
            "--no-teacher applies to training",
        ),
        ("--restore CKPT --masking_mode soft", "--lambda is missing"),
        ("--restore CKPT --masking_mode soft --lambda 0.1 --budget_input x", "--budget-input applies to training"),
        ("--restore CKPT --masking_mode soft --lambda 0.1 --context", "--context applies to training with a budget"),
        ("--restore CKPT --masking_mode soft --target_flops 0.5 --context", "--context applies to masking mode hard"),
        (
            "--restore CKPT --masking_mode hard --target_flops 0.5 --context --summary_tokens segment",
            "summary_tokens is 'segment'; with context it must be none",
        ),
        ("--restore CKPT --masking_mode hard --target_flops 0.5 --budget_input none.txt", "none.txt: no such file"),
        ("--restore CKPT --masking_mode hard --target_flops 0.5 --budget_input few.txt", "few.txt has 2 texts"),
        ("--restore CKPT --masking_mode hard --target_flops 0.5 --thresholds 1 1 1 1", "--thresholds is [1"),
        (
            "--restore CKPT --masking_mode hard --target_flops 0.5 --final_token_threshold 0.1",
            "--final-token-threshold is 0.1; a budget, --target-flops, sets",
        ),
    ],
)
def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    (folder / "few.txt").write_text("good cat\nbad dog\n", encoding="utf-8")
    if "target" not in line:
        edit_config(folder / "CKPT", prune_mode="absolute_threshold", final_token_threshold=0.01)
    assert run(f"--task SST2 {line}") == 2
    errors = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
    assert len(errors) == 1 and message in errors[0]
    assert not (folder / "out").exists() and not (folder / "CKPT" / "teacher_logits").exists()  # before any work


def cost_at(folder: Path, budget: float) -> float:
    """Of the development set, by the command line."""
    line = f"eval --task SST2 --data-dir glue --restore out --budget {budget} --output-dir at"
    assert main(line.split()) == 0
    return float(results(folder, "at")["relative_flops"])


@pytest.mark.parametrize(
    "options", ["", "--summary_tokens segment", "--context", "--vocabulary_keep_rate 1 --schedule linear"]
)
def test_one_run_for_several_budgets(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    drawn = []
    own = elastic_holding.set_budget
    monkeypatch.setattr(
        elastic_holding, "set_budget", lambda model, budget: (drawn.append(budget), own(model, budget))[1]
    )
    assert run(f"--task SST2 --restore CKPT --masking_mode hard --target_flops 0.7 0.55 {options}") == 0
    assert "thresholds fitted to 0.5" in capsys.readouterr().out
    assert results(folder)["relative_flops"] == pytest.approx(0.55, abs=0.06)  # left at the lowest
    config = json.loads((folder / "out" / "config.json").read_text(encoding="utf-8"))
    table = config["budgets"]
    assert {0.55, 0.7} <= {entry["relative_flops"] for entry in table}
    gates = [entry["vocabulary_threshold"] for entry in table]
    assert gates[-1] == 0 and (gates[0] > 0) == ("keep_rate" not in options)
    written = json.loads((folder / "out" / "eval_budgets.json").read_text(encoding="utf-8"))
    assert [each["budget"] for each in written] == [0.55, 0.7]
    assert written[0]["accuracy"] == results(folder)["metrics"]["accuracy"]
    assert cost_at(folder, 0.7) == pytest.approx(0.7, abs=0.06)
    assert results(folder, "at")["metrics"]["accuracy"] == written[1]["accuracy"]
    assert cost_at(folder, 1) == pytest.approx(table[-1]["relative_flops"], abs=0.02)
    between = {*drawn} - {entry["relative_flops"] for entry in table}
    assert 8 <= len(between) < 16  # of the 16 steps, those that are not at the lowest
    assert all(0.55 <= budget <= table[-1]["relative_flops"] for budget in drawn)


def test_between_steps_the_model_is_at_the_lowest_budget() -> None:
    """So that it is what is evaluated and saved."""
    budgets = [tp.pruners.Budget(cost, [level] * 4) for cost, level in ((0.5, 1.0), (0.9, 0.0))]
    pruner = tp.FixedThreshold(thresholds=[1.0] * 4, scoring_mode="relative", budgets=budgets)
    model = tp.prune(tiny_model(), pruner).train()
    holder = ElasticHolder(model, None, ragged_batch([30, 12] * 16), False, 0)
    state = TrainerState(global_step=0, max_steps=10)
    holder.on_step_begin(None, state, CONTROL, model=model)
    lowest = model.token_pruner.pruner.budgets[0].thresholds
    assert model.token_pruner.pruner.thresholds != lowest
    holder.on_step_end(None, state, CONTROL, model=model)
    assert model.token_pruner.pruner.thresholds == lowest


def test_entries_that_still_cost_as_much_are_fitted_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model(), ragged_batch([30, 12, 25, 8] * 16)
    whole = tp.FixedThreshold(thresholds=[0.0] * 4, scoring_mode="relative")
    drain = named_schedule("drain", 3)
    tp.prune(model, with_budget_table(whole, model, batch, [0.5, 0.6], drain)).train()
    holder = ElasticHolder(model, None, batch, False, 0, drain)
    holder.fit(model)
    with torch.no_grad():
        for parameter in model.bert.parameters():
            parameter.mul_(1.1)
    before = model.token_pruner.pruner.budgets
    full = []
    own = elastic_holding.fit_to_budget
    monkeypatch.setattr(elastic_holding, "fit_to_budget", lambda *a, **k: (full.append(a), own(*a, **k))[1])
    holder.fit(model)
    assert model.token_pruner.pruner.budgets != before  # other thresholds, as other weights want
    for budget in model.token_pruner.pruner.budgets:
        tp.set_budget(model, budget.relative_flops)
        with torch.no_grad(), tp.record(model.eval()) as trace:
            model(**batch)
        assert tp.count_flops(model, trace).relative == pytest.approx(budget.relative_flops, abs=0.006)
    assert len(full) < len(before) - 2  # those whose cost moved; the first and the last are not among them
    holder.strengths = [1.0] * len(holder.strengths)  # as if the cost had moved
    full.clear()
    holder.fit(model)
    assert len(full) == len(before) - 2


def test_one_budget_after_several(folder: Path) -> None:
    """The table says nothing of the weights that come."""
    assert run("--task SST2 --restore CKPT --masking_mode hard --target_flops 0.6 0.8") == 0
    assert paper_main(other_line("--restore out --masking_mode hard --target_flops 0.7 --output_dir out2")) == 0
    config = json.loads((folder / "out2" / "config.json").read_text(encoding="utf-8"))
    assert config.get("budgets") is None and config["thresholds"]


def test_too_few_training_examples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--task STSB --restore REGRESSION --masking_mode hard --target_flops 0.5 --no_teacher") == 2
    assert "24 training examples; a budget needs at least 64" in capsys.readouterr().err


def test_the_folder_is_named_after_the_budget() -> None:
    options = TrainOptions(restore="CKPT", task="RTE", masking_mode="hard", target_flops=0.5)
    assert str(options.default_output_dir({"prune_mode": "absolute_threshold"})) == "CKPT/flops_0.5/lr_2e-05"
    soft = TrainOptions(restore="CKPT", task="RTE", masking_mode="soft", target_flops=0.5)
    config = {"prune_mode": "absolute_threshold", "final_token_threshold": 1.28}
    several = TrainOptions(restore="CKPT", task="RTE", masking_mode="hard", target_flops=[0.5, 0.25])
    assert str(several.default_output_dir({"prune_mode": "absolute_threshold"})) == "CKPT/flops_0.25_0.5/lr_2e-05"
    assert "flops_0.5" in str(soft.default_output_dir(config)) and "None" not in str(soft.default_output_dir(config))


def test_a_dense_run_may_start_from_another_task_s_head(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run("--task SST2 --restore REGRESSION --masking_mode none") == 0
    assert "classifier.weight has shape [1, 32]: a new one of [2, 32] is trained" in caplog.text
    config = json.loads((folder / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["problem_type"] == "single_label_classification"


# Context


def test_context_is_fitted_and_learns_with_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[tp.LinearContext] = []
    own = context.fit_context
    monkeypatch.setattr(context, "fit_context", lambda *a: (fitted.append(own(*a)), fitted[-1])[1])
    assert run("--task SST2 --restore CKPT --masking_mode hard --target_flops 0.6 --context") == 0
    assert results(folder)["relative_flops"] == pytest.approx(0.6, abs=0.06)
    checkpoint = read_checkpoint(folder / "out")
    [before], after = fitted, checkpoint.pruner().context
    assert after is not None and after.layers == before.layers == (0, 1, 2, 3)
    for name in ("down", "up"):
        start, learned = getattr(before, name), getattr(after, name)
        assert 1e-4 < (start - learned).norm() / start.norm() < 0.5
    batch = {name: values % len(WORDS) for name, values in ragged_batch([30, 12, 25, 8]).items()}
    with torch.inference_mode():
        model = tp.from_pretrained(folder / "out")
        found = model(**batch).logits
        tp.prune(tp.unprune(model), replace(checkpoint.pruner(), context=None))
        without = model(**batch).logits
    assert (found - without).abs().max() > 1e-4


def test_a_checkpoints_own_context_is_kept_and_learns(folder: Path) -> None:
    assert run("--task SST2 --restore CKPT --masking_mode hard --target_flops 0.6 --context") == 0
    first = read_checkpoint(folder / "out").pruner().context
    line = "train --task SST2 --data-dir glue --restore out --masking-mode hard --target-flops 0.6 --epoch 1 --bs 8"
    assert main([*line.split(), "--output-dir", "again", "--no-teacher"]) == 0
    second = read_checkpoint(folder / "again").pruner().context
    assert first is not None and second is not None and first.layers == second.layers
    assert 0 < (first.down - second.down).norm() / first.down.norm() < 0.5


def test_context_is_refused_where_nothing_says_how_keys_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, features = tiny_model("modernbert"), [{"input_ids": [1, 2, 3]}] * 40
    assert with_context(tp.FixedThreshold(), model, features, 0).context is not None
    monkeypatch.setattr(family_of(model.config), "turned", Family.turned)
    with pytest.raises(ConfigError, match="--context is not for 'modernbert': nothing says how its keys turn"):
        with_context(tp.FixedThreshold(), model, features, 0)

"""Training to a budget: a controller in place of λ, and thresholds that follow the weights while these change.

Costs are relative FLOPs: the closed form of :mod:`token_pruning.runtime.flops` on the tokens kept ÷ that of the dense
model.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from token_pruning.budget.calibration import FEWEST_EXAMPLES
from token_pruning.budget.elastic import budget_dropping_nothing, budget_table
from token_pruning.budget.elastic_holding import ElasticHolder
from token_pruning.budget.examples import Batch
from token_pruning.budget.fitting import (
    check_target,
    cost_of,
    default_keep_rate,
    fit_to_budget,
    prunable_layers,
    using,
)
from token_pruning.budget.holding import BudgetHolder, CalibratedHolder
from token_pruning.budget.schedules import Schedule, named_schedule
from token_pruning.budget.vocabulary import token_ids
from token_pruning.checkpoint import Checkpoint
from token_pruning.checks import choice
from token_pruning.errors import ConfigError
from token_pruning.families import ModelShape
from token_pruning.lab.training.features import hold_out
from token_pruning.lab.training.options import TrainOptions
from token_pruning.pruners import FixedThreshold, Pruner
from token_pruning.pruners.budgets import Budget
from token_pruning.pruners.importance import SCORING_MODES, convert_scores
from token_pruning.runtime.flops import relative_flops
from token_pruning.runtime.prune import prunable
from token_pruning.runtime.trace import Trace

# Units of scoring mode "relative": 128 times the paper's, whose mean score is 1/128.
FINAL_THRESHOLD = 1.28
TEMPERATURE = 0.128
LR_THRESHOLD = 0.0256

HELD_OUT_EXAMPLES = 400


def soft_relative_flops(shape: ModelShape, trace: Trace) -> Tensor:
    """What a batch of the soft stage would cost if each token were kept with its soft mask's probability.

    A token enters a layer with the product of its masks in the layers before: removal is for good.

    Args:
        shape: the model's sizes.
        trace: of soft passes.

    Returns:
        A float64 scalar, differentiable.
    """
    left = torch.cat([trace.attention_lengths[:1], trace.soft_survival])
    return relative_flops(shape, trace.input_lengths, left, first_only=trace.passes[0].first_only)


class BudgetController(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Augmented Lagrangian on the soft stage's relative FLOPs: ``μ · gap + ρ/2 · gap²``, with ``μ`` rising by the gap.

    The target falls from the cost of keeping everything to the budget over the first half of the steps, so that weights
    and thresholds can follow.
    """

    def __init__(self, target: float, penalty: float = 20.0, rate: float = 0.3, annealed: float = 0.5) -> None:
        """Start without pressure.

        Args:
            target: relative FLOPs.
            penalty: ρ.
            rate: by which μ follows the gap, per step.
            annealed: the part of the steps over which the target falls.
        """
        self.target, self.penalty, self.rate, self.annealed = target, penalty, rate, annealed
        self.multiplier = 0.0
        self.start: float | None = None
        self.progress = 0.0

    def loss(self, relative_flops: Tensor) -> Tensor:
        """What to add to the loss; also takes one step of ``μ``.

        Args:
            relative_flops: of this batch, differentiable.
        """
        measured = float(relative_flops.detach())
        if self.start is None:
            self.start = measured
        part = min(1.0, self.progress / self.annealed)
        aim = self.start + (self.target - self.start) * part
        gap = relative_flops - aim
        loss = self.multiplier * gap + self.penalty / 2 * gap**2
        self.multiplier += self.rate * (measured - aim)
        return loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on where a killed run stopped."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, dict):
            self.multiplier, self.start = saved["attributes"]["multiplier"], saved["attributes"]["start"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Know how far training is."""
        self.progress = state.global_step / max(1, state.max_steps)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"target": self.target}, "attributes": {"multiplier": self.multiplier, "start": self.start}}


def fitting_examples(features: list[dict[str, Any]], seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training examples without those that thresholds are fitted to, and these.

    Raises:
        ConfigError: if there are too few.
    """
    count = min(HELD_OUT_EXAMPLES, max(FEWEST_EXAMPLES, len(features) // 10))
    if len(features) < 2 * count:
        raise ConfigError(
            f"there are {len(features)} training examples; a budget needs at least {2 * FEWEST_EXAMPLES}, "
            f"{FEWEST_EXAMPLES} of them to fit thresholds to"
        )
    rest, chosen = hold_out(len(features), count, seed)
    return [features[place] for place in rest], [features[place] for place in chosen]


def budget_schedule(model: Any, options: TrainOptions, learned: bool) -> Schedule | None:
    """Where tokens leave, or None for where learned thresholds say: those of the checkpoint or of a soft stage.

    Several budgets need a schedule.

    Args:
        model: pruned or not.
        options: with a budget.
        learned: whether the checkpoint has thresholds.

    Raises:
        ConfigError: for a ``schedule`` that the model cannot have.
    """
    if options.schedule is not None:
        return named_schedule(options.schedule, prunable_layers(model))
    by_thresholds = options.soft or (learned and not options.elastic)
    return None if by_thresholds else named_schedule("drain", prunable_layers(model))


def with_budget_table(
    pruner: FixedThreshold, model: Any, batch: Batch, targets: Sequence[float], schedule: Schedule
) -> FixedThreshold:
    """The method with a table of budgets, pruning to the lowest.

    Args:
        pruner: with a vocabulary gate, which then has a threshold for each budget, or without one.
        model: not pruned.
        batch: what costs are held on, padded.
        targets: relative FLOPs, the lowest first.
        schedule: where tokens leave.

    Raises:
        ConfigError: if a budget cannot be reached, needs no pruning, or is there twice.
    """
    whole = replace(pruner, vocabulary=None if pruner.vocabulary is None else pruner.vocabulary.at(0.0), budgets=None)
    with prunable(model, whole):
        nothing = budget_dropping_nothing(model, whole, batch)
        for target in targets:
            check_target(model, batch, target)
            if targets.count(target) > 1:
                raise ConfigError(f"--target-flops names {target:g} twice")
            if target >= nothing.relative_flops:
                raise ConfigError(
                    f"--target-flops names {target:g}; with no token dropped this model costs "
                    f"{nothing.relative_flops:.3f}: leave it out"
                )

        def fit(target: float) -> Budget | None:
            gate = whole.vocabulary
            if gate is not None:
                gate = gate.keeping(token_ids(batch), default_keep_rate(model, batch, target))
            threshold = gate.threshold if gate else 0.0
            with using(model, whole.at(replace(nothing, vocabulary_threshold=threshold))):
                found = fit_to_budget(model, batch, schedule, target)
            return None if found is None else Budget(target, found.thresholds, threshold)

        table = budget_table(targets, nothing, fit, lambda budget: cost_of(model, whole.at(budget), batch))
    if table[0].relative_flops != targets[0]:
        raise ConfigError(f"--schedule {schedule.name} cannot reach --target-flops {targets[0]:g}")
    return replace(whole.at(table[0]), budgets=table)


def budget_holder(
    model: Any, dense: Any, batch: Batch, options: TrainOptions, schedule: Schedule | None
) -> BudgetHolder:
    """What keeps the budget, or one of several in each step.

    Args:
        model: pruned.
        dense: a copy that is not pruned, for probes to follow the weights; None where there are no probes to follow.
        batch: what costs are held on, padded.
        options: with a budget.
        schedule: see :class:`BudgetHolder`.

    Raises:
        ConfigError: if the budget cannot be reached.
    """
    if options.elastic:
        return ElasticHolder(model, dense, batch, options.bf16, options.seed, schedule)
    assert options.budget is not None
    check_target(model, batch, options.budget)
    if dense is not None:
        holder = CalibratedHolder(model, dense, batch, options.budget, options.bf16, schedule)
        if holder.fit(model) is None:
            raise ConfigError(
                f"--target-flops is {options.budget:g}, which is out of reach where tokens of {options.restore} leave; "
                "--schedule drain lets them leave earlier"
            )
        return holder
    return BudgetHolder(batch, options.budget, schedule, options.bf16)


def with_relative_scores(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint in scoring mode "relative", in which budgets are held; thresholds are converted, if they can be.

    Raises:
        ConfigError: for a method that cannot hold a budget, or a key with a value that is not allowed.
    """
    config = {"prune_mode": "absolute_threshold", **checkpoint.config}
    if config["prune_mode"] != "absolute_threshold":
        raise ConfigError(
            f"{checkpoint.path / 'config.json'}: prune_mode is {config['prune_mode']!r}; a budget, --target-flops, is "
            "held by absolute_threshold"
        )
    if config.get("prune_layers") is not None:
        raise ConfigError(
            f"prune_layers is {config['prune_layers']}; with a budget, --target-flops, it is --schedule that says "
            "where tokens leave (0,0.5,0,0.5: half of them after layer 2, half after layer 4)"
        )
    tensors = dict(checkpoint.tensors)
    mode = config.get("scoring_mode") or "mean"
    if mode == "mean":
        length = config.get("max_seq_length") or Pruner.max_seq_length
        scale = partial(convert_scores, source="mean", target="relative", max_seq_length=length)
        if "thresholds" in tensors:
            tensors["thresholds"] = scale(tensors["thresholds"])
        if isinstance(config.get("final_token_threshold"), int | float):
            config["final_token_threshold"] = scale(config["final_token_threshold"])
    elif mode == "mean_norm":  # no one length to convert by: the first fit to the budget comes soon
        config.pop("final_token_threshold", None)
        tensors.pop("thresholds", None)
    else:
        choice("scoring_mode", mode, SCORING_MODES)
    if mode != "relative":
        config.pop("thresholds", None)
    config = {"final_token_threshold": FINAL_THRESHOLD, **config, "scoring_mode": "relative"}
    return replace(checkpoint, config=config, tensors=tensors)

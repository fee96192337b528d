"""The methods of a sweep: one function each, from a trial's choices to what is run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from token_pruning.budget.fitting import entering_rate
from token_pruning.budget.schedules import schedules
from token_pruning.lab.training.options import CalibrateOptions, TrainOptions
from token_pruning.pruners.summary import SummaryTokens

_LOWEST_TARGET, _HIGHEST_TARGET = 0.2, 0.8
_HEADROOM = 0.02  # between a budget and the least that can be reached: held-out examples differ a little in length


@dataclass(frozen=True)
class Space:
    """What bounds the choices.

    Attributes:
        base: everything that all trials have in common.
        layers: after which a token's leaving saves anything.
        lowest_flops: the least relative FLOPs that can be reached, by ``summary_tokens``.
        highest_flops: relative FLOPs where every token stays.
        summary_tokens: for every method; None for none, where a method does not choose.
    """

    base: TrainOptions
    layers: int
    lowest_flops: Mapping[str, float]
    highest_flops: float
    summary_tokens: SummaryTokens | None


Trial = Any  # optuna.Trial, which is there only where the sweep extra is
Run = TrainOptions | CalibrateOptions


def ltp(trial: Trial, space: Space) -> TrainOptions:
    """The paper's: λ and T in a soft stage, then a hard stage, half of the epochs each."""
    return replace(
        space.base,
        masking_mode="mixed",
        regularization=trial.suggest_float("ltp.lambda", 0.01, 1.0, log=True),
        temperature=trial.suggest_float("ltp.temperature", 1e-4, 1e-2, log=True),
        pruning=_keys(space, prune_mode="absolute_threshold", final_token_threshold=0.01, scoring_mode="mean"),
    )


def budget(trial: Trial, space: Space) -> TrainOptions:
    """A hard stage that is held to a budget, with the dense model as a teacher."""
    target, summary_tokens = _target_and_summaries(trial, "budget", space)
    saved_before_layers = trial.suggest_float("budget.saved_before_layers", 0.0, 1.0)
    return replace(
        space.base,
        masking_mode="hard",
        target_flops=target,
        vocabulary_keep_rate=entering_rate(saved_before_layers, target, space.highest_flops),
        schedule=trial.suggest_categorical("budget.schedule", [schedule.name for schedule in schedules(space.layers)]),
        pruning={"prune_mode": "absolute_threshold", "summary_tokens": summary_tokens},
    )


def calibrated(trial: Trial, space: Space) -> CalibrateOptions:
    """Thresholds for a budget, without training."""
    target, summary_tokens = _target_and_summaries(trial, "calibrated", space)
    base = replace(space.base, masking_mode="hard", target_flops=target)
    return CalibrateOptions(base=base, summary_tokens=summary_tokens)


def topk(trial: Trial, space: Space) -> TrainOptions:
    """A hard stage that keeps the same fraction of every sequence."""
    rate = trial.suggest_float("topk.token_keep_rate", -3.0, 0.9)
    keep_all = trial.suggest_int("topk.keep_all_layers", 1, 3)
    pruning = _keys(space, prune_mode="topk", token_keep_rate=rate, keep_all_layers=keep_all, scoring_mode="mean")
    return replace(space.base, masking_mode="hard", pruning=pruning)


def manual(trial: Trial, space: Space) -> TrainOptions:
    """A hard stage with thresholds that rise linearly to a given one."""
    threshold = trial.suggest_float("manual.final_token_threshold", 1e-3, 0.1, log=True)
    pruning = _keys(space, prune_mode="absolute_threshold", final_token_threshold=threshold, scoring_mode="mean")
    return replace(space.base, masking_mode="hard", pruning=pruning)


METHODS: dict[str, Callable[[Trial, Space], Run]] = {
    method.__name__: method for method in (ltp, budget, calibrated, topk, manual)
}


def _keys(space: Space, **keys: Any) -> dict[str, Any]:
    return {**keys, "summary_tokens": space.summary_tokens or "none"}


def _target_and_summaries(trial: Trial, method: str, space: Space) -> tuple[float, SummaryTokens]:
    summary_tokens = space.summary_tokens
    if summary_tokens is None:
        summary_tokens = trial.suggest_categorical(f"{method}.summary_tokens", ["none", "segment"])
    low = min(1.0, max(_LOWEST_TARGET, space.lowest_flops[summary_tokens] + _HEADROOM))
    high = _HIGHEST_TARGET if low < _HIGHEST_TARGET else 1.0
    return trial.suggest_float(f"{method}.target_flops", low, high), summary_tokens

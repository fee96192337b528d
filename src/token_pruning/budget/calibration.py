"""Pruning to a budget without training.

Which schedule loses least differs between models and tasks, so it is chosen by how little the outputs change on
examples that thresholds were not fitted to.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from token_pruning.budget.examples import Batch, Examples, as_batch
from token_pruning.budget.fitting import (
    CLOSE_ENOUGH,
    Fit,
    check_target,
    default_keep_rate,
    fit_to_budget,
    highest_flops,
    lowest_flops,
    outputs_of,
    prunable_layers,
    using,
)
from token_pruning.budget.schedules import Schedule, neighbours, schedules
from token_pruning.budget.vocabulary import token_ids
from token_pruning.checks import number
from token_pruning.errors import ConfigError
from token_pruning.families import Reads
from token_pruning.pruners import FixedThreshold, Pruner, Unpruned, VocabularyGate
from token_pruning.pruners.summary import SummaryTokens
from token_pruning.runtime.flops import count_flops
from token_pruning.runtime.prune import attachment_of, hugging_face_model, is_pruned, prunable, prune, record

FEWEST_EXAMPLES = 32
_COMPARABLE = 0.012  # as CLOSE_ENOUGH, while schedules are compared
_METRIC_STEP = 0.05  # between the budgets that max_drop tries, relative FLOPs

Metric = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found.

    Attributes:
        pruner: the method, as it is now attached to the model.
        chosen: the thresholds behind it.
        candidates: everything that was compared, the chosen first and the others by their divergence; with ``max_drop``
            by their cost.
        metric_dense: with ``max_drop``: the dense model's metric on the held-out examples, in points.
        metric_pruned: with ``max_drop``: the pruned model's.
        drop_bound: with ``max_drop``: the estimated loss plus one standard error, in points.
    """

    pruner: FixedThreshold
    chosen: Fit
    candidates: list[Fit]
    metric_dense: float | None = None
    metric_pruned: float | None = None
    drop_bound: float | None = None


def calibrate(
    model: nn.Module,
    examples: Examples,
    target_flops: float | None = None,
    *,
    max_drop: float | None = None,
    metric: Metric | None = None,
    summary_tokens: SummaryTokens = "none",
    prune_layers: Sequence[int] | None = None,
    vocabulary: VocabularyGate | None = None,
    reads: Reads | None = None,
    seed: int = 0,
    search: Sequence[Schedule] | None = None,
) -> Calibration:
    """Prune a model to a budget without training it, in place.

    Half of the examples choose thresholds for each of several schedules; the other half say how much the outputs
    change. The schedule that changes them least is improved by moving parts of what leaves between neighbouring layers.

    Args:
        model: a supported model that is not pruned, with any head.
        examples: at least 32: tokenized texts as dictionaries with ``input_ids``, or one padded batch of tensors
            ``[examples, width]`` with ``input_ids`` and ``attention_mask``; with ``max_drop`` also ``labels``.
        target_flops: what the pruned model may cost, relative to the dense model on valid tokens.
        max_drop: instead: how much the metric may fall, in points (percent). Budgets are tried from the dearest to the
            cheapest, while the estimated loss plus one standard error stays inside the bound.
        metric: from logits ``[n, labels]`` and labels ``[n]`` to a fraction; accuracy, or Pearson's correlation for a
            regression.
        summary_tokens: see :class:`token_pruning.Pruner`.
        prune_layers: see :class:`token_pruning.Pruner`; other layers get thresholds of zero.
        vocabulary: from :func:`token_pruning.vocabulary_gate`, whose threshold is looked for anew: everything is then
            tried twice, with all tokens entering the first layer, and with half of what must be saved kept out of it.
        reads: see :func:`token_pruning.prune`.
        seed: of the division into halves. The same seed gives the same thresholds bit for bit.
        search: the schedules to try, with weights in ``prune_layers`` only; :func:`schedules` by default.

    Returns:
        What was found. The model is pruned with it, by absolute thresholds in scoring mode ``"relative"``.

    Raises:
        ConfigError: for fewer than 32 examples, a budget below what can be reached (the message says what can), both or
            neither of ``target_flops`` and ``max_drop``, missing labels, layers or schedules that do not fit the model
            or the budget, labels that are all the same, a metric that is not a number, or a model that is pruned
            already.
    """
    if (target_flops is None) == (max_drop is None):
        raise ConfigError("give either target_flops or max_drop")
    inner = hugging_face_model(model)
    if is_pruned(inner):
        raise ConfigError(f"this {type(inner).__name__} is pruned already; call unprune(model) first")
    batch = _checked_batch(examples, getattr(inner.config, "pad_token_id", None) or 0, max_drop)
    layers = prunable_layers(model, reads)
    allowed = _allowed_layers(prune_layers, layers)
    _check_schedules(search or (), layers, allowed)
    total = len(batch["input_ids"])
    order = torch.randperm(total, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    half = total // 2
    fitting, held_out = ({k: v[part] for k, v in batch.items()} for part in (order[:half], order[half:]))
    with prunable(model, summary_tokens, None if vocabulary is None else vocabulary.at(0.0), reads):
        tried = list(search or schedules(layers, None if prune_layers is None else allowed))
        bench = _Bench(model, fitting, held_out, tried, allowed)
        if target_flops is not None:
            check_target(model, fitting, target_flops, allowed[0])
            candidates = bench.search(target_flops)
            result = Calibration(_pruner(candidates[0], model), candidates[0], candidates)
        else:
            assert max_drop is not None
            result = bench.cheapest(max_drop, metric or _default_metric)
    prune(model, result.pruner, reads=reads)
    return result


def _checked_batch(examples: Examples, padding: int, max_drop: float | None) -> dict[str, Tensor]:
    """The examples as one padded batch, enough of them, with labels where these are needed."""
    batch = as_batch(examples, padding)
    total = len(batch["input_ids"])
    if total < FEWEST_EXAMPLES:
        raise ConfigError(f"{total} examples were given; calibration needs at least {FEWEST_EXAMPLES}")
    if max_drop is not None:
        number("max_drop", max_drop, above=0)
        if "labels" not in batch:
            raise ConfigError("max_drop needs labelled examples; labels is missing")
        if batch["labels"].dim() != 1:
            raise ConfigError(
                f"max_drop needs one class or score per example; labels has the shape {list(batch['labels'].shape)}"
            )
    return batch


def _allowed_layers(prune_layers: Sequence[int] | None, layers: int) -> tuple[int, ...]:
    """The layers (1-based, ascending) at which tokens may leave."""
    if prune_layers is None:
        return tuple(range(1, layers + 1))
    allowed = tuple(FixedThreshold(prune_layers=prune_layers).prune_layers or ())
    if not allowed or allowed[-1] > layers:
        raise ConfigError(
            f"prune_layers is {list(prune_layers)}; it must name at least one layer from 1 to {layers}, the last after "
            "which this model can drop tokens"
        )
    return allowed


def _check_schedules(search: Sequence[Schedule], layers: int, allowed: tuple[int, ...]) -> None:
    for schedule in search:
        if len(schedule.weights) != layers:
            raise ConfigError(
                f"schedule {schedule.name!r} has {len(schedule.weights)} weights; the model can drop tokens after "
                f"{layers} layers"
            )
        if any(weight and layer not in allowed for layer, weight in enumerate(schedule.weights, start=1)):
            raise ConfigError(f"schedule {schedule.name!r} has weights in layers that prune_layers does not name")


class _Bench:
    """The examples, what the dense model says of them, and the comparison of schedules."""

    def __init__(
        self, model: Any, fitting: Batch, held_out: Batch, search: list[Schedule], allowed: tuple[int, ...]
    ) -> None:
        self.model, self.fitting, self.held_out, self.schedules = model, fitting, held_out, search
        self.allowed = allowed
        with using(model, Unpruned()):
            self.dense = outputs_of(model, held_out)

    def search(self, target: float) -> list[Fit]:
        """Fits to a budget: that of the schedule with the least divergence, then the others."""
        fits = [
            fit
            for threshold in self._vocabulary_thresholds(target)
            for schedule in self.schedules
            if (fit := self.fit(schedule, target, threshold, _COMPARABLE))
        ]
        if not fits:
            names = ", ".join(schedule.name for schedule in self.schedules)
            raise ConfigError(f"target_flops is {target:g}; none of the schedules searched ({names}) can reach it")
        best = min(fits, key=_divergence)
        for share in (0.5, 0.25):
            moved = neighbours(best.schedule, share, self.allowed)
            threshold = best.vocabulary_threshold
            fits += [fit for schedule in moved if (fit := self.fit(schedule, target, threshold, _COMPARABLE))]
            best = min(fits, key=_divergence)
        others = sorted((fit for fit in fits if fit is not best), key=_divergence)
        return [self.fit(best.schedule, target, best.vocabulary_threshold) or best, *others]

    def _vocabulary_thresholds(self, target: float) -> list[float | None]:
        """Those to try."""
        gate = attachment_of(self.model).token_pruner.pruner.vocabulary
        if gate is None:
            return [None]
        keep_rate = default_keep_rate(self.model, self.fitting, target)
        threshold = gate.keeping(token_ids(self.fitting), keep_rate).threshold
        return [None, threshold] if threshold else [None]

    def fit(
        self, schedule: Schedule, target: float, threshold: float | None, tolerance: float = CLOSE_ENOUGH
    ) -> Fit | None:
        """A schedule's thresholds for a budget and their divergence, or None where it cannot reach the budget."""
        method = attachment_of(self.model).token_pruner.pruner
        method = replace(method, vocabulary=_gate(method, threshold))
        with using(self.model, method):
            fit = fit_to_budget(self.model, self.fitting, schedule, target, tolerance)
        if fit is None:
            return None
        with using(self.model, _pruner(fit, self.model)), record(self.model) as trace:
            outputs = outputs_of(self.model, self.held_out)
        return replace(
            fit,
            relative_flops_held_out=count_flops(self.model, trace).relative,
            divergence=_distance(self.dense, outputs, getattr(self.model.config, "problem_type", None)),
        )

    def cheapest(self, max_drop: float, metric: Metric) -> Calibration:
        """The cheapest budget whose estimated loss stays inside the bound."""
        labels = self.held_out["labels"]
        if bool((labels == labels[0]).all()):
            raise ConfigError(
                f"the {len(labels)} held-out examples all have the label {labels[0].item()}; max_drop needs examples "
                "of different labels to estimate a loss"
            )
        dense = 100 * metric(self.dense, labels)
        highest = highest_flops(self.model, self.fitting)
        lowest = lowest_flops(self.model, self.fitting, self.allowed[0])
        best: Calibration | None = None
        seen: list[Fit] = []
        for step in range(math.ceil((highest - lowest) / _METRIC_STEP) + 1):
            target = max(lowest, highest - step * _METRIC_STEP)
            fits = self.search(target)
            seen += fits
            pruner = _pruner(fits[0], self.model)
            with using(self.model, pruner):
                outputs = outputs_of(self.model, self.held_out)
            pruned = 100 * metric(outputs, labels)
            bound = dense - pruned + 100 * _standard_error(metric, self.dense, outputs, labels)
            if not bound <= max_drop:  # nor where the metric is not a number
                break
            best = Calibration(pruner, fits[0], [], dense, pruned, bound)
        if best is None:  # the dearest budget drops nothing, and so loses nothing
            raise ConfigError(f"the metric of the dense model on {len(labels)} held-out examples is not a number")
        return replace(best, candidates=sorted(seen, key=lambda fit: fit.relative_flops))


def _pruner(fit: Fit, model: nn.Module) -> FixedThreshold:
    method = attachment_of(model).token_pruner.pruner
    return FixedThreshold(
        thresholds=fit.thresholds,
        scoring_mode="relative",
        summary_tokens=method.summary_tokens,
        max_seq_length=method.max_seq_length,
        vocabulary=_gate(method, fit.vocabulary_threshold),
    )


def _gate(method: Pruner, threshold: float | None) -> VocabularyGate | None:
    """The method's gate with a threshold; None for none."""
    return None if threshold is None or method.vocabulary is None else method.vocabulary.at(threshold)


def _distance(dense: Tensor, pruned: Tensor, problem_type: str | None = None) -> float:
    """KL divergence of classes, or of the labels of a multi-label head one by one; else squared error ÷ variance."""
    if problem_type == "multi_label_classification":  # each label is there or not
        dense, pruned = (torch.stack([x, torch.zeros_like(x)], -1).reshape(-1, 2) for x in (dense, pruned))
    if dense.shape[1] > 1 and problem_type != "regression":
        return float(
            nn.functional.kl_div(pruned.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean")
        )
    return float(((pruned - dense).square().mean(0) / dense.var(0).clamp(min=1e-12)).mean())


def _divergence(fit: Fit) -> float:
    assert fit.divergence is not None
    return fit.divergence


def _default_metric(logits: Tensor, labels: Tensor) -> float:
    """Accuracy, or for a single output Pearson's correlation, 0 where one side is constant."""
    if logits.shape[1] > 1:
        return float((logits.argmax(-1) == labels).double().mean())
    return float(torch.corrcoef(torch.stack([logits[:, 0].double(), labels.double()]))[0, 1].nan_to_num())


def _standard_error(metric: Metric, dense: Tensor, pruned: Tensor, labels: Tensor, rounds: int = 200) -> float:
    """Of the difference of the metric between two models on the same examples, by the bootstrap."""
    generator = torch.Generator().manual_seed(0)
    drops = []
    for _ in range(rounds):
        rows = torch.randint(len(labels), (len(labels),), generator=generator)
        drops.append(metric(dense[rows], labels[rows]) - metric(pruned[rows], labels[rows]))
    return float(torch.tensor(drops, dtype=torch.float64, device="cpu").std())

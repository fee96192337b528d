"""Pruning to a budget without training.

Which schedule loses least differs between models and tasks, so it is chosen by how little the outputs change on
examples that thresholds were not fitted to.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from token_pruning.budget.clock import Clock, within_milliseconds
from token_pruning.budget.comparison import Comparison, Plan
from token_pruning.budget.divergence import divergence_of
from token_pruning.budget.elastic import checked_targets, with_budgets
from token_pruning.budget.examples import Examples, Texts, as_batch
from token_pruning.budget.fitting import (
    Fit,
    highest_flops,
    lowest_flops,
    outputs_in_parts,
    prunable_layers,
    using,
)
from token_pruning.budget.schedules import Schedule, schedules
from token_pruning.checks import number, positive_integer, whole_number
from token_pruning.errors import ConfigError
from token_pruning.families import Reads, padding_id, shape_of
from token_pruning.pruners import FixedThreshold, Pruner, VocabularyGate
from token_pruning.pruners.summary import SummaryTokens
from token_pruning.runtime.adapters import adapter_of
from token_pruning.runtime.prune import hugging_face_model, is_pruned, prunable, prune, reads_of

FEWEST_EXAMPLES = 32
_METRIC_STEP = 0.05  # between the budgets that max_drop tries, relative FLOPs

Metric = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found.

    Attributes:
        pruner: the method, as it is now attached to the model.
        chosen: the thresholds behind it.
        candidates: everything that was compared, the chosen first and the others by their divergence plus its
            standard error; with ``max_drop`` by their cost.
        metric_dense: with ``max_drop``: the dense model's metric on the held-out examples, in points.
        metric_pruned: with ``max_drop``: the pruned model's.
        drop_bound: with ``max_drop``: the estimated loss plus one standard error, in points.
        dense_ms: with ``target_ms``: milliseconds of a batch of the examples in the engine, nothing pruned.
        pruned_ms: with ``target_ms``: the same, pruned.
        fits: with several budgets: the chosen rule at each, from the lowest on, but for those at which nothing leaves.
    """

    pruner: FixedThreshold
    chosen: Fit
    candidates: list[Fit]
    metric_dense: float | None = None
    metric_pruned: float | None = None
    drop_bound: float | None = None
    dense_ms: float | None = None
    pruned_ms: float | None = None
    fits: Sequence[Fit] = ()


def calibrate(
    model: nn.Module,
    examples: Examples | Texts,
    target_flops: float | Sequence[float] | None = None,
    *,
    target_ms: float | None = None,
    batch_size: int = 1,
    engine: Mapping[str, Any] | None = None,
    max_drop: float | None = None,
    metric: Metric | None = None,
    summary_tokens: SummaryTokens = "none",
    prune_layers: Sequence[int] | None = None,
    vocabulary: VocabularyGate | Literal[False] | None = None,
    reads: Reads | None = None,
    max_tokens: int | None = None,
    chunks: bool = False,
    seed: int = 0,
    search: Sequence[Schedule] | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Prune a model to a budget without training it, in place.

    Most of the examples say what predicts tokens' worth; the others choose thresholds for each of many rules, and say
    how much the outputs change by it. The best rule is improved by moving what leaves between neighbouring layers.

    Args:
        model: a supported model that is not pruned, with any head; or a model of sentence-transformers.
        examples: at least 32. For a model of sentence-transformers texts, or a reranker's pairs, several per query, or
            tokenized texts as dictionaries with ``input_ids``, or one padded batch of tensors
            ``[examples, width]`` with ``input_ids`` and ``attention_mask``; with ``max_drop`` also ``labels``.
        target_flops: what the pruned model may cost, relative to the dense model on valid tokens. Of several budgets
            the lowest is searched, and the model pruned to it; the rule that wins is then fitted to the others too, and
            :func:`token_pruning.set_budget` takes any between the lowest and 1. A correction of pooled vectors, which
            belongs to one budget, is not tried then.
        target_ms: instead: what a batch may take in the engine on this machine, in milliseconds, the mean over batches
            of the examples. The budget is the dearest that meets it; where the dense model does, nothing leaves.
            Tokenizing is not counted, nor what sentence-transformers does around the model.
        batch_size: with ``target_ms``: texts in a batch.
        engine: with ``target_ms``: arguments of :func:`token_pruning.compile`, such as ``{"dtype": "int8", "threads":
            1}``.
        max_drop: how much the metric may fall, in points (percent), on half of the examples. By itself: the budget is
            the cheapest whose estimated loss plus one standard error stays inside the bound, found by halving what
            there is to save. With a budget, it is an error if that loses more.
        metric: from logits ``[n, labels]`` and labels ``[n]`` to a fraction; accuracy, or Pearson's correlation for a
            regression.
        summary_tokens: see :class:`token_pruning.Pruner`.
        prune_layers: see :class:`token_pruning.Pruner`; other layers get thresholds of zero.
        vocabulary: from :func:`token_pruning.vocabulary_gate`, whose threshold is looked for anew: every schedule is
            then tried twice, with all tokens entering the first layer, and with half of what must be saved kept out of
            it. False for no gate at all.
        reads: see :func:`token_pruning.prune`.
        max_tokens: see :class:`token_pruning.Pruner`.
        chunks: see :class:`token_pruning.Pruner`.
        seed: of the division into halves. The same seed gives the same thresholds bit for bit.
        search: the schedules to try, with weights in ``prune_layers`` only; :func:`schedules` by default.
        progress: whether to show a progress bar; on a terminal unless given.

    Returns:
        What was found. The model is pruned with it, by absolute thresholds in scoring mode ``"relative"``.

    Raises:
        ConfigError: for fewer than 32 examples, a budget below what can be reached (the message says what can), none of
            ``target_flops``, ``target_ms`` and ``max_drop``, both budgets, a budget that loses more than ``max_drop``
            (the message says how much), missing labels, layers or schedules that do not fit the model or the budget,
            labels that are all the same, a metric that is not a number, or a model that is pruned already.
    """
    _check_budget(target_flops, target_ms, max_drop)
    whole_number("seed", seed, low=0, high=2**32 - 1)
    several = isinstance(target_flops, Sequence) and not isinstance(target_flops, str)
    inner, adapter = hugging_face_model(model), adapter_of(model)
    if is_pruned(inner):
        raise ConfigError(f"this {type(inner).__name__} is pruned already; call unprune(model) first")
    runs = model
    if adapter is not None:
        runs = inner
        if not isinstance(examples, Mapping) and examples and not isinstance(examples[0], Mapping):
            examples = adapter.tokenized(model, examples, whole=max_tokens is not None)
    batch = _checked_batch(examples, padding_id(inner.config), max_drop)
    layers = prunable_layers(model, reads)
    allowed = _allowed_layers(prune_layers, layers)
    _check_schedules(search or (), layers, allowed)
    template = FixedThreshold(
        thresholds=[0.0] * shape_of(inner.base_model.config).num_layers,
        scoring_mode="relative",
        summary_tokens=summary_tokens,
        max_tokens=max_tokens,
        chunks=chunks,
        vocabulary=vocabulary.at(0.0) if isinstance(vocabulary, VocabularyGate) else vocabulary or None,
    )
    asked_for = bool(search) or prune_layers is not None or bool(vocabulary) or summary_tokens != "none"
    plan = Plan(
        list(search or schedules(layers, None if prune_layers is None else allowed)),
        allowed,
        layers,
        only_received=asked_for,
        gates=vocabulary is not False,
        halves=max_drop is not None,
        corrections=not several,
    )
    with prunable(runs, template, reads_of(model, reads)):
        comparison = Comparison(runs, batch, divergence_of(runs, batch), plan, seed=seed, progress=progress)
        loss = None if max_drop is None else _Loss(comparison, _checked_metric(metric), max_drop)
        if target_flops is not None:
            given: Any = target_flops if several else [target_flops]
            targets = checked_targets(comparison, given)
            candidates = comparison.search(targets[0])
            result = Calibration(candidates[0].pruner, candidates[0], candidates)
            if several:
                pruner, fits = with_budgets(comparison, candidates[0], targets)
                result = replace(result, pruner=pruner, fits=fits)
        elif target_ms is not None:
            clock = Clock(runs, batch, _batch_size(batch_size, len(batch["input_ids"])), engine or {}, seed)
            candidates, taken = within_milliseconds(comparison, clock, target_ms)
            found = Calibration(candidates[0].pruner, candidates[0], candidates)
            result = replace(found, dense_ms=clock.dense_ms, pruned_ms=taken)
        else:
            assert loss is not None
            result = _cheapest(loss)
        if loss is not None and result.drop_bound is None:
            result = _checked_loss(result, loss)
    prune(model, result.pruner, reads=reads)
    return result


def _check_budget(target_flops: Any, target_ms: float | None, max_drop: float | None) -> None:
    if target_flops is not None and target_ms is not None:
        raise ConfigError("give target_flops or target_ms, not both")
    if target_flops is None and target_ms is None and max_drop is None:
        raise ConfigError("give target_flops, target_ms or max_drop")
    if target_ms is not None:
        number("target_ms", target_ms, above=0)


def _batch_size(batch_size: int, examples: int) -> int:
    if positive_integer("batch_size", batch_size) > examples:
        raise ConfigError(f"batch_size is {batch_size}; there are {examples} examples to make batches of")
    return batch_size


def _checked_batch(examples: Examples | Texts, padding: int, max_drop: float | None) -> dict[str, Tensor]:
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


@dataclass(frozen=True)
class _Loss:
    """What pruning costs in points of a metric on the held-out examples, and how many it may cost."""

    comparison: Comparison
    metric: Metric
    max_drop: float

    def __post_init__(self) -> None:
        labels = self._labels
        if bool((labels == labels[0]).all()):
            raise ConfigError(
                f"the {len(labels)} held-out examples all have the label {labels[0].item()}; max_drop needs examples "
                "of different labels to estimate a loss"
            )
        classes = self.comparison.dense.shape[1]
        if self.comparison.divergence.kind == "classes" and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ConfigError(
                f"labels go from {labels.min().item()} to {labels.max().item()}; the model has the classes 0 to "
                f"{classes - 1}"
            )

    @property
    def _labels(self) -> Tensor:
        return self.comparison.batch["labels"][self.comparison.held_out]

    @functools.cached_property
    def dense(self) -> float:
        """The dense model's points."""
        return 100 * self.metric(self.comparison.dense, self._labels)

    def of(self, pruner: Pruner) -> tuple[float, float]:
        """The pruned model's points, and the loss plus one standard error."""
        comparison, labels = self.comparison, self._labels
        with using(comparison.model, pruner):
            outputs = outputs_in_parts(comparison.model, comparison.part(comparison.held_out))
        pruned = 100 * self.metric(outputs, labels)
        return pruned, self.dense - pruned + 100 * _standard_error(self.metric, comparison.dense, outputs, labels)


def _checked_loss(result: Calibration, loss: _Loss) -> Calibration:
    """With what it loses, which must be inside the bound."""
    pruned, bound = loss.of(result.pruner)
    if not bound <= loss.max_drop:
        cost = f"relative FLOPs {result.chosen.relative_flops:.3f}"
        if result.pruned_ms is not None:
            cost += f", {result.pruned_ms:.3g} ms a batch,"
        raise ConfigError(
            f"max_drop is {loss.max_drop:g}; at {cost} the metric falls from {loss.dense:.2f} to {pruned:.2f} on "
            f"{len(loss.comparison.held_out)} held-out examples, by at most {bound:.2f} points with one standard "
            "error: both cannot be had"
        )
    return replace(result, metric_dense=loss.dense, metric_pruned=pruned, drop_bound=bound)


def _cheapest(loss: _Loss) -> Calibration:
    """The cheapest budget whose estimated loss stays inside the bound, by halving what there is to save."""
    comparison = loss.comparison
    model, fitting = comparison.model, comparison.part(comparison.fitting)
    no_number = ConfigError(
        f"the metric of the dense model on {len(comparison.held_out)} held-out examples is not a number"
    )
    if math.isnan(loss.dense):
        raise no_number
    highest = highest_flops(model, fitting)
    lowest = lowest_flops(model, fitting, comparison.plan.allowed[0])
    steps = math.ceil((highest - lowest) / _METRIC_STEP)
    seen: list[Fit] = []

    def inside(target: float) -> Calibration | None:
        """The best for a budget, if its loss is inside the bound; None if not, or if nothing reaches the budget."""
        try:
            fits = comparison.search(target)
        except ConfigError:
            return None
        seen.extend(fits)
        pruned, bound = loss.of(fits[0].pruner)
        return Calibration(fits[0].pruner, fits[0], [], loss.dense, pruned, bound) if bound <= loss.max_drop else None

    best, kept, lost = None, 0, steps + 1
    while lost - kept > 1:
        middle = (kept + lost) // 2
        found = inside(max(lowest, highest - middle * _METRIC_STEP))
        best, kept, lost = (best, kept, middle) if found is None else (found, middle, lost)
    best = best or inside(highest)
    if best is None:  # the dearest budget drops nothing, and so loses nothing: the bootstrap met what is no number
        raise no_number
    return replace(best, candidates=sorted(seen, key=lambda fit: fit.relative_flops))


def _checked_metric(metric: Metric | None) -> Metric:
    """A metric whose results are seen to be numbers; accuracy or correlation unless given."""
    if metric is None:
        return _default_metric
    if not callable(metric):
        raise ConfigError(f"metric is {metric!r}; it must be a function from logits and labels to a fraction")

    def measured(logits: Tensor, labels: Tensor) -> float:
        found: Any = metric(logits, labels)
        try:
            return float(found)
        except (TypeError, ValueError):
            raise ConfigError(f"metric gives {found!r}; it must give a fraction") from None

    return measured


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

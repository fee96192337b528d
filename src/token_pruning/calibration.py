"""Thresholds for a budget without training: sequential quantiles of importance on a few hundred examples.

A *schedule* says in which layers tokens leave; its *strength* how many. Cutting each layer at the quantile that keeps
the wanted fraction, with everything before it already removed, gives thresholds whose cost is known before they are
used. Which schedule loses least differs between models and tasks, so it is chosen by how little the outputs change.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from token_pruning.attach import attachment_of, is_pruned, prunable, prune, record
from token_pruning.checks import number
from token_pruning.errors import ConfigError
from token_pruning.examples import Batch, Examples, as_batch
from token_pruning.flops import count_flops, relative_flops
from token_pruning.models import family_of, reads_first_token_only
from token_pruning.pruners import FixedThreshold, LayerTokens, Pruner, Unpruned
from token_pruning.ragged import layout_from_mask
from token_pruning.summary import SummaryTokens
from token_pruning.vocabulary import vocabulary_threshold

FEWEST_EXAMPLES = 32
_DROP_EVERYTHING = 1e6  # a threshold in relative units, where the mean score is 1
_CLOSE_ENOUGH = 0.003  # between a budget and what the calibration examples cost
_COMPARABLE = 0.012  # the same while schedules are compared
_METRIC_STEP = 0.05  # between the budgets that max_drop tries, relative FLOPs

Metric = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Schedule:
    """Where tokens leave.

    Attributes:
        name: for reports.
        weights: of all tokens that leave, the part that does so after each layer; they add up to 1. The last layer of a
            model whose head reads the first token only has none.
    """

    name: str
    weights: tuple[float, ...]

    def profile(self, strength: float) -> list[float]:
        """The fraction of tokens, first tokens left out, that is kept after each layer.

        Args:
            strength: the fraction that leaves altogether, 0 to 1.
        """
        return [max(0.0, 1.0 - strength * gone) for gone in accumulate(self.weights)]


@dataclass(frozen=True)
class Drain(Schedule):
    """Everything leaves, as late as the budget allows: part of it after one layer and the rest after the next.

    The strength says when: at 0 after no layer, at 1 after the first. What was there lives on in first tokens, and in
    summary tokens where there are any. ``weights`` only says how many layers there are.
    """

    def profile(self, strength: float) -> list[float]:
        """See :meth:`Schedule.profile`."""
        when = (1.0 - strength) * len(self.weights)
        return [min(1.0, max(0.0, when - layer)) for layer in range(len(self.weights))]


def schedules(layers: int, prune_layers: Sequence[int] | None = None) -> list[Schedule]:
    """The schedules tried: everything at once after each layer in turn, spread over layers, and as late as can be.

    Args:
        layers: layers after which a token's leaving saves anything.
        prune_layers: those of them (1-based, ascending) at which tokens may leave; None for all.
    """
    allowed = list(range(1, layers + 1)) if prune_layers is None else list(prune_layers)

    def spread(name: str, raw: Sequence[float]) -> Schedule:
        weights = dict(zip(allowed, raw, strict=True))
        return Schedule(name, tuple(weights.get(layer, 0.0) / sum(raw) for layer in range(1, layers + 1)))

    found = [spread(f"step-{k}", [float(layer == k) for layer in allowed]) for k in allowed]
    if len(allowed) > 1:
        found += [
            spread("linear", [1.0] * len(allowed)),
            spread("geometric", [0.5**i for i in range(len(allowed))]),
            spread("late", [float(i >= len(allowed) // 2) for i in range(len(allowed))]),
        ]
    return found if prune_layers is not None else [*found, Drain("drain", (1.0 / layers,) * layers)]


@dataclass(frozen=True, kw_only=True)
class _Cut(Pruner):
    """Keeps the given fraction of a whole batch's tokens after each layer, and notes the thresholds that do so."""

    prune_mode: ClassVar[str] = "cut"

    profile: tuple[float, ...]
    found: list[float] = field(default_factory=list)

    def keep(self, tokens: LayerTokens) -> Tensor:
        candidates = torch.ones_like(tokens.scores, dtype=torch.bool)
        candidates[tokens.layout.first_rows] = False
        if tokens.summaries is not None:
            candidates &= ~tokens.summaries
        scores = tokens.scores[candidates].sort().values
        everything = int((tokens.input_lengths - 1).clamp(min=0).sum())
        kept = min(len(scores), round(everything * self.profile[tokens.layer - 1]))
        if kept == len(scores):
            threshold = 0.0
        elif kept == 0:
            threshold = _DROP_EVERYTHING
        else:
            threshold = float((scores[-kept - 1] + scores[-kept]) / 2)
        self.found.append(threshold)
        return tokens.scores >= threshold


@dataclass(frozen=True)
class Fit:
    """Thresholds fitted to examples.

    Attributes:
        schedule: where tokens leave.
        strength: which part of them leaves.
        thresholds: one per layer, for scoring mode ``"relative"``.
        kept: of the tokens that enter the first layer, the fraction kept after each layer, first tokens left out.
        relative_flops: on the examples they were fitted to.
        relative_flops_held_out: on the others, or None if there were none.
        divergence: how much the outputs change on the held-out examples: KL divergence to the dense model in nats; for
            regressions and models without logits the squared error ÷ the dense outputs' variance. None if not measured.
        vocabulary_threshold: of the method they were fitted for.
        entering: the fraction of all tokens that it lets into the first layer.
    """

    schedule: Schedule
    strength: float
    thresholds: tuple[float, ...]
    kept: tuple[float, ...]
    relative_flops: float
    relative_flops_held_out: float | None = None
    divergence: float | None = None
    vocabulary_threshold: float | None = None
    entering: float = 1.0


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
    vocabulary_scores: Tensor | None = None,
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
        vocabulary_scores: from :func:`token_pruning.vocabulary_scores`: everything is then tried twice, with all tokens
            entering the first layer, and with half of what must be saved kept out of it.
        seed: of the division into halves. The same seed gives the same thresholds bit for bit.
        search: the schedules to try, with weights in ``prune_layers`` only; :func:`schedules` by default.

    Returns:
        What was found. The model is pruned with it, by absolute thresholds in scoring mode ``"relative"``.

    Raises:
        ConfigError: for fewer than 32 examples, a budget below what can be reached (the message says what can), both or
            neither of ``target_flops`` and ``max_drop``, missing labels, layers or schedules that do not fit the model
            or the budget, or a model that is pruned already.
    """
    if (target_flops is None) == (max_drop is None):
        raise ConfigError("give either target_flops or max_drop")
    if is_pruned(model):
        raise ConfigError(f"this {type(model).__name__} is pruned already; call unprune(model) first")
    if not isinstance(model, PreTrainedModel):
        prune(model, Unpruned())  # says what is wrong
    padding = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    batch = as_batch(examples, padding)
    total = len(batch["input_ids"])
    if total < FEWEST_EXAMPLES:
        raise ConfigError(f"{total} examples were given; calibration needs at least {FEWEST_EXAMPLES}")
    if max_drop is not None:
        number("max_drop", max_drop, above=0)
        if "labels" not in batch:
            raise ConfigError("max_drop needs labelled examples; labels is missing")
    layers = prunable_layers(model)
    allowed = tuple(range(1, layers + 1))
    if prune_layers is not None:
        allowed = tuple(FixedThreshold(prune_layers=prune_layers).prune_layers or ())
        if not allowed or allowed[-1] > layers:
            raise ConfigError(
                f"prune_layers is {list(prune_layers)}; it must name at least one layer from 1 to {layers}, the last "
                "after which this model can drop tokens"
            )
    for schedule in search or ():
        if len(schedule.weights) != layers:
            raise ConfigError(
                f"schedule {schedule.name!r} has {len(schedule.weights)} weights; the model can drop tokens after "
                f"{layers} layers"
            )
        if any(weight and layer not in allowed for layer, weight in enumerate(schedule.weights, start=1)):
            raise ConfigError(f"schedule {schedule.name!r} has weights in layers that prune_layers does not name")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    half = total // 2
    fitting, held_out = ({k: v[part] for k, v in batch.items()} for part in (order[:half], order[half:]))
    with prunable(model, summary_tokens, vocabulary_scores):
        tried = list(search or schedules(layers, None if prune_layers is None else allowed))
        bench = _Bench(model, fitting, held_out, tried, allowed)
        if target_flops is not None:
            check_target(model, fitting, target_flops, allowed[0])
            candidates = bench.search(target_flops)
            result = Calibration(_pruner(candidates[0], model), candidates[0], candidates)
        else:
            assert max_drop is not None
            result = bench.cheapest(max_drop, metric or _default_metric)
    wanted = vocabulary_scores if result.pruner.vocabulary_threshold else None
    prune(model, result.pruner, vocabulary_scores=wanted)
    return result


class _Bench:
    """The examples, what the dense model says of them, and the comparison of schedules."""

    def __init__(
        self, model: Any, fitting: Batch, held_out: Batch, search: list[Schedule], allowed: tuple[int, ...]
    ) -> None:
        self.model, self.fitting, self.held_out, self.schedules = model, fitting, held_out, search
        self.allowed = allowed
        with using(model, Unpruned()):
            self.dense = _outputs(model, held_out)

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
            moved = _neighbours(best.schedule, share, self.allowed)
            threshold = best.vocabulary_threshold
            fits += [fit for schedule in moved if (fit := self.fit(schedule, target, threshold, _COMPARABLE))]
            best = min(fits, key=_divergence)
        others = sorted((fit for fit in fits if fit is not best), key=_divergence)
        return [self.fit(best.schedule, target, best.vocabulary_threshold) or best, *others]

    def _vocabulary_thresholds(self, target: float) -> list[float | None]:
        """Those to try."""
        scores = attachment_of(self.model).token_pruner.vocabulary_scores
        if scores is None:
            return [None]
        threshold = vocabulary_threshold(scores, self.fitting, default_keep_rate(self.model, self.fitting, target))
        return [None, threshold] if threshold else [None]

    def fit(
        self, schedule: Schedule, target: float, threshold: float | None, tolerance: float = _CLOSE_ENOUGH
    ) -> Fit | None:
        """A schedule's thresholds for a budget and their divergence, or None where it cannot reach the budget."""
        method = replace(attachment_of(self.model).token_pruner.pruner, vocabulary_threshold=threshold)
        with using(self.model, method):
            fit = fit_to_budget(self.model, self.fitting, schedule, target, tolerance)
        if fit is None:
            return None
        with using(self.model, _pruner(fit, self.model)), record(self.model) as trace:
            outputs = _outputs(self.model, self.held_out)
        return replace(
            fit,
            relative_flops_held_out=count_flops(self.model, trace).relative,
            divergence=_distance(self.dense, outputs),
        )

    def cheapest(self, max_drop: float, metric: Metric) -> Calibration:
        """The cheapest budget whose estimated loss stays inside the bound."""
        labels = self.held_out["labels"]
        dense = 100 * metric(self.dense, labels)
        highest = predicted_flops(self.model, self.fitting, [1.0] * prunable_layers(self.model))
        lowest = lowest_flops(self.model, self.fitting, self.allowed[0])
        best: Calibration | None = None
        seen: list[Fit] = []
        for step in range(math.ceil((highest - lowest) / _METRIC_STEP) + 1):
            target = max(lowest, highest - step * _METRIC_STEP)
            fits = self.search(target)
            seen += fits
            pruner = _pruner(fits[0], self.model)
            with using(self.model, pruner):
                outputs = _outputs(self.model, self.held_out)
            pruned = 100 * metric(outputs, labels)
            bound = dense - pruned + 100 * _standard_error(metric, self.dense, outputs, labels)
            if bound > max_drop:
                break
            best = Calibration(pruner, fits[0], [], dense, pruned, bound)
        assert best is not None  # the dearest budget drops nothing, and so loses nothing
        return replace(best, candidates=sorted(seen, key=lambda fit: fit.relative_flops))


def fit_to_budget(
    model: Any, batch: Batch, schedule: Schedule, target: float, tolerance: float = _CLOSE_ENOUGH
) -> Fit | None:
    """Thresholds that cost ``target`` on a batch, with tokens leaving where ``schedule`` says.

    Args:
        model: a pruned model in evaluation mode; it keeps its pruner, whose ``summary_tokens`` count.
        batch: padded tensors, all of one forward pass.
        schedule: where tokens leave.
        target: relative FLOPs.
        tolerance: how near is near enough.

    Returns:
        The fit, or None where the schedule costs more whatever its strength.
    """
    aim = target
    best: Fit | None = None
    for _ in range(4):
        strength = _strength(model, batch, schedule, aim)
        if strength is None:
            if best is None and predicted_flops(model, batch, schedule.profile(1.0)) > target + tolerance:
                return None
            strength = 1.0
        fit = fit_profile(model, batch, schedule, strength)
        if best is None or abs(fit.relative_flops - target) < abs(best.relative_flops - target):
            best = fit
        if abs(fit.relative_flops - target) <= tolerance or strength in (0.0, 1.0):
            break
        aim += target - fit.relative_flops  # what was predicted knows lengths, not which sequences lose more
    return best


def fit_profile(model: Any, batch: Batch, schedule: Schedule, strength: float) -> Fit:
    """Thresholds that keep a schedule's fractions of a batch's tokens; arguments as :func:`fit_to_budget`."""
    profile = schedule.profile(strength)
    layers = attachment_of(model).shape.num_layers
    cut = _Cut(
        scoring_mode="relative",
        profile=(*profile, *([1.0] * (layers - len(profile)))),
        summary_tokens=_summaries(model),
        vocabulary_threshold=attachment_of(model).token_pruner.pruner.vocabulary_threshold,
    )
    with using(model, cut), record(model) as trace:
        _outputs(model, batch)
    return Fit(
        schedule,
        strength,
        tuple(cut.found),
        tuple(profile),
        count_flops(model, trace).relative,
        vocabulary_threshold=cut.vocabulary_threshold,
        entering=float(trace.attention_lengths[0].sum() / trace.input_lengths.sum()),
    )


def profile_of(model: Any, batch: Batch) -> Schedule:
    """What the thresholds on a model keep of a batch, as the schedule whose strength 1 is just that."""
    with record(model) as trace:
        _outputs(model, batch)
    ordinary = (trace.ffn_lengths - trace.summary_lengths - 1).clamp(min=0).sum(1).double()
    everything = (trace.attention_lengths[0] - 1).clamp(min=0).sum().double()
    kept = [1.0, *(ordinary / everything).tolist()[: prunable_layers(model)]]
    return Schedule("learned", tuple(max(0.0, a - b) for a, b in pairwise(kept)))


def predicted_flops(model: Any, batch: Batch, profile: Sequence[float]) -> float:
    """Relative FLOPs of a profile, every sequence keeping the same fraction; arguments as :func:`fit_to_budget`."""
    attachment = attachment_of(model)
    valid = layout_from_mask(batch["attention_mask"].to(attachment.model.device, torch.bool))
    entering, *_ = attachment.token_pruner.enter(valid, batch["input_ids"].to(attachment.model.device))
    shape, lengths = attachment.shape, entering.lengths_tensor.double()
    summaries = {"none": 0, "shared": 1, "segment": 2}[_summaries(model)]
    left = [lengths]
    for layer, kept in enumerate((*profile, *[profile[-1]] * (shape.num_layers - len(profile))), start=1):
        tokens = 1 + kept * (lengths - 1)
        extra = summaries if kept < 1 and layer < shape.num_layers else 0
        left.append(torch.minimum(tokens + extra, lengths))
    first_only = reads_first_token_only(attachment.model)
    return float(relative_flops(shape, valid.lengths_tensor, torch.stack(left), first_only=first_only))


def default_keep_rate(model: Any, batch: Batch, target: float) -> float:
    """The part of all tokens that a budget lets into the first layer: half of what must be saved is saved there.

    Arguments as :func:`fit_to_budget`; the model's pruner must have no vocabulary threshold.
    """
    everything = predicted_flops(model, batch, [1.0] * prunable_layers(model))
    return min(1.0, (1 + target / everything) / 2)


def lowest_flops(model: Any, batch: Batch, first_layer: int = 1) -> float:
    """The least that pruning can cost: everything but first tokens (and summaries) leaves after ``first_layer``."""
    rest = prunable_layers(model) - first_layer + 1
    return predicted_flops(model, batch, [1.0] * (first_layer - 1) + [0.0] * rest)


def check_target(model: Any, batch: Batch, target: float, first_layer: int = 1) -> None:
    """Raises ConfigError for a budget that is no fraction or cannot be reached.

    Args:
        model: see :func:`fit_to_budget`.
        batch: see :func:`fit_to_budget`.
        target: relative FLOPs.
        first_layer: the first that may drop tokens, 1-based.
    """
    number("target_flops", target, above=0, high=1)
    lowest = lowest_flops(model, batch, first_layer)
    if target < lowest:
        raise ConfigError(
            f"target_flops is {target:g}; the lowest that can be reached with these examples is {lowest:.3f}, where "
            f"only first tokens are left after {'the first layer' if first_layer == 1 else f'layer {first_layer}'}"
        )


def prunable_layers(model: nn.Module) -> int:
    """Layers after which a token's leaving saves anything: not the last where the head reads first tokens only."""
    outer: Any = attachment_of(model).model if is_pruned(model) else model
    layers = family_of(outer.base_model.config).shape(outer.base_model.config).num_layers
    return layers - 1 if reads_first_token_only(outer) and layers > 1 else layers


@contextmanager
def using(model: nn.Module, pruner: Pruner) -> Iterator[None]:
    """A pruned model with another method inside the block, in evaluation mode.

    Thresholds are those of the method. The model's configuration is left as it is.
    """
    token_pruner = attachment_of(model).token_pruner
    before, thresholds, training = token_pruner.pruner, token_pruner.thresholds, model.training
    values = pruner.initial_thresholds(token_pruner.num_layers)
    model.eval()
    try:
        token_pruner.pruner = pruner
        if thresholds is not None and values is not None:
            stand_in = torch.tensor(values, dtype=torch.float32, device=thresholds.device)
            _set_thresholds(token_pruner, stand_in)
        yield
    finally:
        token_pruner.pruner = before
        if thresholds is not None:
            _set_thresholds(token_pruner, thresholds)
        model.train(training)


def _set_thresholds(token_pruner: Any, thresholds: Tensor) -> None:
    """Exchange the tensor itself, parameter or buffer, so that the optimizer's stays what it was."""
    for tensors in (token_pruner._parameters, token_pruner._buffers):
        if "thresholds" in tensors:
            tensors["thresholds"] = thresholds


def _summaries(model: nn.Module) -> SummaryTokens:
    return attachment_of(model).token_pruner.pruner.summary_tokens


def _pruner(fit: Fit, model: nn.Module) -> FixedThreshold:
    method = attachment_of(model).token_pruner.pruner
    return FixedThreshold(
        thresholds=fit.thresholds,
        scoring_mode="relative",
        summary_tokens=method.summary_tokens,
        max_seq_length=method.max_seq_length,
        vocabulary_threshold=fit.vocabulary_threshold,
    )


def _strength(model: Any, batch: Batch, schedule: Schedule, target: float) -> float | None:
    """The strength that is predicted to cost ``target``, or None where even 1 costs more."""
    if predicted_flops(model, batch, schedule.profile(1.0)) > target:
        return None
    low, high = 0.0, 1.0
    if predicted_flops(model, batch, schedule.profile(0.0)) <= target:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        if predicted_flops(model, batch, schedule.profile(middle)) > target:
            low = middle
        else:
            high = middle
    return high


def _neighbours(schedule: Schedule, share: float, allowed: tuple[int, ...]) -> list[Schedule]:
    """Schedules with a share of one layer's part moved to the layer before or after it that may drop tokens."""
    found: list[Schedule] = []
    if isinstance(schedule, Drain):
        return found
    for one, two in pairwise(allowed):
        for layer, other in ((one - 1, two - 1), (two - 1, one - 1)):
            weight = schedule.weights[layer]
            if weight > 0.05:
                weights = list(schedule.weights)
                weights[layer] -= share * weight
                weights[other] += share * weight
                found.append(Schedule(" ".join(f"{value:.2f}" for value in weights), tuple(weights)))
    return found


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}


@torch.inference_mode()
def _outputs(model: Any, batch: Batch) -> Tensor:
    """Logits ``[n, labels]`` float32 of the sequences, or of every valid token.

    Numbers that are not logits of classes, a regression's, an answer's start and end, hidden states, are ``[n, 1]``.
    """
    device = attachment_of(model).model.device
    inputs = {name: tensor.to(device) for name, tensor in _inputs(batch).items()}
    output = model(**inputs)
    valid = inputs["attention_mask"].bool()
    logits: Tensor
    if "logits" in output:
        logits = output.logits if output.logits.dim() == 2 else output.logits[valid]
    elif "start_logits" in output:
        logits = torch.stack([output.start_logits, output.end_logits], -1)[valid].reshape(-1, 1)
    else:
        logits = output.last_hidden_state[valid].reshape(-1, 1)
    return logits.float().cpu()


def _distance(dense: Tensor, pruned: Tensor) -> float:
    """KL divergence of classes, else squared error ÷ variance."""
    if dense.shape[1] > 1:
        return float(
            nn.functional.kl_div(pruned.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean")
        )
    return float((pruned - dense).square().mean() / dense.var().clamp(min=1e-12))


def _divergence(fit: Fit) -> float:
    assert fit.divergence is not None
    return fit.divergence


def _default_metric(logits: Tensor, labels: Tensor) -> float:
    """Accuracy, or Pearson's correlation for a single output."""
    if logits.shape[1] > 1:
        return float((logits.argmax(-1) == labels).double().mean())
    return float(torch.corrcoef(torch.stack([logits[:, 0].double(), labels.double()]))[0, 1])


def _standard_error(metric: Metric, dense: Tensor, pruned: Tensor, labels: Tensor, rounds: int = 200) -> float:
    """Of the difference of the metric between two models on the same examples, by the bootstrap."""
    generator = torch.Generator().manual_seed(0)
    drops = []
    for _ in range(rounds):
        rows = torch.randint(len(labels), (len(labels),), generator=generator)
        drops.append(metric(dense[rows], labels[rows]) - metric(pruned[rows], labels[rows]))
    return float(torch.tensor(drops, dtype=torch.float64).std())

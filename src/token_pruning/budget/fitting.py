"""Thresholds for a budget: quantiles of importance on a few hundred examples, layer by layer.

A schedule says in which layers tokens leave; its *strength* how many. Cutting each layer at the quantile that keeps the
wanted fraction, with everything before it already removed, gives thresholds whose cost is known before they are used.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from token_pruning.budget.examples import Batch, model_inputs, part_of
from token_pruning.budget.schedules import Schedule
from token_pruning.checks import number
from token_pruning.errors import ConfigError
from token_pruning.families import Reads, shape_of
from token_pruning.pruners import FixedThreshold, LayerTokens, Pruner
from token_pruning.pruners.budgets import DROP_EVERYTHING
from token_pruning.pruners.summary import SummaryTokens
from token_pruning.runtime.flops import count_flops, relative_flops
from token_pruning.runtime.prune import attachment_of, hugging_face_model, reads_of, record
from token_pruning.runtime.selection import select
from token_pruning.runtime.token_pruner import TokenPruner

CLOSE_ENOUGH = 0.003  # between a budget and what the examples cost
_PASS_TOKENS = 16_000


@dataclass(frozen=True)
class Fit:
    """Thresholds fitted to examples.

    Attributes:
        schedule: where tokens leave.
        strength: which part of them leaves.
        thresholds: one per layer, for scoring mode ``"relative"``, or in a probe's units.
        kept: of the tokens that enter the first layer, the fraction kept after each layer, first tokens left out.
        relative_flops: on the examples they were fitted to.
        relative_flops_held_out: on the others, or None if there were none.
        divergence: how much the outputs change on the held-out examples, see
            :mod:`token_pruning.budget.divergence`; None if not measured.
        divergence_error: its standard error over examples.
        vocabulary_threshold: of the method they were fitted for.
        entering: the fraction of all tokens that it lets into the first layer.
        rule: what decides and what departed tokens count as, in words.
        method: the method they were fitted for, with thresholds of its own.
        outputs: what the model gave on the examples while they were fitted, pruned by them; None if not known.
    """

    schedule: Schedule
    strength: float
    thresholds: tuple[float, ...]
    kept: tuple[float, ...]
    relative_flops: float
    relative_flops_held_out: float | None = None
    divergence: float | None = None
    divergence_error: float | None = None
    vocabulary_threshold: float | None = None
    entering: float = 1.0
    rule: str = "attention received"
    method: Pruner | None = field(default=None, repr=False, compare=False)
    outputs: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def pruner(self) -> FixedThreshold:
        """The method with these thresholds."""
        settings = {} if self.method is None else settings_of(self.method)
        return FixedThreshold(**{**settings, "thresholds": self.thresholds, "scoring_mode": "relative"})


def settings_of(method: Pruner) -> dict[str, Any]:
    """What every method can be set to, by name."""
    return {f.name: getattr(method, f.name) for f in fields(Pruner)}


def fit_to_budget(
    model: Any, batch: Batch, schedule: Schedule, target: float, tolerance: float = CLOSE_ENOUGH
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
    aim, predict = target, _prediction(model, batch)
    best: Fit | None = None
    for _ in range(4):
        strength = _strength(predict, schedule, aim)
        if strength is None:
            if best is None and predict(schedule.profile(1.0)) > target + tolerance:
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
    method = attachment_of(model).token_pruner.pruner
    every = (*profile, *([1.0] * (layers - len(profile))))
    cutting = [layer for layer, (before, after) in enumerate(pairwise((1.0, *every)), start=1) if after < before]
    cut = _Cut(**{**settings_of(method), "scoring_mode": "relative", "prune_layers": cutting, "profile": every})
    with using(model, cut), record(model) as trace:
        outputs = outputs_of(model, batch)
    return Fit(
        schedule,
        strength,
        tuple(cut.found.get(layer, nothing) for layer, nothing in enumerate(dropping_nothing(method, layers), start=1)),
        tuple(profile),
        count_flops(model, trace).relative,
        vocabulary_threshold=cut.vocabulary_threshold,
        method=method,
        entering=float(trace.attention_lengths[0].sum() / trace.input_lengths.sum()),
        outputs=outputs,
    )


def dropping_nothing(method: Pruner, layers: int) -> list[float]:
    """A method's thresholds that drop nothing: attention received is never below 0, a probe may say anything."""
    probed = () if method.probes is None else method.probes.layers
    return [-DROP_EVERYTHING if layer in probed else 0.0 for layer in range(1, layers + 1)]


def profile_of(model: Any, batch: Batch) -> Schedule:
    """What the thresholds on a model keep of a batch, as the schedule whose strength 1 is just that."""
    with record(model) as trace:
        outputs_of(model, batch)
    ordinary = (trace.ffn_lengths - trace.summary_lengths - 1).clamp(min=0).sum(1).double()
    everything = (trace.attention_lengths[0] - 1).clamp(min=0).sum().double()
    kept = [1.0, *(ordinary / everything).tolist()[: prunable_layers(model)]]
    return Schedule("learned", tuple(max(0.0, a - b) for a, b in pairwise(kept)))


def predicted_flops(model: Any, batch: Batch, profile: Sequence[float]) -> float:
    """Relative FLOPs of a profile, every sequence keeping the same fraction; arguments as :func:`fit_to_budget`."""
    return _prediction(model, batch)(profile)


def _prediction(model: Any, batch: Batch) -> Callable[[Sequence[float]], float]:
    """:func:`predicted_flops` of many profiles: what enters is the same for all."""
    attachment = attachment_of(model)
    packed = attachment.pack(**{**model_inputs(batch, attachment.model.device), "token_type_ids": None})
    selection = select(packed, attachment.token_pruner.pruner)
    packed = packed if selection is None else selection.tokens
    entering, *_ = attachment.token_pruner.enter(packed)
    shape, lengths = attachment.shape, entering.lengths_tensor.double()
    summaries = {"none": 0, "shared": 1, "segment": 2}[_summaries(model)]
    method, reads = attachment.token_pruner.pruner, attachment.reads
    probed = method.probes.layers if method.probes is not None else ()
    unread = (reads == "first" or method.departed == "survivors") and not summaries
    needed = {*probed, *method.context_cuts(shape.num_layers)}
    joined = [not unread or layer in needed for layer in range(1, shape.num_layers + 1)]

    def predict(profile: Sequence[float]) -> float:
        left = [lengths]
        for layer, kept in enumerate((*profile, *[profile[-1]] * (shape.num_layers - len(profile))), start=1):
            tokens = 1 + kept * (lengths - 1)
            extra = summaries if kept < 1 and layer < shape.num_layers else 0
            left.append(torch.minimum(tokens + extra, lengths))
        cost = relative_flops(
            shape,
            packed.layout.lengths_tensor,
            torch.stack(left),
            first_only=reads == "first",
            dropped_are_joined=joined,
            context=method.context,
        )
        return float(cost)

    return predict


def default_keep_rate(model: Any, batch: Batch, target: float) -> float:
    """The part of all tokens that a budget lets into the first layer: half of what must be saved is saved there.

    Arguments as :func:`fit_to_budget`; the model's pruner must have no vocabulary threshold.
    """
    return entering_rate(0.5, target, highest_flops(model, batch))


def entering_rate(saved: float, target: float, highest: float) -> float:
    """The part of all tokens to let into the first layer, for a part of what a budget must save to be saved there.

    Args:
        saved: the part, 0 to 1.
        target: relative FLOPs.
        highest: from :func:`highest_flops`; what the last layer saves by itself need not be saved before the first.
    """
    return 1 - saved * max(0.0, 1 - target / highest)


def highest_flops(model: Any, batch: Batch) -> float:
    """What it costs when no token leaves: less than 1 where the last layer computes first tokens only."""
    return predicted_flops(model, batch, [1.0] * prunable_layers(model))


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


def prunable_layers(model: nn.Module, reads: Reads | None = None) -> int:
    """Layers after which a token's leaving saves anything: not the last where the head reads first tokens only."""
    layers = shape_of(hugging_face_model(model).base_model.config).num_layers
    return layers - 1 if (reads or reads_of(model)) == "first" and layers > 1 else layers


@contextmanager
def using(model: nn.Module, pruner: Pruner) -> Iterator[None]:
    """A pruned model with another method inside the block, in evaluation mode.

    The model's configuration is left as it is.
    """
    attachment = attachment_of(model)
    before, training = attachment.token_pruner, model.training
    stand_in = TokenPruner(pruner, before.num_layers, attachment.model.device)
    stand_in.attachment = attachment
    model.eval()
    try:
        attachment.exchange(stand_in.eval())
        yield
    finally:
        attachment.exchange(before)
        model.train(training)


@dataclass(frozen=True, kw_only=True)
class _Cut(Pruner, registered=False):
    """Keeps the given fraction of a whole batch's tokens after each layer, and notes the thresholds that do so."""

    prune_mode: ClassVar[str] = "cut"

    profile: tuple[float, ...]
    found: dict[int, float] = field(default_factory=dict)

    def keep(self, tokens: LayerTokens) -> Tensor:
        candidates = torch.ones_like(tokens.scores, dtype=torch.bool)
        candidates[tokens.layout.first_rows] = False
        if tokens.summaries is not None:
            candidates &= ~tokens.summaries
        everything = int((tokens.input_lengths - 1).clamp(min=0).sum())
        kept = round(everything * self.profile[tokens.layer - 1])
        if tokens.protected is not None:
            kept -= int((candidates & tokens.protected).sum())
            candidates &= ~tokens.protected
        scores = tokens.scores[candidates].sort().values
        if kept >= len(scores):
            threshold = dropping_nothing(self, tokens.num_layers)[tokens.layer - 1]
        elif kept <= 0:
            threshold = DROP_EVERYTHING
        else:
            threshold = float((scores[-kept - 1] + scores[-kept]) / 2)
        self.found[tokens.layer] = threshold
        return tokens.scores >= threshold


def _summaries(model: nn.Module) -> SummaryTokens:
    return attachment_of(model).token_pruner.pruner.summary_tokens


def _strength(predict: Callable[[Sequence[float]], float], schedule: Schedule, target: float) -> float | None:
    """The strength that is predicted to cost ``target``, or None where even 1 costs more."""
    if predict(schedule.profile(1.0)) > target:
        return None
    low, high = 0.0, 1.0
    if predict(schedule.profile(0.0)) <= target:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        if predict(schedule.profile(middle)) > target:
            low = middle
        else:
            high = middle
    return high


@torch.inference_mode()
def outputs_of(model: Any, batch: Batch) -> Tensor:
    """What a model gives for each sequence, or for every valid token, float32.

    Returns:
        Logits ``[n, labels]``; pooled vectors ``[n, hidden]`` of a model without a head whose mean or first state is
        read. Other numbers that are not logits of classes, an answer's start and end, hidden states, are ``[n, 1]``.
    """
    inputs = model_inputs(batch, attachment_of(model).model.device)
    output = model(**inputs)
    mask = inputs["attention_mask"]
    valid = mask.bool()
    logits: Tensor
    if "logits" in output:
        logits = output.logits if output.logits.dim() == 2 else output.logits[valid]
    elif "start_logits" in output:
        logits = torch.stack([output.start_logits, output.end_logits], -1)[valid].reshape(-1, 1)
    else:
        states, reads = output.last_hidden_state.float(), reads_of(model)
        if reads == "first":
            logits = states[:, 0]
        elif reads == "mean":
            logits = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            logits = states[valid].reshape(-1, 1)
    return logits.float().cpu()


def outputs_in_parts(model: Any, batch: Batch) -> Tensor:
    """:func:`outputs_of`, for more examples than one pass should take."""
    return torch.cat([outputs_of(model, part) for part in in_parts(batch)])


def cost_of(model: Any, pruner: Pruner, batch: Batch) -> float:
    """Relative FLOPs of a pruned model on a batch, with another method."""
    with using(model, pruner), record(model) as trace:
        outputs_in_parts(model, batch)
    return count_flops(model, trace).relative


def in_parts(batch: Batch) -> Iterator[dict[str, Tensor]]:
    """A batch's examples in their order, as many at a time as one pass should take."""
    lengths = batch["attention_mask"].sum(1).tolist()
    start, tokens = 0, 0
    for end, length in enumerate([*lengths, _PASS_TOKENS], start=1):
        tokens += length
        if tokens > _PASS_TOKENS and end - 1 > start:
            yield part_of(batch, slice(start, end - 1))
            start, tokens = end - 1, length

"""The comparison behind :func:`token_pruning.calibrate`: rules and schedules, fitted to a budget on one part of the
examples, and judged by how little they change the outputs on the other.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from token_pruning.budget.context import can_have_context, fit_context
from token_pruning.budget.divergence import Divergence, Spans, drawn_spans
from token_pruning.budget.examples import Batch
from token_pruning.budget.fitting import (
    CLOSE_ENOUGH,
    Fit,
    cost_of,
    default_keep_rate,
    entering_rate,
    fit_profile,
    fit_to_budget,
    highest_flops,
    outputs_in_parts,
    predicted_flops,
    using,
)
from token_pruning.budget.observation import Observed, observe
from token_pruning.budget.ridge import Ridge
from token_pruning.budget.rules import (
    Rule,
    first_rules,
    further_rules,
    received_rules,
    spread_rules,
    step,
    targets_for,
)
from token_pruning.budget.schedules import Schedule, neighbours
from token_pruning.budget.vocabulary import token_ids
from token_pruning.engine.compiled import native_encoder
from token_pruning.engine.native import NativeEncoder
from token_pruning.errors import ConfigError
from token_pruning.families import Family, Reads, padding_id
from token_pruning.pruners import Correction, FixedThreshold, Unpruned, VocabularyGate
from token_pruning.pruners.fitted import Departed
from token_pruning.ragged import PackedTokens
from token_pruning.runtime.departed import LastStates
from token_pruning.runtime.flops import count_flops, layer_flops
from token_pruning.runtime.prune import attachment_of, hugging_face_model, record
from token_pruning.runtime.token_pruner import TokenPruner

_COMPARABLE = 0.012  # as CLOSE_ENOUGH, while rules are compared
_SCREENING_FLOPS = 1.2e11  # of one dense pass over the examples that most rules are compared on
_FEWEST_TOKENS = 2500  # of such a pass, however large the model is
_FEWEST_GROUPS = 24
_FITTING_TOKENS = 40_000  # more say no better where a threshold must be
_FINALISTS, _RANKING_FINALISTS = 8, 6
_FITTED = 0.7  # of the examples, for probes, maps and tables; thresholds are chosen on the others, as new texts are
_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0)  # of the correction


@dataclass(frozen=True)
class Plan:
    """What may be tried.

    Attributes:
        schedules: of attention received.
        allowed: the layers (1-based, ascending) at which tokens may leave.
        layers: layers after which a token's leaving saves anything.
        only_received: whether nothing else is tried: the caller said what to search.
        gates: whether rules with a vocabulary gate are tried.
        halves: whether half of the examples are held out, not fewer.
        corrections: whether pooled vectors may be corrected.
    """

    schedules: Sequence[Schedule]
    allowed: tuple[int, ...]
    layers: int
    only_received: bool
    gates: bool
    halves: bool
    corrections: bool = True


class _NativePass:
    """The native kernels in place of the loop on PyTorch: the many passes take half the time."""

    def __init__(
        self, encoder: NativeEncoder, family: Family, token_pruner: TokenPruner, tokens: PackedTokens, *, reads: Reads
    ) -> None:
        self._run = partial(encoder.run, tokens, token_pruner, reads=reads)

    def run(self) -> LastStates:
        """See :class:`token_pruning.runtime.loop.PackedLoop`."""
        return self._run()


class Comparison:
    """The examples, what the dense model says of them, and what was fitted to them."""

    def __init__(
        self, model: Any, batch: Batch, divergence: Divergence, plan: Plan, *, seed: int, progress: bool | None
    ) -> None:
        """Divide the examples, a ranking's queries whole, and run the dense model over one part.

        Args:
            model: pruned by thresholds of zero.
            batch: the examples, padded.
            divergence: how outputs are compared.
            plan: what may be tried.
            seed: of the division.
            progress: whether to show a progress bar; None for where standard error is a terminal.
        """
        self.model, self.batch, self.divergence, self.plan, self.seed = model, batch, divergence, plan, seed
        self._shows = sys.stderr.isatty() if progress is None else progress
        attachment = attachment_of(model)
        found = attachment.token_pruner.pruner
        assert isinstance(found, FixedThreshold)
        self.template = found
        if attachment.packed and attachment.model.device.type == "cpu" and attachment.model.dtype == torch.float32:
            family, threads = attachment.family, torch.get_num_threads()
            if (encoder := native_encoder(family, family, "float32", threads)) is not None:
                attachment.loop = partial(_NativePass, encoder)
        # A ranking says less than its passages would one by one.
        halves = plan.halves or plan.only_received or divergence.kind == "ranking"
        if (groups := len(torch.unique(divergence.groups))) < 4:
            raise ConfigError(
                f"all examples are of {groups} queries; a ranking needs at least 4, with several passages"
            )
        self.fitting, self.held_out = _divided(divergence.groups, 0.5 if halves else _FITTED, seed)
        self.dense = self._dense(self.part(self.held_out))
        if divergence.kind == "embedding":
            self.divergence = replace(divergence, spans=self._spans())
        self._observed: Observed | None = None
        self._rules: dict[str, Rule] = {}  # that were searched, by their names
        self._dense_fitting: Tensor | None = None

    def part(self, rows: Tensor) -> dict[str, Tensor]:
        """Some of the examples."""
        return {name: values[rows] for name, values in self.batch.items()}

    # Attention received, by schedules, and perhaps a gate that the caller gave: all on the whole halves.

    def by_attention(self, target: float) -> list[Fit]:
        """Fits to a budget: that of the schedule that likely diverges least, then the others.

        Raises:
            ConfigError: if no schedule reaches it.
        """
        fits = [
            fit
            for threshold in self._vocabulary_thresholds(target)
            for schedule in self.plan.schedules
            if (fit := self._by_attention(schedule, target, threshold, _COMPARABLE))
        ]
        if not fits:
            names = ", ".join(schedule.name for schedule in self.plan.schedules)
            raise ConfigError(f"target_flops is {target:g}; none of the schedules searched ({names}) can reach it")
        best = min(fits, key=likely_divergence)
        for share in (0.5, 0.25):
            threshold = best.vocabulary_threshold
            moved = neighbours(best.schedule, share, self.plan.allowed)
            fits += [fit for schedule in moved if (fit := self._by_attention(schedule, target, threshold, _COMPARABLE))]
            best = min(fits, key=likely_divergence)
        others = sorted((fit for fit in fits if fit is not best), key=likely_divergence)
        return [self._by_attention(best.schedule, target, best.vocabulary_threshold) or best, *others]

    def _vocabulary_thresholds(self, target: float) -> list[float | None]:
        """Those to try."""
        gate = self.template.vocabulary
        if gate is None:
            return [None]
        batch = self.part(self.fitting)
        threshold = gate.keeping(token_ids(batch), default_keep_rate(self.model, batch, target)).threshold
        return [None, threshold] if threshold else [None]

    def _by_attention(
        self, schedule: Schedule, target: float, threshold: float | None, tolerance: float = CLOSE_ENOUGH
    ) -> Fit | None:
        gate = self.template.vocabulary
        method = replace(self.template, vocabulary=None if gate is None or threshold is None else gate.at(threshold))
        fit = self._fit(method, schedule, target, self.fitting, tolerance)
        if fit is None:
            return None
        rule = f"{'the gate given, ' if threshold else ''}attention received {schedule.name}"
        return self._judged(replace(fit, rule=rule, outputs=None), self.held_out, self.dense)

    def quick(self, target: float) -> Fit | None:
        """Some fit to a budget, attention received in an early layer, not judged; None where that cannot reach it."""
        layers = self.plan.layers
        for layer in dict.fromkeys(min(wanted, layers) for wanted in (2, 1)):
            if (fit := self._fit(self.template, step(layer, layers), target, self.held_out, _COMPARABLE)) is not None:
                return fit
        return None

    # Everything: who decides, where, and what departed tokens count as.

    def search(self, target: float) -> list[Fit]:
        """Fits to a budget: that of the rule that likely diverges least, then the others.

        Most rules are compared on some of the examples, the best of them on all.

        Raises:
            ConfigError: if no rule reaches it.
        """
        if self.plan.only_received:
            return self.by_attention(target)
        fits, finalists = self._screened(target)
        found = [
            fit
            for rule in finalists
            if (fit := self._fit_rule(rule, target, self.held_out, self.observed, CLOSE_ENOUGH))
        ]
        found = [self._judged(fit, self.held_out, self.dense) for fit in found]
        found += [fit for each in found if (fit := self._corrected(each)) is not each]
        return [*sorted(found, key=likely_divergence), *fits]

    def refit(self, fit: Fit, target: float) -> Fit | None:
        """What was found for one budget, with thresholds for another; None where that needs none, or cannot be reached.

        Args:
            fit: one of :meth:`search`, without a correction.
            target: relative FLOPs.
        """
        if self.plan.only_received:
            threshold = self._vocabulary_thresholds(target)[-1] if fit.vocabulary_threshold else None
            return self._by_attention(fit.schedule, target, threshold)
        found = self._fit_rule(self._rules[fit.rule], target, self.held_out, self.observed, CLOSE_ENOUGH)
        return None if found is None else self._judged(found, self.held_out, self.dense)

    def cost(self, pruner: FixedThreshold) -> float:
        """Relative FLOPs of a method on the examples that thresholds are fitted to."""
        rows = self.fitting if self.plan.only_received else self.held_out
        return cost_of(self.model, pruner, self.part(self._for_thresholds(rows)))

    @property
    def observed(self) -> Observed:
        """What was fitted to the fitting part."""
        if self._observed is None:
            targets, fitting = targets_for(self._pairs), self.part(self.fitting)
            observed = observe(self.model, fitting, self.cuts, targets, seed=self.seed)
            if can_have_context(self.model):
                observed = replace(observed, context=fit_context(self.model, fitting, self.cuts))
            self._observed = observed
        return self._observed

    @property
    def _pairs(self) -> bool:
        """Whether the examples are a ranking's."""
        return self.divergence.kind == "ranking"

    @property
    def cuts(self) -> tuple[int, ...]:
        """Early layers that get probes and maps."""
        layers = self.plan.layers
        return tuple(sorted({layer for layer in (1, 2, 3, 4, layers // 2) if 0 < layer <= layers}))

    def _screened(self, target: float) -> tuple[list[Fit], list[Rule]]:
        """Rules compared on some examples: their fits by divergence, and the best of the rules."""
        layers, pairs = self.plan.layers, self._pairs
        some = self._some(self.held_out)
        dense = self._dense(self.part(some))
        tried: dict[str, tuple[Rule, Fit]] = {}

        def compare(rules: Iterable[Rule], what: str) -> Rule | None:
            # Even a bar that is not shown starts a thread.
            for rule in tqdm([*rules], desc=what, leave=False) if self._shows else rules:
                if str(rule) in tried or (rule.gate and not self.plan.gates):
                    continue
                fit = self._fit_rule(rule, target, some, self.observed, _COMPARABLE)
                # Protected tokens may cost more than all that the budget leaves.
                if fit is not None and fit.relative_flops <= target + _COMPARABLE:
                    tried[str(rule)] = rule, self._judged(fit, some, dense)
                    self._rules[str(rule)] = rule
            return min(tried.values(), key=lambda pair: likely_divergence(pair[1]), default=(None, None))[0]

        departed = self._departed()
        cuts = self.cuts
        best = compare(first_rules(layers, pairs, departed, can_have_context(self.model)), "who decides")
        if not pairs or best is None:  # short passages leave too little beside a long query
            best = compare(received_rules(self.plan.schedules), "attention received")
        if best is None:
            raise ConfigError(f"target_flops is {target:g}; nothing that was tried can reach it")
        best = compare(further_rules(best, layers, cuts, departed, pairs), "after which layers")
        assert best is not None
        compare(spread_rules(best, layers, cuts, pairs), "after several layers")
        ranked = sorted(tried.values(), key=lambda pair: likely_divergence(pair[1]))
        for rule, _ in ranked[:2]:
            allowed = cuts if rule.probes or rule.departed == "map" else self.plan.allowed
            if rule.gate < 1:
                moved = [replace(rule, schedule=s) for s in neighbours(rule.schedule, 0.5, allowed)]
                compare(moved, "more here, less there")
        ranked = sorted(tried.values(), key=lambda pair: likely_divergence(pair[1]))
        return [fit for _, fit in ranked], [rule for rule, _ in ranked[: _RANKING_FINALISTS if pairs else _FINALISTS]]

    def _departed(self) -> list[Departed]:
        """What is worth trying: means over survivors are nobody's own label."""
        reads, inner = attachment_of(self.model).reads, hugging_face_model(self.model)
        if reads == "first":
            return ["state"]
        return ["map", "state"] if inner is not inner.base_model or reads == "all" else ["survivors", "map"]

    def _some(self, rows: Tensor) -> Tensor:
        """The first of them, about as many tokens as rules are compared on; a ranking's queries whole."""
        shape = attachment_of(self.model).shape
        lengths = self.batch["attention_mask"][rows].sum(1).double()
        mean = lengths.mean()
        cost = float(layer_flops(shape, mean, mean) / mean) * shape.num_layers
        tokens = lengths.cumsum(0) <= max(_FEWEST_TOKENS, _SCREENING_FLOPS / cost)
        groups = self.divergence.groups[rows]
        fewest = torch.unique_consecutive(groups)[: _FEWEST_GROUPS if self._pairs else 32]
        wanted = torch.unique(torch.cat([groups[tokens], fewest]))
        return rows[torch.isin(groups, wanted)]

    def _fit_rule(self, rule: Rule, target: float, rows: Tensor, observed: Observed, tolerance: float) -> Fit | None:
        """A rule's thresholds for a budget, or None where it cannot reach it."""
        method = rule.method(self.template, observed)
        batch = self.part(rows)
        ids = token_ids(batch)
        if rule.gate:
            table = VocabularyGate(observed.tables[rule.target])
            with using(self.model, replace(method, departed="state", maps=None, probes=None)):
                highest = highest_flops(self.model, batch)
                rate = entering_rate(rule.gate, target, highest)
            if rule.gate == 1:
                return self._gate_alone(rule, method, table, ids, batch, target)
            gate = table.keeping(ids, max(0.01, rate))
            method = replace(method, vocabulary=gate if gate.threshold else None)
        fit = self._fit(method, rule.schedule, target, rows, tolerance)
        return None if fit is None else replace(fit, rule=str(rule))

    def _gate_alone(
        self, rule: Rule, method: FixedThreshold, table: VocabularyGate, ids: Tensor, batch: Batch, target: float
    ) -> Fit | None:
        """The gate that lets so many tokens in as the budget has room for."""
        everything = [1.0] * self.plan.layers
        low, high = 0.01, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            with using(self.model, replace(method, vocabulary=table.keeping(ids, middle))):
                too_many = predicted_flops(self.model, batch, everything) > target
            low, high = (low, middle) if too_many else (middle, high)
        gate = table.keeping(ids, low)
        if not gate.threshold:
            return None
        with using(self.model, replace(method, vocabulary=gate)):
            fit = fit_profile(self.model, batch, Schedule("gate", (0.0,) * self.plan.layers), 0.0)
        return replace(fit, rule=str(rule)) if fit.relative_flops <= target + _COMPARABLE else None

    def _fit(
        self, method: FixedThreshold, schedule: Schedule, target: float, rows: Tensor, tolerance: float
    ) -> Fit | None:
        some = self._for_thresholds(rows)
        with using(self.model, method):
            fit = fit_to_budget(self.model, self.part(some), schedule, target, tolerance)
        return fit if fit is None or len(some) == len(rows) else replace(fit, outputs=None)

    def _for_thresholds(self, rows: Tensor) -> Tensor:
        lengths = self.batch["attention_mask"][rows].sum(1).cumsum(0)
        return rows[: max(32, int((lengths <= _FITTING_TOKENS).sum()))]

    def _judged(self, fit: Fit, rows: Tensor, dense: Tensor) -> Fit:
        """With its cost and divergence on examples; where it has outputs, they are of these."""
        outputs, cost = fit.outputs, fit.relative_flops
        if outputs is None:
            with using(self.model, fit.pruner), record(self.model) as trace:
                outputs = outputs_in_parts(self.model, self.part(rows))
            cost = count_flops(self.model, trace).relative
        divergence, error = self.divergence.between(dense, outputs, self.divergence.groups[rows])
        return replace(fit, relative_flops_held_out=cost, divergence=divergence, divergence_error=error, outputs=None)

    def _dense(self, batch: Batch) -> Tensor:
        with using(self.model, Unpruned(max_tokens=self.template.max_tokens, chunks=self.template.chunks)):
            return outputs_in_parts(self.model, batch)

    def _spans(self) -> Spans | None:
        padding = padding_id(hugging_face_model(self.model).config)
        drawn = drawn_spans(self.batch, self.held_out, padding, self.seed)
        return None if drawn is None else Spans(self._dense(drawn[0]), drawn[1])

    def _corrected(self, fit: Fit) -> Fit:
        """With the best correction of the pooled vector, where one helps."""
        if self.divergence.kind != "embedding" or not self.plan.corrections:
            return fit
        if self._dense_fitting is None:
            self._dense_fitting = self._dense(self.part(self.fitting))
        with using(self.model, fit.pruner):
            pruned = outputs_in_parts(self.model, self.part(self.fitting))
        # Fitted to what is missing of the dense vectors, so that little data changes little.
        ridge = Ridge()
        ridge.add(pruned, self._dense_fitting - pruned)
        corrected = [_with_correction(fit, ridge.solve(penalty)) for penalty in _PENALTIES]
        return min([fit, *(self._judged(each, self.held_out, self.dense) for each in corrected)], key=likely_divergence)


def _with_correction(fit: Fit, missing: Tensor) -> Fit:
    """With a correction that adds what is missing, an affine map ``[hidden, hidden + 1]`` of the pooled vector."""
    assert fit.method is not None
    correction = Correction(missing + torch.eye(*missing.shape))
    return replace(fit, method=replace(fit.method, correction=correction), rule=f"{fit.rule}, corrected")


def likely_divergence(fit: Fit) -> float:
    """What fits are compared by: the divergence plus one standard error.

    A rule that ruins one example in thirty often looks harmless on those at hand; the error shows it.
    """
    assert fit.divergence is not None and fit.divergence_error is not None
    return fit.divergence + fit.divergence_error


def _divided(groups: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two parts of the examples in random order, no group in both."""
    numbers = torch.unique(groups)
    generator = torch.Generator("cpu").manual_seed(seed)
    order = numbers[torch.randperm(len(numbers), generator=generator, device="cpu")]
    half = int(len(order) * share)
    if len(order) == len(groups):
        return order[:half], order[half:]
    first, second = (
        torch.cat([(groups == group).nonzero().squeeze(-1) for group in part]) for part in (order[:half], order[half:])
    )
    return first, second

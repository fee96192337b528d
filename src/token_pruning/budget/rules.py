"""What calibration compares: who decides which tokens leave, where, and what these count as afterwards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

import torch

from token_pruning.budget.observation import Observed, Target
from token_pruning.budget.schedules import Schedule, schedules
from token_pruning.pruners import DepartureMaps, FixedThreshold, LinearContext, Probes
from token_pruning.pruners.fitted import Departed, Protected, ReceivedFrom

QUERY: tuple[Protected, ...] = ("first_segment", "separators")  # what never leaves in a ranking's pairs
_SHARES = (0.0, 0.25, 0.5, 0.75)  # of what must be saved, what the vocabulary gate saves


@dataclass(frozen=True)
class Rule:
    """One way to prune to a budget.

    Attributes:
        target: what gate and probes predict.
        gate: the part of what must be saved that the vocabulary gate saves, 0 to 1.
        schedule: where the rest leaves.
        probes: whether probes decide there, or attention received.
        received_from: whose attention that is.
        protect: which tokens never leave.
        departed: what tokens that left count as.
        context: whether they are attended to still.
    """

    target: Target
    gate: float
    schedule: Schedule
    probes: bool
    received_from: ReceivedFrom
    protect: tuple[Protected, ...]
    departed: Departed
    context: bool = False

    def __str__(self) -> str:
        parts = []
        if self.gate:
            parts.append(f"gate of {self.target}" + (f" for {self.gate:.0%}" if self.gate < 1 else ""))
        if self.gate < 1:
            source = f"probe of {self.target}" if self.probes else "attention received"
            if not self.probes and self.received_from != "all":
                source += f" from {self.received_from}"
            parts.append(f"{source} {self.schedule.name}")
        if self.departed != "state":
            parts.append(f"departed: {self.departed}")
        if self.context:
            parts.append("as context")
        if self.protect:
            parts.append(f"{' and '.join(self.protect)} protected")
        return ", ".join(parts)

    def method(self, template: FixedThreshold, observed: Observed) -> FixedThreshold:
        """The method without thresholds, and without a vocabulary gate."""
        layers = [layer for layer, weight in enumerate(self.schedule.weights, start=1) if weight and self.gate < 1]
        probes = maps = None
        if self.probes and layers:
            rows = [observed.probes[self.target, layer] for layer in layers]
            probes = Probes(layers, torch.stack(rows))
        cuts = [*([0] if self.gate else []), *layers]
        context = self._context_of(cuts, observed) if self.context else None
        if self.departed == "map":
            maps = DepartureMaps(cuts, torch.stack([observed.maps[cut] for cut in cuts]))
        return replace(
            template,
            probes=probes,
            maps=maps,
            context=context,
            departed=self.departed,
            protect=self.protect,
            received_from=self.received_from,
        )

    @staticmethod
    def _context_of(cuts: Sequence[int], observed: Observed) -> LinearContext | None:
        """Of the cuts that have any."""
        found = observed.context
        assert found is not None
        rows = {cut: row for row, cut in enumerate(found.layers) if cut in cuts}
        return LinearContext([*rows], found.down[[*rows.values()]], found.up) if rows else None


def targets_for(pairs: bool) -> tuple[Target, ...]:
    """What gates and probes may predict.

    Of a ranking's pairs attention alone. Probes of influence kept a reranker's scores nearer to the dense model's, all
    passages taken together, and yet lost 2.4 and 3.2 MRR at .45 of the FLOPs where those of attention lost 1.1 and 1.3;
    and on texts of other subjects they cost more than was asked for.

    Args:
        pairs: whether the examples are a ranking's pairs.
    """
    every: tuple[Target, ...] = get_args(Target)
    return every[:1] if pairs else every


def first_rules(layers: int, pairs: bool, departed: Sequence[Departed], context: bool = False) -> list[Rule]:
    """The rules tried first: who decides, by tokens' entry or after an early layer.

    Args:
        layers: layers after which a token's leaving saves anything.
        pairs: whether the examples are a ranking's pairs, whose first text is protected then.
        departed: what tokens that left may count as.
        context: whether tokens that left can be attended to still.
    """
    targets = targets_for(pairs)
    protections: tuple[tuple[Protected, ...], ...] = (QUERY,) if pairs else ((), ("separators",))
    early = step(min(2, layers), layers)
    found = []
    for protect, counts in product(protections, departed):
        for target in targets:
            found += [Rule(target, gate, early, True, "all", protect, counts, context) for gate in (1.0, 0.5, 0.0)]
        asking: tuple[ReceivedFrom, ...] = ("all", "first_segment") if pairs else ("all",)
        found += [Rule("attention", 0.0, early, False, source, protect, counts, context) for source in asking]
    return found


def further_rules(
    best: Rule, layers: int, cuts: Sequence[int], departed: Sequence[Departed], pairs: bool
) -> list[Rule]:
    """The best of the first rules with other layers, other shares of the gate, other counts for what left, no context.

    Args:
        best: the rule.
        layers: see :func:`first_rules`.
        cuts: layers (1-based) that have probes and maps.
        departed: see :func:`first_rules`.
        pairs: see :func:`first_rules`.
    """
    steps = [step(cut, layers) for cut in cuts]
    shares = _SHARES[:2] if pairs else _SHARES  # what enters a reranker had better be most of the passage
    found = [
        replace(best, gate=gate, schedule=schedule, departed=counts)
        for gate, schedule, counts in product(shares, steps, departed)
    ]
    if best.context:
        found.append(replace(best, context=False))
    return [rule for rule in found if rule != best]


def spread_rules(best: Rule, layers: int, cuts: Sequence[int], pairs: bool) -> list[Rule]:
    """The best rule so far with what leaves spread over two or three cuts.

    A later cut corrects an earlier one: a reranker at .45 of the FLOPs lost 0.5 MRR with half of the cut after layer 2
    and half after layer 3, 2.5 with all of it after layer 2; at .30, asking the query, 0.1 and 12.0 (400 questions).

    Args:
        best: the rule.
        layers: see :func:`first_rules`.
        cuts: see :func:`further_rules`.
        pairs: see :func:`first_rules`.
    """
    spreads = [even(cuts[start : start + count], layers) for count in (2, 3) for start in range(len(cuts) - count + 1)]
    found = [
        replace(best, target=target, gate=gate, schedule=schedule, probes=True, received_from="all")
        for target, gate, schedule in product(targets_for(pairs), _SHARES[:2], spreads)
    ]
    if pairs:
        found += [
            replace(best, gate=gate, schedule=schedule, probes=False, received_from="first_segment")
            for gate, schedule in product(_SHARES[:2], spreads)
        ]
    return found


def received_rules(searched: Sequence[Schedule]) -> Iterator[Rule]:
    """Attention received by every schedule, as published: what left counts as its state, and nothing is protected."""
    for schedule in searched:
        yield Rule("attention", 0.0, schedule, False, "all", (), "state")


def even(cuts: Sequence[int], layers: int) -> Schedule:
    """As much of what leaves after each of some layers."""
    weights = tuple(1 / len(cuts) if layer in cuts else 0.0 for layer in range(1, layers + 1))
    return Schedule("after " + " and ".join(map(str, cuts)), weights)


def step(layer: int, layers: int) -> Schedule:
    """Everything that leaves does so after one layer."""
    return next(found for found in schedules(layers) if found.name == f"step-{layer}")

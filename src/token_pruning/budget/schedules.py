"""Schedules: in which of a model's layers tokens leave."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from token_pruning.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """Where tokens leave.

    Attributes:
        name: for reports.
        weights: of all tokens that leave, the part that does so after each layer; they add up to 1, or to more where
            tokens run out before the last of these layers. The last layer of a model whose head reads the first token
            only has none.
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


def named_schedule(name: str, layers: int) -> Schedule:
    """One of :func:`schedules` by its name, or by its parts: ``"0.6,0.4"``.

    Args:
        name: a name, or for each layer from the first on the part of what leaves that does so there.
        layers: see :func:`token_pruning.budget.fitting.prunable_layers`.

    Raises:
        ConfigError: if it is neither.
    """
    found = {schedule.name: schedule for schedule in schedules(layers)}
    if name in found:
        return found[name]
    try:
        parts = [float(part) for part in name.split(",")]
    except ValueError:
        parts = []
    if not 0 < len(parts) <= layers or not all(0 <= part < math.inf for part in parts) or sum(parts) <= 0:
        raise ConfigError(
            f"--schedule is {name!r}; for this model it must be one of {', '.join(found)}, or up to {layers} numbers "
            "with commas between them, the parts that leave after each layer"
        )
    total = sum(parts)
    return Schedule(name, tuple(part / total for part in parts) + (0.0,) * (layers - len(parts)))


def neighbours(schedule: Schedule, share: float, allowed: tuple[int, ...]) -> list[Schedule]:
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

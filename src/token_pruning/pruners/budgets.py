"""One checkpoint for several budgets: the thresholds that were fitted to each, and what stands between them."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from token_pruning.checks import number
from token_pruning.errors import ConfigError

DROP_EVERYTHING = 1e6  # a threshold in relative units, where the mean score is 1


@dataclass(frozen=True)
class Budget:
    """Thresholds for a cost.

    Attributes:
        relative_flops: the cost, relative to the dense model on valid tokens; above 0, at most 1.
        thresholds: one per layer, in the units of the method's scoring mode, or of its probes.
        vocabulary_threshold: of the method's gate; 0 lets every token in.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    relative_flops: float
    thresholds: Sequence[float]
    vocabulary_threshold: float = 0.0

    def __post_init__(self) -> None:
        """Check the entry."""
        number("relative_flops", self.relative_flops, above=0, high=1)
        number("vocabulary_threshold", self.vocabulary_threshold, low=0)
        if isinstance(self.thresholds, str) or not isinstance(self.thresholds, Sequence):
            raise ConfigError(f"thresholds is {self.thresholds!r}; it must be a list with one number per layer")
        values = tuple(number(f"thresholds[{i}]", value) for i, value in enumerate(self.thresholds))
        object.__setattr__(self, "thresholds", values)


def checked_budgets(name: str, value: Any) -> tuple[Budget, ...]:
    """A table of budgets, as it is given or as ``config.json`` has it.

    Raises:
        ConfigError: unless it is a list of budgets whose costs rise.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ConfigError(f"{name} is {value!r}; it must be a list of budgets")
    found = tuple(_checked(f"{name}[{i}]", entry) for i, entry in enumerate(value))
    costs = [budget.relative_flops for budget in found]
    if sorted(set(costs)) != costs:
        raise ConfigError(f"{name} has the relative_flops {costs}; they must rise")
    return found


def _checked(name: str, entry: Any) -> Budget:
    if isinstance(entry, Budget):
        return entry
    names = [f.name for f in fields(Budget)]
    if not isinstance(entry, Mapping) or not set(names[:2]) <= set(entry) <= set(names):
        raise ConfigError(
            f"{name} is {entry!r}; it must be an object with {names[0]}, {names[1]} and perhaps {names[2]}"
        )
    try:
        return Budget(**entry)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def as_json(budgets: Sequence[Budget]) -> list[dict[str, Any]]:
    """A table as ``config.json`` has it."""
    return [{**asdict(budget), "thresholds": list(budget.thresholds)} for budget in budgets]


def at_budget(budgets: Sequence[Budget], relative_flops: float) -> Budget:
    """The thresholds for a cost: those of an entry, or between two neighbours linear in the cost.

    A threshold that drops nothing (0, or far below all that a probe says) or everything is no quantile of scores:
    between such a one and another stands the one that keeps more.

    Args:
        budgets: see :func:`checked_budgets`.
        relative_flops: above the table's highest cost the thresholds are those of its last entry.

    Raises:
        ConfigError: for a cost below the table's lowest, or above 1.
    """
    costs = [budget.relative_flops for budget in budgets]
    number("budget", relative_flops, low=costs[0], high=1)
    place = bisect_left(costs, relative_flops)
    if place == len(costs) or costs[place] == relative_flops:
        return budgets[min(place, len(costs) - 1)]
    low, high = budgets[place - 1], budgets[place]
    share = (relative_flops - low.relative_flops) / (high.relative_flops - low.relative_flops)
    thresholds = [_between(one, two, share) for one, two in zip(low.thresholds, high.thresholds, strict=True)]
    return Budget(relative_flops, thresholds, _between(low.vocabulary_threshold, high.vocabulary_threshold, share))


def _between(one: float, two: float, share: float) -> float:
    if any(value == 0 or abs(value) >= DROP_EVERYTHING for value in (one, two)):
        return min(one, two)
    return one + share * (two - one)

"""One rule for several budgets: its thresholds at each, so dense a table that what lies between costs what it says."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil

from token_pruning.budget.comparison import Comparison
from token_pruning.budget.fitting import Fit, check_target, dropping_nothing, highest_flops, using
from token_pruning.errors import ConfigError
from token_pruning.pruners import FixedThreshold
from token_pruning.pruners.budgets import Budget, at_budget

_STEP = 0.1  # between entries of the table, at most
_FINEST = 0.025  # between entries: nearer ones are not put between them
_STRAIGHT = 0.008  # how far from a straight line the cost halfway between two entries may be


def checked_targets(comparison: Comparison, targets: Sequence[float]) -> list[float]:
    """Several budgets, the lowest first.

    Raises:
        ConfigError: for none, the same one twice, or one that is refused by
            :func:`token_pruning.budget.fitting.check_target`.
    """
    if not targets:
        raise ConfigError("target_flops is empty; it must be a budget or a list of budgets")
    batch = comparison.part(comparison.fitting)
    for target in targets:
        check_target(comparison.model, batch, target, comparison.plan.allowed[0])
        if targets.count(target) > 1:
            raise ConfigError(f"target_flops names {target!r} twice")
    return sorted(targets)


def with_budgets(comparison: Comparison, best: Fit, targets: Sequence[float]) -> tuple[FixedThreshold, list[Fit]]:
    """The rule that won at the lowest budget, with a table of budgets from there to where nothing leaves.

    Between the budgets that were asked for others are fitted, at most 0.1 apart, and where a straight line between two
    entries misses the cost halfway, one more.

    Args:
        comparison: which found the rule.
        best: without a correction: one that was fitted to one budget would do harm at another.
        targets: the budgets, the lowest first; that of ``best`` is the first.

    Returns:
        The method, pruning to the lowest budget, and the rule's fits to the budgets asked for, in their order. A budget
        at which the rule drops nothing has none.
    """
    nothing = _dropping_nothing(comparison, best)
    if targets[0] >= nothing.relative_flops:
        return replace(best.pruner, budgets=[replace(nothing, relative_flops=targets[0])]), [best]
    asked = [target for target in targets if target < nothing.relative_flops]
    fits = {targets[0]: best}
    table = {targets[0]: _entry(targets[0], best), nothing.relative_flops: nothing}

    def fit(target: float) -> None:
        found = comparison.refit(best, target)
        if found is not None:
            fits[target], table[target] = found, _entry(target, found)

    for low, high in pairwise([*asked, nothing.relative_flops]):
        parts = ceil((high - low) / _STEP)
        for target in [low + (high - low) * part / parts for part in range(1, parts)]:
            fit(target)
        if high in asked:
            fit(high)
    pending = [*pairwise(sorted(table))]
    while pending:
        low, high = pending.pop()
        middle = (low + high) / 2
        if high - low > _FINEST and abs(_cost(comparison, best, table, middle) - middle) > _STRAIGHT:
            fit(middle)
            if middle in table:
                pending += [(low, middle), (middle, high)]
    pruner = replace(best.pruner, budgets=[table[cost] for cost in sorted(table)])
    return pruner, [fits[target] for target in targets if target in fits]


def _entry(target: float, fit: Fit) -> Budget:
    return Budget(target, fit.thresholds, fit.vocabulary_threshold or 0.0)


def _dropping_nothing(comparison: Comparison, fit: Fit) -> Budget:
    """The table's last entry: what the rule costs where no token leaves."""
    thresholds = dropping_nothing(fit.pruner, len(fit.thresholds))
    whole = replace(fit.pruner, thresholds=thresholds, vocabulary=None)
    with using(comparison.model, whole):
        return Budget(highest_flops(comparison.model, comparison.part(comparison.held_out)), thresholds)


def _cost(comparison: Comparison, fit: Fit, table: dict[float, Budget], relative_flops: float) -> float:
    found = at_budget([table[cost] for cost in sorted(table)], relative_flops)
    gate = None if fit.pruner.vocabulary is None else fit.pruner.vocabulary.at(found.vocabulary_threshold)
    return comparison.cost(replace(fit.pruner, thresholds=found.thresholds, vocabulary=gate))

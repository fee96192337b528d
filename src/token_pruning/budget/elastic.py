"""One rule for several budgets: its thresholds at each, so dense a table that what lies between costs what it says."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import ceil
from typing import Any

from token_pruning.budget.comparison import Comparison
from token_pruning.budget.examples import Batch
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

    Args:
        comparison: which found the rule.
        best: without a correction: one that was fitted to one budget would do harm at another.
        targets: the budgets, the lowest first; that of ``best`` is the first.

    Returns:
        The method, pruning to the lowest budget, and the rule's fits to the budgets asked for, in their order. A budget
        at which the rule drops nothing has none.
    """
    nothing = budget_dropping_nothing(comparison.model, best.pruner, comparison.part(comparison.held_out))
    if targets[0] >= nothing.relative_flops:
        return replace(best.pruner, budgets=[replace(nothing, relative_flops=targets[0])]), [best]
    fits = {targets[0]: best}

    def fit(target: float) -> Budget | None:
        found = best if target == targets[0] else comparison.refit(best, target)
        if found is None:
            return None
        fits[target] = found
        return Budget(target, found.thresholds, found.vocabulary_threshold or 0.0)

    budgets = budget_table(targets, nothing, fit, lambda budget: comparison.cost(best.pruner.at(budget)))
    return replace(best.pruner, budgets=budgets), [fits[target] for target in targets if target in fits]


def budget_table(
    targets: Sequence[float],
    nothing: Budget,
    fit: Callable[[float], Budget | None],
    cost: Callable[[Budget], float],
) -> list[Budget]:
    """Entries for some budgets, and as many others as what stands between them needs to cost what it says.

    Between the budgets that were asked for others are fitted, at most 0.1 apart, and where a straight line between two
    entries misses the cost halfway, one more.

    Args:
        targets: the budgets asked for, the lowest first; it must be below what ``nothing`` costs.
        nothing: the last entry, at which no token leaves.
        fit: the entry for a cost, or None where there is none; the lowest has one.
        cost: what an entry costs.
    """
    asked = [target for target in targets if target < nothing.relative_flops]
    table = {nothing.relative_flops: nothing}

    def add(target: float) -> None:
        if (found := fit(target)) is not None:
            table[target] = found

    add(asked[0])
    for low, high in pairwise([*asked, nothing.relative_flops]):
        parts = ceil((high - low) / _STEP)
        for target in [low + (high - low) * part / parts for part in range(1, parts)]:
            add(target)
        if high in asked:
            add(high)
    pending = [*pairwise(sorted(table))]
    while pending:
        low, high = pending.pop()
        middle = (low + high) / 2
        between = at_budget([table[each] for each in sorted(table)], middle)
        if high - low > _FINEST and abs(cost(between) - middle) > _STRAIGHT:
            add(middle)
            if middle in table:
                pending += [(low, middle), (middle, high)]
    return [table[each] for each in sorted(table)]


def budget_dropping_nothing(model: Any, pruner: FixedThreshold, batch: Batch) -> Budget:
    """The table's last entry: what a method costs where no token leaves.

    Args:
        model: pruned by some method.
        pruner: with thresholds.
        batch: what costs are measured on.
    """
    assert pruner.thresholds is not None
    thresholds = tuple(dropping_nothing(pruner, len(pruner.thresholds)))
    with using(model, replace(pruner, thresholds=thresholds, vocabulary=None, budgets=None)):
        return Budget(min(1.0, highest_flops(model, batch)), thresholds)  # windows' sums can be off by a last bit

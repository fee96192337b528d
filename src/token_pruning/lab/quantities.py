"""What analyses and reports are made of, in NumPy: quantiles, groups, kept fractions."""

from typing import Any

import numpy as np
import numpy.typing as npt

from token_pruning.lab.training.features import length_quantile

Array = npt.NDArray[Any]

PERCENTILES = {"p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95}


def quantile_groups(values: Array, count: int) -> list[Array]:
    """Split examples into quantiles of a value; equal values always stay together.

    Args:
        values: ``[examples]`` numbers, at least one.
        count: how many quantiles.

    Returns:
        Indices in ascending order for each group, smallest values first; at most ``count`` groups, none empty.
    """
    edges = [length_quantile(values, number / count) for number in range(1, count + 1)]
    group = np.searchsorted(edges, values, side="left")
    return [np.flatnonzero(group == number) for number in np.unique(group)]


def kept_fractions(tokens: Array, left: Array) -> Array:
    """The mean over the layers of tokens in the feed-forward ÷ tokens at the input.

    Args:
        tokens: ``[examples]`` int64, at the input.
        left: ``[layers, examples]`` int64, after each layer's pruning.

    Returns:
        ``[examples]`` float64.
    """
    fractions: Array = (left / np.maximum(tokens, 1)).mean(axis=0)
    return fractions


def spread(values: Array) -> dict[str, float | None]:
    """The mean, the median, the quartiles and the 5th and 95th percentiles; None for no values."""
    if not len(values):
        return dict.fromkeys(("mean", *PERCENTILES))
    points = np.percentile(values, list(PERCENTILES.values()))
    return {"mean": float(np.mean(values)), **dict(zip(PERCENTILES, points.tolist(), strict=True))}


def correlation(first: Array, second: Array) -> float | None:
    """Pearson's correlation of two ``[examples]`` arrays; None where one is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def spread_over_lengths(lengths: Array, count: int) -> list[int]:
    """Examples from the shortest to the longest in even steps of rank, ``count`` or all if there are fewer.

    For one it is the one in the middle. The same lengths give the same examples.
    """
    order = np.argsort(lengths, kind="stable").tolist()
    if count == 1:
        return [order[(len(order) - 1) // 2]]
    count = min(count, len(order))
    return [order[step * (len(order) - 1) // max(count - 1, 1)] for step in range(count)]

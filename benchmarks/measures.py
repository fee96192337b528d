"""Scores of rankings and similarities, intervals of what they lose, and lengths to truncate to."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr

SAMPLES = 2000
NDCG_AT = 10


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's correlation × 100."""
    return 100 * float(spearmanr(first, second).statistic)


def ranks(scores: NDArray[np.floating], targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many others score at least as high as each row's target: 0 where it is the first alone.

    Args:
        scores: ``[rows, candidates]``.
        targets: the candidate wanted, ``[rows]``.
    """
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    found: NDArray[np.int64] = (scores >= own).sum(1) - 1
    return found


def ndcg(found: NDArray[np.int64]) -> NDArray[np.float64]:
    """nDCG@10 with one relevant document, at the rank found: ``1 / log2(rank + 2)``, or 0 beyond ten."""
    gains: NDArray[np.float64] = np.where(found < NDCG_AT, 1 / np.log2(found + 2.0), 0.0)
    return gains


def reciprocal_rank(found: NDArray[np.int64]) -> NDArray[np.float64]:
    """``1 / (rank + 1)``."""
    reciprocals: NDArray[np.float64] = 1 / (found + 1.0)
    return reciprocals


def loss_interval(
    score: Callable[[NDArray[np.float64], NDArray[np.int64]], float],
    dense: NDArray[np.float64],
    other: NDArray[np.float64],
    items: NDArray[np.int64],
    *,
    samples: int = SAMPLES,
) -> tuple[float, float]:
    """The 95 % interval of ``score(dense) − score(other)``, by bootstrap over items, the same ones for both.

    Args:
        score: of some items' outcomes.
        dense: an outcome per item.
        other: the same.
        items: those that count.
        samples: how many times to draw them anew, with repetition.
    """
    drawn = np.random.default_rng(0).choice(items, size=(samples, len(items)))
    losses = [score(dense, chosen) - score(other, chosen) for chosen in drawn]
    low, high = np.quantile(losses, [0.025, 0.975])
    return float(low), float(high)


def length_for(target: float, cost: Callable[[int], float], longest: int, *, shortest: int = 3) -> int:
    """The length whose cost is nearest to ``target``; the shorter one of two.

    Args:
        target: what it should cost.
        cost: of truncating to a length; it must not fall as the length grows.
        longest: the greatest length to consider.
        shortest: the smallest.
    """
    low, high = shortest, longest
    while low < high:  # the first length that costs as much, or the longest
        middle = (low + high) // 2
        if cost(middle) < target:
            low = middle + 1
        else:
            high = middle
    below = max(shortest, low - 1)
    return below if target - cost(below) <= cost(low) - target else low


def truncated(lengths: Sequence[int], length: int) -> list[int]:
    """Of texts cut to ``length`` tokens, those added at both ends included."""
    return [min(each, length) for each in lengths]

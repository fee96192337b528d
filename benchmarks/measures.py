"""Scores of rankings, similarities, answers and entities, intervals of what they lose, and lengths to truncate to."""

import re
import string
from collections import Counter
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


# Answers and entities


def plain(text: str) -> list[str]:
    """An answer's words as SQuAD compares them: lower case, without punctuation and articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def answer_scores(answer: str, accepted: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of words, 0 to 1, as SQuAD 2.0 has them: against whichever accepted answer is nearest.

    Args:
        answer: empty for none.
        accepted: none for a question without an answer; those without words do not count.
    """
    words, wanted = plain(answer), [each for text in accepted if (each := plain(text))] or [[]]
    return float(words in wanted), max(_overlap(words, each) for each in wanted)


def _overlap(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    return 2 * (Counter(words) & Counter(wanted)).total() / (len(words) + len(wanted))


def entities(labels: Sequence[str]) -> set[tuple[str, int, int]]:
    """Kinds, first words and ends of what BIO labels name; as in conlleval, an I after another kind begins one too."""
    found, kind, start = set(), "", 0
    for place, label in enumerate([*labels, "O"]):
        begins = label.startswith("B-") or label[2:] != kind
        if begins and kind:
            found.add((kind, start, place))
        if begins:
            kind, start = label[2:], place
    return found


def entity_counts(found: Sequence[str], wanted: Sequence[str]) -> tuple[int, int, int]:
    """Of one sentence's labels: entities that are right, found, and wanted."""
    first, second = entities(found), entities(wanted)
    return len(first & second), len(first), len(second)


def entity_f1(counts: NDArray[np.float64]) -> float:
    """F1 × 100 of sentences' :func:`entity_counts`, ``[sentences, 3]``."""
    right, found, wanted = counts.sum(0)
    return 200 * float(right) / max(1.0, float(found + wanted))

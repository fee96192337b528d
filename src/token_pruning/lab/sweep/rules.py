"""Which trials are worth keeping: the Pareto front, and the rule that stops hopeless ones."""

from collections.abc import Iterable, Sequence

Point = tuple[float, float]
"""A metric (larger is better) and relative FLOPs (smaller is better)."""


def pareto_front(points: Sequence[Point]) -> list[int]:
    """The points that no other one dominates: none is as good and as cheap, and better in one of the two.

    Args:
        points: metric and relative FLOPs of each.

    Returns:
        Their places in ``points``, cheapest first. Of equal points all are there or none.
    """
    front: list[int] = []
    best, cost = float("-inf"), float("-inf")
    for place in sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][0])):
        metric, flops = points[place]
        if metric > best or (metric, flops) == (best, cost):
            front.append(place)
            best, cost = metric, flops
    return front


def hopeless(point: Point, finished: Iterable[Point], margin: float) -> bool:
    """Whether a finished trial costs no more and is better by more than ``margin``.

    Args:
        point: metric and relative FLOPs of a trial so far.
        finished: those of finished trials, of any method.
        margin: in the metric's unit.
    """
    metric, flops = point
    return any(other_flops <= flops and other - metric > margin for other, other_flops in finished)

"""Summary tokens: what a layer drops lives on as one token per segment.

The hidden states of the tokens dropped at a layer become their importance-weighted mean, merged with the segment's
earlier summary by the importance each has gathered. A summary is an ordinary row to all that follows: it attends, is
attended to, counts as a query in others' importance, and goes through the feed-forward; it is never dropped. It takes
the row of the first token that its segment lost, so that nothing else has to know of it.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

SummaryTokens = Literal["none", "shared", "segment"]
SUMMARY_TOKENS: tuple[str, ...] = get_args(SummaryTokens)

_SMALLEST_WEIGHT = 1e-6  # attention received can underflow to 0; a mean of such tokens is their plain mean


@dataclass(frozen=True)
class Summaries:
    """The summary tokens among a layout's rows.

    Attributes:
        present: ``[rows]`` bool, True where a row carries a summary.
        weights: ``[rows]`` float32: the importance a summary has gathered (received attention, whose mean over a
            sequence's tokens is 1); without meaning in other rows. Differentiable.
    """

    present: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Merge:
    """How one layer's dropped rows become summaries.

    Attributes:
        rows: ``[merged]`` int64: rows that are merged, dropped tokens and the summaries there were.
        hosts: ``[summaries]`` int64: rows that carry a summary afterwards.
        slots: ``[merged]`` int64: the place in ``hosts`` that each of ``rows`` goes to.
        shares: ``[merged]`` float32: its share in the mean; they add up to 1 in each summary. Differentiable.
    """

    rows: Tensor
    hosts: Tensor
    slots: Tensor
    shares: Tensor

    def apply(self, states: Tensor) -> Tensor:
        """``[rows, dim]`` with the hosts' rows replaced by their summaries; dropped tokens' rows are left alone."""
        weighted = states[self.rows].float() * self.shares[:, None]
        means = weighted.new_zeros(self.hosts.numel(), states.shape[1]).index_add(0, self.slots, weighted)
        return states.index_copy(0, self.hosts, means.to(states.dtype))


def plan_merge(
    groups: Tensor, dropped: Tensor, summaries: Summaries | None, received: Tensor
) -> tuple[Merge, Summaries]:
    """Decide what is merged into what.

    Args:
        groups: ``[rows]`` int64: which summary each row would go to.
        dropped: ``[rows]`` bool: tokens that leave; none of them a summary.
        summaries: those there are already.
        received: ``[rows]`` float32: attention received.

    Returns:
        The merge, and the summaries among the same rows after it.
    """
    total = groups.numel()
    raw = received.clamp(min=_SMALLEST_WEIGHT)
    taking_part = dropped
    if summaries is not None:
        raw = torch.where(summaries.present, summaries.weights, raw)
        taking_part = dropped | summaries.present
    rows = taking_part.nonzero().squeeze(-1)
    present, slots = torch.unique(groups[rows], return_inverse=True)
    # A summary stays in its row; a new one takes the first row that its group lost.
    order = rows if summaries is None else torch.where(summaries.present[rows], rows - total, rows)
    first = torch.full_like(present, total).scatter_reduce(0, slots, order, "amin")
    hosts = torch.where(first < 0, first + total, first)
    gathered = raw.new_zeros(hosts.numel()).index_add(0, slots, raw[rows])
    after = Summaries(
        torch.zeros_like(dropped).index_fill(0, hosts, True),
        raw.new_zeros(total).index_copy(0, hosts, gathered),
    )
    return Merge(rows, hosts, slots, raw[rows] / gathered[slots]), after

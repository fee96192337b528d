"""Importance scores from attention probabilities (Learned Token Pruning, arXiv 2107.00910, equation 2).

Pure tensors: nothing here knows a model. With ``A_h[j, i]`` the attention probability from query ``j`` to key ``i`` of
head ``h`` (before dropout), the attention a token receives is ``r_i = (1/H) Σ_h Σ_j A_h[j, i]``, ``j`` over the
surviving tokens. Its mean over a sequence's tokens is 1. The importance score is ``s_i = r_i / N``.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from token_pruning.ragged import Layout

ScoringMode = Literal["mean", "mean_norm"]
SCORING_MODES: tuple[str, ...] = get_args(ScoringMode)


def received_attention(probabilities: Tensor, queries: Tensor | None = None) -> Tensor:
    """Attention each key receives, averaged over heads and summed over queries.

    Args:
        probabilities: attention probabilities before dropout, ``[batch, heads, queries, keys]``, floating point.
        queries: ``[batch, queries]`` bool, True where the query is a surviving token; None when all are.

    Returns:
        ``[batch, keys]`` float32.
    """
    # Autocast would run the weighted sum in half precision; decisions are taken in float32.
    with torch.autocast(probabilities.device.type, enabled=False):
        probabilities = probabilities.float()
        if queries is None:
            return probabilities.mean(1).sum(1)
        weights = queries.to(torch.float32)[:, None, None, :]
        return (weights @ probabilities).squeeze(2).mean(1)


def normalizer(layout: Layout, scoring_mode: ScoringMode, max_seq_length: int) -> Tensor:
    """The ``N`` that divides received attention, per sequence.

    Args:
        layout: the tokens that entered the layer.
        scoring_mode: ``"mean"``: ``N = max_seq_length`` whatever the batch was padded to; ``"mean_norm"``: the number
            of tokens of that sequence that entered the layer.
        max_seq_length: ``N`` in ``"mean"`` mode, in tokens.

    Returns:
        ``[batch]`` float32.
    """
    if scoring_mode == "mean":
        return torch.full((layout.batch_size,), float(max_seq_length), device=layout.indices.device)
    return layout.lengths_tensor.to(torch.float32)

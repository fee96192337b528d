"""The attention that tokens receive (Learned Token Pruning, arXiv 2107.00910, equation 2)."""

import torch
from torch import Tensor


def received_attention(probabilities: Tensor, queries: Tensor | None = None) -> Tensor:
    """Attention each key receives, averaged over heads and summed over queries.

    Args:
        probabilities: attention probabilities before dropout, ``[batch, heads, queries, keys]``, floating point.
        queries: ``[batch, queries]`` bool, True where the query is a surviving token, or floating point, how much its
            attention counts; None when all are.

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

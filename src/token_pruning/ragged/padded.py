"""The padded reference: one softmax over the whole batch, with everything that is gone masked out.

It is what the packed path is held against, and the only execution that returns attention probabilities.
"""

import torch
from torch import Tensor

from token_pruning.ragged.logits import NO_TERMS, LogitTerms
from token_pruning.ragged.received import received_attention


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alive: Tensor,
    scaling: float,
    dropout: float = 0.0,
    *,
    paid: Tensor | None = None,
    terms: LogitTerms = NO_TERMS,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention over a padded batch.

    Args:
        query: ``[batch, heads, width, head_dim]``; ``key`` and ``value`` alike.
        key: see ``query``.
        value: see ``query``.
        alive: ``[batch, width]`` bool: the surviving tokens. Others are neither attended to nor counted as queries.
        scaling: factor on ``query · key``.
        dropout: probability of zeroing an attention probability, after the importance was taken.
        paid: ``[batch, width]`` float32: how much the attention that a token pays counts in what others receive; 1 for
            all that survive unless given.
        terms: what is added to the logits.
        positions: ``[batch, width]`` integers; needed by ``terms`` alone.

    Returns:
        context ``[batch, heads, width, head_dim]``, probabilities ``[batch, heads, width, width]`` in the value's
        dtype, received attention ``[batch, width]`` float32.
    """
    logits = (query @ key.transpose(-1, -2)).float() * scaling
    if terms and positions is not None:
        logits = logits + terms.of(query * scaling, key, positions, positions)
    # The lowest finite number, not -inf: a sequence without any valid token must not become NaN.
    logits = logits.masked_fill(~alive[:, None, None, :], torch.finfo(torch.float32).min)
    probabilities = logits.softmax(-1)
    received = received_attention(probabilities, alive if paid is None else paid)
    probabilities = probabilities.to(value.dtype)
    dropped = torch.nn.functional.dropout(probabilities, dropout, training=dropout > 0)
    return dropped @ value, probabilities, received

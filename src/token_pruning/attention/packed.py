"""Attention over packed sequences in plain PyTorch.

Sequences of similar length are laid side by side in one small padded block, so that a batch costs a few matrix products
instead of one per sequence; padding inside a block is masked and never leaves it. The projections and the feed-forward,
nearly all the arithmetic, never see padding at all.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from token_pruning.importance import received_attention
from token_pruning.ragged import Layout

_BLOCK_STEP = 64  # sequences whose lengths round up to the same multiple share a block


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float,
    dropout: float = 0.0,
    *,
    needs_importance: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention within each sequence.

    Args:
        query: ``[rows, heads, head_dim]`` with at least ``layout.total`` rows; further rows are filler and give zeros.
        key: see ``query``.
        value: see ``query``.
        layout: the tokens present.
        scaling: factor on ``query · key``.
        dropout: probability of zeroing an attention probability, after the importance was taken.
        needs_importance: False where nothing will be pruned: then no probabilities have to be kept.

    Returns:
        context ``[rows, heads, head_dim]`` and received attention ``[layout.total]`` float32 (None if not needed).
    """
    blocks = _blocks(layout, round_to=1 if query.dtype == torch.float32 else 8)
    if len(blocks) == 1 and blocks[0][2] is None:  # equal lengths: a view, nothing to gather
        batch, width = blocks[0][0], blocks[0][1]
        shape = (batch, width, *query.shape[1:])
        q, k, v = (x[: layout.total].view(shape) for x in (query, key, value))
        context, received = _block_attention(q, k, v, None, scaling, dropout, needs_importance)
        return _fill(context.flatten(0, 1), query.shape[0]), None if received is None else received.flatten()

    contexts: list[Tensor] = []
    importances: list[Tensor] = []
    places: list[Tensor] = []
    for _, _, rows, present in blocks:
        assert rows is not None and present is not None
        q, k, v = (x[rows] for x in (query, key, value))
        context, received = _block_attention(q, k, v, present, scaling, dropout, needs_importance)
        contexts.append(context[present])
        places.append(rows[present])
        if received is not None:
            importances.append(received[present])
    context = torch.cat(contexts)
    importance = torch.cat(importances) if needs_importance else None
    if len(blocks) > 1:  # blocks are ordered by length; a single block is already in packed order
        order = torch.cat(places).argsort()
        context = context[order]
        importance = None if importance is None else importance[order]
    return _fill(context, query.shape[0]), importance


def _fill(context: Tensor, rows: int) -> Tensor:
    return pad(context, (0, 0, 0, 0, 0, rows - context.shape[0])) if rows > context.shape[0] else context


def _blocks(layout: Layout, round_to: int) -> list[tuple[int, int, Tensor | None, Tensor | None]]:
    """Sequences grouped by length: ``(sequences, width, rows [sequences, width], present [sequences, width])``.

    Rows and present are None when every sequence has the same length, so that rows need no gathering. The width is
    rounded up to a multiple of ``round_to`` so that half-precision products meet few different shapes.
    """
    lengths = layout.lengths
    if len(set(lengths)) == 1:
        return [(len(lengths), lengths[0], None, None)]
    groups: dict[int, list[int]] = {}
    for sequence, length in enumerate(lengths):
        if length:
            groups.setdefault(-(-length // _BLOCK_STEP), []).append(sequence)
    starts = layout.cu_seqlens.long()
    blocks: list[tuple[int, int, Tensor | None, Tensor | None]] = []
    for sequences in groups.values():
        width = -(-max(lengths[s] for s in sequences) // round_to) * round_to
        members = torch.tensor(sequences, device=starts.device)
        offsets = torch.arange(width, device=starts.device)
        first = starts[members, None]
        present = offsets < starts[members + 1, None] - first
        blocks.append((len(sequences), width, torch.where(present, first + offsets, first), present))
    return blocks


def _block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    present: Tensor | None,
    scaling: float,
    dropout: float,
    needs_importance: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention in one padded block ``[sequences, width, heads, head_dim]``, returned in the same order of axes."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if not needs_importance and not torch.is_grad_enabled():
        mask = None if present is None else present[:, None, None, :]
        context = scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scaling)
        return context.transpose(1, 2), None
    # Training keeps the probabilities: the plain backward is several times faster on a CPU than fused attention's.
    logits = (q @ k.transpose(-1, -2)).float() * scaling
    if present is not None:
        logits = logits.masked_fill(~present[:, None, None, :], -torch.inf)
    probabilities = logits.softmax(-1)
    received = received_attention(probabilities, present) if needs_importance else None
    probabilities = torch.nn.functional.dropout(probabilities.to(v.dtype), dropout, training=dropout > 0)
    return (probabilities @ v).transpose(1, 2), received

"""Attention over packed sequences: fused on a GPU, elsewhere and for what is not fused in plain PyTorch.

Sequences of similar length are laid side by side in one small padded block, so that a batch costs a few matrix products
instead of one per sequence; padding inside a block is masked and never leaves it. The projections and the feed-forward,
nearly all the arithmetic, never see padding at all.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from token_pruning.ragged.fused import can_fuse, fused_attention, fused_first_token_attention
from token_pruning.ragged.layout import Layout
from token_pruning.ragged.logits import NO_TERMS, LogitTerms
from token_pruning.ragged.received import received_attention

_CACHED_PROBABILITIES = 400_000  # float32 numbers that stay in two cores' second-level caches
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
    differentiable_importance: bool = True,
    paid: Tensor | None = None,
    terms: LogitTerms = NO_TERMS,
    positions: Tensor | None = None,
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
        differentiable_importance: False where the received attention needs no gradient: then fused attention may train.
        paid: ``[layout.total]`` float32: how much the attention that a token pays counts in what others receive; 1 for
            all unless given.
        terms: what is added to the logits.
        positions: ``[rows]`` integers, in the original text; needed by ``terms`` alone.

    Returns:
        context ``[rows, heads, head_dim]`` and received attention ``[layout.total]`` float32 (None if not needed).
    """
    differentiable_importance = needs_importance and differentiable_importance
    paid = paid if needs_importance else None
    if (
        terms.bias is None
        and paid is None
        and can_fuse(
            query, key, value, layout, dropout, differentiable_importance=differentiable_importance, window=terms.window
        )
    ):
        return fused_attention(
            query, key, value, layout, scaling,
            needs_importance=needs_importance, window=terms.window, positions=positions,
        )  # fmt: skip
    rows, total = query.shape[0], layout.total
    query, key, value = query[:total] * scaling, key[:total], value[:total]
    lengths = layout.lengths
    if len(set(lengths)) == 1:  # a view, nothing to gather
        shape = (len(lengths), lengths[0], *query.shape[1:])
        q, k, v = (x.reshape(shape) for x in (query, key, value))
        where = positions[:total].view(shape[:2]) if terms and positions is not None else None
        weights = None if paid is None else paid.view(shape[:2])
        context, received = _block_attention(q, k, v, None, dropout, needs_importance, terms, where, weights)
        return _with_zeros(context.flatten(0, 1), rows), None if received is None else received.flatten()

    blocks, places, slots = _blocks(layout, round_to=1 if query.dtype == torch.float32 else 8)
    sizes = [sequences * width for sequences, width in blocks]
    inputs = (torch.split(_rearrange(x, places, slots), sizes) for x in (query, key, value))
    present = torch.split(places < total, sizes)
    wheres: Any = [None] * len(blocks)
    if terms and positions is not None:
        wheres = torch.split(positions[:total][places.clamp(max=total - 1)], sizes)
    all_weights: Any = [None] * len(blocks)
    if paid is not None:  # padded slots count for nothing
        all_weights = torch.split(pad(paid, (0, 1))[places.clamp(max=total)], sizes)
    contexts: list[Tensor] = []
    importances: list[Tensor] = []
    for (sequences, width), q, k, v, mask, where, weights in zip(
        blocks, *inputs, present, wheres, all_weights, strict=True
    ):
        q, k, v = (x.view(sequences, width, *x.shape[1:]) for x in (q, k, v))
        where, weights = (None if x is None else x.view(sequences, width) for x in (where, weights))
        context, received = _block_attention(
            q, k, v, mask.view(sequences, width), dropout, needs_importance, terms, where, weights
        )
        contexts.append(context.flatten(0, 1))
        if received is not None:
            importances.append(received.flatten())
    context = _rearrange(torch.cat(contexts), slots, places)
    return _with_zeros(context, rows), torch.cat(importances)[slots] if needs_importance else None


def first_token_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scaling: float,
    dropout: float = 0.0,
    *,
    terms: LogitTerms = NO_TERMS,
    positions: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each sequence's first token alone.

    Args:
        query: ``[sequences, heads, head_dim]``: the first tokens' queries, empty sequences left out.
        key: ``[rows, heads, head_dim]`` with at least ``layout.total`` rows; ``value`` alike.
        value: see ``key``.
        layout: the tokens present.
        scaling: factor on ``query · key``.
        dropout: probability of zeroing an attention probability.
        terms: what is added to the logits.
        positions: ``[rows]`` integers, in the original text; needed by ``terms`` alone.

    Returns:
        context ``[sequences, heads, head_dim]``.
    """
    fuses = not terms and can_fuse(query, key, value, layout, dropout, differentiable_importance=False)
    if fuses and 0 not in layout.lengths:
        return fused_first_token_attention(query, key, value, layout, scaling)
    starts = layout.first_rows
    lengths = layout.lengths_tensor
    lengths = lengths[lengths > 0]
    width = max(layout.lengths)
    columns = torch.arange(width, device=starts.device)
    present = columns < lengths[:, None]
    places = torch.where(present, starts[:, None] + columns, starts[:, None] + layout.total).flatten()
    slots = present.flatten().nonzero().squeeze(-1)
    k, v = (
        _rearrange(x[: layout.total], places, slots).view(*present.shape, *x.shape[1:]).transpose(1, 2)
        for x in (key, value)
    )
    q = (query * scaling).unsqueeze(2)
    added = None
    if terms and positions is not None:
        where = positions[places.clamp(max=layout.total - 1)].view(present.shape)
        added = terms.of(q, k, where[:, :1], where)
    if torch.is_grad_enabled():
        return _softmax_attention(q, k, v, present, dropout, False, added)[0].squeeze(2)
    mask = _sdpa_mask(present, added, q.dtype)
    return scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=1.0).squeeze(2)


def _blocks(layout: Layout, round_to: int) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
    """Group sequences by length into padded blocks.

    Args:
        layout: the tokens present.
        round_to: block widths are multiples of this.

    Returns:
        Each block's ``(sequences, width)``; for every slot of all blocks in turn the row it takes, or ``layout.total``
        and more where it is padding; for every row its slot. Both int64.
    """
    groups: dict[int, list[int]] = {}
    for sequence, length in enumerate(layout.lengths):
        if length:
            groups.setdefault(-(-length // _BLOCK_STEP), []).append(sequence)
    starts = layout.cu_seqlens.long()
    blocks: list[tuple[int, int]] = []
    places: list[Tensor] = []
    for sequences in groups.values():
        width = -(-max(layout.lengths[s] for s in sequences) // round_to) * round_to
        members = torch.tensor(sequences, device=starts.device)
        rows = starts[members, None] + torch.arange(width, device=starts.device)
        padding = starts[members, None] + layout.total
        places.append(torch.where(rows < starts[members + 1, None], rows, padding).flatten())
        blocks.append((len(sequences), width))
    all_places = torch.cat(places)
    return blocks, all_places, all_places.argsort(stable=True)[: layout.total]


class _Rearrange(torch.autograd.Function):
    """Rows to slots or slots to rows. No row is taken twice, so the gradient is a look-up too, not a scattered sum.

    Padded slots get their sequence's first row: it is masked, but a NaN there would go through any mask, and must not
    come from another sequence. The gradient they give must be zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(0, index.remainder(x.shape[0]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _take(gradients[0], ctx.inverse), None, None


def _rearrange(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    result: Tensor = _Rearrange.apply(x, index, inverse)  # type: ignore[no-untyped-call]
    return result


def _take(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``; where ``x`` holds the rows and ``index`` the padded slots, padding is a row of zeros."""
    if index.numel() > x.shape[0]:
        x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return x.index_select(0, index.clamp(max=x.shape[0] - 1))


def _with_zeros(context: Tensor, rows: int) -> Tensor:
    return pad(context, (0, 0, 0, 0, 0, rows - context.shape[0])) if rows > context.shape[0] else context


def _block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    present: Tensor | None,
    dropout: float,
    needs_importance: bool,
    terms: LogitTerms,
    positions: Tensor | None,
    paid: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention in one block ``[sequences, width, heads, head_dim]``, the query scaled; returned in the same order."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if needs_importance and not torch.is_grad_enabled() and q.device.type == "cpu":
        return _cached_attention(q, k, v, present, dropout, terms, positions, paid)
    added = None if positions is None else terms.of(q, k, positions, positions)
    if not needs_importance and not torch.is_grad_enabled():
        mask = _sdpa_mask(present, added, q.dtype)
        return scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=1.0).transpose(1, 2), None
    context, received = _softmax_attention(q, k, v, present, dropout, needs_importance, added, paid)
    return context.transpose(1, 2), received


def _cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    present: Tensor | None,
    dropout: float,
    terms: LogitTerms,
    positions: Tensor | None,
    paid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Inference on a CPU: a few sequences at a time, so that their probabilities stay in the cache.

    Half-precision inputs are converted first: three narrow tensors cost less than the square ones there and back.
    """
    sequences, heads, width, _ = q.shape
    step = max(1, _CACHED_PROBABILITIES // max(1, heads * width * width))
    context = v.new_empty(sequences, width, heads, q.shape[-1])
    received = v.new_empty(sequences, width, dtype=torch.float32)
    with torch.autocast("cpu", enabled=False):
        for start in range(0, sequences, step):
            part = slice(start, start + step)
            q32, k32, v32 = (x[part].to(torch.float32, memory_format=torch.contiguous_format) for x in (q, k, v))
            there = None if present is None else present[part]
            where = None if positions is None else positions[part]
            added = None if where is None else terms.of(q32, k32, where, where)
            probabilities = _probabilities(q32, k32, there, added)
            received[part] = received_attention(probabilities, there if paid is None else paid[part])
            context[part] = (_dropout(probabilities, dropout) @ v32).transpose(1, 2)
    return context, received


def _softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    present: Tensor | None,
    dropout: float,
    needs_importance: bool,
    added: Tensor | None,
    paid: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention that keeps its probabilities, ``[sequences, heads, width, head_dim]``.

    Training always takes this path: the plain backward is several times faster on a CPU than fused attention's.
    """
    probabilities = _probabilities(q, k, present, added)
    received = received_attention(probabilities, present if paid is None else paid) if needs_importance else None
    return _dropout(probabilities.to(v.dtype), dropout) @ v, received


def _probabilities(q: Tensor, k: Tensor, present: Tensor | None, added: Tensor | None) -> Tensor:
    """Softmax of ``q · k`` over the keys that are present, ``[sequences, heads, width, width]`` float32."""
    logits = (q @ k.transpose(-1, -2)).float()
    if present is not None:
        logits += _absence(present)
    if added is not None:
        logits = logits + added
    return logits.softmax(-1)


def _absence(present: Tensor) -> Tensor:
    """What masks absent keys: ``[sequences, 1, 1, keys]`` float32, 0 or −∞."""
    return torch.where(present, 0.0, -torch.inf).to(torch.float32)[:, None, None, :]


def _sdpa_mask(present: Tensor | None, added: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What PyTorch's own attention takes: a bool mask, or a floating-point one in the query's dtype."""
    if added is None:
        return None if present is None else present[:, None, None, :]
    total = added if present is None else added + _absence(present)
    return total.to(dtype).clamp(min=torch.finfo(dtype).min)


def _dropout(x: Tensor, probability: float) -> Tensor:
    """Dropout; on a CPU with a quarter of the random numbers, whose making takes a fifth of a training step there.

    Each 64-bit random number serves four elements, so the probability is rounded to a multiple of 2⁻¹⁶.
    """
    if probability == 0:
        return x
    if x.device.type != "cpu":
        return torch.nn.functional.dropout(x, probability)
    limit = round(probability * 2**16)
    if limit == 2**16:
        return x * 0
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= limit - 2**15
    return x * keep.to(x.dtype).mul_(1 / (1 - limit / 2**16))

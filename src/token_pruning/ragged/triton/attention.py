"""Attention over packed sequences, and the attention every key receives, without the square matrix.

Sequence ``s`` owns the rows ``cu_seqlens[s]:cu_seqlens[s + 1]``. One program handles one block of one head of one
sequence; blocks past a sequence's end return at once. No program shares an output with another, so there are no atomics
and results are the same on every run.

A window is a greatest distance between a query's and a key's *original* positions. They rise within a sequence, so that
tokens within the window are never farther apart as rows than as positions: that bounds the blocks to visit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b):
    if _INTERPRETED:  # which would multiply bfloat16's bit patterns
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit(do_not_specialize=["lse_head", "window"])  # they change from call to call
def _forward(
    query, key, value, out, lse, cu_queries, cu_keys, query_positions, key_positions,
    query_row, query_head, key_row, key_head, value_row, value_head, out_row, out_head, lse_head,
    scale, window,
    WINDOWED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(1), tl.program_id(2)
    queries_start = tl.load(cu_queries + sequence).to(tl.int64)
    num_queries = (tl.load(cu_queries + sequence + 1) - queries_start).to(tl.int32)
    first_query = tl.program_id(0) * BLOCK_QUERIES
    if first_query >= num_queries:
        return
    keys_start = tl.load(cu_keys + sequence).to(tl.int64)
    num_keys = (tl.load(cu_keys + sequence + 1) - keys_start).to(tl.int32)

    dims = tl.arange(0, BLOCK_D)
    rows = first_query + tl.arange(0, BLOCK_QUERIES)
    row_present, dim_present = rows < num_queries, dims < HEAD_DIM
    query_mask = row_present[:, None] & dim_present[None, :]
    q = tl.load(
        query + (queries_start + rows)[:, None] * query_row + head * query_head + dims[None, :],
        mask=query_mask, other=0.0,
    )  # fmt: skip
    if WINDOWED:
        row_positions = tl.load(query_positions + queries_start + rows, mask=row_present, other=0)
    low, high = 0, num_keys
    if WINDOWED:
        low = tl.maximum(0, (first_query - window) // BLOCK_KEYS * BLOCK_KEYS)
        high = tl.minimum(num_keys, first_query + BLOCK_QUERIES + window)

    # Logits are kept in units of log 2, since exp2 is what the hardware has.
    largest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    context = tl.zeros([BLOCK_QUERIES, BLOCK_D], tl.float32)
    for start in range(low, high, BLOCK_KEYS):
        columns = start + tl.arange(0, BLOCK_KEYS)
        column_present = columns < num_keys
        k = tl.load(
            key + (keys_start + columns)[None, :] * key_row + head * key_head + dims[:, None],
            mask=column_present[None, :] & dim_present[:, None], other=0.0,
        )  # fmt: skip
        visible = column_present[None, :]
        if WINDOWED:
            column_positions = tl.load(key_positions + keys_start + columns, mask=column_present, other=0)
            visible = visible & (tl.abs(row_positions[:, None] - column_positions[None, :]) <= window)
        logits = _dot(q, k) * (scale * _LOG2E)
        logits = tl.where(visible, logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # a row that has seen no key yet
        weights = tl.exp2(logits - reference[:, None])
        shrink = tl.exp2(largest - reference)
        v = tl.load(
            value + (keys_start + columns)[:, None] * value_row + head * value_head + dims[None, :],
            mask=column_present[:, None] & dim_present[None, :], other=0.0,
        )  # fmt: skip
        total = total * shrink + tl.sum(weights, 1)
        context = context * shrink[:, None] + _dot(weights.to(v.dtype), v)
        largest = new_largest
    total = tl.where(row_present, total, 1.0)
    tl.store(
        out + (queries_start + rows)[:, None] * out_row + head * out_head + dims[None, :],
        (context / total[:, None]).to(out.dtype.element_ty), mask=query_mask,
    )  # fmt: skip
    tl.store(lse + head * lse_head + queries_start + rows, (largest + tl.log2(total)) / _LOG2E, mask=row_present)


@triton.jit(do_not_specialize=["lse_head", "sums_head", "window"])
def _column_sums(
    query, key, lse, sums, cu_seqlens, positions,
    query_row, query_head, key_row, key_head, lse_head, sums_head,
    scale, window,
    WINDOWED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(1), tl.program_id(2)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    first_key = tl.program_id(0) * BLOCK_KEYS
    if first_key >= length:
        return

    dims = tl.arange(0, BLOCK_D)
    dim_present = dims < HEAD_DIM
    rows = first_key + tl.arange(0, BLOCK_KEYS)
    row_present = rows < length
    k = tl.load(
        key + (start + rows)[:, None] * key_row + head * key_head + dims[None, :],
        mask=row_present[:, None] & dim_present[None, :], other=0.0,
    )  # fmt: skip
    if WINDOWED:
        row_positions = tl.load(positions + start + rows, mask=row_present, other=0)
    low, high = 0, length
    if WINDOWED:
        low = tl.maximum(0, (first_key - window) // BLOCK_QUERIES * BLOCK_QUERIES)
        high = tl.minimum(length, first_key + BLOCK_KEYS + window)

    received = tl.zeros([BLOCK_KEYS], tl.float32)
    for first_query in range(low, high, BLOCK_QUERIES):
        columns = first_query + tl.arange(0, BLOCK_QUERIES)
        column_present = columns < length
        q = tl.load(
            query + (start + columns)[None, :] * query_row + head * query_head + dims[:, None],
            mask=column_present[None, :] & dim_present[:, None], other=0.0,
        )  # fmt: skip
        # A query that is not there gives exp2(-inf) = 0.
        normalizer = tl.load(lse + head * lse_head + start + columns, mask=column_present, other=float("inf"))
        logits = _dot(k, q) * (scale * _LOG2E)
        if WINDOWED:
            column_positions = tl.load(positions + start + columns, mask=column_present, other=0)
            near = tl.abs(row_positions[:, None] - column_positions[None, :]) <= window
            logits = tl.where(near, logits, float("-inf"))
        received += tl.sum(tl.exp2(logits - (normalizer * _LOG2E)[None, :]), 1)
    tl.store(sums + head * sums_head + start + rows, received, mask=row_present)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    scaling: float,
    *,
    window: int | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention within each sequence. Not differentiable.

    Args:
        query: ``[queries, heads, head_dim]`` float16, bfloat16 or float32, ``head_dim`` at most 256.
        key: ``[keys, heads, head_dim]``; ``value`` alike.
        value: see ``key``.
        cu_queries: ``[batch + 1]`` int32: where each sequence's queries begin and end.
        cu_keys: ``[batch + 1]`` int32, of keys and values. A sequence with queries has keys.
        max_queries: at least the longest sequence's number of queries.
        scaling: factor on ``query · key``.
        window: greatest distance in positions that a query sees; None for all of its sequence.
        query_positions: ``[queries]`` int32 or int64, rising within a sequence; with ``window``.
        key_positions: ``[keys]``; with ``window``.

    Returns:
        context ``[queries, heads, head_dim]`` in the inputs' dtype, and the logits' natural log-sum-exp ``[heads,
        queries]`` float32.
    """
    query, key, value = (_dense(x) for x in (query, key, value))
    rows, heads, head_dim = query.shape
    out = query.new_empty(rows, heads, head_dim)
    lse = torch.empty(heads, rows, dtype=torch.float32, device=query.device)
    block_queries, block_keys, warps = _blocks(query)
    grid = (triton.cdiv(max_queries, block_queries), heads, cu_queries.numel() - 1)
    if not (max_queries and rows):
        return out, lse
    with torch.cuda.device_of(query):
        _forward[grid](
            query, key, value, out, lse, cu_queries, cu_keys,
            cu_queries if query_positions is None else query_positions,
            cu_keys if key_positions is None else key_positions,
            query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            out.stride(0), out.stride(1), lse.stride(0), scaling, 0 if window is None else window,
            WINDOWED=window is not None, HEAD_DIM=head_dim, BLOCK_D=_padded(head_dim),
            BLOCK_QUERIES=block_queries, BLOCK_KEYS=block_keys, num_warps=warps,
        )  # fmt: skip
    return out, lse


def column_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scaling: float,
    *,
    window: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """The attention that every key receives, per head: ``Σ_j exp(q_j · k_i · scaling − lse_j)``.

    Args:
        query: ``[rows, heads, head_dim]`` as for :func:`attend`; ``key`` alike.
        key: see ``query``.
        lse: natural log-sum-exp of each query's logits, ``[heads, rows]`` float32.
        cu_seqlens: ``[batch + 1]`` int32.
        max_length: at least the longest sequence's length.
        scaling: as it was for ``lse``.
        window: as it was for ``lse``.
        positions: ``[rows]`` int32 or int64, rising within a sequence; with ``window``.

    Returns:
        ``[heads, rows]`` float32, the same on every run.
    """
    query, key = _dense(query), _dense(key)
    rows, heads, head_dim = query.shape
    sums = torch.empty(heads, rows, dtype=torch.float32, device=query.device)
    block_keys, block_queries, warps = _blocks(query)
    grid = (triton.cdiv(max_length, block_keys), heads, cu_seqlens.numel() - 1)
    if not (max_length and rows):
        return sums
    with torch.cuda.device_of(query):
        _column_sums[grid](
            query, key, lse, sums, cu_seqlens, cu_seqlens if positions is None else positions,
            query.stride(0), query.stride(1), key.stride(0), key.stride(1), lse.stride(0), sums.stride(0),
            scaling, 0 if window is None else window,
            WINDOWED=window is not None, HEAD_DIM=head_dim, BLOCK_D=_padded(head_dim),
            BLOCK_QUERIES=block_queries, BLOCK_KEYS=block_keys, num_warps=warps,
        )  # fmt: skip
    return sums


def _dense(x: Tensor) -> Tensor:
    """The kernels step over rows and heads by strides, not over a head's numbers."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(head_dim: int) -> int:
    return int(max(16, triton.next_power_of_2(head_dim)))


def _blocks(x: Tensor) -> tuple[int, int, int]:
    """Rows of the block that stays, rows of those that pass, warps: what fits registers and shared memory."""
    width = _padded(x.shape[-1])
    if x.dtype == torch.float32:
        return (32, 32, 4) if width <= 64 else (32, 16, 8)
    return (128, 64, 4) if width <= 64 else (128, 64, 8) if width == 128 else (64, 32, 8)

"""Dropping rows from packed sequences: two launches, and the one copy to the host that says how many are left."""

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _count(keep, cu_seqlens, counts, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        found += tl.load(keep + rows, mask=rows < end, other=0).to(tl.int32)
    tl.store(counts + sequence, tl.sum(found, 0))


@triton.jit(do_not_specialize=["divisor", "layer"])
def _decide(
    received, thresholds, protected, places, cu_seqlens, keep, counts, scores, divisor, layer, BLOCK: tl.constexpr
):
    sequence = tl.program_id(0)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    threshold = tl.load(thresholds + layer)
    by = tl.where(divisor > 0, divisor, (end - start).to(tl.float32))
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        present = rows < end
        # Rounded as PyTorch rounds: the quotient is compared.
        score = tl.div_rn(tl.load(received + rows, mask=present, other=0.0), tl.zeros([BLOCK], tl.float32) + by)
        stays = (score >= threshold) | (rows == start)
        if protected is not None:
            place = tl.load(places + rows, mask=present, other=0)
            stays = stays | (tl.load(protected + place, mask=present, other=0) != 0)
        stays = (stays & present).to(tl.int32)
        tl.store(keep + rows, stays, mask=present)
        if scores is not None:
            tl.store(scores + rows, score, mask=present)
        found += stays
    tl.store(counts + sequence, tl.sum(found, 0))


@triton.jit(do_not_specialize=["step"])
def _split(keep, places, cu_seqlens, counts, kept_cu_seqlens, found, step, DROPPED: tl.constexpr, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    kept = tl.zeros([BLOCK], tl.int32)
    for first in range(0, sequence, BLOCK):
        others = first + tl.arange(0, BLOCK)
        kept += tl.load(counts + others, mask=others < sequence, other=0)
    kept_before = tl.sum(kept, 0)
    if sequence == 0:
        tl.store(kept_cu_seqlens, 0)
    tl.store(kept_cu_seqlens + sequence + 1, kept_before + tl.load(counts + sequence))
    for first in range(start, end, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        present = rows < end
        stays = tl.load(keep + rows, mask=present, other=0).to(tl.int32)
        # Where a kept row goes is the number of kept rows before it; a dropped one comes after all dropped before it.
        before = kept_before + tl.cumsum(stays, 0) - stays
        tl.store(found + before, rows.to(tl.int64), mask=present & (stays != 0))
        place = tl.load(places + rows, mask=present, other=0)
        tl.store(found + step + before, place, mask=present & (stays != 0))
        if DROPPED:
            tl.store(found + 2 * step + rows - before, rows.to(tl.int64), mask=present & (stays == 0))
        kept_before += tl.sum(stays, 0)


def compact(keep: Tensor, places: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """Split packed rows into those that stay and those that leave.

    Args:
        keep: ``[rows]`` bool.
        places: ``[rows]`` int64, a number carried along by every row.
        cu_seqlens: ``[batch + 1]`` int32.

    Returns:
        The rows kept and the rows dropped (int64, ascending), the kept rows' places (int64), the new ``cu_seqlens``,
        and the number of rows kept in each sequence, on the host: the only synchronisation.
    """
    keep = keep.contiguous()
    counts = torch.empty(cu_seqlens.numel() - 1, dtype=torch.int32, device=keep.device)
    with torch.cuda.device_of(keep):
        if counts.numel():
            _count[(counts.numel(),)](keep, cu_seqlens, counts, BLOCK=_BLOCK)
        kept, dropped, kept_places, kept_cu_seqlens, lengths = _rows(keep, counts, places, cu_seqlens, dropped=True)
    assert dropped is not None
    return kept, dropped, kept_places, kept_cu_seqlens, lengths


def compact_below(
    received: Tensor,
    places: Tensor,
    cu_seqlens: Tensor,
    thresholds: Tensor,
    layer: int,
    *,
    divisor: int | None,
    protected: Tensor | None = None,
    dropped: bool = True,
    scores: bool = True,
) -> tuple[tuple[Tensor, Tensor | None, Tensor, Tensor, list[int]], Tensor | None]:
    """Split packed rows into those whose score reaches a threshold and those that leave.

    Every sequence's first row stays. The decision is bit for bit that of float32 division and comparison.

    Args:
        received: ``[rows]`` float32.
        places: ``[rows]`` int64, a number carried along by every row.
        cu_seqlens: ``[batch + 1]`` int32.
        thresholds: ``[layers]`` float32.
        layer: which of them, 0 for the first.
        divisor: what makes ``received`` a score; None for the sequence's number of rows.
        protected: bool by place; True for one whose row stays. None for none.
        dropped: whether the rows dropped are wanted.
        scores: whether the scores are.

    Returns:
        As :func:`compact`, and the scores ``[rows]`` float32; None for what is not wanted.
    """
    received = received.contiguous()
    keep = torch.empty(received.shape, dtype=torch.bool, device=received.device)
    counts = torch.empty(cu_seqlens.numel() - 1, dtype=torch.int32, device=received.device)
    found = torch.empty(received.shape, dtype=torch.float32, device=received.device) if scores else None
    with torch.cuda.device_of(received):
        if counts.numel():
            _decide[(counts.numel(),)](
                received, thresholds, protected, places, cu_seqlens, keep, counts, found,
                float(divisor or 0), layer, BLOCK=_BLOCK,
            )  # fmt: skip
        return _rows(keep, counts, places, cu_seqlens, dropped=dropped), found


def _rows(
    keep: Tensor, counts: Tensor, places: Tensor, cu_seqlens: Tensor, *, dropped: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, list[int]]:
    """What :func:`compact` returns, from flags ``[rows]`` and their sums ``[batch]`` int32."""
    batch, rows = counts.numel(), keep.numel()
    # Room for all, so that the launch need not wait for the copy to the host; even, to keep 16 bytes' alignment.
    step = rows + rows % 2
    found = torch.empty((2 + dropped) * step, dtype=torch.int64, device=keep.device)
    if batch:
        kept_cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device=keep.device)
        _split[(batch,)](keep, places, cu_seqlens, counts, kept_cu_seqlens, found, step, DROPPED=dropped, BLOCK=_BLOCK)
    else:
        kept_cu_seqlens = torch.zeros(1, dtype=torch.int32, device=keep.device)
    ends: list[int] = kept_cu_seqlens.tolist()
    total = ends[-1]
    gone = found[2 * step : 2 * step + rows - total] if dropped else None
    lengths = [end - start for start, end in pairwise(ends)]
    return found[:total], gone, found[step : step + total], kept_cu_seqlens, lengths

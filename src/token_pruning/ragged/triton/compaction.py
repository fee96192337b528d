"""Dropping rows from packed sequences: two launches around the one copy to the host that says how many are left."""

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


@triton.jit
def _split(keep, places, cu_seqlens, kept_cu_seqlens, kept, dropped, kept_places, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    kept_before = tl.load(kept_cu_seqlens + sequence)
    for first in range(start, end, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        present = rows < end
        stays = tl.load(keep + rows, mask=present, other=0).to(tl.int32)
        # Where a kept row goes is the number of kept rows before it; a dropped one comes after all dropped before it.
        before = kept_before + tl.cumsum(stays, 0) - stays
        tl.store(kept + before, rows.to(tl.int64), mask=present & (stays != 0))
        place = tl.load(places + rows, mask=present, other=0)
        tl.store(kept_places + before, place, mask=present & (stays != 0))
        tl.store(dropped + rows - before, rows.to(tl.int64), mask=present & (stays == 0))
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
    batch, rows = cu_seqlens.numel() - 1, keep.numel()
    flags = keep.contiguous().view(torch.uint8)
    kept_cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=keep.device)
    counts = torch.empty(batch, dtype=torch.int32, device=keep.device)
    if batch:
        with torch.cuda.device_of(keep):
            _count[(batch,)](flags, cu_seqlens, counts, BLOCK=_BLOCK)
        torch.cumsum(counts, 0, dtype=torch.int32, out=kept_cu_seqlens[1:])
    lengths: list[int] = counts.tolist()
    total = sum(lengths)
    kept, dropped, kept_places = (
        torch.empty(size, dtype=torch.int64, device=keep.device) for size in (total, rows - total, total)
    )
    if rows:
        with torch.cuda.device_of(keep):
            _split[(batch,)](flags, places, cu_seqlens, kept_cu_seqlens, kept, dropped, kept_places, BLOCK=_BLOCK)
    return kept, dropped, kept_places, kept_cu_seqlens, lengths

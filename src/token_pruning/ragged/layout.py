"""Packing sequences of different lengths into one run of rows, and dropping rows from it.

A padded batch ``[batch, width, dim]`` with two sequences of three and two valid tokens

    a b c .
    d e . .          width 4; '.' is padding

is packed into the rows ``a b c d e``, with ``indices = [0, 1, 2, 4, 5]`` (the row's place in the flattened padded
batch), ``cu_seqlens = [0, 3, 5]`` (int32; sequence ``s`` is ``rows[cu_seqlens[s]:cu_seqlens[s + 1]]``). Keeping
``a c d`` gives ``indices = [0, 2, 4]`` and ``cu_seqlens = [0, 2, 3]``: a token never forgets where it came from.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor

from token_pruning.ragged import triton

T = TypeVar("T")


class computed_once(Generic[T]):
    """``functools.cached_property`` without its lock.

    Python 3.11 has one for each property of a class, not of an object: threads would wait for each other, and a child
    that is forked while one of them holds it would wait for ever.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function, self.name, self.__doc__ = function, function.__name__, function.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> "computed_once[T]": ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> "T | computed_once[T]":
        if instance is None:
            return self
        value = self.function(instance)
        instance.__dict__[self.name] = value
        return value


@dataclass(frozen=True)
class Layout:
    """Which tokens of a padded batch are present, in packed order.

    Attributes:
        indices: ``[tokens]`` int64, ascending: each row's place in the flattened ``[batch * width]`` grid.
        cu_seqlens: ``[batch + 1]`` int32: where each sequence's rows begin and end.
        width: the padded batch's sequence length.
    """

    indices: Tensor
    cu_seqlens: Tensor
    width: int

    @property
    def batch_size(self) -> int:
        """Number of sequences, empty ones included."""
        return self.cu_seqlens.numel() - 1

    @property
    def total(self) -> int:
        """Number of tokens over all sequences."""
        return self.indices.numel()

    @computed_once
    def lengths(self) -> list[int]:
        """Tokens per sequence, on the host: the one device synchronisation a layout costs."""
        ends: list[int] = self.cu_seqlens.tolist()
        return [end - start for start, end in pairwise(ends)]

    @computed_once
    def lengths_tensor(self) -> Tensor:
        """Tokens per sequence, ``[batch]`` int64."""
        return self.cu_seqlens.diff().long()

    @computed_once
    def sequence_ids(self) -> Tensor:
        """The sequence each row belongs to, ``[tokens]`` int64."""
        return self.indices // self.width

    @computed_once
    def first_rows(self) -> Tensor:
        """Rows that hold the first token of a non-empty sequence, int64."""
        starts = self.cu_seqlens[:-1].long()
        return starts[self.lengths_tensor > 0] if 0 in self.lengths else starts

    def per_sequence(self, first: Tensor) -> Tensor:
        """``[non-empty sequences, dim]`` as ``[batch, dim]``, with zeros for a sequence without tokens."""
        if 0 not in self.lengths:
            return first
        filled = (self.lengths_tensor > 0).nonzero().squeeze(-1)
        return first.new_zeros(self.batch_size, first.shape[1]).index_copy(0, filled, first)

    def ranks(self, scores: Tensor) -> Tensor:
        """Each row's place among its sequence's by score, the highest first, of equals the earlier row.

        Args:
            scores: ``[tokens]`` floating point.

        Returns:
            ``[tokens]`` int64, 0 for the first.
        """
        # Two stable sorts: by score, then by sequence. Rows end up sequence by sequence, best first.
        by_score = scores.argsort(descending=True, stable=True)
        order = by_score[self.sequence_ids[by_score].argsort(stable=True)]
        places = torch.arange(self.total, device=scores.device) - self.cu_seqlens.long()[self.sequence_ids]
        return torch.zeros_like(places).index_put((order,), places)

    def grid(self, values: Tensor) -> Tensor:
        """``[tokens]`` values in their places of the padded batch, ``[batch, width]``; elsewhere zero."""
        flat = values.new_zeros(self.batch_size * self.width)
        return flat.index_copy(0, self.indices, values).view(self.batch_size, self.width)


def layout_from_mask(mask: Tensor) -> Layout:
    """The layout of the valid tokens of a padded batch.

    Args:
        mask: ``[batch, width]`` bool, True for a valid token.
    """
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and mask.numel() and bool(mask.all()):
        return full_layout(*mask.shape)
    lengths = mask.sum(-1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return Layout(mask.flatten().nonzero().squeeze(-1), cu_seqlens, mask.shape[1])


def full_layout(batch_size: int, width: int) -> Layout:
    """That of a batch without padding on a CPU: a small one is computed faster than a mask is gone through."""
    tokens = batch_size * width
    cu_seqlens = torch.arange(0, tokens + 1, width, dtype=torch.int32, device="cpu")
    layout = Layout(torch.arange(tokens, device="cpu"), cu_seqlens, width)
    layout.__dict__["lengths"] = [width] * batch_size
    return layout


def pack(hidden_states: Tensor, layout: Layout) -> Tensor:
    """``[batch, width, …]`` to ``[tokens, …]``, padding left out."""
    flat = hidden_states.flatten(0, 1)
    return flat if len(flat) == layout.total else flat.index_select(0, layout.indices)


def unpack(rows: Tensor, indices: Tensor, batch_size: int, width: int) -> Tensor:
    """``[tokens, dim]`` back to ``[batch, width, dim]``; places no row belongs to are zero."""
    flat = rows.new_zeros(batch_size * width, rows.shape[-1])
    return flat.index_copy(0, indices, rows).view(batch_size, width, rows.shape[-1])


def drop(layout: Layout, keep: Tensor) -> tuple[Layout, Tensor, Tensor]:
    """Remove tokens from a layout.

    Args:
        layout: the tokens present.
        keep: ``[tokens]`` bool.

    Returns:
        The layout of the kept tokens, and the rows (int64, into the old layout) that stay and that leave.
    """
    if triton.usable(keep.device):
        from token_pruning.ragged.triton.compaction import compact

        kept, dropped, places, cu_seqlens, lengths = compact(keep, layout.indices, layout.cu_seqlens)
        return _known(places, cu_seqlens, layout.width, lengths), kept, dropped
    kept = keep.nonzero().squeeze(-1)
    dropped = (~keep).nonzero().squeeze(-1)
    kept_before = torch.nn.functional.pad(keep.long().cumsum(0), (1, 0))
    cu_seqlens = kept_before[layout.cu_seqlens.long()].to(torch.int32)
    return replace(layout, indices=layout.indices[kept], cu_seqlens=cu_seqlens), kept, dropped


def drop_below(
    layout: Layout,
    received: Tensor,
    thresholds: Tensor,
    layer: int,
    *,
    divisor: int | None,
    protected: Tensor | None = None,
    dropped: bool = True,
    scores: bool = True,
) -> tuple[Layout, Tensor, Tensor | None, Tensor | None]:
    """Remove the tokens whose score is below a threshold, in two launches of Triton's kernels; first tokens stay.

    Args:
        layout: the tokens present.
        received: ``[tokens]`` float32.
        thresholds: ``[layers]`` float32.
        layer: which of them, 0 for the first.
        divisor: what makes ``received`` a score; None for the sequence's number of tokens.
        protected: ``[batch * width]`` bool: places whose tokens stay. None for none.
        dropped: whether the rows that leave are wanted.
        scores: whether the scores are.

    Returns:
        The layout of the kept tokens, the rows (int64, into the old layout) that stay and that leave, and the scores
        ``[tokens]`` float32; None for what is not wanted.
    """
    from token_pruning.ragged.triton.compaction import compact_below

    (kept, gone, places, cu_seqlens, lengths), found = compact_below(
        received, layout.indices, layout.cu_seqlens, thresholds, layer,
        divisor=divisor, protected=protected, dropped=dropped, scores=scores,
    )  # fmt: skip
    return _known(places, cu_seqlens, layout.width, lengths), kept, gone, found


def _known(indices: Tensor, cu_seqlens: Tensor, width: int, lengths: list[int]) -> Layout:
    """A layout whose lengths are on the host already: no second synchronisation."""
    layout = Layout(indices, cu_seqlens, width)
    layout.__dict__["lengths"] = lengths
    return layout


def row_bucket(rows: int) -> int:
    """The row count that a half-precision CPU matrix product is padded to: 16 steps per octave.

    oneDNN builds and caches a primitive for every shape it sees (2 to 18 ms each), so half-precision products on a CPU
    must not meet a fresh number of rows every time.
    """
    step = max(1, 1 << max(0, rows.bit_length() - 5))
    return -(-rows // step) * step

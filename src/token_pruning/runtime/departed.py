"""What tokens that left count as, where all last states are read or pooled.

One place for the loop on PyTorch and the native kernels: both say which states there are and where each token left.
Sums run over a text's rows in their order, whatever the batch, so that equal states give equal vectors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from token_pruning.families import Reads
from token_pruning.pruners import Pruner
from token_pruning.pruners.fitted import apply_affine
from token_pruning.ragged import Layout
from token_pruning.runtime.selection import Selection
from token_pruning.runtime.token_pruner import TokenPruner

Affine = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LastStates:
    """What an encoder gives.

    Attributes:
        states: ``[batch, dim]`` of first tokens where only these are read; else ``[tokens, dim]``, each token's last
            state. Of tokens that left they are unfinished, without a norm that comes after the last layer, where
            ``departed`` is ``"map"``; where it is ``"survivors"`` they mean nothing.
        left_at: ``[tokens]`` int64: the layer after whose attention each token left, 0 for one that never entered, the
            number of layers and one for a survivor. None where nobody needs it.
    """

    states: Tensor
    left_at: Tensor | None = None


def needs_left_at(pruner: Pruner, reads: Reads) -> bool:
    """Whether it matters where tokens left."""
    return pruner.correction is not None or (reads != "first" and pruner.departed != "state")


class Departures:
    """Puts together what is read of a pass, from the states there are."""

    def __init__(
        self,
        token_pruner: TokenPruner,
        *,
        maps: Mapping[int, Affine] | None = None,
        correction: Affine | None = None,
    ) -> None:
        """Take a method's settings.

        Args:
            token_pruner: the method and its tensors.
            maps: what applies its maps, by layer; PyTorch unless given.
            correction: what applies its correction.
        """
        self.token_pruner = token_pruner
        self._maps = maps
        self._correction = correction

    @property
    def maps(self) -> Mapping[int, Affine]:
        """By the layer after whose attention a token left."""
        if self._maps is not None:
            return self._maps
        return {at: partial(apply_affine, weights=w) for at, w in self.token_pruner.departure_maps.items()}

    def pooled(
        self,
        last: LastStates,
        layout: Layout,
        *,
        cu_texts: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """The mean of each text's last states, with what its departed tokens count as, corrected.

        Args:
            last: of all tokens.
            layout: those tokens.
            cu_texts: ``[texts + 1]`` where each text's rows begin and end; the layout's sequences unless given.
            counted: ``[tokens]`` bool, the tokens that take part in the mean; all unless given.

        Returns:
            ``[texts, dim]`` float32; zeros for a text without tokens.
        """
        texts = layout.cu_seqlens.long() if cu_texts is None else cu_texts
        departed = self.token_pruner.pruner.departed
        left = None if last.left_at is None else last.left_at <= self.token_pruner.num_layers
        stayed = counted
        if left is not None and departed != "state":
            stayed = ~left if counted is None else ~left & counted
        total, count = _sums(last.states, stayed, texts)
        if departed == "map" and last.left_at is not None:
            for at, affine in self.maps.items():
                gone = last.left_at == at
                some, number = _sums(last.states, gone if counted is None else gone & counted, texts)
                if bool(number.any()):
                    total = total + affine(some / number.clamp(min=1)[:, None]) * number[:, None]
                    count = count + number
        mean = total / count.clamp(min=1)[:, None]
        return self.corrected(mean, left, texts)

    def corrected(self, vectors: Tensor, left: Tensor | None, texts: Tensor) -> Tensor:
        """``[texts, dim]`` with the correction, where a text lost a token; ``left`` is ``[tokens]`` bool."""
        weights = self.token_pruner.correction_weights
        if weights is None or left is None:
            return vectors
        before = pad(left.cumsum(0), (1, 0))
        lost = before[texts[1:]] > before[texts[:-1]]
        affine = self._correction or partial(apply_affine, weights=weights)
        return torch.where(lost[:, None], affine(vectors).to(vectors.dtype), vectors)

    def states(
        self, last: LastStates, layout: Layout, reads: Reads, selection: Selection | None, valid: Layout
    ) -> Tensor:
        """What the base model returns of its last states.

        Args:
            last: what the encoder gave.
            layout: the tokens it was given.
            reads: which last states are used.
            selection: how these were chosen from the valid tokens; None where they are the same.
            valid: the valid tokens.

        Returns:
            ``[batch, dim]`` of first tokens, or ``[valid.total, dim]``; in the states' dtype.
        """
        pruner, layers = self.token_pruner.pruner, self.token_pruner.num_layers
        states, left_at = last.states, last.left_at
        if reads == "first":
            left = None if left_at is None else left_at < layers  # nothing reads what leaves after the last
            return self.corrected(states, left, layout.cu_seqlens.long())
        if reads == "mean":
            return self._for_mean(last, layout, selection, valid)
        if left_at is None or pruner.departed == "state":
            return states
        if pruner.departed == "survivors":
            stays = left_at > layers
            total, count = _sums(states, stays, layout.cu_seqlens.long())
            means = (total / count.clamp(min=1)[:, None]).to(states.dtype)
            return torch.where(stays[:, None], states, means[layout.sequence_ids])
        for at, affine in self.maps.items():
            rows = (left_at == at).nonzero().squeeze(-1)
            states = states.index_copy(0, rows, affine(states[rows]).to(states.dtype))
        return states

    def _for_mean(self, last: LastStates, layout: Layout, selection: Selection | None, valid: Layout) -> Tensor:
        """States of the valid tokens whose mean is the pooled vector: what left shares one row in each text."""
        pruner = self.token_pruner.pruner
        if selection is None and pruner.departed == "state" and pruner.correction is None:
            return last.states
        texts = valid.cu_seqlens.long() if selection is None else selection.cu_texts
        pooled = self.pooled(last, layout, cu_texts=texts)
        own = torch.ones(layout.total, dtype=torch.bool, device=texts.device)
        if last.left_at is not None:
            own = last.left_at > self.token_pruner.num_layers
        rows = torch.arange(valid.total, device=texts.device)
        if selection is not None:
            rows = selection.rows
            own = own & ~selection.in_windows
        own_rows = own.nonzero().squeeze(-1)
        total, count = _sums(last.states, own, texts)
        lengths = valid.lengths_tensor
        rest = (pooled * lengths[:, None] - total) / (lengths - count).clamp(min=1)[:, None]
        # Where all survived the rest is nothing, and no row has it.
        filled = rest.to(last.states.dtype)[valid.sequence_ids]
        return filled.index_copy(0, rows[own_rows], last.states[own_rows])


def _sums(states: Tensor, chosen: Tensor | None, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of each text's chosen rows, ``[texts, dim]`` float32, and how many these are, ``[texts]`` int64."""
    if chosen is None:
        rows, starts = torch.arange(states.shape[0], device=states.device), texts
    else:
        rows, starts = chosen.nonzero().squeeze(-1), pad(chosen.cumsum(0), (1, 0))[texts]
    count = starts.diff()
    if not rows.numel():
        return states.new_zeros(len(count), states.shape[1], dtype=torch.float32), count
    return embedding_bag(rows, states.float(), starts[:-1], mode="sum"), count

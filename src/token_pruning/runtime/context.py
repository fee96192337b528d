"""Tokens that left and are attended to still: by keys and values guessed from where they left.

For PyTorch's loops. The native kernels have the same in C++.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from token_pruning.pruners.fitted import apply_affine
from token_pruning.ragged import Layout
from token_pruning.runtime.token_pruner import TokenPruner


@dataclass(frozen=True)
class ContextTokens:
    """The context tokens of one layer.

    Attributes:
        places: ``[tokens]`` int64, in the padded batch.
        key: ``[tokens, heads, head_dim]``.
        value: likewise.
    """

    places: Tensor
    key: Tensor
    value: Tensor


class Together(NamedTuple):
    """Tokens that are there and context tokens, in their order in the text.

    Attributes:
        layout: of all.
        order: where its rows are among those of the former followed by those of the latter, int64.
        own: which of its rows the former are, int64.
    """

    layout: Layout
    order: Tensor
    own: Tensor


class Context:
    """What tokens that left give to each layer."""

    def __init__(self, token_pruner: TokenPruner) -> None:
        """Take a method's setting, which may be none."""
        self.setting = token_pruner.pruner.context
        self._cuts = token_pruner.pruner.context_cuts(token_pruner.num_layers)
        self._down, self._up = token_pruner.context_down, token_pruner.context_up
        self._codes: dict[int, Tensor] = {}
        self._together: tuple[Layout, int, Together] | None = None

    def takes(self, layer: int) -> bool:
        """Whether tokens that leave after a layer, 0 for those that never enter, become context."""
        return layer in self._cuts

    def of(self, layer: int, departed: Mapping[int, tuple[Tensor, Tensor]], like: Tensor) -> ContextTokens | None:
        """The context tokens in a layer's attention; None where no tokens can have become such.

        Args:
            layer: 1-based.
            departed: per layer, the places of the tokens that left there and their states, ``[tokens, dim]``.
            like: keys ``[rows, heads, head_dim]``, of the dtype that is wanted.
        """
        before = [left for left in departed if left < layer and self.takes(left)]
        if not before or self._up is None:
            return None
        codes = torch.cat([self._code(left, departed[left][1]) for left in before])
        both = apply_affine(codes, self._up[layer - 1]).to(like.dtype)
        heads, size = like.shape[1:]
        own = self._up.shape[1] // (2 * size)
        both = both.view(-1, 2, own, size)
        if own < heads:  # several query heads share a key's
            both = both.repeat_interleave(heads // own, 2)
        key, value = both.unbind(1)
        return ContextTokens(torch.cat([departed[left][0] for left in before]), key, value)

    def beside(self, layout: Layout, others: ContextTokens) -> Together:
        """The tokens that are there and the context tokens; layers between which none leaves have the same."""
        count = others.places.numel()
        if self._together is not None and self._together[0] is layout and self._together[1] == count:
            return self._together[2]
        places = torch.cat([layout.indices, others.places])
        order = places.argsort()
        together = places[order]
        sequences = together // layout.width
        lengths = sequences.new_zeros(layout.batch_size).index_add(0, sequences, torch.ones_like(sequences))
        cu_seqlens = pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        rows = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))
        found = Together(Layout(together, cu_seqlens, layout.width), order, rows[: layout.total])
        self._together = layout, count, found
        return found

    def _code(self, layer: int, states: Tensor) -> Tensor:
        """``[tokens, rank]`` float32; where gradients are wanted computed in each layer, as checkpointing does."""
        assert self.setting is not None and self._down is not None
        if layer in self._codes:
            return self._codes[layer]
        code = apply_affine(states, self._down[self.setting.layers.index(layer)])
        if not torch.is_grad_enabled():
            self._codes[layer] = code
        return code

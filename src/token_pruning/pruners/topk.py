"""Top-k: the same fraction of every sequence stays (the SpAtten-style baseline, arXiv 2012.09852)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_pruning.checks import number, positive_integer
from token_pruning.pruners.base import LayerTokens, Pruner


@dataclass(frozen=True, kw_only=True)
class TopK(Pruner):
    """Keep the most important tokens, fewer in every layer.

    The first three layers (``keep_all_layers``) keep all; then the keep rate falls linearly to ``token_keep_rate`` at
    the last layer, each layer's rate being ``max(0, rate)``. A sequence of ``n`` valid tokens at the input keeps
    ``round(n · rate)`` of them (half to even), never fewer than its first. Among equal scores the earlier token stays.
    A model of no more than ``keep_all_layers`` layers is not pruned.

    Args:
        token_keep_rate: the last layer's keep rate, at most 1; may be negative.
        keep_all_layers: how many layers keep all; the published code has three of twelve.

    Raises:
        ConfigError: for a rate above 1 or one that is not a finite number, or layers that are not a positive integer.
    """

    prune_mode: ClassVar[str] = "topk"
    required: ClassVar[tuple[str, ...]] = ("token_keep_rate",)

    token_keep_rate: float = 0.5
    keep_all_layers: int = 3

    def __post_init__(self) -> None:
        """Check the configuration."""
        super().__post_init__()
        number("token_keep_rate", self.token_keep_rate, high=1)
        positive_integer("keep_all_layers", self.keep_all_layers)

    def keep_rate(self, layer: int, num_layers: int) -> float:
        """The fraction of the input's tokens that stay after ``layer`` (1-based)."""
        if layer <= self.keep_all_layers:
            return 1.0
        # Written so that the last layer's rate is token_keep_rate to the last bit: n · rate may be exactly a half.
        left = (num_layers - layer) / (num_layers - self.keep_all_layers)
        return max(0.0, self.token_keep_rate + (1.0 - self.token_keep_rate) * left)

    def prunes(self, layer: int, num_layers: int) -> bool:
        """After the layers that keep all."""
        return super().prunes(layer, num_layers) and layer > self.keep_all_layers and self.token_keep_rate < 1

    def keep(self, tokens: LayerTokens) -> Tensor:
        """The ``round(n · rate)`` highest scores of each sequence, the first token counted among them."""
        layout = tokens.layout
        rate = self.keep_rate(tokens.layer, tokens.num_layers)
        counts = (tokens.input_lengths.double() * rate).round().long().clamp(min=1)  # round() is half to even
        scores = tokens.scores.index_fill(0, layout.first_rows, torch.inf)
        if tokens.summaries is not None:  # they stay besides
            scores = scores.masked_fill(tokens.summaries, -torch.inf)
        return layout.ranks(scores) < counts[layout.sequence_ids]

    def compared(self, tokens: LayerTokens) -> tuple[Tensor, Tensor]:
        """The scores, and the lowest that stays in each sequence, first tokens not counted; infinite for none."""
        layout = tokens.layout
        staying = self.keep(tokens).index_fill(0, layout.first_rows, False)
        if tokens.summaries is not None:
            staying = staying & ~tokens.summaries
        lowest = tokens.scores.new_full((layout.batch_size,), torch.inf)
        scores = tokens.scores.masked_fill(~staying, torch.inf)
        return tokens.scores, lowest.scatter_reduce(0, layout.sequence_ids, scores, "amin")[layout.sequence_ids]

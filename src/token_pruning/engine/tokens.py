"""What goes into an encoder and comes out of it, whatever runs it."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from token_pruning.ragged.layout import Layout
from token_pruning.runtime.state import LayerRecord, TokenPruner


@dataclass(frozen=True)
class PackedTokens:
    """A batch without padding. No sequence is empty.

    Attributes:
        ids: ``[tokens]`` int32.
        positions: ``[tokens]`` int32, as the position embeddings count them.
        token_types: ``[tokens]`` int32, or None for all zeros.
        layout: where the tokens belong in the padded batch.
    """

    ids: Tensor
    positions: Tensor
    token_types: Tensor | None
    layout: Layout

    def of(self, rows: Tensor, layout: Layout) -> "PackedTokens":
        """The tokens in ``rows``, ``[fewer tokens]`` int64, with a layout of their own."""
        types = None if self.token_types is None else self.token_types[rows]
        return PackedTokens(self.ids[rows], self.positions[rows], types, layout)

    def id_grid(self) -> Tensor:
        """The padded batch again, ``[batch, width]`` int32, with zeros for padding."""
        grid = self.ids.new_zeros(self.layout.batch_size * self.layout.width)
        return grid.index_copy_(0, self.layout.indices, self.ids).view(self.layout.batch_size, self.layout.width)


@dataclass(frozen=True)
class EncoderOutput:
    """What an encoder returns.

    Attributes:
        states: float32 last hidden states: ``[batch, hidden]``, those of first tokens, or ``[tokens, hidden]``.
        layers: a record per layer (1-based) if they were asked for, else empty.
    """

    states: Tensor
    layers: dict[int, LayerRecord]


class Encoder(Protocol):
    """Runs a model's embeddings and layers."""

    def run(self, tokens: PackedTokens, pruner: TokenPruner, *, first_only: bool, recorded: bool) -> EncoderOutput:
        """One forward pass.

        Args:
            tokens: the batch.
            pruner: the method and its thresholds.
            first_only: return the states of first tokens only.
            recorded: return what happened in every layer.
        """

    def head_linear(self, linear: nn.Linear, vocabulary: int) -> nn.Module:
        """What runs a linear layer of the head; ``vocabulary`` is the size of the model's."""

    def explain(self) -> list[str]:
        """What was chosen and why, a line each."""

"""A batch of token ids without padding."""

from dataclasses import dataclass

from torch import Tensor

from token_pruning.ragged.layout import Layout


@dataclass(frozen=True)
class PackedTokens:
    """A batch without padding: what a model's embeddings read.

    Attributes:
        ids: ``[tokens]`` integers, or None where ``embeds`` are given.
        positions: ``[tokens]`` integers, as the position embeddings count them.
        token_types: ``[tokens]`` integers, or None for all zeros.
        layout: where the tokens belong in the padded batch.
        embeds: ``[tokens, dim]`` word embeddings in place of ``ids``, or None.
    """

    ids: Tensor | None
    positions: Tensor
    token_types: Tensor | None
    layout: Layout
    embeds: Tensor | None = None

    def of(self, rows: Tensor, layout: Layout) -> "PackedTokens":
        """The tokens in ``rows``, ``[fewer tokens]`` int64, with a layout of their own."""

        def take(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[rows]

        return PackedTokens(
            take(self.ids), self.positions[rows], take(self.token_types), layout, embeds=take(self.embeds)
        )

    def int32(self) -> "PackedTokens":
        """The same with int32 numbers."""
        types = None if self.token_types is None else self.token_types.int()
        ids = None if self.ids is None else self.ids.int()
        return PackedTokens(ids, self.positions.int(), types, self.layout, embeds=self.embeds)

"""What a layer's attention logits are made of besides ``query · key``: a window, and a bias by position."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# From queries ``[sequences, heads, queries, head_dim]`` (already scaled), keys ``[sequences, heads, keys, head_dim]``
# and their positions ``[sequences, queries]`` and ``[sequences, keys]`` to what is added to the logits, of a shape that
# broadcasts with ``[sequences, heads, queries, keys]``.
LogitBias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_OUTSIDE = -1e30  # finite: a padded query may have no key inside its window, and must not become NaN


@dataclass(frozen=True)
class LogitTerms:
    """What is added to logits, by positions in the original text, whatever has left in between.

    Attributes:
        window: greatest distance between the positions of a query and a key that attend to each other; None for none.
        bias: a function of queries, keys and their positions; None for none.
    """

    window: int | None = None
    bias: LogitBias | None = None

    def __bool__(self) -> bool:
        """Whether anything is added at all."""
        return self.window is not None or self.bias is not None

    def of(self, query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """The sum of both terms, float32; shapes as for ``LogitBias``."""
        total: Tensor | None = None
        if self.bias is not None:
            total = self.bias(query, key, query_positions, key_positions).float()
        if self.window is not None:
            distance = (query_positions[:, None, :, None] - key_positions[:, None, None, :]).abs()
            outside = (distance > self.window).float() * _OUTSIDE
            total = outside if total is None else total + outside
        assert total is not None
        return total


NO_TERMS = LogitTerms()

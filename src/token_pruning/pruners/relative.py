"""Relative thresholds: a token leaves when its importance is small beside its sequence's largest."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from token_pruning.checks import number
from token_pruning.pruners.base import LayerTokens, Pruner


def _relative_scores(tokens: LayerTokens) -> Tensor:
    """``s_i / max_i s_i`` within each sequence, the maximum without summaries, ``[tokens.layout.total]`` float32."""
    sequence = tokens.layout.sequence_ids
    scores = tokens.scores if tokens.summaries is None else tokens.scores.masked_fill(tokens.summaries, 0.0)
    largest = scores.new_zeros(tokens.layout.batch_size).scatter_reduce(0, sequence, scores, "amax")
    return tokens.scores / largest[sequence]


def _with_threshold(values: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    return values, values.new_full(values.shape, threshold)


@dataclass(frozen=True, kw_only=True)
class RelativeThreshold(Pruner):
    """The published code's ``"threshold"`` mode: token ``i`` leaves iff ``s_i / max_i s_i < token_threshold``.

    Args:
        token_threshold: between 0 and 1, the same in every layer.

    Raises:
        ConfigError: for a value outside 0..1.
    """

    prune_mode: ClassVar[str] = "threshold"
    required: ClassVar[tuple[str, ...]] = ("token_threshold",)

    token_threshold: float = 0.1

    def __post_init__(self) -> None:
        """Check the configuration."""
        super().__post_init__()
        number("token_threshold", self.token_threshold, low=0, high=1)

    def keep(self, tokens: LayerTokens) -> Tensor:
        """``s_i / max_i s_i >= token_threshold``."""
        return _relative_scores(tokens) >= self.token_threshold

    def compared(self, tokens: LayerTokens) -> tuple[Tensor, Tensor]:
        """``s_i / max_i s_i`` and ``token_threshold``."""
        return _with_threshold(_relative_scores(tokens), self.token_threshold)

    def prunes(self, layer: int, num_layers: int) -> bool:
        """Not with a threshold of 0."""
        return super().prunes(layer, num_layers) and self.token_threshold > 0


@dataclass(frozen=True, kw_only=True)
class RisingThreshold(Pruner):
    """The published code's ``"rising_threshold"`` mode: relative, rising linearly to ``final_token_threshold``.

    Args:
        final_token_threshold: the last layer's relative threshold, between 0 and 1; layer ``l`` of ``L`` gets
            ``final_token_threshold · l / L``.

    Raises:
        ConfigError: for a value outside 0..1.
    """

    prune_mode: ClassVar[str] = "rising_threshold"
    required: ClassVar[tuple[str, ...]] = ("final_token_threshold",)

    final_token_threshold: float = 0.1

    def __post_init__(self) -> None:
        """Check the configuration."""
        super().__post_init__()
        number("final_token_threshold", self.final_token_threshold, low=0, high=1)

    def keep(self, tokens: LayerTokens) -> Tensor:
        """``s_i / max_i s_i >= final_token_threshold · l / L``."""
        return _relative_scores(tokens) >= self._threshold(tokens)

    def compared(self, tokens: LayerTokens) -> tuple[Tensor, Tensor]:
        """``s_i / max_i s_i`` and ``final_token_threshold · l / L``."""
        return _with_threshold(_relative_scores(tokens), self._threshold(tokens))

    def _threshold(self, tokens: LayerTokens) -> float:
        return self.final_token_threshold * tokens.layer / tokens.num_layers

    def prunes(self, layer: int, num_layers: int) -> bool:
        """Not with a threshold of 0."""
        return super().prunes(layer, num_layers) and self.final_token_threshold > 0

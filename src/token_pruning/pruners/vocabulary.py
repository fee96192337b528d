"""Keeping tokens out of the first layer by what their vocabulary entries are worth."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from token_pruning.checks import number
from token_pruning.errors import ConfigError


@dataclass(frozen=True, eq=False, repr=False)
class VocabularyGate:
    """A score for every vocabulary entry, and the score below which its tokens never enter the first layer.

    Attributes:
        scores: ``[vocabulary]`` floating point; made by :func:`token_pruning.vocabulary_gate`.
        threshold: in the scores' units; 0 lets every token in.

    Raises:
        ConfigError: for scores that are not one-dimensional, or a threshold that is not a number from 0.
    """

    scores: Tensor
    threshold: float = 0.0

    def __post_init__(self) -> None:
        """Check the configuration."""
        if not isinstance(self.scores, Tensor) or self.scores.dim() != 1 or not self.scores.is_floating_point():
            shape = list(self.scores.shape) if isinstance(self.scores, Tensor) else type(self.scores).__name__
            raise ConfigError(f"vocabulary scores are {shape}; they must be one floating-point number per entry")
        number("vocabulary_threshold", self.threshold, low=0)

    def at(self, threshold: float) -> "VocabularyGate":
        """The same scores with another threshold."""
        return replace(self, threshold=threshold)

    def keeping(self, token_ids: Tensor, keep_rate: float) -> "VocabularyGate":
        """The same scores with the threshold that lets a fraction of some tokens in.

        Args:
            token_ids: ``[tokens]`` integers.
            keep_rate: the fraction; above 0, at most 1. Entries are kept or dropped as a whole and special tokens are
                always kept, so that more tokens may be let in, but never fewer.

        Raises:
            ConfigError: for a keep rate outside its range, or no tokens.
        """
        number("keep_rate", keep_rate, above=0, high=1)
        if token_ids.numel() == 0:
            raise ConfigError("no examples were given; a keep rate is a fraction of examples' tokens")
        found = self.scores.cpu()[token_ids.cpu()]
        values, counts = torch.unique(found, return_counts=True)
        allowed = round((1 - keep_rate) * len(found), 6)
        drops = int((counts[values.isfinite()].cumsum(0) <= allowed).sum())
        if drops == 0:
            return self.at(0.0)
        above = values[drops] if drops < len(values) and values[drops].isfinite() else values[drops - 1] + 1
        return self.at(float((values[drops - 1] + above) / 2))  # between two scores, so that rounding decides nothing

    def __repr__(self) -> str:
        return f"VocabularyGate({len(self.scores)} entries, threshold={self.threshold:g})"

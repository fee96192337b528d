"""No pruning: packed execution alone."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from token_pruning.pruners.base import LayerTokens, Pruner


@dataclass(frozen=True, kw_only=True)
class Unpruned(Pruner, registered=False):
    """Keep every token. What is saved is the padding, which packed execution never computes.

    It writes nothing into ``config.json``: a model saved with it is a plain dense model.
    """

    prune_mode: ClassVar[str] = "none"

    def keep(self, tokens: LayerTokens) -> Tensor:
        """All."""
        return torch.ones_like(tokens.scores, dtype=torch.bool)

    def prunes(self, layer: int, num_layers: int) -> bool:
        """Never."""
        return False

    def config(self) -> dict[str, Any]:
        """Nothing."""
        return {}

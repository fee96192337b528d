"""What runs the layers of a compiled model: the native kernels, or the package's own loop on PyTorch."""

import copy
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from token_pruning.families import Family, Reads
from token_pruning.ragged import PackedTokens
from token_pruning.runtime.departed import LastStates
from token_pruning.runtime.loop import PackedLoop
from token_pruning.runtime.token_pruner import TokenPruner


class Encoder(Protocol):
    """Runs a model's embeddings and layers."""

    def run(self, tokens: PackedTokens, token_pruner: TokenPruner, *, reads: Reads) -> LastStates:
        """One forward pass, given to those who record.

        Args:
            tokens: the valid tokens, with ids.
            token_pruner: the method and its thresholds.
            reads: which last states are used.

        Returns:
            Last states, float32; zeros for an empty sequence's first token.
        """

    def head_linear(self, linear: nn.Linear, vocabulary: int) -> nn.Module:
        """What runs a linear layer of the head; ``vocabulary`` is the size of the model's."""

    def explain(self) -> list[str]:
        """What was chosen and why, a line each."""


class TorchEncoder:
    """The loop over a copy of the base model: any family, on any machine."""

    def __init__(self, family: Family, dtype: torch.dtype) -> None:
        """Take over a base model.

        Args:
            family: bound to a copy of the base model that is the encoder's own.
            dtype: float32 or bfloat16.
        """
        family.base.requires_grad_(False).eval()
        for parameter in family.base.parameters():  # buffers, such as rotary frequencies, stay float32
            parameter.data = parameter.data.to("cpu", dtype)
        self._family, self._dtype = family, dtype

    def head_linear(self, linear: nn.Linear, vocabulary: int) -> nn.Module:
        """A head's linear layer, as it is."""
        return copy.deepcopy(linear)

    def run(self, tokens: PackedTokens, token_pruner: TokenPruner, *, reads: Reads) -> LastStates:
        """See :class:`Encoder`."""
        last = PackedLoop(self._family, token_pruner, tokens, reads=reads).run()
        return replace(last, states=last.states.float())

    def explain(self) -> list[str]:
        """Nothing was chosen."""
        return []

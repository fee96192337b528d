"""What runs the layers of a compiled model: the native kernels, or the package's own loop on PyTorch."""

import copy
from typing import Protocol

import torch
from torch import Tensor, nn

from token_pruning.families import Family
from token_pruning.ragged import PackedTokens
from token_pruning.runtime.loop import PackedLoop
from token_pruning.runtime.token_pruner import TokenPruner


class Encoder(Protocol):
    """Runs a model's embeddings and layers."""

    def run(self, tokens: PackedTokens, token_pruner: TokenPruner, *, first_only: bool) -> Tensor:
        """One forward pass, given to those who record.

        Args:
            tokens: the valid tokens, with ids.
            token_pruner: the method and its thresholds.
            first_only: whether the states of first tokens alone are wanted.

        Returns:
            Last states, float32: ``[batch, hidden]`` of first tokens (zeros for an empty sequence), or
            ``[tokens, hidden]``.
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

    def run(self, tokens: PackedTokens, token_pruner: TokenPruner, *, first_only: bool) -> Tensor:
        """See :class:`Encoder`."""
        return PackedLoop(self._family, token_pruner, tokens, first_only=first_only).run().float()

    def explain(self) -> list[str]:
        """Nothing was chosen."""
        return []

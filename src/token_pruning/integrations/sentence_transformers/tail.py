"""What comes after an encoder: pooling and the modules behind it, such that a text's result is its own.

A product of matrices may round otherwise in another batch, and so may PyTorch's activations, whose vector and scalar
code differ. Normalisation does not: each row is one reduction.
"""

import copy
from typing import Any

import torch
from sentence_transformers.base.modules import Dense, Normalize
from torch import Tensor, nn

from token_pruning.engine.compiled import Engine, Pooled
from token_pruning.integrations.sentence_transformers.modules import pooling_modes, pooling_of


class Tail:
    """A copy of the modules after the Transformer."""

    def __init__(self, model: Any, engine: Engine) -> None:
        self.pooling = copy.deepcopy(pooling_of(model))
        self.reads = engine.reads
        modes = () if self.pooling is None else pooling_modes(self.pooling)
        self.needs_states = self.reads == "all" or (self.reads == "mean" and "cls" in modes)
        self.modules = [_independent(module, engine) for module in list(model)[1 if self.pooling is None else 2 :]]

    def vectors(self, pooled: Pooled, cu_seqlens: Tensor, features: dict[str, Any]) -> dict[str, Any]:
        """All features of the texts.

        Args:
            pooled: of the engine, with states where :attr:`needs_states`.
            cu_seqlens: ``[texts + 1]`` where each begins and ends.
            features: of the tokenisation.

        Returns:
            ``sentence_embedding`` ``[texts, dim]``, and what else the modules make.
        """
        lengths = cu_seqlens.diff()
        if self.reads == "all":
            assert pooled.states is not None
            vectors = torch.cat(
                [self._pool(states, features) for states in torch.split(pooled.states, lengths.tolist())]
            )
        else:
            parts = [self._part(mode, pooled, cu_seqlens) for mode in pooling_modes(self.pooling)]
            vectors = torch.cat(parts, dim=-1)
        return self({**features, "sentence_embedding": vectors})

    def _part(self, mode: str, pooled: Pooled, cu_seqlens: Tensor) -> Tensor:
        if mode == "mean_sqrt_len_tokens":
            return pooled.vectors * cu_seqlens.diff()[:, None].sqrt()
        if mode == "cls" and pooled.states is not None and self.reads == "mean":
            return pooled.states[cu_seqlens[:-1]]
        return pooled.vectors

    def __call__(self, features: dict[str, Any]) -> dict[str, Any]:
        """The modules after pooling."""
        for module in self.modules:
            features = module(features)
        return features

    def _pool(self, states: Tensor, features: dict[str, Any]) -> Tensor:
        mask = torch.ones(1, states.shape[0], dtype=torch.int64)
        given = {**features, "token_embeddings": states[None], "attention_mask": mask}
        vector: Tensor = self.pooling(given)["sentence_embedding"]
        return vector


class _RowByRow(nn.Module):
    """An activation that sees one row at a time."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat([self.activation(row) for row in torch.split(rows, 1)])


class _OneByOne(nn.Module):
    """A module that sees one text at a time."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        count = len(features["sentence_embedding"])
        texts = [self.module(_only(features, text, count)) for text in range(count)]
        return {
            name: torch.cat([text[name] for text in texts]) if isinstance(value, Tensor) and value.ndim else value
            for name, value in (texts[0] if texts else features).items()
        }


def _only(features: dict[str, Any], text: int, count: int) -> dict[str, Any]:
    return {
        name: value[text : text + 1] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
        for name, value in features.items()
    }


def _independent(module: Any, engine: Engine) -> Any:
    """A copy of a module that computes each text by itself."""
    module = copy.deepcopy(module).float().eval().requires_grad_(False)
    if isinstance(module, Normalize):
        return module
    if not isinstance(module, Dense):
        return _OneByOne(module)
    for name, linear in list(module.named_children()):
        if isinstance(linear, nn.Linear):
            setattr(module, name, engine.linear(linear))
    module.activation_function = _RowByRow(module.activation_function)
    return module

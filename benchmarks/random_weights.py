"""Encoders with random weights, and thresholds that keep a wanted fraction of their tokens after every layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

import token_pruning as tp
from token_pruning.families import Reads, shape_of
from token_pruning.pruners import LayerTokens, Pruner
from token_pruning.runtime.flops import relative_flops

_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_TINY = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("roberta", {**_ROBERTA, **_TINY}),
    "base": ("roberta", _ROBERTA),
    "large": ("roberta", {**_ROBERTA, **_LARGE}),
    "minilm-l6": ("bert", _MINILM),
    "modernbert-base": ("modernbert", {}),
}
"""Model types, and in what they differ from their configs' defaults."""
FINAL_KEEP = 0.12
"""The fraction of tokens that the line ends at; relative FLOPs of twelve layers are then about 0.57."""


def make_model(shape: str, num_labels: int = 2) -> Any:
    """A classifier in evaluation mode, always the same for the same arguments; ``shape`` is a key of ``SHAPES``."""
    torch.manual_seed(0)
    model_type, sizes = SHAPES[shape]
    config = transformers.AutoConfig.for_model(model_type, num_labels=num_labels, **sizes)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def final_keep_for(target: float, config: Any, lengths: Sequence[int], *, first_only: bool) -> float:
    """Where the line of :func:`linear_thresholds` must end for relative FLOPs of ``target``; 0 if it cannot.

    Args:
        target: FLOPs relative to the dense model.
        config: the model's.
        lengths: the sequences' tokens.
        first_only: whether first tokens' last states alone are used.
    """
    shape, counts = shape_of(config), torch.tensor(lengths).double()

    def cost(final_keep: float) -> float:
        line = 1 - (1 - final_keep) * torch.arange(shape.num_layers) / (shape.num_layers - 1)
        left = torch.cat([torch.ones(1), line])[:, None] * counts
        return float(relative_flops(shape, counts, left, first_only=first_only))

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class _Profile(Pruner, registered=False):
    """Keeps the wanted fraction of a batch's tokens at every layer, and writes down the threshold that does so."""

    prune_mode = "profile"
    final_keep: float
    found: list[float] = field(default_factory=list)

    def keep(self, tokens: LayerTokens) -> Tensor:
        fraction = 1 - (1 - self.final_keep) * (tokens.layer - 1) / (tokens.num_layers - 1)
        wanted = max(round(fraction * int(tokens.input_lengths.sum())), len(tokens.input_lengths) + 1)
        scores = tokens.scores.index_fill(0, tokens.layout.first_rows, torch.inf)  # they stay whatever happens
        ordered = scores.sort(descending=True).values
        threshold = 0.0 if wanted >= len(ordered) else ordered[wanted - 1 : wanted + 1].mean().item()
        self.found.append(threshold)
        return scores >= threshold


def linear_thresholds(
    model: Any,
    batch: Mapping[str, Tensor],
    final_keep: float,
    prune_layers: Sequence[int] | None = None,
    reads: Reads | None = None,
) -> tp.FixedThreshold:
    """The method that keeps everything in the first layer, ``final_keep`` of the tokens in the last, linearly between.

    Received attention has mean 1 in a sequence of any length; "mean" divides it by a constant, so that the same
    threshold keeps about the same fraction of short and of long sequences.

    Args:
        model: not pruned, in evaluation mode. Where first tokens alone are read, its last layer drops nothing.
        batch: a padded batch with the lengths to expect.
        final_keep: 0 to 1.
        prune_layers: where tokens may leave, down to the same line.
        reads: as for ``tp.prune``.
    """
    profile = _Profile(final_keep=final_keep, prune_layers=prune_layers)
    tp.prune(model, profile, reads=reads)
    try:
        with torch.inference_mode():
            model(**batch)
    finally:
        tp.unprune(model)
    layers = range(1, model.config.num_hidden_layers + 1)
    found = dict(zip([layer for layer in layers if profile.prunes(layer, len(layers))], profile.found, strict=False))
    thresholds = [found.get(layer, 0.0) for layer in layers]  # the last layer, of first tokens only, is not asked
    return tp.FixedThreshold(thresholds=thresholds, scoring_mode="mean", prune_layers=prune_layers)

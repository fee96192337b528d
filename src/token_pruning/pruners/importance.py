"""Importance scores from attention probabilities (Learned Token Pruning, arXiv 2107.00910, equation 2).

Pure tensors: nothing here knows a model. With ``A_h[j, i]`` the attention probability from query ``j`` to key ``i`` of
head ``h`` (before dropout), the attention a token receives is ``r_i = (1/H) Σ_h Σ_j A_h[j, i]``, ``j`` over the
surviving tokens. Its mean over a sequence's tokens is 1. The importance score is ``s_i = r_i / N``; the scoring mode
chooses ``N``.
"""

from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from token_pruning.checks import choice
from token_pruning.errors import ConfigError
from token_pruning.ragged.layout import Layout

ScoringMode = Literal["mean", "mean_norm", "relative"]
SCORING_MODES: tuple[str, ...] = get_args(ScoringMode)
ScoresT = TypeVar("ScoresT", float, Tensor)


def common_normalizer(scoring_mode: ScoringMode, max_seq_length: int) -> int | None:
    """The ``N`` of :func:`normalizer` that all sequences share; None where it is each one's number of tokens."""
    return {"mean": max_seq_length, "mean_norm": None, "relative": 1}[scoring_mode]


def normalizer(layout: Layout, scoring_mode: ScoringMode, max_seq_length: int) -> Tensor:
    """The ``N`` that divides received attention, per sequence.

    Args:
        layout: the tokens that entered the layer.
        scoring_mode: ``"mean"``: ``N = max_seq_length`` whatever the batch was padded to; ``"mean_norm"``: the number
            of tokens of that sequence that entered the layer; ``"relative"``: 1, so that scores have mean 1 whatever
            the length and the layer.
        max_seq_length: ``N`` in ``"mean"`` mode, in tokens.

    Returns:
        ``[batch]`` float32.
    """
    divisor = common_normalizer(scoring_mode, max_seq_length)
    if divisor is None:
        return layout.lengths_tensor.to(torch.float32)
    return torch.full((layout.batch_size,), divisor, dtype=torch.float32, device=layout.indices.device)


def importance_scores(received: Tensor, layout: Layout, scoring_mode: ScoringMode, max_seq_length: int) -> Tensor:
    """Received attention ÷ ``N``.

    Args:
        received: ``[layout.total]`` float32.
        layout: the tokens that entered the layer.
        scoring_mode: see :func:`normalizer`.
        max_seq_length: see :func:`normalizer`.

    Returns:
        ``[layout.total]`` float32.
    """
    if scoring_mode == "mean_norm":
        return received / normalizer(layout, scoring_mode, max_seq_length)[layout.sequence_ids]
    return received / max_seq_length if scoring_mode == "mean" else received


def convert_scores(
    values: ScoresT,
    source: ScoringMode,
    target: ScoringMode,
    *,
    max_seq_length: int = 128,
    tokens: int | Tensor | None = None,
) -> ScoresT:
    """Importance scores, thresholds or temperatures of one scoring mode in the units of another.

    Args:
        values: numbers or a tensor of any shape.
        source: the mode they are in.
        target: the mode wanted.
        max_seq_length: ``N`` of ``"mean"``, in tokens.
        tokens: ``N`` of ``"mean_norm"``: tokens that entered the layer; a tensor must broadcast with ``values``.

    Raises:
        ConfigError: for an unknown mode, or ``"mean_norm"`` without ``tokens``.
    """
    divisors: list[Any] = []
    for name, mode in (("source", source), ("target", target)):
        choice(name, mode, SCORING_MODES)
        if mode == "mean_norm" and tokens is None and source != target:
            raise ConfigError(f"{name} is 'mean_norm', whose scores depend on the number of tokens; tokens is missing")
        divisors.append({"mean": max_seq_length, "mean_norm": tokens, "relative": 1}[mode])
    return values if source == target else values * divisors[0] / divisors[1]

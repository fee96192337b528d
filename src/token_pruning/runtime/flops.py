"""Floating-point operations in closed form, from token counts per layer.

Counted is every matrix product of the encoder's layers (Q, K, V and output projections, query·key, attention·value, the
feed-forward), and of probes, maps, context and corrections, at two operations per multiply–accumulate. Embeddings,
normalisations, softmax and heads are not counted. Of a layer with a window the keys inside it count, though plain
PyTorch attention also computes the others and masks them; context tokens count as keys, though it asks for them too.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from token_pruning.families import ModelShape, shape_of
from token_pruning.pruners import LinearContext
from token_pruning.runtime.trace import ComputedLengths, Trace


@dataclass(frozen=True)
class Flops:
    """FLOPs per example, averaged over a trace, three ways that always stand together.

    Attributes:
        padded: the dense model with every sequence padded to the maximum length.
        dense: the dense model on valid tokens only. Savings are measured against this one.
        pruned: with the tokens that were really computed.
    """

    padded: float
    dense: float
    pruned: float

    @property
    def relative(self) -> float:
        """``pruned / dense``."""
        return self.pruned / self.dense

    def gflops(self) -> dict[str, float]:
        """The three figures in units of 10⁹."""
        return {name: value / 1e9 for name, value in asdict(self).items()}


def layer_flops(
    shape: ModelShape,
    attention_lengths: Tensor,
    ffn_lengths: Tensor,
    query_lengths: Tensor | None = None,
    projected_lengths: Tensor | None = None,
    context_lengths: Tensor | None = None,
) -> Tensor:
    """FLOPs of single layers.

    Args:
        shape: the model's sizes.
        attention_lengths: tokens in the layer's attention: ``[layers, …]``, or any other shape for the mean of all
            layers; whole numbers or, in the soft stage, fractions.
        ffn_lengths: tokens in its feed-forward, the same shape.
        query_lengths: tokens whose own attention is computed, the same shape; all unless given.
        projected_lengths: tokens in attention's output projection, the same shape; as ``query_lengths`` unless given.
        context_lengths: further keys, of tokens that left, the same shape; none unless given. What these take to be
            made is not counted here.

    Returns:
        float64, the same shape, differentiable.
    """
    attending, remaining = attention_lengths.double(), ffn_lengths.double()
    asking = attending if query_lengths is None else query_lengths.double()
    joining = asking if projected_lengths is None else projected_lengths.double()
    projections = (2 * attending * shape.key_size + (asking + joining) * shape.query_size) * shape.hidden_size
    keys = attending if context_lengths is None else attending + context_lengths.double()
    attention = asking * (2 * _reached(shape, keys) + shape.position_columns) * shape.query_size
    feed_forward = shape.ffn_matrices * remaining * shape.hidden_size * shape.intermediate_size
    return 2 * (projections + attention + feed_forward)


def _reached(shape: ModelShape, lengths: Tensor) -> Tensor:
    """Keys that a query meets: fewer than there are where a layer has a window."""
    if all(window is None for window in shape.windows):
        return lengths
    inside = [lengths if window is None else lengths.clamp(max=2 * window + 1) for window in shape.windows]
    if lengths.dim() == 2 and len(lengths) == shape.num_layers:
        return torch.stack([keys[layer] for layer, keys in enumerate(inside)])
    return torch.stack(inside).mean(0)  # of no layer in particular


def relative_flops(
    shape: ModelShape,
    input_lengths: Tensor,
    left: Tensor,
    *,
    first_only: bool,
    dropped_are_joined: Sequence[bool] | None = None,
    context: LinearContext | None = None,
) -> Tensor:
    """Cost of a batch relative to the dense model, from tokens left, where these need not be whole numbers.

    Args:
        shape: the model's sizes.
        input_lengths: valid tokens, ``[batch]``.
        left: tokens that enter the first layer, then those left after each layer, ``[layers + 1, batch]``.
        first_only: whether first tokens' last states alone are used.
        dropped_are_joined: for each layer, whether tokens that leave are in its attention's output projection too; as
            where their states are read, if not given.
        context: what tokens that left go on giving.

    Returns:
        A float64 scalar, differentiable.
    """
    keys, queries, feed_forward = left[:-1], left[:-1], left[1:]
    joined = [not first_only] * shape.num_layers if dropped_are_joined is None else dropped_are_joined
    projected = torch.where(torch.tensor(joined, device=left.device)[:, None], left[:-1], left[1:])
    if first_only:
        queries, projected, feed_forward = (
            torch.cat([rows[:-1], rows[-1:].clamp(max=1)]) for rows in (queries, projected, feed_forward)
        )
    dense = layer_flops(shape, input_lengths, input_lengths).sum() * shape.num_layers
    if context is None:
        return layer_flops(shape, keys, feed_forward, queries, projected).sum() / dense
    lost = torch.cat([input_lengths[None].to(left), left]).diff(dim=0).neg()
    layers = layer_flops(shape, keys, feed_forward, queries, projected, context.lengths(lost))
    return (layers.sum() + 2 * context.products(lost).sum()) / dense


def flops_from_lengths(shape: ModelShape, computed: ComputedLengths, max_seq_length: int) -> Flops:
    """FLOPs per example from token counts.

    Args:
        shape: the model's sizes.
        computed: the rows computed in each layer, each ``[layers, examples]`` int64.
        max_seq_length: what sequences are padded to for the padded figure, in tokens; the longest sequence if longer.
    """
    valid = computed.dense
    padded = torch.full_like(valid, max(max_seq_length, int(valid.max())))
    rows = (computed.keys, computed.queries, computed.projected, computed.feed_forward, computed.context)
    totals = [
        layer_flops(shape, keys, feed_forward, queries, projected, *context).sum(0).mean().item()
        for keys, queries, projected, feed_forward, *context in ((padded,) * 4, (valid,) * 4, rows)
    ]
    products = computed.probed.sum(0) + computed.mapped[0] * shape.hidden_size  # each with a row of the hidden size
    totals[-1] += 2 * (shape.hidden_size * products + computed.context_products[0]).double().mean().item()
    return Flops(*totals)


def count_flops(model: Any, trace: Trace) -> Flops:
    """FLOPs per example of the forward passes in a trace.

    Args:
        model: the model that was recorded, or its config.
        trace: from :func:`token_pruning.record`.

    Returns:
        The three figures, each the mean over the trace's examples. Sequences are padded to the pruner's
        ``max_seq_length``, or to the longest sequence of the trace if that is longer. Dense models compute every token
        of the last layer; a pruned one whose head reads the first token only does not.
    """
    shape = shape_of(getattr(model, "config", model))
    return flops_from_lengths(shape, trace.computed_lengths, trace.max_seq_length)

"""What happened to the tokens of a forward pass, and how a user records it."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from token_pruning.families import Reads
from token_pruning.pruners import Pruner
from token_pruning.pruners.importance import normalizer
from token_pruning.pruners.summary import Merge, Summaries
from token_pruning.ragged import Layout
from token_pruning.runtime.token_pruner import TokenPruner

_EMPTY = "the trace is empty: no forward pass of this model was run under record()"


@dataclass
class LayerRecord:
    """What happened in one layer.

    Attributes:
        entering: tokens that took part in the layer's attention.
        leaving: tokens left after its pruning.
        kept_rows: rows of ``entering`` that stay, int64; None where nothing was pruned.
        dropped_rows: rows of ``entering`` whose tokens leave, int64; None where nothing was pruned. With summary tokens
            a dropped token's row may stay, to carry the summary.
        soft_mask: ``[entering.total]`` float32 in the soft stage, else None.
        scores: ``[entering.total]`` float32 importance, or None where none was computed.
        merge: how the dropped tokens become summary tokens, or None.
        summaries: the summary tokens among the rows of ``leaving``, or None.
    """

    entering: Layout
    leaving: Layout
    kept_rows: Tensor | None = None
    dropped_rows: Tensor | None = None
    soft_mask: Tensor | None = None
    scores: Tensor | None = None
    merge: Merge | None = None
    summaries: Summaries | None = None

    @property
    def token_rows(self) -> Tensor:
        """Rows of ``leaving`` that hold tokens, not summaries, int64."""
        if self.summaries is None:
            return torch.arange(self.leaving.total, device=self.leaving.indices.device)
        return (~self.summaries.present).nonzero().squeeze(-1)


class ComputedLengths(NamedTuple):
    """Rows that a model computes per layer and sequence, ``[layers, batch]`` int64.

    Attributes:
        dense: what a dense model computes: the valid tokens, in every layer.
        keys: keys and values.
        queries: queries, and so attention.
        projected: rows of attention's output projection, which tokens that leave skip where nobody reads their states.
        feed_forward: rows of the feed-forward.
        probed: rows that a probe was asked about.
        mapped: ``[1, batch]`` int64: how often a map, or the correction, was applied.
        context: keys and values that tokens which left still give.
        context_products: ``[1, batch]`` int64: multiply–accumulates that these took.
    """

    dense: Tensor
    keys: Tensor
    queries: Tensor
    projected: Tensor
    feed_forward: Tensor
    probed: Tensor
    mapped: Tensor
    context: Tensor
    context_products: Tensor

    @classmethod
    def without_pruning(cls, lengths: Tensor) -> "ComputedLengths":
        """What a dense model computes, from the valid tokens ``[layers, batch]``."""
        nothing = torch.zeros_like(lengths)
        return cls(lengths, lengths, lengths, lengths, lengths, nothing, nothing[:1], nothing, nothing[:1])


@dataclass
class PassRecord:
    """What happened in one forward pass.

    Attributes:
        pruner: the method.
        valid: the valid tokens.
        entering: those that enter the first layer: all that the vocabulary threshold lets through.
        reads: which last states are used; where first tokens' alone are, the last layer computes no others.
        layers: a record per layer, 1-based.
    """

    pruner: Pruner
    valid: Layout
    entering: Layout
    reads: Reads
    layers: dict[int, LayerRecord] = field(default_factory=dict)

    @property
    def first_only(self) -> bool:
        """Whether the last layer computed first tokens only."""
        return self.reads == "first"

    def probed(self, layer: int) -> bool:
        """Whether a probe takes the layer's decision; one that nobody but a trace wants does not count."""
        probes = self.pruner.probes
        wanted = layer < len(self.layers) or not self.first_only
        return probes is not None and layer in probes.layers and self.layers[layer].scores is not None and wanted

    def lost(self, layer: int) -> Tensor:
        """Tokens that left at a layer, or at 0 before the first, ``[batch]`` int64."""
        before = self.valid.lengths_tensor if layer == 0 else self._left(layer - 1)
        return before - self._left(layer)

    def _left(self, layer: int) -> Tensor:
        """Tokens left after a layer, summaries not counted, ``[batch]`` int64."""
        if layer == 0:
            return self.entering.lengths_tensor
        record = self.layers[layer]
        if record.summaries is None:
            return record.leaving.lengths_tensor
        return record.leaving.sequence_ids[record.token_rows].bincount(minlength=self.valid.batch_size)


@dataclass
class Trace:
    """What happened to the tokens of every forward pass run under :func:`token_pruning.record`.

    Batches of several forward passes follow one another along the ``batch`` axis.
    """

    max_seq_length: int = 128
    passes: list[PassRecord] = field(default_factory=list)

    def _per_layer(self, which: str) -> Tensor:
        if not self.passes:
            raise RuntimeError(_EMPTY)
        return torch.cat(
            [
                torch.stack([getattr(done.layers[layer], which).lengths_tensor for layer in sorted(done.layers)])
                for done in self.passes
            ],
            dim=1,
        )

    @property
    def input_lengths(self) -> Tensor:
        """Valid tokens of each sequence, whether they entered the first layer or not, ``[batch]`` int64."""
        if not self.passes:
            raise RuntimeError(_EMPTY)
        return torch.cat([done.valid.lengths_tensor for done in self.passes])

    @property
    def attention_lengths(self) -> Tensor:
        """Tokens that entered each layer's attention, summary tokens included, ``[layers, batch]`` int64."""
        return self._per_layer("entering")

    @property
    def ffn_lengths(self) -> Tensor:
        """Tokens left after each layer's pruning, summary tokens included, ``[layers, batch]`` int64.

        In the soft stage nothing leaves. Where the head reads the first token only, the last layer's decision is
        recorded though none of its other tokens are computed; see :attr:`computed_lengths`.
        """
        return self._per_layer("leaving")

    @property
    def summary_lengths(self) -> Tensor:
        """Summary tokens among those left after each layer's pruning, ``[layers, batch]`` int64."""

        def count(record: LayerRecord) -> Tensor:
            layout = record.leaving
            present = layout.indices.new_zeros(layout.total) if record.summaries is None else record.summaries.present
            return layout.indices.new_zeros(layout.batch_size).index_add(0, layout.sequence_ids, present.long())

        return torch.cat(
            [torch.stack([count(done.layers[layer]) for layer in sorted(done.layers)]) for done in self.passes], dim=1
        )

    @property
    def computed_lengths(self) -> ComputedLengths:
        """The rows computed in each layer: what FLOPs are counted from."""
        keys, feed_forward = self.attention_lengths, self.ffn_lengths.clone()
        queries = keys.clone()
        dense = self.input_lengths.expand_as(keys)
        projected, probed = (
            torch.cat([count(done) for done in self.passes], 1) for count in (_projected_lengths, _probed_lengths)
        )
        mapped = torch.cat([_mapped(done) for done in self.passes])
        narrow = torch.cat([torch.full((done.valid.batch_size,), done.first_only) for done in self.passes])
        for lengths in (queries, projected, feed_forward):
            lengths[-1] = torch.where(narrow.to(lengths.device), lengths[-1].clamp(max=1), lengths[-1])
        context, products = (torch.cat(parts, -1) for parts in zip(*map(_context, self.passes), strict=True))
        return ComputedLengths(
            dense, keys, queries, projected, feed_forward, probed, mapped[None], context, products[None]
        )

    @property
    def soft_lengths(self) -> Tensor:
        """``Σ_i m_i`` of each layer in the soft stage, ``[layers, batch]`` float32, differentiable.

        Raises:
            RuntimeError: when the model was not in the soft stage.
        """
        return self._soft_sums(normalized=False)

    @property
    def soft_rates(self) -> Tensor:
        """``Σ_i m_i / N`` of each layer, ``[layers, batch]`` float32, differentiable: the regularizer's terms.

        ``N`` is that of the scoring mode. Raises as :attr:`soft_lengths`.
        """
        return self._soft_sums(normalized=True)

    @property
    def soft_survival(self) -> Tensor:
        """Tokens left after each layer if each mask were the probability to stay, ``[layers, batch]`` float32.

        ``Σ_i Π_{k ≤ l} m_k,i``: what is dropped does not come back. Differentiable; raises as :attr:`soft_lengths`.
        """
        return self._soft_sums(normalized=False, cumulative=True)

    def _soft_sums(self, *, normalized: bool, cumulative: bool = False) -> Tensor:
        batches = []
        for done in self.passes:
            pruner = done.pruner
            if all(record.soft_mask is None for record in done.layers.values()):
                raise RuntimeError("nothing was masked softly: the soft stage needs LearnedThreshold and train()")
            sums: list[Tensor] = []
            survival: Tensor | float = 1.0
            for layer in sorted(done.layers):
                record = done.layers[layer]
                layout = record.entering
                soft_mask = record.soft_mask
                if soft_mask is None:  # a layer that may drop nothing
                    soft_mask = torch.ones(layout.total, dtype=torch.float32, device=layout.indices.device)
                survival = soft_mask * survival if cumulative else soft_mask
                total = survival.new_zeros(layout.batch_size).index_add(0, layout.sequence_ids, survival)
                sums.append(
                    total / normalizer(layout, pruner.scoring_mode, pruner.max_seq_length) if normalized else total
                )
            batches.append(torch.stack(sums))
        if not batches:
            raise RuntimeError(_EMPTY)
        return torch.cat(batches, dim=1)

    @property
    def survived_layers(self) -> list[Tensor]:
        """For every sequence, the number of layers after which each valid token was still there.

        A list with one ``[valid tokens]`` int64 tensor per sequence; 0 means dropped in the first layer or before it,
        the number of layers means never dropped. A token whose row carries a summary was dropped.
        """
        result: list[Tensor] = []
        for done in self.passes:
            valid = done.valid
            survived = valid.indices.new_zeros(valid.batch_size * valid.width)
            for record in done.layers.values():
                survived[record.leaving.indices[record.token_rows]] += 1
            result += torch.split(survived[valid.indices], valid.lengths)
        return result


def _projected_lengths(done: PassRecord) -> Tensor:
    """Rows of each layer's output projection, ``[layers, batch]`` int64: all where dropped tokens' states are used."""
    unread = done.first_only or done.pruner.departed == "survivors"
    only_those_left = unread and done.pruner.summary_tokens == "none"
    coded = done.pruner.context_cuts(len(done.layers))
    return torch.stack(
        [
            (
                each.leaving if only_those_left and not done.probed(layer) and layer not in coded else each.entering
            ).lengths_tensor
            for layer, each in sorted(done.layers.items())
        ]
    )


def _probed_lengths(done: PassRecord) -> Tensor:
    """Rows of each layer that a probe was asked about, ``[layers, batch]`` int64."""
    return torch.stack(
        [each.entering.lengths_tensor * done.probed(layer) for layer, each in sorted(done.layers.items())]
    )


def _lost(done: PassRecord) -> Tensor:
    """Tokens that never entered, then those that left after each layer, ``[layers + 1, batch]`` int64."""
    return torch.stack([done.lost(layer) for layer in range(len(done.layers) + 1)])


def _context(done: PassRecord) -> tuple[Tensor, Tensor]:
    """Context tokens of each layer, ``[layers, batch]``, and multiply–accumulates for them, ``[batch]``; int64."""
    lost, context = _lost(done), done.pruner.context
    if context is None:
        return torch.zeros_like(lost[1:]), torch.zeros_like(lost[0])
    return context.lengths(lost), context.products(lost)


def _mapped(done: PassRecord) -> Tensor:
    """How often a map or the correction was applied, ``[batch]`` int64: where means are read, a map once for a text."""
    pruner, lost = done.pruner, _lost(done)
    if done.first_only:
        lost = lost[:-1]
    total = torch.zeros_like(lost[0])
    if pruner.departed == "map" and not done.first_only:
        total = (lost.clamp(max=1) if done.reads == "mean" else lost).sum(0)
    return total if pruner.correction is None or done.reads == "all" else total + (lost.sum(0) > 0)


recording: ContextVar[tuple[tuple[TokenPruner, Trace], ...]] = ContextVar("token_pruning_recording", default=())
"""The traces being recorded in this thread or task."""

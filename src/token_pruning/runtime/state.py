"""The state of one forward pass, and the trace a user can record of it.

State travels as a keyword argument of the forward calls, so that several threads can run one model at once. Everything
is keyed by layer and written once, so that gradient checkpointing can run a layer again.
"""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from token_pruning.errors import ConfigError
from token_pruning.pruners import FixedThreshold, LayerTokens, LearnedThreshold, Pruner
from token_pruning.pruners.importance import importance_scores, normalizer
from token_pruning.pruners.summary import Merge, Summaries, plan_merge, segments_of
from token_pruning.ragged.layout import Layout, drop, layout_from_mask

_EMPTY = "the trace is empty: no forward pass of this model was run under record()"


class TokenPruner(nn.Module):
    """What :func:`token_pruning.prune` adds to a model as ``model.token_pruner``: the method and its thresholds.

    Attributes:
        pruner: the method.
        thresholds: ``[layers]`` float32, or None: a parameter where thresholds are learned, else a buffer.
        vocabulary_scores: ``[vocabulary]`` float32, or None: what ``pruner.vocabulary_threshold`` is compared with.

    Both stay float32 when the model is cast to a half-precision dtype, since rounding them would change decisions.
    """

    thresholds: Tensor | None
    vocabulary_scores: Tensor | None

    def __init__(
        self, pruner: Pruner, num_layers: int, device: torch.device, vocabulary_scores: Tensor | None = None
    ) -> None:
        """Start from the method's initial thresholds."""
        super().__init__()
        if pruner.vocabulary_threshold and vocabulary_scores is None:
            raise ConfigError(
                f"vocabulary_threshold is {pruner.vocabulary_threshold:g}, but the model has no vocabulary scores to "
                "compare with it: give prune() those of vocabulary_scores(model, examples)"
            )
        self.register_buffer(
            "vocabulary_scores",
            None if vocabulary_scores is None else vocabulary_scores.to(device, torch.float32, copy=True),
        )
        for layer in pruner.prune_layers or ():
            if layer > num_layers:
                raise ConfigError(f"prune_layers names layer {layer}; the model has {num_layers} layers")
        self.pruner = pruner
        self.num_layers = num_layers
        initial = pruner.initial_thresholds(num_layers)
        if initial is None:
            self.thresholds = None
            return
        values = torch.tensor(initial, dtype=torch.float32, device=device)
        if pruner.learned:
            self.thresholds = nn.Parameter(values)
        else:
            self.register_buffer("thresholds", values, persistent=pruner.stores_thresholds)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        def keep_dtype(tensor: Tensor) -> Tensor:
            result: Tensor = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]

    @property
    def soft(self) -> bool:
        """Whether the next forward pass masks softly instead of removing tokens."""
        return self.training and self.pruner.learned

    def dropping_layers(self) -> list[bool]:
        """Where the method can drop anything with the thresholds there are now, first layer first.

        Importance is never negative, so nothing is below a threshold of zero. One device synchronisation.
        """
        layers = range(1, self.num_layers + 1)
        drops = [self.pruner.prunes(layer, self.num_layers) for layer in layers]
        if self.thresholds is None or type(self.pruner).keep is not FixedThreshold.keep:
            return drops
        return [can and threshold > 0 for can, threshold in zip(drops, self.thresholds.tolist(), strict=True)]

    def enter(self, valid: Layout, input_ids: Tensor | None) -> tuple[Layout, Tensor | None, Tensor | None]:
        """Drop the tokens that the vocabulary threshold keeps out of the first layer.

        Args:
            valid: the valid tokens.
            input_ids: ``[batch, width]`` integers; looked at where a token is valid.

        Returns:
            The tokens that enter, and the rows of ``valid`` that do and that do not, int64; None for both where nothing
            can be dropped.

        Raises:
            ConfigError: where ``input_ids`` are needed and missing.
        """
        threshold = self.pruner.vocabulary_threshold
        if not threshold:
            return valid, None, None
        if input_ids is None:
            raise ConfigError(
                f"vocabulary_threshold is {threshold:g}, which needs input_ids; inputs_embeds will not do"
            )
        assert self.vocabulary_scores is not None
        scores = self.vocabulary_scores[input_ids.flatten()[valid.indices]]
        return drop(valid, (scores >= threshold).index_fill(0, valid.first_rows, True))

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return repr(self.pruner)


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
        queries: queries, and so attention and its output projection.
        feed_forward: rows of the feed-forward.
    """

    dense: Tensor
    keys: Tensor
    queries: Tensor
    feed_forward: Tensor


@dataclass
class PassRecord:
    """What happened in one forward pass.

    Attributes:
        pruner: the method.
        mask: ``[batch, width]`` bool, True for a valid token.
        valid: the valid tokens.
        entering: those that enter the first layer: all that the vocabulary threshold lets through.
        layers: a record per layer, 1-based.
        first_only: whether the last layer computed first tokens only, since the head reads no others.
    """

    pruner: Pruner
    mask: Tensor
    valid: Layout
    entering: Layout
    layers: dict[int, LayerRecord] = field(default_factory=dict)
    first_only: bool = False


class ForwardState:
    """Everything one forward pass knows about its tokens."""

    def __init__(
        self,
        token_pruner: TokenPruner,
        mask: Tensor,
        layer_numbers: Mapping[nn.Module, int],
        *,
        packed: bool,
        input_ids: Tensor | None = None,
        first_only: bool = False,
    ) -> None:
        """Start with the valid tokens.

        Args:
            token_pruner: the method and its thresholds.
            mask: ``[batch, width]`` bool, True for a valid token.
            layer_numbers: the number (1-based) of the layer an attention module belongs to.
            packed: packed execution, or the masked reference.
            input_ids: ``[batch, width]``; without them a pair's sentences share a summary token, and there can be no
                vocabulary threshold.
            first_only: whether the last hidden states of other than first tokens are wanted by nobody.
        """
        self.token_pruner = token_pruner
        self.layer_numbers = layer_numbers
        self.packed = packed
        self.soft = token_pruner.soft
        self.with_grad = torch.is_grad_enabled()
        self.mask = mask
        self.valid = layout_from_mask(mask)
        entering, _, self.never_entered = token_pruner.enter(self.valid, input_ids)
        """``never_entered``: the rows of ``valid`` that the vocabulary threshold drops, or None."""
        self.record = PassRecord(token_pruner.pruner, mask, self.valid, entering, first_only=first_only)
        self.recorded = any(pruner is token_pruner for pruner, _ in recording.get())
        self._dropping_layers = None if self.soft or self.recorded else token_pruner.dropping_layers()
        self.segments: Tensor | None = None
        if token_pruner.pruner.summary_tokens == "segment" and input_ids is not None:
            self.segments = segments_of(input_ids, self.valid)
        self.layers = self.record.layers
        self.last_states: dict[int, tuple[Tensor, Tensor]] = {}
        """Per layer, the places in the padded batch of the tokens dropped there, and their hidden states.

        Layer 0 has the embeddings of those that never entered.
        """
        self.attention_outputs: dict[int, Tensor] = {}
        """Masked execution: per layer, the attention block's output, the last state of tokens dropped there."""

    def entering(self, layer: int) -> Layout:
        """The tokens that take part in ``layer``'s attention (1-based)."""
        return self.record.entering if layer == 1 else self.layers[layer - 1].leaving

    def summaries(self, layer: int) -> Summaries | None:
        """The summary tokens among those that enter ``layer``."""
        return None if layer == 1 else self.layers[layer - 1].summaries

    def first_only(self, layer: int) -> bool:
        """Whether ``layer`` is the last, and only its first tokens' results are wanted."""
        return self.record.first_only and layer == self.token_pruner.num_layers

    def prunes(self, layer: int) -> bool:
        """Whether ``layer`` needs importance scores.

        Where nothing can be dropped they are computed for a trace only: with a threshold of zero, or in a last layer
        for first tokens only.
        """
        if self._dropping_layers is None:
            return self.token_pruner.pruner.prunes(layer, self.token_pruner.num_layers)
        return self._dropping_layers[layer - 1] and not self.first_only(layer)

    @property
    def differentiable_importance(self) -> bool:
        """Whether importance passes a gradient on: to thresholds in the soft stage, through summaries' weights."""
        return self.soft or self.token_pruner.pruner.summary_tokens != "none"

    def decide(self, layer: int, received: Tensor | None) -> None:
        """Take the layer's decision from the attention its tokens received, and record it.

        Args:
            layer: 1-based.
            received: ``[entering.total]`` float32, or None where nothing is pruned.
        """
        entering = self.entering(layer)
        if received is None:
            self.layers.setdefault(layer, LayerRecord(entering, entering, summaries=self.summaries(layer)))
            return
        module = self.token_pruner
        pruner = module.pruner
        scores = importance_scores(received, entering, pruner.scoring_mode, pruner.max_seq_length)
        threshold = None if module.thresholds is None else module.thresholds[layer - 1]
        summaries = self.summaries(layer)
        present = None if summaries is None else summaries.present
        input_lengths = self.record.entering.lengths_tensor
        tokens = LayerTokens(layer, module.num_layers, entering, scores, input_lengths, threshold, present)
        if self.soft:
            assert isinstance(pruner, LearnedThreshold)
            # Computed again when gradient checkpointing runs the layer again, so that it saves the same tensors.
            soft_mask = pruner.soft_mask(tokens)
            self.layers.setdefault(layer, LayerRecord(entering, entering, soft_mask=soft_mask, scores=scores))
            return
        decided = self.layers.get(layer)  # when gradient checkpointing runs the layer again
        if decided is not None and decided.merge is None:
            return
        with torch.no_grad():
            if decided is not None and decided.dropped_rows is not None:
                keep = torch.ones_like(scores, dtype=torch.bool).index_fill(0, decided.dropped_rows, False)
            else:
                keep = pruner.keep(tokens).index_fill(0, entering.first_rows, True)
                if present is not None:
                    keep |= present
        merge, stays = None, keep
        if pruner.summary_tokens != "none" and layer < module.num_layers:  # after the last nobody would read a summary
            # Planned again too, so that it saves the same tensors.
            merge, summaries = plan_merge(self._groups(entering), ~keep, summaries, received)
            stays = keep | summaries.present
        leaving, kept, dropped = drop(entering, stays)
        if summaries is not None:
            summaries = Summaries(summaries.present[kept], summaries.weights[kept])
            dropped = (~keep).nonzero().squeeze(-1)
        self.layers.setdefault(
            layer,
            LayerRecord(entering, leaving, kept, dropped, scores=scores.detach(), merge=merge, summaries=summaries),
        )

    def _groups(self, layout: Layout) -> Tensor:
        """Which summary token each row would go to, ``[layout.total]`` int64."""
        if self.segments is None:
            return layout.sequence_ids
        return 2 * layout.sequence_ids + self.segments[layout.indices]


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
        narrow = torch.cat([torch.full((done.valid.batch_size,), done.first_only) for done in self.passes])
        for lengths in (queries, feed_forward):
            lengths[-1] = torch.where(narrow.to(lengths.device), lengths[-1].clamp(max=1), lengths[-1])
        return ComputedLengths(dense, keys, queries, feed_forward)

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
                    soft_mask = torch.ones(layout.total, device=layout.indices.device)
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
            survived = torch.zeros(done.mask.numel(), dtype=torch.long, device=done.mask.device)
            for record in done.layers.values():
                survived[record.leaving.indices[record.token_rows]] += 1
            result += torch.split(survived[done.valid.indices], done.valid.lengths)
        return result


recording: ContextVar[tuple[tuple[TokenPruner, Trace], ...]] = ContextVar("token_pruning_recording", default=())
"""The traces being recorded in this thread or task."""

"""The decisions of one forward pass: which tokens enter each layer, and which leave after its attention."""

import torch
from torch import Tensor

from token_pruning.families import Reads
from token_pruning.pruners import FixedThreshold, LayerTokens, LearnedThreshold
from token_pruning.pruners.fitted import apply_affine
from token_pruning.pruners.importance import common_normalizer, importance_scores
from token_pruning.pruners.summary import Summaries, plan_merge
from token_pruning.ragged import Layout, PackedTokens, drop, drop_below, triton
from token_pruning.runtime.roles import asking, first_segment, protected
from token_pruning.runtime.token_pruner import TokenPruner
from token_pruning.runtime.trace import LayerRecord, PassRecord, recording


class Decisions:
    """Takes and keeps a pass's decisions, layer by layer.

    Each is recorded once, so that gradient checkpointing can run a layer again.
    """

    def __init__(self, token_pruner: TokenPruner, tokens: PackedTokens, *, reads: Reads) -> None:
        """Start with the valid tokens.

        Args:
            token_pruner: the method and its thresholds.
            tokens: the valid tokens; without ids a pair's sentences share a summary token, and there can be no
                vocabulary threshold.
            reads: which last hidden states are used.
        """
        self.token_pruner = token_pruner
        self.soft = token_pruner.soft
        entering, self.entered_rows, self.never_entered_rows = token_pruner.enter(tokens)
        self.record = PassRecord(token_pruner.pruner, tokens.layout, entering, reads)
        self.traces = [trace for pruner, trace in recording.get() if pruner is token_pruner]
        self._dropping_layers = None if self.soft or self.traces else token_pruner.dropping_layers()
        self._stays, self._asks = (
            None if found is None else tokens.layout.grid(found).flatten()
            for found in (protected(tokens, token_pruner.pruner), asking(tokens, token_pruner.pruner))
        )
        pruner = token_pruner.pruner
        self._probed = () if pruner.probes is None or token_pruner.probe_weights is None else pruner.probes.layers
        # One kernel scores, compares and keeps what must stay. It has no gradient, and knows no summaries.
        self._by_kernel = (
            not self.soft
            and type(pruner).keep is FixedThreshold.keep
            and pruner.summary_tokens == "none"
            and triton.usable(entering.indices.device)
        )
        # Where first tokens alone are read, nobody asks which others left, but for a trace, a correction and context.
        linear = pruner.correction is not None or pruner.context is not None
        self._names_dropped = bool(self.traces) or reads != "first" or linear
        self.segments: Tensor | None = None
        if token_pruner.pruner.summary_tokens == "segment" and tokens.ids is not None:
            second = ~first_segment(tokens.ids, tokens.layout)
            self.segments = tokens.layout.grid(second.long()).flatten()

    def entering(self, layer: int) -> Layout:
        """The tokens that take part in ``layer``'s attention (1-based)."""
        return self.record.entering if layer == 1 else self.record.layers[layer - 1].leaving

    def first_only(self, layer: int) -> bool:
        """Whether ``layer`` is the last, and only its first tokens' results are used."""
        return self.record.first_only and layer == self.token_pruner.num_layers

    def prunes(self, layer: int) -> bool:
        """Whether ``layer`` needs importance scores.

        Where nothing can be dropped they are computed for a trace only: with a threshold of zero, or in a last layer
        for first tokens only.
        """
        if self._dropping_layers is None:
            return self.token_pruner.pruner.prunes(layer, self.token_pruner.num_layers)
        return self._dropping_layers[layer - 1] and not self.first_only(layer)

    def probes(self, layer: int) -> bool:
        """Whether a probe takes ``layer``'s decision, from states after its attention block."""
        return layer in self._probed and self.prunes(layer)

    def probe_scores(self, layer: int, states: Tensor) -> Tensor:
        """What the layer's probe says of states ``[rows, dim]`` after its attention block: ``[rows]`` float32."""
        probe = self.token_pruner.probe(layer)
        assert probe is not None
        return apply_affine(states, probe[None]).squeeze(1)

    def paid(self, layer: int) -> Tensor | None:
        """How much the attention that each token of ``layer`` pays counts, ``[entering.total]`` float32; None for 1.

        Its mean over a sequence is 1. Where nobody is left whose attention should count, everybody's does.
        """
        if self._asks is None:
            return None
        layout = self.entering(layer)
        asks = self._asks[layout.indices].float()
        asking = asks.new_zeros(layout.batch_size).scatter_add(0, layout.sequence_ids, asks)
        share = layout.lengths_tensor / asking.clamp(min=1)
        return torch.where((asking > 0)[layout.sequence_ids], asks * share[layout.sequence_ids], 1.0)

    @property
    def differentiable_importance(self) -> bool:
        """Whether importance passes a gradient on: to thresholds in the soft stage, through summaries' weights."""
        return self.soft or self.token_pruner.pruner.summary_tokens != "none"

    def decide(self, layer: int, received: Tensor | None) -> LayerRecord:
        """Take the layer's decision.

        Args:
            layer: 1-based.
            received: ``[entering.total]`` float32: the attention that tokens received, or what a probe says of them;
                None where nothing is pruned.
        """
        layers = self.record.layers
        entering = self.entering(layer)
        summaries = None if layer == 1 else layers[layer - 1].summaries
        if received is None:
            return layers.setdefault(layer, LayerRecord(entering, entering, summaries=summaries))
        if self._by_kernel:  # when gradient checkpointing runs the layer again, as decided before
            return layers.get(layer) or layers.setdefault(layer, self._drop_below(layer, received))
        pruner = self.token_pruner.pruner
        tokens = self._layer_tokens(layer, received, summaries)
        if self.soft:
            assert isinstance(pruner, LearnedThreshold)
            # Computed again when gradient checkpointing runs the layer again, so that it saves the same tensors.
            soft_mask = pruner.soft_mask(tokens)
            if self._stays is not None:
                soft_mask = soft_mask.masked_fill(self._stays[entering.indices], 1.0)
            record = LayerRecord(entering, entering, soft_mask=soft_mask, scores=tokens.scores)
            layers.setdefault(layer, record)
            return record
        decided = layers.get(layer)  # when gradient checkpointing runs the layer again
        if decided is not None and decided.merge is None and summaries is None:
            return decided
        keep = self._keep(tokens, decided)
        merge, stays = None, keep
        if pruner.summary_tokens != "none" and layer < self.token_pruner.num_layers:  # nobody reads the last's
            # Planned again too, so that it saves the same tensors.
            merge, summaries = plan_merge(self._groups(entering), ~keep, summaries, received)
            stays = keep | summaries.present
        leaving, kept, dropped = drop(entering, stays)
        if summaries is not None:
            summaries = Summaries(summaries.present[kept], summaries.weights[kept])
            dropped = (~keep).nonzero().squeeze(-1)
        scores = tokens.scores.detach()
        record = LayerRecord(entering, leaving, kept, dropped, scores=scores, merge=merge, summaries=summaries)
        layers.setdefault(layer, record)
        return record

    def finish(self) -> None:
        """Give the pass to those who record."""
        for trace in self.traces:
            trace.passes.append(self.record)

    def _drop_below(self, layer: int, received: Tensor) -> LayerRecord:
        """The layer's decision by its threshold, in as few launches as can be."""
        module, entering = self.token_pruner, self.entering(layer)
        pruner = module.pruner
        assert module.thresholds is not None
        divisor = 1 if self.probes(layer) else common_normalizer(pruner.scoring_mode, pruner.max_seq_length)
        leaving, kept, dropped, scores = drop_below(
            entering, received, module.thresholds, layer - 1, divisor=divisor, protected=self._stays,
            dropped=self._names_dropped, scores=bool(self.traces),
        )  # fmt: skip
        return LayerRecord(entering, leaving, kept, dropped, scores=scores)

    def _layer_tokens(self, layer: int, received: Tensor, summaries: Summaries | None) -> LayerTokens:
        module, entering = self.token_pruner, self.entering(layer)
        pruner = module.pruner
        return LayerTokens(
            layer=layer,
            num_layers=module.num_layers,
            layout=entering,
            scores=received
            if self.probes(layer)
            else importance_scores(received, entering, pruner.scoring_mode, pruner.max_seq_length),
            input_lengths=self.record.entering.lengths_tensor,
            threshold=None if module.thresholds is None else module.thresholds[layer - 1],
            summaries=None if summaries is None else summaries.present,
            protected=None if self._stays is None else self._stays[entering.indices],
        )

    @torch.no_grad()
    def _keep(self, tokens: LayerTokens, decided: LayerRecord | None) -> Tensor:
        """Which tokens stay, as decided before if the layer runs again: ``[entering.total]`` bool."""
        if decided is not None and decided.dropped_rows is not None:
            return torch.ones_like(tokens.scores, dtype=torch.bool).index_fill(0, decided.dropped_rows, False)
        keep = self.token_pruner.pruner.checked_keep(tokens).index_fill(0, tokens.layout.first_rows, 1)
        if tokens.protected is not None:
            keep = keep | tokens.protected
        return keep if tokens.summaries is None else keep | tokens.summaries

    def _groups(self, layout: Layout) -> Tensor:
        """Which summary token each row would go to, ``[layout.total]`` int64."""
        if self.segments is None:
            return layout.sequence_ids
        return 2 * layout.sequence_ids + self.segments[layout.indices]

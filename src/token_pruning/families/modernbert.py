"""ModernBERT."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from token_pruning.families.base import ModelShape, Reads, wanted
from token_pruning.families.rotary import Rotary
from token_pruning.ragged import NO_TERMS, LogitTerms, PackedTokens


class ModernBert(Rotary):
    """Pre-LN with a gated feed-forward; most layers see a window, with rotary positions of another base."""

    model_types = ("modernbert",)
    output_class = BaseModelOutput
    replaced = ("attn",)
    # Multiple choice looks for the first token where the mask has it, in states of all places.
    first_token_heads = ("ForSequenceClassification",)

    @classmethod
    def shape(cls, config: Any) -> ModelShape:
        """With the windows of local layers."""
        windows = (config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)
        return replace(super().shape(config), windows=tuple(windows))

    @classmethod
    def unsupported(cls, config: Any) -> str | None:
        """Heads of another width: transformers' rotary embeddings would have it, its layers not."""
        width = getattr(config, "head_dim", None)
        own = config.hidden_size // config.num_attention_heads
        return super().unsupported(config) if width in (None, own) else f"head_dim {width}, not {own}"

    @classmethod
    def reads(cls, model: Any) -> Reads:
        """Sequence classification pools as its config says."""
        return super().reads(model) if model.config.classifier_pooling == "cls" else "all"

    def attention(self, layer: Any) -> Any:
        return layer.attn

    def scale(self, layer: Any) -> float:
        return float(layer.attn.head_dim**-0.5)

    def terms(self, layer: Any) -> LogitTerms:
        """The window of a local layer."""
        local = layer.attention_type == "sliding_attention"
        return LogitTerms(window=self.config.sliding_window) if local else NO_TERMS

    def embed(self, tokens: PackedTokens) -> Tensor:
        """Without token types."""
        ids = None if tokens.ids is None else tokens.ids[None]
        embeds = None if tokens.embeds is None else tokens.embeds[None]
        embedded: Tensor = self.base.embeddings(input_ids=ids, inputs_embeds=embeds)
        return embedded[0]

    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        """One linear layer for all three."""
        attention = layer.attn
        fused = attention.Wqkv(layer.attn_norm(rows)).view(rows.shape[0], 3, -1, attention.head_dim)
        query, key, value = fused.unbind(1)
        angles = self.base.rotary_emb(rows, positions[None], layer.attention_type)
        return self.rotated(wanted(query, asking), key, value, angles, asking)

    def join(self, layer: Any, context: Tensor, rows: Tensor) -> Tensor:
        joined: Tensor = rows + layer.attn.out_drop(layer.attn.Wo(context))
        return joined

    def feed_forward(self, layer: Any, rows: Tensor) -> Tensor:
        result: Tensor = rows + layer.mlp(layer.mlp_norm(rows))
        return result

    def finish(self, rows: Tensor) -> Tensor:
        finished: Tensor = self.base.final_norm(rows)
        return finished

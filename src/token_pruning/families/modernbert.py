"""ModernBERT."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from token_pruning.families.base import EmbeddingModules, LayerModules, ModelShape, Outputs, Reads, Rotation, wanted
from token_pruning.families.rotary import Rotary
from token_pruning.ragged import NO_TERMS, LogitTerms, PackedTokens


class ModernBert(Rotary):
    """Pre-LN with a gated feed-forward; most layers see a window, with rotary positions of another base."""

    model_types = ("modernbert",)
    output_class = BaseModelOutput
    native = True
    norm_first = True
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

    def angles(self, layer: Any, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the layer's kind."""
        found: tuple[Tensor, Tensor] = self.base.rotary_emb(rows, positions[None], layer.attention_type)
        return found

    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        """One linear layer for all three."""
        attention = layer.attn
        fused = attention.Wqkv(layer.attn_norm(rows)).view(rows.shape[0], 3, -1, attention.head_dim)
        query, key, value = fused.unbind(1)
        return self.rotated(wanted(query, asking), key, value, self.angles(layer, rows, positions), asking)

    def join(self, layer: Any, context: Tensor, rows: Tensor) -> Tensor:
        joined: Tensor = rows + layer.attn.out_drop(layer.attn.Wo(context))
        return joined

    def feed_forward(self, layer: Any, rows: Tensor) -> Tensor:
        result: Tensor = rows + layer.mlp(layer.mlp_norm(rows))
        return result

    @property
    def last_norm(self) -> nn.Module:
        norm: nn.Module = self.base.final_norm
        return norm

    def embedding_modules(self) -> EmbeddingModules:
        embeddings = self.base.embeddings
        return EmbeddingModules(word=embeddings.tok_embeddings, norm=embeddings.norm)

    def layer_modules(self, layer: Any) -> LayerModules:
        attention, mlp = layer.attn, layer.mlp
        width, inner = attention.Wqkv.out_features // 3, mlp.Wi.out_features // 2
        before = layer.attn_norm
        return LayerModules(
            query=Outputs(attention.Wqkv, 0, width),
            key=Outputs(attention.Wqkv, width, 2 * width),
            value=Outputs(attention.Wqkv, 2 * width, 3 * width),
            attention_output=attention.Wo,
            attention_norm=None if type(before) is nn.Identity else before,
            feed_forward_up=Outputs(mlp.Wi, inner, 2 * inner),
            feed_forward_gate=Outputs(mlp.Wi, 0, inner),
            feed_forward_down=mlp.Wo,
            output_norm=layer.mlp_norm,
            activation=mlp.act,
        )

    def rotation(self, layer: Any) -> Rotation:
        rotary, kind = self.base.rotary_emb, layer.attention_type
        return Rotation(getattr(rotary, f"{kind}_inv_freq"), float(getattr(rotary, f"{kind}_attention_scaling")))

    @property
    def activation(self) -> str:
        return str(self.config.hidden_activation)

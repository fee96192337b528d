"""EuroBERT."""

from importlib import import_module
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from token_pruning.families.base import EmbeddingModules, LayerModules, Reads
from token_pruning.families.rotary import Rotary
from token_pruning.ragged import PackedTokens


class EuroBert(Rotary):
    """Pre-LN as in Llama: RMS norms, grouped keys and values, a gated feed-forward, and a norm at the end."""

    model_types = ("eurobert",)
    output_class = BaseModelOutput
    native = True
    norm_first = True
    rms_norm = True

    @classmethod
    def reads(cls, model: Any) -> Reads:
        """Sequence classification pools as the model says."""
        return super().reads(model) if getattr(model, "classifier_pooling", None) == "bos" else "all"

    def attention(self, layer: Any) -> Any:
        return layer.self_attn

    def embed(self, tokens: PackedTokens) -> Tensor:
        """Nothing but the tokens' own embeddings."""
        embedded: Tensor = self.base.embed_tokens(tokens.ids) if tokens.embeds is None else tokens.embeds
        return embedded

    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        """Keys and values are repeated for the queries that share them."""
        query, key, value = super().project(layer, layer.input_layernorm(rows), positions, asking)
        groups = layer.self_attn.num_key_value_groups
        return query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)

    def join(self, layer: Any, context: Tensor, rows: Tensor) -> Tensor:
        joined: Tensor = rows + layer.self_attn.o_proj(context)
        return joined

    def feed_forward(self, layer: Any, rows: Tensor) -> Tensor:
        result: Tensor = rows + layer.mlp(layer.post_attention_layernorm(rows))
        return result

    @property
    def last_norm(self) -> nn.Module:
        norm: nn.Module = self.base.norm
        return norm

    def embedding_modules(self) -> EmbeddingModules:
        return EmbeddingModules(word=self.base.embed_tokens)

    def layer_modules(self, layer: Any) -> LayerModules:
        attention, mlp = layer.self_attn, layer.mlp
        return LayerModules(
            query=attention.q_proj,
            key=attention.k_proj,
            value=attention.v_proj,
            attention_output=attention.o_proj,
            attention_norm=layer.input_layernorm,
            feed_forward_up=mlp.up_proj,
            feed_forward_gate=mlp.gate_proj,
            feed_forward_down=mlp.down_proj,
            output_norm=layer.post_attention_layernorm,
            activation=mlp.act_fn,
        )

    @property
    def norm_class(self) -> type[nn.Module]:
        found: type[nn.Module] = import_module("transformers.models.eurobert.modeling_eurobert").EuroBertRMSNorm
        return found

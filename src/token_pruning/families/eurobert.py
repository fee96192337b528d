"""EuroBERT."""

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from token_pruning.families.base import Reads
from token_pruning.families.rotary import Rotary
from token_pruning.ragged import PackedTokens


class EuroBert(Rotary):
    """Pre-LN as in Llama: RMS norms, grouped keys and values, a gated feed-forward, and a norm at the end."""

    model_types = ("eurobert",)
    output_class = BaseModelOutput

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

    def finish(self, rows: Tensor) -> Tensor:
        finished: Tensor = self.base.norm(rows)
        return finished

"""NomicBERT, and the base of models with the same layers: GTE, Jina embeddings v3."""

from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from token_pruning.families.rotary import Rotary


class NomicBert(Rotary):
    """Post-LN with a gated feed-forward; rotary positions, BERT's embeddings without a position table."""

    model_types: ClassVar[tuple[str, ...]] = ("nomic_bert",)
    output_class = BaseModelOutputWithPooling

    def attention(self, layer: Any) -> Any:
        return layer.self_attn

    def join(self, layer: Any, context: Tensor, rows: Tensor) -> Tensor:
        attended = layer.post_attention_dropout(layer.self_attn.o_proj(context))
        joined: Tensor = layer.post_attention_layernorm(rows + attended)
        return joined

    def feed_forward(self, layer: Any, rows: Tensor) -> Tensor:
        result: Tensor = layer.post_mlp_layernorm(rows + layer.post_mlp_dropout(layer.mlp(rows)))
        return result

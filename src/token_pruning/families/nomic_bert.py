"""NomicBERT, and the base of models with the same layers: GTE, Jina embeddings v3."""

from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from token_pruning.families.base import EmbeddingModules, LayerModules
from token_pruning.families.rotary import Rotary


class NomicBert(Rotary):
    """Post-LN with a gated feed-forward; rotary positions, BERT's embeddings without a position table."""

    model_types: ClassVar[tuple[str, ...]] = ("nomic_bert",)
    output_class = BaseModelOutputWithPooling
    native = True

    def attention(self, layer: Any) -> Any:
        return layer.self_attn

    def join(self, layer: Any, context: Tensor, rows: Tensor) -> Tensor:
        attended = layer.post_attention_dropout(layer.self_attn.o_proj(context))
        joined: Tensor = layer.post_attention_layernorm(rows + attended)
        return joined

    def feed_forward(self, layer: Any, rows: Tensor) -> Tensor:
        result: Tensor = layer.post_mlp_layernorm(rows + layer.post_mlp_dropout(layer.mlp(rows)))
        return result

    def embedding_modules(self) -> EmbeddingModules:
        embeddings = self.base.embeddings
        return EmbeddingModules(
            word=embeddings.word_embeddings, token_type=embeddings.token_type_embeddings, norm=embeddings.LayerNorm
        )

    def layer_modules(self, layer: Any) -> LayerModules:
        attention, mlp = layer.self_attn, layer.mlp
        return LayerModules(
            query=attention.q_proj,
            key=attention.k_proj,
            value=attention.v_proj,
            attention_output=attention.o_proj,
            attention_norm=layer.post_attention_layernorm,
            feed_forward_up=mlp.up_proj,
            feed_forward_gate=mlp.gate_proj,
            feed_forward_down=mlp.down_proj,
            output_norm=layer.post_mlp_layernorm,
            activation=mlp.act_fn,
        )

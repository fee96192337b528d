"""Jina embeddings v3."""

from typing import Any

from token_pruning.families.base import LayerModules
from token_pruning.families.nomic_bert import NomicBert


class JinaEmbeddingsV3(NomicBert):
    """NomicBERT's layers with biases and a plain feed-forward."""

    model_types = ("jina_embeddings_v3",)
    ffn_matrices = 2

    def layer_modules(self, layer: Any) -> LayerModules:
        attention, mlp = layer.self_attn, layer.mlp
        return LayerModules(
            query=attention.q_proj,
            key=attention.k_proj,
            value=attention.v_proj,
            attention_output=attention.o_proj,
            attention_norm=layer.post_attention_layernorm,
            feed_forward_up=mlp.fc1,
            feed_forward_down=mlp.fc2,
            output_norm=layer.post_mlp_layernorm,
            activation=mlp.activation_fn,
        )

"""DistilBERT."""

from operator import attrgetter
from typing import Any

from token_pruning.families.base import EmbeddingModules, Family, LayerModules, ModelShape, column_positions


def _shape(config: Any) -> ModelShape:
    return ModelShape(
        num_layers=config.n_layers,
        hidden_size=config.dim,
        num_heads=config.n_heads,
        intermediate_size=config.hidden_dim,
        ffn_matrices=2,
        max_positions=config.max_position_embeddings,
    )


def _embedding_modules(base: Any) -> EmbeddingModules:
    embeddings = base.embeddings
    return EmbeddingModules(
        word=embeddings.word_embeddings,
        position=embeddings.position_embeddings,
        token_type=None,
        norm=embeddings.LayerNorm,
        projection=None,
    )


def _layer_modules(layer: Any) -> LayerModules:
    return LayerModules(
        query=layer.attention.q_lin,
        key=layer.attention.k_lin,
        value=layer.attention.v_lin,
        attention_output=layer.attention.out_lin,
        attention_norm=layer.sa_layer_norm,
        feed_forward_up=layer.ffn.lin1,
        feed_forward_down=layer.ffn.lin2,
        output_norm=layer.output_layer_norm,
    )


DISTILBERT = Family(
    model_types=("distilbert",),
    encoder=attrgetter("transformer"),
    layers=attrgetter("layer"),
    attention=attrgetter("attention"),
    attention_output=attrgetter("sa_layer_norm"),
    shape=_shape,
    embedding_modules=_embedding_modules,
    layer_modules=_layer_modules,
    activation=attrgetter("activation"),
    positions=column_positions,
)

"""DistilBERT."""

from typing import Any

from token_pruning.models.base import Family, ModelShape


def _shape(config: Any) -> ModelShape:
    return ModelShape(
        num_layers=config.n_layers,
        hidden_size=config.dim,
        num_heads=config.n_heads,
        intermediate_size=config.hidden_dim,
        ffn_matrices=2,
        max_positions=config.max_position_embeddings,
    )


DISTILBERT = Family(
    model_types=("distilbert",),
    encoder=lambda base: base.transformer,
    layers=lambda encoder: encoder.layer,
    attention=lambda layer: layer.attention,
    attention_output=lambda layer: layer.sa_layer_norm,
    shape=_shape,
)

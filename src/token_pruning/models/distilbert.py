"""DistilBERT."""

from operator import attrgetter
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
    encoder=attrgetter("transformer"),
    layers=attrgetter("layer"),
    attention=attrgetter("attention"),
    attention_output=attrgetter("sa_layer_norm"),
    shape=_shape,
)

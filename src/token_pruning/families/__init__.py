"""One file per model family: the only place that knows layers' names. Importing one registers it."""

from token_pruning.families import (  # noqa: F401 - each registers what it knows
    albert,
    bert,
    deberta,
    deberta_v2,
    distilbert,
    ernie,
    eurobert,
    gte,
    jina_embeddings_v3,
    megatron_bert,
    modernbert,
    mpnet,
    nomic_bert,
    roberta,
    vit,
    xlm_roberta_xl,
)
from token_pruning.families.base import (
    EmbeddingModules,
    Family,
    LayerModules,
    ModelShape,
    Outputs,
    Reads,
    Rotation,
    family_of,
    shape_of,
    split_heads,
    supported_model_types,
    wanted,
)

__all__ = [
    "EmbeddingModules",
    "Family",
    "LayerModules",
    "ModelShape",
    "Outputs",
    "Reads",
    "Rotation",
    "family_of",
    "shape_of",
    "split_heads",
    "supported_model_types",
    "wanted",
]

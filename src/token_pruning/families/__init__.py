"""One file per model family: the only place that knows layers' names. Importing one registers it."""

from token_pruning.families import (
    bert,
    distilbert,
    eurobert,
    gte,
    jina_embeddings_v3,
    megatron_bert,
    modernbert,
    nomic_bert,
    roberta,
    xlm_roberta_xl,
)
from token_pruning.families.base import (
    EmbeddingModules,
    Family,
    LayerModules,
    ModelShape,
    Reads,
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
    "Reads",
    "bert",
    "distilbert",
    "eurobert",
    "family_of",
    "gte",
    "jina_embeddings_v3",
    "megatron_bert",
    "modernbert",
    "nomic_bert",
    "roberta",
    "shape_of",
    "split_heads",
    "supported_model_types",
    "wanted",
    "xlm_roberta_xl",
]

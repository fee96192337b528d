"""One file per model family: the only place that knows layers' names. Importing one registers it."""

from token_pruning.families import albert, bert, deberta, deberta_v2, distilbert, ernie, mpnet, roberta, vit
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
    "albert",
    "bert",
    "deberta",
    "deberta_v2",
    "distilbert",
    "ernie",
    "family_of",
    "mpnet",
    "roberta",
    "shape_of",
    "split_heads",
    "supported_model_types",
    "vit",
    "wanted",
]

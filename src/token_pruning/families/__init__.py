"""One file per model family: the only place that knows layers' names. Importing one registers it."""

from token_pruning.families import bert, distilbert, roberta
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
    "family_of",
    "roberta",
    "shape_of",
    "split_heads",
    "supported_model_types",
    "wanted",
]

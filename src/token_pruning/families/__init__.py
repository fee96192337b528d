"""One adapter per model family: the only place that knows layer names."""

from token_pruning.families.base import EmbeddingModules, Family, LayerModules, ModelShape, reads_first_token_only
from token_pruning.families.bert import BERT, ROBERTA
from token_pruning.families.distilbert import DISTILBERT
from token_pruning.families.registry import family_of, shape_of, supported_model_types

__all__ = [
    "BERT",
    "DISTILBERT",
    "ROBERTA",
    "EmbeddingModules",
    "Family",
    "LayerModules",
    "ModelShape",
    "family_of",
    "reads_first_token_only",
    "shape_of",
    "supported_model_types",
]

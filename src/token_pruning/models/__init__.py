"""One adapter per model family: the only place that knows layer names."""

from token_pruning.models.base import Family, ModelShape
from token_pruning.models.bert import BERT, ROBERTA
from token_pruning.models.distilbert import DISTILBERT
from token_pruning.models.registry import family_of, shape_of, supported_model_types

__all__ = ["BERT", "DISTILBERT", "ROBERTA", "Family", "ModelShape", "family_of", "shape_of", "supported_model_types"]
